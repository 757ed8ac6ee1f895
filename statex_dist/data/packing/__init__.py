"""Packing strategies: how spans of documents are laid into packs of a fixed length."""

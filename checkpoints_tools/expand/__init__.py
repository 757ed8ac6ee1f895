"""Expansion of a checkpoint on disk."""

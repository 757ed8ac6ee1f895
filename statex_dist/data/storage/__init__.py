"""Shard files: their formats, where they lie, and how they come to this machine."""

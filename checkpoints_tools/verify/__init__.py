"""Inspection and verification of checkpoints."""

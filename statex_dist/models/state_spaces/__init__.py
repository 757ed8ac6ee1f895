"""Mamba2 models in the original layout of state-spaces/mamba: other names and keys."""

"""Gated linear attention (arXiv 2312.06635), with the parameter names of flash-linear-attention's checkpoints."""

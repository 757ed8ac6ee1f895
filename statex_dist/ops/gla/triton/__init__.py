"""Gated linear attention of expanded layers on a GPU: elementwise work in Triton, the rest in batched products."""

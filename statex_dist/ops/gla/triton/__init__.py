"""Gated linear attention of expanded layers on a GPU: Triton for what is elementwise, batched products for the rest."""

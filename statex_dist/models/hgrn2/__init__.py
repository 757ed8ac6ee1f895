"""HGRN2 (arXiv 2404.07904): gated linear attention with tied forget gates and keys, ``k = 1 - f``."""

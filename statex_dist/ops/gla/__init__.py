"""Gated linear attention: oracle, chunked form and decoding step in PyTorch, our Triton kernels, and the dispatch."""

from statex_dist.ops.gla.dispatch import gla
from statex_dist.ops.gla.torch_forms import gla_decode

__all__ = ["gla", "gla_decode"]

"""The gated delta rule: oracle, chunked form and decoding step in PyTorch, and the dispatch."""

from statex_dist.ops.delta_rule.dispatch import delta_rule
from statex_dist.ops.delta_rule.torch_forms import delta_decode

__all__ = ["delta_decode", "delta_rule"]

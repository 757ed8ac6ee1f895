"""The Mamba2 scan: oracle, chunked form and decoding step in PyTorch, mamba_ssm's kernels, and the dispatch."""

from statex_dist.ops.ssd.dispatch import ssd
from statex_dist.ops.ssd.torch_forms import ssd_decode

__all__ = ["ssd", "ssd_decode"]

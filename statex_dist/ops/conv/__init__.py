"""The causal convolution before a recurrence: PyTorch's form, causal-conv1d's kernel and the dispatch."""

from statex_dist.ops.conv.dispatch import convolve_sequences

__all__ = ["convolve_sequences"]

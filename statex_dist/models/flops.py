"""FLOPs of a model for a token, by its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import family_of

if TYPE_CHECKING:
    from statex_dist.models.hybrid.flops import HostFlops


def forward_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a forward pass for one token; a multiplication and an addition are two.

    ``2`` per element of every matrix and convolution that multiplies the token (embedding tables do not; of experts
    those that a token is sent to), and the chunked scan's of every recurrent layer
    (:attr:`statex_dist.state.geometry.StateGeometry.scan_flops`). Norms, gates, products of features and the softmax
    are left out; attention, whose cost grows with the text, has :func:`training_flops_per_pair`.
    """
    if host := _of_host(config):
        matrices = host.per_token
    else:
        specs = family_of(config.MODEL_TYPE).tensors(config)
        matrices = 2 * sum(s.numel for s in specs.values() if s.trunk and len(s.shape) >= 2 and s.role != "gain")
    return matrices + sum(config.layer_geometry(layer).scan_flops for layer in config.recurrent_layers)


def training_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of forward and backward for one token: three times the forward's.

    A backward pass computes two products for each of the forward's. What activation checkpointing computes again does
    not count: a model FLOPs utilisation (arXiv 2204.02311, appendix B) measures what the model needs.
    """
    return 3 * forward_flops_per_token(config)


def training_flops_per_pair(config: ModelConfig) -> int:
    """Return the FLOPs of forward and backward of all softmax attention, for a token and one that it reads."""
    host = _of_host(config)
    return 3 * host.per_pair if host else 0


def _of_host(config: ModelConfig) -> HostFlops | None:
    """Return the FLOPs of a model whose other layers are transformers'; None where the family lists every tensor."""
    if getattr(config, "HOST", None) is None:
        return None
    from statex_dist.models.hybrid.flops import host_flops  # transformers' models, where one is needed

    return host_flops(config)

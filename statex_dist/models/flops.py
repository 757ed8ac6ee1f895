"""Floating-point operations of a model, from its configuration alone."""

from __future__ import annotations

from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import family_of


def forward_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a forward pass for one token; a multiplication and an addition are two.

    ``2`` per element of every matrix and convolution that multiplies the token (embedding tables do not), and the
    chunked scan's of every recurrent layer (:attr:`statex_dist.state.geometry.StateGeometry.scan_flops`). Norms, gates
    and the softmax are left out. Of a mixed model only what the family knows is counted.
    """
    specs = family_of(config.MODEL_TYPE).tensors(config)
    matrices = sum(spec.numel for spec in specs.values() if spec.trunk and len(spec.shape) >= 2)
    return 2 * matrices + sum(config.layer_geometry(layer).scan_flops for layer in config.recurrent_layers)


def training_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of forward and backward for one token: three times the forward's.

    A backward pass computes two products for each of the forward's. What activation checkpointing computes again does
    not count: a model FLOPs utilisation (arXiv 2204.02311, appendix B) measures what the model needs.
    """
    return 3 * forward_flops_per_token(config)

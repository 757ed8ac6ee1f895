"""Products of keys and queries as further key channels: a lossless growth of the state (docs/method.md, section 7).

    k' = [k ; phi(k)],   q' = [q ; gain phi(q)],   a' = [a ; a ... a]                           linear attention, Mamba2
    k' = [k ; gain phi(k)] / sqrt(1 + |gain phi(k)|^2),   q' = [q ; phi(q)]                     delta rules

with :class:`statex_dist.state.geometry.FeatureMap` as ``phi``. At a gain of zero the outputs are those without
features: the old channels and their decays are not touched. Products are computed in fp32 (float64 for float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from statex_dist.ops.mitigations import Tensors
from statex_dist.state.geometry import FeatureMap

SMALLEST_NORM = 1e-6
"""Added to the norm of products that are scaled to that of their channels."""


class Features(NamedTuple):
    """The features of one layer.

    Attributes:
        map: The products.
        gain: ``[G, n K]`` gain of each product, for each group of heads that share keys.
    """

    map: FeatureMap
    gain: torch.Tensor


def products(x: torch.Tensor, features: FeatureMap) -> torch.Tensor:
    """Return ``phi(x) [..., n K]`` of ``x [..., K]``, in fp32 (float64 for float64).

    Block ``i`` of ``K`` channels holds ``x_c x_(c - r_i)``, ``r_i`` the ``i``-th roll.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    base = torch.relu(x) if features.relu else x
    blocks = torch.cat([base * base.roll(roll, -1) for roll in features.rolls], dim=-1)
    if features.match_norm:
        norms = [torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (x, blocks)]
        blocks = blocks * (norms[0] / (norms[1] + SMALLEST_NORM))
    return blocks


def with_products(x: torch.Tensor, features: Features, *, gain: bool) -> torch.Tensor:
    """Return ``[x ; phi(x)]`` of ``x [..., G, K]``, times the gains where ``gain``, in ``x``'s dtype."""
    added = products(x, features.map)
    if gain:
        added = added * features.gain.to(added.dtype)
    return torch.cat([x, added.to(x.dtype)], dim=-1)


def normalised_with_products(x: torch.Tensor, features: Features) -> torch.Tensor:
    """Return ``[x ; gain phi(x)] / sqrt(1 + |gain phi(x)|^2)``, of norm 1 where ``x [..., G, K]`` has norm 1."""
    added = products(x, features.map)
    added = added * features.gain.to(added.dtype)
    factor = torch.rsqrt(1 + added.square().sum(-1, keepdim=True))
    return torch.cat([x.to(added.dtype), added], dim=-1).mul(factor).to(x.dtype)


def repeated_decays(g: torch.Tensor, key_dim: int, features: Features) -> torch.Tensor:
    """Return log decays ``[..., (1 + n) K]`` of ``g [..., K]``: each product has the decay of its first factor.

    One decay for all channels of a head, ``[..., 1]``, stays as it is.
    """
    return g if g.shape[-1] < key_dim else torch.cat([g] * features.map.factor, dim=-1)


def widened_gla(inputs: Tensors, features: Features) -> Tensors:
    """Return ``q, k, v, g`` of linear attention with the products as further key channels."""
    q, k, v, g = inputs
    keys = q.shape[-1]
    q, k = (with_products(x, features, gain=gain) for x, gain in ((q, True), (k, False)))
    return q, k, v, repeated_decays(g, keys, features)


def widened_delta(inputs: Tensors, features: Features) -> Tensors:
    """Return ``q, k, v, g, beta`` of a delta rule with the products as further key channels."""
    q, k, v, g, beta = inputs
    keys = q.shape[-1]
    q, k = with_products(q, features, gain=False), normalised_with_products(k, features)
    return q, k, v, repeated_decays(g, keys, features), beta


def widened_ssd(inputs: Tensors, features: Features) -> Tensors:
    """Return ``x, dt, A, B, C`` of Mamba2 with the products as further state rows."""
    x, dt, A, B, C = inputs
    return x, dt, A, with_products(B, features, gain=False), with_products(C, features, gain=True)

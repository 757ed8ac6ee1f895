"""Products of keys and queries as further key channels: a lossless growth of the state (docs/method.md, section 7).

    k' = [k ; phi(k)],   q' = [q ; gain phi(q)],   a' = [a ; a ... a]                           linear attention, Mamba2
    k' = [k ; gain phi(k)] / sqrt(1 + |gain phi(k)|^2),   q' = [q ; phi(q)]                     delta rules

with :class:`statex_dist.state.geometry.FeatureMap` as ``phi``. At a gain of zero the outputs are those without
features: the old channels and their decays are not touched. Products are computed in fp32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from statex_dist.ops.cu_seqlens import at_least_fp32
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

    def of_chunks(self) -> Features:
        """Return the features of tensors ``[..., G, tokens, K]``, in place of ``[..., G, K]``."""
        return Features(self.map, self.gain.unsqueeze(-2))

    def repeated(self, times: int) -> Features:
        """Return the features of keys that ``times`` heads of a group each have a copy of."""
        return Features(self.map, self.gain.repeat_interleave(times, dim=0))


def state_blocks(key_dim: int, features: Features | None) -> tuple[int, ...]:
    """Return the sizes of the blocks of a state's rows: ``key_dim`` projected channels, and their products if any."""
    return (key_dim,) if features is None else (key_dim, key_dim * (features.map.factor - 1))


def block_sizes(rows: int, projected: int | None) -> list[int]:
    """Return the sizes of the blocks of a state with ``rows`` rows, of which ``projected`` are of no products."""
    return [rows] if projected is None else [projected, rows - projected]


def join_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of parts, in their order: that of the projected channels, then those of their products.

    A product over all channels at once may sum in another order, and a gain of zero would not give the exact numbers of
    the layer without features.
    """
    total, *others = parts
    for part in others:
        total = total + part
    return total


def decayed(x: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
    """Return ``x [..., n K]`` times decays ``[..., K]`` of each block of ``K`` channels, or ``[..., 1]`` of all."""
    if decays.shape[-1] in (1, x.shape[-1]):
        return x * decays
    return (x.unflatten(-1, (-1, decays.shape[-1])) * decays.unsqueeze(-2)).flatten(-2)


def decay_rows(decays: torch.Tensor, rows: int) -> torch.Tensor:
    """Return ``[..., rows, 1]`` decays of a state's rows from those of ``K`` channels, ``[..., K, 1]``."""
    keys = decays.shape[-2]
    return decays if keys in (1, rows) else torch.cat([decays] * (rows // keys), dim=-2)


def products(x: torch.Tensor, features: FeatureMap) -> torch.Tensor:
    """Return ``phi(x) [..., n K]`` of ``x [..., K]``, in fp32 (float64 for float64).

    Block ``i`` of ``K`` channels holds ``x_c x_(c - r_i)``, ``r_i`` the ``i``-th roll.
    """
    x = at_least_fp32(x)
    base = torch.relu(x) if features.relu else x
    blocks = torch.cat([base * base.roll(roll, -1) for roll in features.rolls], dim=-1)
    if features.match_norm:
        norms = [torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (x, blocks)]
        blocks = blocks * (norms[0] / (norms[1] + SMALLEST_NORM))
    return blocks


def with_products(x: torch.Tensor, features: Features, *, gain: bool) -> torch.Tensor:
    """Return ``[x ; phi(x)]`` of ``x [..., G, K]``, the products times the gains where ``gain``, in ``x``'s dtype."""
    added = products(x, features.map)
    return _beside(x, added * features.gain.to(added.dtype) if gain else added)


def linear_products(q: torch.Tensor, k: torch.Tensor, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``gain phi(q)`` and ``phi(k)`` of ``q, k [..., G, K]``: further channels of linear attention, in fp32."""
    added = products(q, features.map)
    return added * features.gain.to(added.dtype), products(k, features.map)


def delta_products(
    q: torch.Tensor, k: torch.Tensor, features: Features
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``phi(q)``, and for the keys the results of :func:`delta_keys`."""
    return products(q, features.map), *delta_keys(k, features)


def delta_keys(k: torch.Tensor, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Return further key channels of a delta rule, and the factor ``[..., G, 1]`` of the old ones, in fp32.

    With ``f = 1 / sqrt(1 + |gain phi(k)|^2)`` they are ``f gain phi(k)``, and ``f`` is the factor, 1 to the last bit at
    a gain of zero. The norm of a key of norm 1 stays 1.
    """
    added = products(k, features.map)
    added = added * features.gain.to(added.dtype)
    factor = torch.rsqrt(1 + added.square().sum(-1, keepdim=True))
    return added * factor, factor


def repeated_decays(g: torch.Tensor, key_dim: int, features: Features) -> torch.Tensor:
    """Return log decays ``[..., (1 + n) K]`` of ``g [..., K]``: each product has the decay of its first factor.

    One decay for all channels of a head, ``[..., 1]``, stays as it is.
    """
    return g if g.shape[-1] < key_dim else torch.cat([g] * features.map.factor, dim=-1)


def widened_gla(inputs: Tensors, features: Features) -> Tensors:
    """Return ``q, k, v, g`` of linear attention with the products as further key channels, in the inputs' dtypes."""
    q, k, v, g = inputs
    decays = repeated_decays(g, q.shape[-1], features)
    return with_products(q, features, gain=True), with_products(k, features, gain=False), v, decays


def widened_delta(inputs: Tensors, features: Features) -> Tensors:
    """Return ``q, k, v, g, beta`` of a delta rule with the products as further key channels, in the inputs' dtypes."""
    q, k, v, g, beta = inputs
    added_q, added_k, factor = delta_products(q, k, features)
    k = _beside((k.to(factor.dtype) * factor).to(k.dtype), added_k)
    return _beside(q, added_q), k, v, repeated_decays(g, q.shape[-1], features), beta


def widened_ssd(inputs: Tensors, features: Features) -> Tensors:
    """Return ``x, dt, A, B, C`` of Mamba2 with the products as further state rows, in the inputs' dtypes."""
    x, dt, A, B, C = inputs
    return x, dt, A, with_products(B, features, gain=False), with_products(C, features, gain=True)


def _beside(x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, added.to(x.dtype)], dim=-1)

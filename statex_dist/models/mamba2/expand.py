"""Expansion of a Mamba2 layer: growing ``d_state``. Pure functions from tensors to tensors.

B and C of every group get new rows behind their old ones, in ``in_proj`` and in the convolution's channels. The
dynamics (``dt_bias``, ``A_log``, ``D``) and the norms are kept in every mode: the StateX authors' script resets them,
after which almost every head forgets within one token.

``lossless`` makes the new C rows zero and the new B rows random: the new state columns are written but not yet read, so
the function is unchanged, C receives gradient at once and B from the second step on. (Both zero, the authors'
``merge_zero``, is a saddle with zero gradient for ever.)
"""

from __future__ import annotations

import torch

from statex_dist.models.layout import TensorSpec
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.mamba2.init import initial_value
from statex_dist.models.mamba2.layout import layer_tensors
from statex_dist.models.random_init import generator_for
from statex_dist.state.plan import LayerExpansion

OPS = ("grow_state",)
DEFAULT_OP = "grow_state"
TOKEN_MIXING = tuple(
    f"mixer.{part}.{kind}" for part in ("in_proj", "conv1d", "out_proj") for kind in ("weight", "bias")
)


def expand_tensor(
    suffix: str, tensor: torch.Tensor, *, config: Mamba2Config, expansion: LayerExpansion, name: str
) -> torch.Tensor:
    """Return one tensor of an expanded layer.

    Args:
        suffix: Name without the layer's prefix, for example ``mixer.in_proj.weight``.
        tensor: The original values.
        config: Configuration of the *original* model.
        expansion: What is done to the layer.
        name: Full name, which with the expansion's seed fixes the random values.

    Returns:
        The new values, in ``tensor``'s dtype; ``tensor`` itself where nothing changes.
    """
    spec = layer_tensors(config, expansion.layer)[suffix]
    rng = generator_for(expansion.seed, name)
    if expansion.init == "reinit" and suffix in TOKEN_MIXING:
        shape = list(tensor.shape)
        shape[0] += sum(_new_rows(spec, expansion))
        return initial_value(suffix, shape, config=config, dtype=tensor.dtype, rng=rng)
    if not spec.parts:
        return tensor
    pieces = []
    for (part, rows), added, old in zip(
        spec.parts, _new_rows(spec, expansion), tensor.split([rows for _, rows in spec.parts]), strict=True
    ):
        assert old.shape[0] == rows
        pieces.append(_grow(suffix, part, old, added, config, expansion, rng) if added else old)
    return torch.cat(pieces)


def new_tensors(
    *, config: Mamba2Config, expansion: LayerExpansion, prefix: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return tensors that the expanded layer has and the original had not: none, for Mamba2."""
    return {}


def _new_rows(spec: TensorSpec, expansion: LayerExpansion) -> list[int]:
    """Return how many rows each part gains."""
    return [rows * (expansion.factor - 1) if part in ("B", "C") else 0 for part, rows in spec.parts]


def _grow(
    suffix: str,
    part: str,
    old: torch.Tensor,
    added: int,
    config: Mamba2Config,
    expansion: LayerExpansion,
    rng: torch.Generator,
) -> torch.Tensor:
    """Return a B or C part with new rows after the old ones of each group."""
    fresh = initial_value(suffix, [added, *old.shape[1:]], config=config, dtype=old.dtype, rng=rng)
    # For C a zero projection suffices: the convolution of zeros is zero, because new biases start at zero.
    if expansion.init == "lossless" and part == "C" and suffix == "mixer.in_proj.weight":
        fresh = torch.zeros_like(fresh)
    grouped = old.unflatten(0, (config.n_groups, -1))
    return torch.cat([grouped, fresh.unflatten(0, (config.n_groups, -1))], dim=1).flatten(0, 1)

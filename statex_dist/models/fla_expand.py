"""Expansions that flash-linear-attention's families share, as recipes (:mod:`statex_dist.models.recipe`).

*merge_heads* is StateX's (arXiv 2509.22630): groups of heads are read as one head. No projection changes its shape,
because a head is only a way to read rows. *mix_heads* is ours (docs/method.md, section 4): every key head also stores
other heads' values, and a matrix M, which starts as the identity, learns to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from statex_dist.models.distributions import Constant, Distribution, FirstColumn
from statex_dist.models.fla import MIX_NAME
from statex_dist.models.layout import TensorSpec
from statex_dist.models.recipe import Recipe, added, redrawn
from statex_dist.state.plan import LayerExpansion


def mix_recipe(expansion: LayerExpansion, num_heads: int) -> dict[str, Recipe]:
    """Return the recipe of the mixing matrix ``M [num_heads, factor]`` (nothing for other operations).

    Column 0 reads a head's own values, column ``s`` those of the head ``s`` places on (cyclically). ``lossless`` starts
    at the identity, other modes at ``1/sqrt(factor)``, StateX's merge expressed in M.
    """
    if expansion.op != "mix_heads":
        return {}
    factor = expansion.factor
    start: Distribution = FirstColumn(factor) if expansion.init == "lossless" else Constant(factor**-0.5)
    return {MIX_NAME: added((num_heads, factor), start)}


def renewed_norms(
    expansion: LayerExpansion,
    before: Mapping[str, TensorSpec],
    after: Mapping[str, TensorSpec],
    *,
    norm: str,
    output_norm: str,
) -> dict[str, Recipe]:
    """Return recipes that set a layer's norms to 1 where the plan resets the dynamics (nothing otherwise).

    The authors' script renews the norm before the token mixing always, the output norm with the layer (``reinit``).

    Args:
        expansion: What is done to the layer.
        before: The original layer's tensors.
        after: The expanded layer's tensors.
        norm: Name of the norm before the token mixing.
        output_norm: Name of the norm behind it.
    """
    if not expansion.reset_dynamics:
        return {}
    names = [norm, output_norm] if expansion.init == "reinit" else [norm]
    return redrawn_tensors(before, after, names, lambda name, shape: Constant(1.0))


def redrawn_tensors(
    before: Mapping[str, TensorSpec],
    after: Mapping[str, TensorSpec],
    names: Collection[str],
    first_value: Callable[[str, tuple[int, ...]], Distribution],
) -> dict[str, Recipe]:
    """Return recipes that draw the named tensors anew, at the expanded layer's shapes.

    Args:
        before: The original layer's tensors.
        after: The expanded layer's tensors.
        names: Tensors to draw, by name without the layer's prefix.
        first_value: Returns a tensor's distribution in a fresh model.
    """
    return {
        name: redrawn(after[name].shape, first_value(name, after[name].shape), source_rows=before[name].shape[0])
        for name in names
    }

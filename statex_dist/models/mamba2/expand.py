"""Expansion of a Mamba2 layer, as recipes: growing ``d_state``.

B and C of every group get new rows behind their old ones, in ``in_proj`` and in the convolution's channels; ``z``,
``x``, ``dt`` and the output projection are kept. What becomes of B and C:

* ``reinit``: all their rows are drawn anew (what the StateX authors' ``mamba4`` does);
* ``inherit``: the old rows are kept, the new ones drawn;
* ``lossless``: the same, but the new C rows of ``in_proj`` are zero: the new state columns are written but not yet
  read, so the function is unchanged; C receives gradient at once and B from the second step on. (Both zero, the
  authors' ``merge_zero``, is a saddle with zero gradient for ever.)
* ``copy``: the new rows are copies of the old ones (the authors' ``merge_copy``: C.B grows by the factor).

The dynamics (``dt_bias``, ``A_log``) and the gated norm are kept in every mode unless the plan resets them, as the
authors' script does, after which almost every head forgets within one token.
"""

from __future__ import annotations

from functools import partial

from statex_dist.models.distributions import Constant
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.mamba2.init import first_value
from statex_dist.models.mamba2.layout import layer_tensors
from statex_dist.models.recipe import Block, Fresh, Keep, Recipe, from_blocks, grown_groups, redrawn
from statex_dist.state.plan import LayerExpansion

DYNAMICS = ("mixer.dt_bias", "mixer.A_log", "mixer.norm.weight")


def layer_recipes(config: Mamba2Config, after: Mamba2Config, expansion: LayerExpansion) -> dict[str, Recipe]:
    """Return a recipe for each tensor of an expanded layer that changes, by name without the prefix.

    Args:
        config: Configuration of the original model.
        after: Configuration of the expanded model.
        expansion: What is done to the layer.
    """
    first = partial(first_value, config=config, layer_default=expansion.reset_dynamics)
    recipes = {}
    for name, spec in layer_tensors(config, expansion.layer).items():
        if expansion.reset_dynamics and name in DYNAMICS:
            recipes[name] = redrawn(spec.shape, first(name, spec.shape), source_rows=spec.shape[0])
        if not spec.parts:
            continue
        blocks: list[Block] = []
        start = 0
        for part, rows in spec.parts:
            new = first(name, spec.shape)
            # A zero projection suffices: the convolution of zeros is zero, because new biases start at zero.
            if expansion.init == "lossless" and part == "C" and name == "mixer.in_proj.weight":
                new = Constant(0.0)
            if part not in ("B", "C"):
                blocks.append(Keep(start, start + rows))
            elif expansion.init == "reinit":
                blocks.append(Fresh(rows * expansion.factor, new))
            else:
                blocks += grown_groups(
                    start,
                    groups=config.n_groups,
                    rows=rows // config.n_groups,
                    factor=expansion.factor,
                    new=None if expansion.init == "copy" else new,
                )
            start += rows
        recipes[name] = from_blocks(spec.shape, blocks)
    return recipes

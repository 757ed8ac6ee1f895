"""What an expansion does to every tensor of a model, and how one tensor's new rows are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from statex_dist.models.config import ModelConfig
from statex_dist.models.distributions import generator_for
from statex_dist.models.recipe import Fresh, Keep, Recipe
from statex_dist.models.registry import family_of, new_expansions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Surgery:
    """What becomes of one tensor.

    Attributes:
        name: Full name.
        layer: The expanded layer.
        recipe: Its rows.
        seed: Seed of its new rows.
    """

    name: str
    layer: int
    recipe: Recipe
    seed: int

    def draw(self, block: int, *, size: int) -> Iterator[np.ndarray]:
        """Yield the values of a block of new rows, flattened, in fp32 pieces of at most ``size`` elements.

        The values do not depend on ``size``: the generator belongs to the block.
        """
        fresh = self.recipe.blocks[block]
        assert isinstance(fresh, Fresh)
        rng = generator_for(self.seed, f"{self.name}#{block}")
        total = fresh.rows * self.recipe.row_numel
        for start in range(0, total, size):
            yield fresh.distribution.draw(rng, start, min(size, total - start))


def surgeries(before: ModelConfig, after: ModelConfig) -> dict[str, Surgery]:
    """Return what becomes of each tensor that an expansion changes or makes, by full name; the others are kept.

    Args:
        before: Config of the original model.
        after: The same with a plan (:func:`statex_dist.models.registry.make_plan`).
    """
    family = family_of(before.MODEL_TYPE)
    result = {}
    for expansion in new_expansions(before, after).layers:
        prefix = family.names.layer(expansion.layer)
        for suffix, recipe in family.layer_recipes(before, after, expansion).items():
            name = prefix + suffix
            result[name] = Surgery(name=name, layer=expansion.layer, recipe=recipe, seed=expansion.seed)
    return result


def expand_state_dict(
    tensors: dict[str, torch.Tensor], before: ModelConfig, after: ModelConfig
) -> dict[str, torch.Tensor]:
    """Expand a model in memory, by the same recipes as the offline tool.

    Args:
        tensors: The original model's tensors by full name.
        before: The original model's config.
        after: The expanded model's config.

    Returns:
        The tensors of the expanded model; those that are kept are the same objects.
    """
    import torch

    changed = surgeries(before, after)
    dtype = tensors[family_of(before.MODEL_TYPE).names.embeddings].dtype
    result = dict(tensors)
    for name, surgery in changed.items():
        recipe, old = surgery.recipe, tensors.get(name)
        pieces = []
        for index, block in enumerate(recipe.blocks):
            if isinstance(block, Keep):
                assert old is not None
                pieces.append(old[block.start : block.stop])
            else:
                size = block.rows * recipe.row_numel
                values = torch.from_numpy(np.concatenate([*surgery.draw(index, size=max(size, 1))]))
                shape = (block.rows, *recipe.shape[1:])
                pieces.append(values.to(dtype if old is None else old.dtype).view(shape))
        result[name] = torch.cat(pieces)
    return result

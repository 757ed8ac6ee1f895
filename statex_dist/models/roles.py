"""What part each parameter of a model plays in its expansion, so that an optimizer can treat them apart."""

from __future__ import annotations

from typing import Literal

from statex_dist.models.config import ModelConfig
from statex_dist.models.fla import MIX_NAME
from statex_dist.models.registry import family_of
from statex_dist.models.surgery import surgeries

Role = Literal["base", "expanded", "new", "mix"]


def parameter_roles(config: ModelConfig) -> dict[str, Role]:
    """Return the role of every parameter, by full name.

    ``mix``: a mixing matrix M. ``new``: another tensor that an expansion added, grew or drew anew. ``expanded``: the
    other tensors of expanded layers. ``base``: all the rest, and everything in a model without a plan.

    Args:
        config: The model's configuration with its plan.
    """
    family = family_of(config.MODEL_TYPE)
    plan = config.statex
    layers = {expansion.layer for expansion in plan.layers} if plan else set()
    before = config.replace(statex=None)
    recipes = {name: surgery.recipe for name, surgery in surgeries(before, config).items()} if plan else {}
    mix = MIX_NAME.rpartition(".")[2]

    def role(name: str) -> Role:
        place = family.names.split(name)
        if place is None or place[0] not in layers:
            return "base"
        if name not in recipes or recipes[name].change == "kept":
            return "expanded"
        return "mix" if name.rpartition(".")[2] == mix else "new"

    return {name: role(name) for name in family.tensors(config)}

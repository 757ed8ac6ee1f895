"""The configuration: the keys of config.json, and the expansion plan in it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.state.geometry import FeatureMap
from statex_dist.state.plan import ExpansionPlan, LayerExpansion


def feature_map(entry: dict[str, Any]) -> FeatureMap | None:
    """Return the features of a layer's expansion, from its entry in the plan."""
    return FeatureMap(**entry["features"]) if entry["op"] == "grow_features" else None


def expansion_plan(entry: dict[str, Any] | None) -> ExpansionPlan:
    """Return the expansion plan of the entry ``statex`` of ``config.json``: operation and factor of each layer."""
    entries = sorted((entry or {}).get("layers", ()), key=lambda entry: entry["layer"])
    return ExpansionPlan(layers=tuple(LayerExpansion(**{**entry, "features": feature_map(entry)}) for entry in entries))


class PlannedConfig(PretrainedConfig):
    """A configuration with an expansion plan under ``statex``.

    Every key of ``config.json`` is an attribute under its own name.
    """

    def __init__(self, tie_word_embeddings: bool = False, statex: dict[str, Any] | None = None, **kwargs: Any):
        self.statex = statex
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    @property
    def plan(self) -> ExpansionPlan:
        """The expansion plan: operation and factor of each expanded layer."""
        return expansion_plan(self.statex)

    def expansion(self, layer: int) -> tuple[str | None, int]:
        """Return what was done to a layer, and the factor by which its state grew (None and 1 for nothing)."""
        found = self.plan.get(layer)
        return (None, 1) if found is None else (found.op, found.factor)

    def before_plan(self) -> dict[str, Any]:
        """Return the keys as they were before a plan that some of them express, and the plan."""
        return {**vars(self), **(self.statex or {}).get("base", {}), "statex": self.plan}


class StateXConfig(PlannedConfig):
    """The model's configuration."""

    model_type = "hgrn2"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without

    def sizes(self) -> HGRN2Config:
        """Return what computes the layers' sizes; the file's values were checked when it was written."""
        found = HGRN2Config.__new__(HGRN2Config)
        vars(found).update(self.before_plan())
        return found

"""The expansion plan: which layers grow, by which operation and factor, and from which initial values.

A plan is stored under the key ``statex`` of a checkpoint's ``config.json``, so that the checkpoint itself records the
expansion of each layer. The StateX authors' code changes the shared configuration instead, and so records one head for
*every* layer. Here the geometry of each layer is derived from the base configuration and the plan.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from statex_dist.errors import ConfigError, reason, shown
from statex_dist.state.geometry import FeatureMap, StateGeometry

Op = Literal["merge_heads", "mix_heads", "grow_state", "grow_features"]
Init = Literal["reinit", "inherit", "lossless", "copy"]

PLAN_VERSION = 1

MAX_LAYERS = 10_000
"""Largest number of layers of a model, and so of a plan."""

MAX_FACTOR = 4096

DEFAULT_GROWTH = 4
"""Factor of the operations that grow the key side of a state, where none is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExpansion:
    """The expansion of one layer.

    Attributes:
        layer: Index of the layer, from 0.
        op: ``merge_heads`` (StateX for GLA: groups of ``factor`` heads become one), ``mix_heads`` (each key head also
            stores the values of ``factor - 1`` other heads, read through a learned matrix M), ``grow_state`` (the key
            side of the state times ``factor``: Mamba2's ``d_state``, the key channels of a GLA head) or
            ``grow_features`` (the same by products of the existing key channels).
        factor: How many times larger the layer's state becomes, 2 or more.
        init: ``reinit`` (the paper's choice: fresh token-mixing parameters), ``inherit`` (old values kept),
            ``lossless`` (the model computes what it computed before) or ``copy`` (the new rows are copies of the old
            ones; the authors' ``merge_copy``, for replication).
        seed: Seed of the layer's random values; a tensor's generator is derived from it and the tensor's name, so that
            they do not depend on the order in which shards are read.
        reset_dynamics: Whether decays, time steps and norms are initialised again, as in the authors' scripts (for
            replication).
        features: The products of ``grow_features``; a mapping of the fields of :class:`FeatureMap` is read too.
    """

    layer: int
    op: Op
    factor: int
    init: Init
    seed: int = 0
    reset_dynamics: bool = False
    features: FeatureMap | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reset_dynamics, bool):
            raise ConfigError(f"plan: reset_dynamics must be true or false, not {shown(self.reset_dynamics)}")
        for name, kind in (("layer", int), ("factor", int), ("seed", int)):
            if not isinstance(getattr(self, name), kind) or isinstance(getattr(self, name), bool):
                raise ConfigError(f"plan: {name} must be a whole number, not {shown(getattr(self, name))}")
        if self.op not in get_args(Op):
            raise ConfigError(f"plan, layer {self.layer}: op {shown(self.op)} is not one of {', '.join(get_args(Op))}")
        if self.init not in get_args(Init):
            raise ConfigError(
                f"plan, layer {self.layer}: init {shown(self.init)} is not one of {', '.join(get_args(Init))}"
            )
        if self.factor < 2:
            raise ConfigError(f"plan, layer {self.layer}: factor must be 2 or more, not {self.factor}")
        if self.factor > MAX_FACTOR:
            raise ConfigError(
                f"plan, layer {self.layer}: factor must be at most {MAX_FACTOR}, not {shown(self.factor)}"
            )
        self._check_features()
        if self.op == "merge_heads" and self.init == "lossless":
            raise ConfigError(
                f"plan, layer {self.layer}: merging heads cannot be lossless; use op mix_heads, or init inherit"
            )
        if self.init == "copy" and self.op != "grow_state":
            raise ConfigError(f"plan, layer {self.layer}: init copy is for op grow_state, not {self.op}")
        if self.init == "lossless" and self.reset_dynamics:
            raise ConfigError(
                f"plan, layer {self.layer}: reset_dynamics changes the function, so the start cannot be lossless"
            )

    def _check_features(self) -> None:
        """Raise unless ``grow_features``, and no other operation, names its products."""
        where = f"plan, layer {self.layer}"
        if isinstance(self.features, dict):
            try:
                object.__setattr__(self, "features", FeatureMap(**self.features))
            except TypeError as error:
                names = ", ".join(field.name for field in fields(FeatureMap))
                raise ConfigError(f"{where}: bad entry 'features': {reason(error)}; it holds {names}") from None
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        if self.op != "grow_features":
            if self.features is not None:
                raise ConfigError(f"{where}: features are for op grow_features, not {self.op}")
            return
        if not isinstance(self.features, FeatureMap):
            raise ConfigError(
                f"{where}: op grow_features needs features such as {{'rolls': [1, 2, 3]}}, not {shown(self.features)}"
            )
        if self.features.factor != self.factor:
            raise ConfigError(
                f"{where}: features.rolls {shown(list(self.features.rolls))} make the factor {self.features.factor}, "
                f"not {self.factor}; give {self.factor - 1} rolls, or the factor {self.features.factor}"
            )
        if self.init != "lossless":
            raise ConfigError(f"{where}: op grow_features starts lossless; init {self.init} is for other operations")

    @property
    def summary(self) -> str:
        """The expansion in the short form of tables and messages: ``merge_heads x4 inherit``."""
        line = f"{self.op} x{self.factor} {self.init}"
        return line if self.features is None else f"{line} ({self.features.summary})"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of ``config.json``; fields that other expansions need are left out."""
        values = asdict(self)
        del values["features"]
        if not self.reset_dynamics:
            del values["reset_dynamics"]
        return values if self.features is None else {**values, "features": self.features.to_dict()}

    def with_features(self, geometry: StateGeometry) -> StateGeometry:
        """Return the state of a layer with the key channels that this expansion's features add, if it has any."""
        if self.features is None:
            return geometry
        return replace(geometry, key_dim=geometry.key_dim * self.factor, features=self.features)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpansionPlan:
    """All expansions of a model, at most one per layer, sorted by layer.

    Attributes:
        layers: The expansions.
    """

    layers: tuple[LayerExpansion, ...] = ()

    def __post_init__(self) -> None:
        indices = [expansion.layer for expansion in self.layers]
        if len(set(indices)) != len(indices):
            doubled = sorted(layer for layer, times in Counter(indices).items() if times > 1)
            raise ConfigError(f"plan: layers {shown(doubled)} are expanded more than once")
        object.__setattr__(self, "layers", tuple(sorted(self.layers, key=lambda expansion: expansion.layer)))

    def get(self, layer: int) -> LayerExpansion | None:
        """Return the expansion of ``layer``, or None where it stays as it is."""
        index = bisect_left(self.layers, layer, key=lambda expansion: expansion.layer)
        found = self.layers[index] if index < len(self.layers) else None
        return found if found is not None and found.layer == layer else None

    def to_dict(self) -> dict[str, Any]:
        """Return the form stored under ``statex`` in ``config.json``."""
        return {"version": PLAN_VERSION, "layers": [expansion.to_dict() for expansion in self.layers]}

    @classmethod
    def from_dict(cls, values: Any) -> ExpansionPlan:
        """Read a plan from a ``config.json``.

        Raises:
            ConfigError: Not a plan, or one of a newer version.
        """
        if not isinstance(values, dict) or not isinstance(values.get("layers"), list):
            raise ConfigError(f"config.json: 'statex' must hold a plan with a list 'layers', not {shown(values)}")
        if values.get("version") != PLAN_VERSION:
            raise ConfigError(
                f"config.json: plan version {shown(values.get('version'))}; this release reads {PLAN_VERSION}"
            )
        if len(values["layers"]) > MAX_LAYERS:
            raise ConfigError(
                f"config.json: statex.layers has {len(values['layers'])} entries; at most {MAX_LAYERS} are read"
            )
        try:
            layers = tuple(LayerExpansion(**row) for row in values["layers"])
        except TypeError as error:
            raise ConfigError(f"config.json: bad entry in statex.layers: {reason(error)}") from None
        return cls(layers=layers)


def select_layers(rule: str, num_layers: int, recurrent: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the layers that a rule names.

    Args:
        rule: ``all``, ``every:K`` (the first and every K-th after it, as in the paper), ``first:K``, ``last:K`` or a
            list ``0,6,12``. All but a list count recurrent layers only.
        num_layers: Layers of the model.
        recurrent: The layers that have a recurrent state; None for all of them.

    Raises:
        ConfigError: The rule is not one of these, or a layer is out of range or has no recurrent state.
    """
    allowed = "all, every:K, first:K, last:K or a list such as 0,6,12"
    choice = tuple(range(num_layers) if recurrent is None else recurrent)
    if rule == "all":
        return choice
    if match := re.fullmatch(r"(every|first|last):(\d+)", rule):
        kind, count = match[1], int(match[2])
        if count < 1 or (count > len(choice) and kind != "every"):
            raise ConfigError(
                f"--layers {rule}: K must be 1 or more, and at most the model's {len(choice)} layers for first and last"
            )
        if kind == "every":
            return choice[::count]
        return choice[:count] if kind == "first" else choice[-count:]
    if not re.fullmatch(r"\d+(,\d+)*", rule):
        raise ConfigError(f"--layers {rule!r} is not a rule; allowed: {allowed}")
    layers = tuple(sorted({int(part) for part in rule.split(",")}))
    if layers[-1] >= num_layers:
        raise ConfigError(
            f"--layers {rule}: layer {layers[-1]} is out of range; the model has layers 0..{num_layers - 1}"
        )
    if other := [layer for layer in layers if layer not in choice]:
        raise ConfigError(
            f"--layers {rule}: layers {other} of this model have no recurrent state; those that have: {list(choice)}"
        )
    return layers


def extend_plan(existing: ExpansionPlan | None, new: Iterable[LayerExpansion]) -> ExpansionPlan:
    """Return ``existing`` with ``new`` expansions added.

    Raises:
        ConfigError: A layer that is already expanded is to be expanded again.
    """
    new = tuple(new)
    if existing is None:
        return ExpansionPlan(layers=new)
    if again := [e.layer for e in new if existing.get(e.layer)]:
        raise ConfigError(
            f"layers {again} are already expanded in this checkpoint; "
            "choose other layers, or expand the original checkpoint by the full factor"
        )
    return ExpansionPlan(layers=existing.layers + new)

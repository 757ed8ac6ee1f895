"""What every family's ``config.json`` has in common: reading, checking, writing, and the expansion plan inside it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from statex_dist.checkpoint.config_json import config_text, decode_floats, parse_config
from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import ExpansionPlan, LayerExpansion

OUR_CODE_PREFIX = "statex_"
"""Of the ``model_type`` of an expanded model whose code is beside its weights: other software may have a class for the
bare name that knows no plan and would open the weights all the same."""

LARGEST_SIZE = 2**40
"""No axis of a model is longer; arithmetic on what a damaged file says stays exact below."""


@dataclass(kw_only=True)
class ModelConfig:
    """Fields that all families share; a family's own follow in its subclass.

    Field names and meanings are those of the public checkpoints, but for ``embedding_initializer_range``, ours: the
    standard deviation of a fresh embedding table where it is to differ from ``initializer_range``. Keys that we do not
    interpret are kept in ``extra`` and written back, so that reading and writing a config loses nothing.
    """

    MODEL_TYPE: ClassVar[str]
    OPS: ClassVar[tuple[str, ...]] = ()
    """Expansions that the family knows, the default one first."""
    DERIVED: ClassVar[tuple[str, ...]] = (".inv_freq", ".cos_cached", ".sin_cached", "position_ids")
    """Endings of tensors that a checkpoint may hold and that follow from the configuration: never needed, kept."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    statex: ExpansionPlan | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_positive("vocab_size", "hidden_size", "num_hidden_layers")
        if not (math.isfinite(self.initializer_range) and self.initializer_range >= 0):
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: initializer_range must be 0 or more, not {self.initializer_range}"
            )

    @classmethod
    def recognises(cls, values: dict[str, Any]) -> bool:
        """Return whether the contents of a ``config.json`` describe a model of this family."""
        return values.get("model_type") in (cls.MODEL_TYPE, OUR_CODE_PREFIX + cls.MODEL_TYPE)

    def check_positive(self, *names: str) -> None:
        """Raise if one of these fields is given and below 1, or larger than any tensor's axis."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise CheckpointError(f"{self.MODEL_TYPE} config: {name} must be 1 or more, not {value}")
            if value is not None and value > LARGEST_SIZE:
                raise CheckpointError(
                    f"{self.MODEL_TYPE} config: {name} must not exceed {LARGEST_SIZE}, but is {value}"
                )

    def check_sizes(self, *names: str) -> None:
        """Raise unless these ratios are finite and above 0."""
        for name in names:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CheckpointError(f"{self.MODEL_TYPE} config: {name} must be a number above 0, not {value}")

    def check_plan(self) -> None:
        """Raise if the plan does not fit the model.

        Raises:
            CheckpointError: A layer does not exist.
            ConfigError: A layer has no recurrent state, or the operation is not for this family or does not divide.
        """
        for expansion in self.statex.layers if self.statex else ():
            if not 0 <= expansion.layer < self.num_hidden_layers:
                raise CheckpointError(
                    f"plan: layer {expansion.layer} is out of range; "
                    f"the model has layers 0..{self.num_hidden_layers - 1}"
                )
            if expansion.layer not in self.recurrent_layers:
                raise ConfigError(
                    f"plan: layer {expansion.layer} has no recurrent state; those that have: "
                    f"{list(self.recurrent_layers)}"
                )
            if expansion.op not in self.OPS:
                raise ConfigError(
                    f"plan, layer {expansion.layer}: {self.why_not(expansion.op)}; use {' or '.join(self.OPS)}"
                )
            self.check_expansion(expansion)

    def why_not(self, op: str) -> str:
        """Return why an operation that is not in :attr:`OPS` cannot be done."""
        return f"op {op} does not apply to {self.MODEL_TYPE}"

    def check_expansion(self, expansion: LayerExpansion) -> None:
        """Raise if an expansion of a known operation does not fit the layer: a family's own rules."""

    def _check_head_factor(self, expansion: LayerExpansion, num_heads: int) -> None:
        """Raise unless the heads can be merged or mixed by the expansion's factor."""
        where = f"plan, layer {expansion.layer}"
        if expansion.op == "merge_heads" and num_heads % expansion.factor:
            raise ConfigError(
                f"{where}: {num_heads} heads do not divide into groups of {expansion.factor}; "
                f"the factor must divide num_heads={num_heads}"
            )
        if expansion.op in ("merge_heads", "mix_heads") and expansion.factor > num_heads:
            raise ConfigError(
                f"{where}: factor {expansion.factor} is larger than num_heads={num_heads}; "
                f"a {self.MODEL_TYPE} layer grows at most by its number of heads"
            )

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Layers with a recurrent state of this family; the others (attention, MLP) are never touched."""
        return tuple(range(self.num_hidden_layers))

    @property
    def state_numbers(self) -> int:
        """State numbers of all recurrent layers together."""
        return sum(self.layer_geometry(layer).numbers for layer in self.recurrent_layers)

    @property
    def obstacle(self) -> str | None:
        """Why the model can be expanded and resharded here but not run, or None if it can be run."""
        return None

    def require_runnable(self) -> None:
        """Raise if the model cannot be run here.

        Raises:
            ConfigError: It has layers that only other software runs.
        """
        if self.obstacle:
            raise ConfigError(
                f"this {self.MODEL_TYPE} model can be expanded and inspected but not run here: {self.obstacle}"
            )

    @property
    def is_mixed(self) -> bool:
        """Whether the model has tensors that the family's layout does not list: they are passed through untouched."""
        return self.obstacle is not None

    def common_factor(self) -> int | None:
        """Return the factor by which every recurrent layer grows, or None where they grow differently or not at all."""
        factors = {e.layer: e.factor for e in self.statex.layers} if self.statex else {}
        alike = set(factors) == set(self.recurrent_layers) and len(set(factors.values())) == 1
        return next(iter(factors.values())) if alike else None

    def plain_keys(self) -> dict[str, Any]:
        """Return changes of ``config.json`` that by themselves say what the plan says.

        Where every recurrent layer of a Mamba2 model grows alike, ``state_size`` says it all, and classes that know no
        plan can open the directory. Empty where there is no such way.
        """
        return {}

    @property
    def final_norm_eps(self) -> float:
        """Epsilon of the RMS norms outside the mixers."""
        raise NotImplementedError

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a config from the contents of a ``config.json``.

        Raises:
            CheckpointError: A required key is missing or has the wrong type.
        """
        values = decode_floats(values)
        plan = ExpansionPlan.from_dict(values["statex"]) if values.get("statex") else None
        values = {**values, **base_keys(values)}
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)} - {"statex", "extra"}
        kept = {key: value for key, value in values.items() if key in names}
        for key, value in kept.items():
            if not _fits(value, hints[key]):
                wanted = getattr(hints[key], "__name__", str(hints[key]))
                raise CheckpointError(f"{CONFIG_NAME}: '{key}' must be {wanted}, not {value!r}")
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in kept]:
            raise CheckpointError(f"{CONFIG_NAME} of a {cls.MODEL_TYPE} model lacks {', '.join(missing)}")
        extra = {k: v for k, v in values.items() if k not in names and k not in ("statex", "model_type")}
        return cls(**kept, statex=plan, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``config.json``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = values.pop("extra")
        del values["statex"]
        if self.embedding_initializer_range is None:
            del values["embedding_initializer_range"]
        return self.with_plan({"model_type": self.MODEL_TYPE, **extra, **values})

    def with_plan(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a ``config.json`` with this plan written in and all other keys as they are.

        Args:
            values: Contents that describe this model, with or without an earlier plan.
        """
        if self.statex is None:
            return values
        earlier = base_keys(values)
        plain, entry = self.plain_keys(), self.statex.to_dict()
        values = {**values, **earlier}
        if plain:
            entry["base"] = {key: values[key] if key in values else getattr(self, key) for key in plain}
        return {**values, **plain, "statex": entry}

    def to_json(self) -> str:
        """Return the text of ``config.json``."""
        return config_text(self.to_dict())

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``."""
        return dataclasses.replace(self, **changes)


def base_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a ``config.json`` as they were before a plan that they express by themselves.

    Raises:
        CheckpointError: They are not a mapping.
    """
    plan = values.get("statex") or {}
    base = plan.get("base", {}) if isinstance(plan, dict) else None
    if not isinstance(base, dict):
        raise CheckpointError(f"{CONFIG_NAME}: 'statex' must be a mapping, and 'base' in it too, not {plan!r}")
    return base


def is_layer(value: Any, num_layers: int) -> bool:
    """Return whether a value of a ``config.json`` names one of ``num_layers`` layers."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_layers


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the annotated type (an int passes for a float)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, arg) for arg in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    return isinstance(value, origin) if isinstance(origin, type) else True


def read_config_dict(model_dir: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model directory.

    Raises:
        CheckpointError: The directory or the file is missing, or the file is not a JSON object.
    """
    if not model_dir.exists():
        raise CheckpointError(f"model directory not found: {model_dir}")
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is a file; give the directory that holds {CONFIG_NAME}")
    path = model_dir / CONFIG_NAME
    try:
        values = parse_config(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{model_dir} holds no {CONFIG_NAME}: not a Hugging Face model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return values

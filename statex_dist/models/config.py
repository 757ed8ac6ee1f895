"""What every family's ``config.json`` has in common: reading, checking, writing, and the expansion plan inside it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from statex_dist.checkpoint.json_file import config_text, decode_floats, parse_config, read_text
from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError, ConfigError, reason, shown
from statex_dist.models.attention_layers import AttentionLayer
from statex_dist.models.config_keys import (
    OUR_CODE_PREFIX,
    check_other_keys,
    ours,
    own_keys,
    with_plan_entry,
    without_plan,
)
from statex_dist.models.layout import Part
from statex_dist.state.geometry import FeatureMap, StateGeometry, largest_roll
from statex_dist.state.plan import MAX_LAYERS, ExpansionPlan, LayerExpansion

Recurrence = Literal["gla", "delta_rule", "ssd"]
"""The equations of a layer's state (:mod:`statex_dist.ops`)."""

LARGEST_SIZE = 2**40
"""No axis of a model is longer; arithmetic on what a damaged file says stays exact below."""

_MAX_HEADS = 1 << 16
_LIMITS = {
    "num_hidden_layers": MAX_LAYERS,
    "num_local_experts": 4096,
    **dict.fromkeys(("num_heads", "num_v_heads", "num_attention_heads", "mamba_n_heads"), _MAX_HEADS),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), _MAX_HEADS),
}
"""Fields that say how many things there are of a kind, each of which takes time and memory: the most that is read."""


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
    RECURRENCE: ClassVar[Recurrence] = "gla"
    """The equation of its layers' states."""
    DERIVED: ClassVar[tuple[str, ...]] = (".inv_freq", ".cos_cached", ".sin_cached", "position_ids")
    """Endings of tensors that a checkpoint may hold and that follow from the configuration: never needed, kept."""
    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Fields by other names that the file may give them."""
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Keys of the family's classes elsewhere that we do not implement, with the values that change nothing."""
    TRAINING: ClassVar[frozenset[str]] = frozenset()
    """... that change a training run there, and no logit."""
    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    """... that have no effect on the model's output."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
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
                raise CheckpointError(f"{self.MODEL_TYPE} config: {name} must be 1 or more, not {shown(value)}")
            if value is not None and value > (most := _LIMITS.get(name, LARGEST_SIZE)):
                raise CheckpointError(f"{self.MODEL_TYPE} config: {name} must not exceed {most}, but is {shown(value)}")

    def check_sizes(self, *names: str) -> None:
        """Raise unless these ratios are finite and above 0."""
        for name in names:
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= LARGEST_SIZE):
                raise CheckpointError(
                    f"{self.MODEL_TYPE} config: {name} must be a number above 0 and at most {LARGEST_SIZE}, not {value}"
                )

    def check_plan(self) -> None:
        """Raise if the plan does not fit the model.

        Raises:
            CheckpointError: A layer does not exist.
            ConfigError: A layer has no recurrent state, or the operation is not for this family or does not divide.
        """
        recurrent = frozenset(self.recurrent_layers) if self.statex else frozenset()
        for expansion in self.statex.layers if self.statex else ():
            if not 0 <= expansion.layer < self.num_hidden_layers:
                raise CheckpointError(
                    f"plan: layer {expansion.layer} is out of range; "
                    f"the model has layers 0..{self.num_hidden_layers - 1}"
                )
            if expansion.layer not in recurrent:
                raise ConfigError(
                    f"plan: layer {expansion.layer} has no recurrent state; those that have: "
                    f"{shown(list(self.recurrent_layers))}"
                )
            if expansion.op not in self.OPS:
                raise ConfigError(
                    f"plan, layer {expansion.layer}: {self.why_not(expansion.op)}; use {' or '.join(self.OPS)}"
                )
            self.check_expansion(expansion)
            if expansion.features is not None:
                self._check_rolls(expansion.layer, expansion.features)

    def why_not(self, op: str) -> str:
        """Return why an operation that is not in :attr:`OPS` cannot be done."""
        return f"op {op} does not apply to {self.MODEL_TYPE}"

    def check_expansion(self, expansion: LayerExpansion) -> None:
        """Raise if an expansion of a known operation does not fit the layer: a family's own rules."""

    def _check_rolls(self, layer: int, features: FeatureMap) -> None:
        """Raise if a roll of a layer's features repeats the products of a smaller one."""
        keys = self.layer_geometry(layer).projected_key_dim
        if max(features.rolls) > (most := largest_roll(keys)):
            raise ConfigError(
                f"plan, layer {layer}: roll {shown(max(features.rolls))} of features.rolls repeats the products of "
                f"another; {keys} key channels of a head allow rolls 0 (the squares) to {most}"
            )

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
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with softmax attention in place of a recurrence."""
        return ()

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Layers with a recurrent state of this family; the others are never touched."""
        attention = frozenset(self.attention_layers)
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in attention)

    @property
    def state_elements(self) -> int:
        """State elements of all recurrent layers together."""
        return sum(self.layer_geometry(layer).elements for layer in self.recurrent_layers)

    @property
    def kv_elements(self) -> int | None:
        """Numbers of keys and values that all attention layers keep of a token; None where that is not known."""
        found = [self.attention_layer(layer) for layer in self.attention_layers]
        return None if None in found else sum(2 * layer.sizes.key_size for layer in found if layer is not None)

    def attention_layer(self, layer: int) -> AttentionLayer | None:
        """Return our own form of one of :attr:`attention_layers`; None where only other software runs it."""
        return None

    @property
    def own_block(self) -> str | None:
        """``module:Class`` of this model's recurrent layers where it is not the family's, or None."""
        return None

    def said(self, *keys: str) -> Any:
        """Return the value of the first of these keys that the file has and no field holds, or None."""
        return next((self.extra[key] for key in keys if self.extra.get(key) is not None), None)

    @property
    def activation_key(self) -> str:
        """Key of ``config.json`` with an activation that the family's classes in other software make."""
        return "hidden_act"

    @property
    def section_key(self) -> str | None:
        """Key of the section that :attr:`activation_key` is in, or None."""
        return None

    @property
    def obstacle(self) -> str | None:
        """Why the model can be expanded and resharded here but not run, or None: attention that is not ours."""
        others = [layer for layer in self.attention_layers if self.attention_layer(layer) is None]
        return f"layers {others} are softmax attention" if others else None

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
        """Return the factor of ``grow_state`` if every recurrent layer has it and nothing else is done, else None."""
        factors = {e.layer: e.factor for e in self.statex.layers if e.op == "grow_state"} if self.statex else {}
        alike = set(factors) == set(self.recurrent_layers) and len(set(factors.values())) == 1
        return next(iter(factors.values())) if alike else None

    @property
    def ours_alone(self) -> bool:
        """Whether the family's classes in other software compute another function: they know no plan.

        A plan that :meth:`plain_keys` expresses is none to them.
        """
        return self.statex is not None and not self.plain_keys()

    def plain_keys(self) -> dict[str, Any]:
        """Return changes of ``config.json`` that by themselves express the plan.

        Where every recurrent layer of a Mamba2 model grows alike, ``state_size`` expresses the whole plan, and classes
        that know no plan can open the directory. Empty where no such changes exist.
        """
        return {}

    def file_parts(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Part]]:
        """Return the tensors of the files that tensors of memory are made of, where the names differ.

        Args:
            shapes: Shapes by names, of memory or already of the files; the latter have no entry.
        """
        found = {name: self.parts(name, shape) for name, shape in shapes.items()}
        return {name: parts for name, parts in found.items() if [part.name for part in parts] != [name]}

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """Return the tensors of the files that a tensor of memory is made of, in order: by default itself."""
        return [Part(name, tuple(shape))]

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
        model_type = values.get("model_type")
        values = cls.in_our_names(without_plan(values))
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)} - {"statex", "extra"}
        kept = {key: value for key, value in values.items() if key in names}
        for key, value in kept.items():
            check_type(key, value, hints[key])
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in kept]:
            raise CheckpointError(f"{CONFIG_NAME} of a {cls.MODEL_TYPE} model lacks {', '.join(missing)}")
        extra = {k: v for k, v in values.items() if k not in names and k not in ("statex", "model_type")}
        check_other_keys(cls.MODEL_TYPE, extra, fixed=cls.FIXED, training=cls.TRAINING, harmless=cls.HARMLESS)
        config = cls(**kept, statex=plan, extra=extra)
        if ours(model_type) and plan is None and not config.ours_alone:
            raise CheckpointError(
                f"{CONFIG_NAME}: model_type {model_type!r} is of an expanded model, but there is no plan under 'statex'"
            )
        return config

    @classmethod
    def in_our_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a ``config.json`` with the names of our fields.

        Raises:
            CheckpointError: A field has two names in the file, and two values.
        """
        for other, name in cls.ALIASES.items():
            if other not in values:
                continue
            if values.get(name, values[other]) != values[other]:
                raise CheckpointError(f"{CONFIG_NAME}: '{name}' and '{other}' are one setting and differ")
            values = {key: value for key, value in values.items() if key != other} | {name: values[other]}
        return values

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
        values = without_plan(values)
        plain = self.plain_keys()
        if plain:  # a base that leaves a key to its default
            values = {**{key: getattr(self, key) for key in plain if key not in values}, **values}
        changes = plain or own_keys(values, activation=self.activation_key, section=self.section_key)
        return with_plan_entry(values, changes, self.statex.to_dict())

    def to_json(self) -> str:
        """Return the text of ``config.json``."""
        return config_text(self.to_dict())

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``."""
        return dataclasses.replace(self, **changes)


def check_layer_list(what: str, layers: Sequence[Any], num_layers: int) -> None:
    """Raise if a list of a ``config.json`` names more layers than the model has (each may be wrong by itself).

    Raises:
        CheckpointError: It does.
    """
    if len(layers) > num_layers:
        raise CheckpointError(f"{what} lists {len(layers)} layers; the model has {num_layers}")


def is_layer(value: Any, num_layers: int) -> bool:
    """Return whether a value of a ``config.json`` names one of ``num_layers`` layers."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_layers


def check_type(key: str, value: Any, hint: Any) -> None:
    """Raise if the value of a key of ``config.json`` has not the annotated type."""
    if not _fits(value, hint):
        wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
        raise CheckpointError(f"{CONFIG_NAME}: '{key}' must be {wanted}, not {repr(value)[:80]}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the annotated type (an int passes for a float)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, arg) for arg in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000
        return whole or isinstance(value, float)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is list and typing.get_args(hint):
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
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
        values = parse_config(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{model_dir} holds no {CONFIG_NAME}: not a Hugging Face model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return values

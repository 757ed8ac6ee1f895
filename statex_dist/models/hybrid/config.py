"""Configurations of models of transformers that have recurrent layers: the keys that those layers depend on.

The ``config.json`` is kept as it is. A family's row (:class:`HostModel`) names the keys with the sizes of its recurrent
layers, and transformers' defaults; everything else is read by transformers alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from statex_dist.checkpoint.json_file import decode_floats
from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import LARGEST_SIZE, ModelConfig, check_type
from statex_dist.models.config_keys import check_other_keys, ours, without_plan
from statex_dist.models.hybrid.key_values import CountElements
from statex_dist.models.hybrid.layer_lists import LayerKind, Values
from statex_dist.models.hybrid.names import NameMap
from statex_dist.models.layout import Part
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import ExpansionPlan


def attention_sizes(settings: Any) -> tuple[int, int, int]:
    """Return the query heads of an attention layer, and the channels of a key and a value in most models."""
    heads = settings.num_attention_heads
    size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return heads, size, size


@dataclass(frozen=True, kw_only=True, slots=True)
class HostModel:
    """How transformers' model of a family is built, as far as its recurrent layers need it.

    Attributes:
        model: ``module:Class`` of the model without its head, below ``transformers.models``.
        layer_kinds: Takes the file's values and the number of layers; returns each layer's kind.
        keys: Key of the file and transformers' default, by the name of a field of the recurrent layers' configuration.
        options: Takes the file's values; returns further fields of that configuration.
        place: Name of the recurrent mixer in its layer, or a function of the layer's index and its kind.
        cached: Counts what an attention layer keeps of a token.
        mixer: ``module:Class`` of our mixer, below ``statex_dist.models``; a class alone is in ``hybrid.mixers``.
        activation: Key of an activation that every model of the host makes.
        text: Key of the section of the text model, where there is one.
        head_factor: Takes the file's values; returns the factor of the logits.
        names: The names of memory in the files.
        aliases: Keys of older files, and the key of today in whose place transformers reads them.
        read: Types of further keys that the functions above read; a key that is left out is transformers' default.
        fixed: Keys that change the recurrent layers in a way that ours do not have, with the values that change
            nothing.
        training: Keys that change a training run of transformers and no logit; reported where they are set.
        attention: Takes transformers' configuration; returns what :func:`attention_sizes` does.
        used_once: Pattern in the names of parameters of a shared block that one of its layers alone uses.
    """

    model: str
    layer_kinds: Callable[[Values, int], list[LayerKind]]
    keys: Mapping[str, tuple[str, Any]]
    mixer: str
    place: str | Callable[[int, LayerKind], str]
    cached: CountElements
    options: Callable[[Values], dict[str, Any]] = field(default=lambda values: {})
    activation: str = "hidden_act"
    text: str | None = None
    head_factor: Callable[[Values], float] = field(default=lambda values: 1.0)
    names: NameMap = field(default_factory=NameMap)
    aliases: Mapping[str, str] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    training: frozenset[str] = frozenset()
    attention: Callable[[Any], tuple[int, int, int]] = attention_sizes
    used_once: str = ""

    def text_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the text model under the keys of today.

        Raises:
            CheckpointError: The section of the text model is no mapping.
        """
        text = values if self.text is None else values.get(self.text, values)
        if not isinstance(text, dict):
            raise CheckpointError(f"{CONFIG_NAME}: '{self.text}' must be a mapping, not {shown(text)}")
        old = {key: name for key, name in self.aliases.items() if key in text}
        return {**{key: value for key, value in text.items() if key not in old}, **{old[k]: text[k] for k in old}}

    def check_types(self, text: Values) -> None:
        """Raise if a key that we read has not the type that transformers gives it, or is no size.

        Raises:
            CheckpointError: It has not.
        """
        hints = {key: _hint(default) for key, default in self.keys.values() if default is not None}
        for key, hint in {**hints, **self.read}.items():
            if key not in text:
                continue
            check_type(key, value := text[key], hint)
            if type(value) is int and hint is not float and not 1 <= value <= LARGEST_SIZE:
                raise CheckpointError(
                    f"{CONFIG_NAME}: {key} must be 1 or more and at most {LARGEST_SIZE}, not {shown(value)}"
                )


def _hint(default: Any) -> Any:
    """Return the type of a key with this default."""
    return tuple[float, ...] if isinstance(default, tuple) else type(default)


@dataclass(kw_only=True)
class HybridConfig(ModelConfig):
    """A model that transformers hosts.

    Attributes:
        values: The contents of its ``config.json``, without a plan.
    """

    HOST: ClassVar[HostModel]
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """transformers' defaults of the fields that all models have, where the file may leave them out."""

    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kinds = tuple(self.HOST.layer_kinds(self.text, self.num_hidden_layers))
        if len(self._kinds) != self.num_hidden_layers:
            raise CheckpointError(
                f"{self.MODEL_TYPE} config: its list of layers has {len(self._kinds)} entries; num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        self._recurrent = tuple(i for i, kind in enumerate(self._kinds) if kind in ("recurrent", "both"))
        self.places = frozenset(self.place(layer) for layer in self._recurrent)
        self.check_plan()
        self.HOST.head_factor(self.text)
        assert self.kv_elements is not None  # counted here, so that a wrong size is refused when the file is read
        if self._recurrent:
            self._check_mixers()

    def _check_mixers(self) -> None:
        """Raise if the recurrent layers' sizes do not fit, by the names that they have in the file."""
        try:
            self.mixer_config()
        except CheckpointError as error:
            keys = {name: key for name, (key, _) in self.HOST.keys.items()}
            text = re.sub(r"^\w+ config", f"{self.MODEL_TYPE} config", str(error))
            text = re.sub(r"\w+", lambda word: keys.get(word[0], word[0]), text)
            raise CheckpointError(text) from None

    @property
    def text(self) -> dict[str, Any]:
        """The values of the text model."""
        return self.HOST.text_of(self.values)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Each layer's kind."""
        return self._kinds

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with softmax attention, also beside a recurrence."""
        return tuple(i for i, kind in enumerate(self._kinds) if kind in ("attention", "both"))

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Layers with a recurrent state."""
        return self._recurrent

    @property
    def kv_elements(self) -> int:
        """Numbers of keys and values that all attention layers keep of a token: shared blocks once for each use."""
        return len(self.attention_layers) * self.HOST.cached({**self.text, "hidden_size": self.hidden_size})

    def said(self, *keys: str) -> Any:
        """Return the value of the first of these keys that the file has, of the text model or beside it, or None."""
        both = {**self.values, **self.text}
        return next((both[key] for key in keys if both.get(key) is not None), None)

    @property
    def activation_key(self) -> str:
        """Key with an activation that the host makes."""
        return self.HOST.activation

    @property
    def section_key(self) -> str | None:
        """Key of the section of the text model, or None."""
        return self.HOST.text

    @property
    def obstacle(self) -> str | None:
        """Nothing: transformers runs the other layers."""
        return None

    @property
    def is_mixed(self) -> bool:
        """Tensors of the other layers are passed through."""
        return True

    @property
    def final_norm_eps(self) -> float:
        """Epsilon of the norms; the host's own are the host's."""
        return self.mixer_config().final_norm_eps

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """Return the tensors of the files that a tensor of memory is made of, in order."""
        return self.HOST.names.parts(name, shape, self.row_sizes(name))

    def row_sizes(self, name: str) -> tuple[int, ...]:
        """Return the rows of the parts of a tensor that is joined of unequal ones; empty where they are equal."""
        return ()

    def place(self, layer: int) -> str:
        """Return the name of a layer's recurrent mixer in the layer."""
        place = self.HOST.place
        return place if isinstance(place, str) else place(layer, self._kinds[layer])

    def mixer_fields(self) -> dict[str, Any]:
        """Return the fields of the recurrent layers' own configuration that the file gives."""
        text = {**self.text, "hidden_size": self.hidden_size}  # the file may leave it out
        fields = {name: text.get(key, default) for name, (key, default) in self.HOST.keys.items()}
        return {**fields, **self.HOST.options(text)}

    def mixer_config(self, layer: int | None = None) -> Any:
        """Return the recurrent layers' own configuration, with the whole plan or that of one layer alone."""
        raise NotImplementedError

    def plan_of(self, layer: int | None) -> ExpansionPlan | None:
        """Return the plan, or what it has of one layer."""
        if layer is None or self.statex is None:
            return self.statex
        expansion = self.statex.get(layer)
        return ExpansionPlan(layers=(expansion,)) if expansion else None

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of a recurrent layer under the plan."""
        geometry: StateGeometry = self.mixer_config(layer).layer_geometry(layer)
        return geometry

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a config from the contents of a ``config.json``.

        Raises:
            CheckpointError: A required key is missing or has the wrong type.
        """
        values = decode_floats(values)
        plan = ExpansionPlan.from_dict(values["statex"]) if values.get("statex") else None
        model_type = values.get("model_type")
        values = without_plan(values)
        host = cls.HOST
        text = host.text_of(values)
        hints: dict[str, Any] = {
            "vocab_size": int,
            "hidden_size": int,
            "num_hidden_layers": int,
            "initializer_range": float,
        }
        hints |= {"tie_word_embeddings": bool, "pad_token_id": int | None, "bos_token_id": int | None}
        hints |= {"eos_token_id": int | list[int] | None}
        given = {**cls.DEFAULTS, **text}
        if host.text is not None and "tie_word_embeddings" in values:
            given["tie_word_embeddings"] = values["tie_word_embeddings"]
        kept = {key: given[key] for key in hints if key in given}
        for key, value in kept.items():
            check_type(key, value, hints[key])
        host.check_types(text)
        known = frozenset(text)  # transformers reads the other keys
        check_other_keys(cls.MODEL_TYPE, text, fixed=host.fixed, training=host.training, harmless=known)
        if "num_hidden_layers" not in kept and (found := host.layer_kinds(text, 0)):
            kept["num_hidden_layers"] = len(found)  # a host that counts the entries of its list of layers
        if missing := [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key not in kept]:
            raise CheckpointError(f"{CONFIG_NAME} of a {cls.MODEL_TYPE} model lacks {', '.join(missing)}")
        extra = {key: value for key, value in values.items() if key not in kept}
        config = cls(**kept, statex=plan, extra=extra, values=values)
        if ours(model_type) and plan is None:
            raise CheckpointError(
                f"{CONFIG_NAME}: model_type {model_type!r} is of an expanded model, but there is no plan under 'statex'"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``config.json``: those that were read, and the plan."""
        changed = {key: value for key, value in self.extra.items() if self.values.get(key, ...) != value}
        return self.with_plan({"model_type": self.MODEL_TYPE, **self.values, **changed})

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``."""
        return dataclasses.replace(self, **changes)

"""The interface of a model family, the families by the ``model_type`` of their ``config.json``, and functions over any.

A family is a folder whose ``config`` (or ``tensors``) module makes a :class:`Family`: one value that gives its names,
tensors, first values and layers. Adding one is a folder and one row here, or a call of :func:`register`. It is imported
when a configuration names it, which needs numpy alone. Its mixer pulls in torch and the scan kernels, so it is imported
when a model is built and never when a checkpoint is only read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import ModelConfig, read_config_dict
from statex_dist.models.config_keys import OUR_CODE_PREFIX
from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.row_mapping import Constant, Distribution, Keep, RowMapping, TensorMapping, added
from statex_dist.state.geometry import FeatureMap
from statex_dist.state.plan import DEFAULT_GROWTH, ExpansionPlan, Init, LayerExpansion, Op, extend_plan, select_layers

if TYPE_CHECKING:
    import torch
    from torch import nn

Role = Literal["base", "expanded", "new", "mix", "gain"]

SharedInputs = Callable[[Any], "Sequence[Sequence[torch.Tensor | None]]"]
"""Computes of a trunk's shared parameters each layer's inputs: further arguments of its forward, each one per layer."""


def no_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Return no tensors: of a family whose layers share no parameter."""
    return {}


def no_notes(config: ModelConfig) -> list[str]:
    """Return no notes."""
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronLayer:
    """How megatron-core's module of a family names the tensors of a layer.

    Attributes:
        names: Its names below ``decoder.layers.{i}.``, by ours without the layer's prefix.
        notes: Takes a config; returns what has to be known before Megatron gets the weights.
    """

    names: Mapping[str, str]
    notes: Callable[[Any], list[str]] = no_notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model family.

    Attributes:
        config: Its config class, which names its ``model_type``.
        names: Where it keeps embeddings, layers and head.
        layer_tensors: Takes config and layer; returns the tensors of a recurrent layer under the plan, in the order of
            the built model's parameters, by name without the layer's prefix.
        first_value: Takes such a name, a shape and ``config=``; returns the tensor's distribution in a fresh model.
        layer_mappings: Takes the configs before and after and a layer's expansion; returns the row mappings of the
            tensors that change or are new, by name without the prefix.
        block: ``module:Class`` of the layer; a function ``shared_inputs`` may stand beside it. None where transformers
            hosts the layers (:mod:`statex_dist.models.hybrid`).
        shared_tensors: Takes a config; returns parameters that the layers share, by full name.
        megatron: Names of megatron-core's module; None where it has none.
    """

    config: type[ModelConfig]
    names: Names
    layer_tensors: Callable[[Any, int], dict[str, TensorSpec]]
    first_value: Callable[..., Distribution]
    layer_mappings: Callable[[Any, Any, LayerExpansion], dict[str, RowMapping]]
    block: str | None
    shared_tensors: Callable[[Any], dict[str, TensorSpec]] = field(default=no_tensors)
    megatron: MegatronLayer | None = None

    @property
    def model_type(self) -> str:
        """The ``model_type`` of its configs."""
        return self.config.MODEL_TYPE

    def _mixer_module(self) -> ModuleType:
        assert self.block is not None, f"{self.model_type} is hosted by transformers"
        return importlib.import_module(self.block.partition(":")[0])

    def block_classes(self, config: ModelConfig) -> list[type[nn.Module]]:
        """Import and return the class of each layer."""
        own = config.own_block or self.block
        assert own is not None, f"{self.model_type} is hosted by transformers"
        blocks = [own] * config.num_hidden_layers
        for layer in config.attention_layers:
            if (attention := config.attention_layer(layer)) is not None:
                blocks[layer] = attention.block
        classes = {block: _imported(block) for block in set(blocks)}
        return [classes[block] for block in blocks]

    def shared_inputs(self) -> SharedInputs | None:
        """Return the function that makes further arguments of the layers of the shared parameters, or None."""
        return getattr(self._mixer_module(), "shared_inputs", None)

    def outside_tensors(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """Return the tensors outside the layers, by full name: embeddings, final norm, head, shared parameters."""
        specs = self.names.outside_layers(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, tied=config.tie_word_embeddings
        )
        return {**self.shared_tensors(config), **specs}

    def tensors(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """Return every tensor of a model that the family knows, by full name (of a mixed model, not those between).

        Their order is that of the built model's ``named_parameters()``, in which a ZeRO-3 checkpoint is flat.
        """
        specs = self.outside_tensors(config)
        behind = {name: specs.pop(name) for name in self.names.behind_layers if name in specs}
        recurrent = frozenset(config.recurrent_layers)
        for layer in range(config.num_hidden_layers):
            prefix = self.names.layer(layer)
            found = self.layer_tensors(config, layer) if layer in recurrent else _attention_tensors(config, layer)
            specs.update({prefix + name: spec for name, spec in found.items()})
        return {**specs, **behind}

    def checked_mappings(
        self, before: ModelConfig, after: ModelConfig, expansion: LayerExpansion
    ) -> dict[str, RowMapping]:
        """Return what becomes of a layer's tensors, by name without the prefix; those not named are kept.

        Raises:
            AssertionError: The mappings do not make the tensors that the layout of the expanded model asks for.
        """
        if expansion.op == "grow_features":
            mappings = self._gain_mapping(after, expansion.layer)
        else:
            mappings = self.layer_mappings(before, after, expansion)
        old, new = self.layer_tensors(before, expansion.layer), self.layer_tensors(after, expansion.layer)
        made = {name: spec.shape for name, spec in old.items()} | {name: m.shape for name, m in mappings.items()}
        assert made == {name: spec.shape for name, spec in new.items()}, f"{self.model_type}: {expansion}"
        return mappings

    def _gain_mapping(self, after: ModelConfig, layer: int) -> dict[str, RowMapping]:
        """Return the mapping of the gains of features, which is all that ``grow_features`` adds: they start at zero."""
        specs = self.layer_tensors(after, layer)
        return {name: added(spec.shape, Constant(0.0)) for name, spec in specs.items() if spec.role == "gain"}


def _attention_tensors(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of a layer of another kind, by name without its prefix; none where it is not ours."""
    attention = config.attention_layer(layer)
    return {} if attention is None else attention.tensors


def _imported(place: str) -> Any:
    """Import and return what ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


FAMILIES: dict[str, Family | str] = {
    "gla": "gla.config",
    "mamba2": "mamba2.tensors",
    "mamba2_state_spaces": "state_spaces.config",
    "hgrn2": "hgrn2.config",
    "retnet": "retnet.config",
    "minimax": "lightning.config",
    "gated_deltanet": "gated_deltanet.config",
    "kda": "kda.config",
    "bamba": "hybrid.mamba2_hosts:BAMBA",
    "granitemoehybrid": "hybrid.mamba2_hosts:GRANITE_H",
    "nemotron_h": "hybrid.mamba2_hosts:NEMOTRON_H",
    "falcon_h1": "hybrid.mamba2_hosts:FALCON_H1",
    "zamba2": "hybrid.mamba2_hosts:ZAMBA2",
    "qwen3_next": "hybrid.delta_hosts:QWEN3_NEXT",
    "qwen3_5": "hybrid.delta_hosts:QWEN3_5",
    "qwen3_5_text": "hybrid.delta_hosts:QWEN3_5_TEXT",
    "qwen3_5_moe": "hybrid.delta_hosts:QWEN3_5_MOE",
    "qwen3_5_moe_text": "hybrid.delta_hosts:QWEN3_5_MOE_TEXT",
    "olmo_hybrid": "hybrid.delta_hosts:OLMO_HYBRID",
    "kimi_linear": "hybrid.delta_hosts:KIMI_LINEAR",
}
"""Each family, or the module of this package that has it (under ``FAMILY`` or the name behind the colon);
:func:`family_of` imports it."""


_MAMBA1 = "its Mamba layers (Mamba1) have a decay for each channel and state, and no heads whose state could grow"
_RWKV = "RWKV's recurrence has no scan here"

UNSUPPORTED: dict[str, str] = {
    "mamba": _MAMBA1,
    "falcon_mamba": _MAMBA1,
    "jamba": _MAMBA1,
    "zamba": _MAMBA1,
    "recurrent_gemma": "its RG-LRU layers keep a vector, and no matrix that could grow",
    "lfm2": "its layers are short convolutions, which keep a few tokens and no state",
    "lfm2_moe": "its layers are short convolutions, which keep a few tokens and no state",
    "rwkv": "its layers keep a vector, and no matrix that could grow",
    "rwkv6": _RWKV,
    "rwkv7": _RWKV,
    "xlstm": "its layers have exponential gates and a normaliser, for which there is no scan here",
}
"""Recurrent models that we do not support, by ``model_type``, and why."""


def register(family: Family) -> None:
    """Add a family.

    Raises:
        ConfigError: Another family has its ``model_type``.
    """
    if family.model_type in FAMILIES:
        raise ConfigError(f"a family of model_type {family.model_type!r} is registered already")
    FAMILIES[family.model_type] = family


def family_of(model_type: Any) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        CheckpointError: We have no such family.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = f": {UNSUPPORTED[model_type]}" if isinstance(model_type, str) and model_type in UNSUPPORTED else ""
        raise CheckpointError(f"model_type {shown(model_type)} is not supported{why}; supported: {', '.join(FAMILIES)}")
    row = FAMILIES[model_type]
    if isinstance(row, str):
        module, _, name = row.partition(":")
        row = FAMILIES[model_type] = getattr(importlib.import_module(f"{__package__}.{module}"), name or "FAMILY")
    return row


def find_family(values: dict[str, Any]) -> Family | None:
    """Return the family that the contents of a ``config.json`` belong to, or None."""
    named = values.get("model_type")
    named = named.removeprefix(OUR_CODE_PREFIX) if isinstance(named, str) else None
    families = map(family_of, (named,) if named in FAMILIES else FAMILIES)
    return next((family for family in families if family.config.recognises(values)), None)


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Return the config that the contents of a ``config.json`` describe."""
    family = find_family(values)
    if family is None and "model_type" not in values:
        shown = repr(values.get("architectures"))[:80]
        raise CheckpointError(
            f"config.json has no model_type (architectures: {shown}); add the one that the model's class has, such as "
            f"{', '.join(kind for kind in FAMILIES if kind != 'mamba2_state_spaces')}"
        )
    return (family or family_of(values["model_type"])).config.from_dict(values)


def read_config(model_dir: Path) -> ModelConfig:
    """Return the config of a model directory."""
    return config_from_dict(read_config_dict(model_dir))


def default_op(config: ModelConfig, init: Init) -> Op:
    """Return the operation that an initialisation asks for where the user names none."""
    ops: tuple[Any, ...] = config.OPS
    if init == "lossless" and "mix_heads" in ops:
        return "mix_heads"
    return "grow_state" if init == "copy" else ops[0]


def make_plan(
    config: ModelConfig,
    *,
    layers: str,
    factor: int | None,
    init: Init,
    seed: int = 0,
    op: Op | None = None,
    reset_dynamics: bool = False,
    features: FeatureMap | None = None,
) -> ModelConfig:
    """Return ``config`` with an expansion plan in it.

    Args:
        config: The model to expand.
        layers: A rule of :func:`statex_dist.state.plan.select_layers`.
        factor: Growth of each layer's state; None means ``full``, all heads of a layer.
        init: Initialisation of the new state.
        seed: Seed of the random values.
        op: The operation; None takes :func:`default_op`.
        reset_dynamics: Whether decays, steps and norms are initialised again, as in the authors' scripts.
        features: The products of ``grow_features``; None takes those of :meth:`FeatureMap.of_factor`.

    Raises:
        ConfigError: The plan does not fit the model.
    """
    if not config.recurrent_layers:
        raise ConfigError(
            f"this {config.MODEL_TYPE} model has no recurrent layer to expand: all {config.num_hidden_layers} of its "
            "layers are softmax attention"
        )
    op = op or default_op(config, init)
    if op == "grow_features":
        if op not in config.OPS:
            raise ConfigError(f"{config.why_not(op)}; use {' or '.join(config.OPS)}")
        keys = config.replace(statex=None).layer_geometry(config.recurrent_layers[0]).key_dim
        if features is None:
            features = FeatureMap.of_factor(DEFAULT_GROWTH if factor is None else factor, keys)
        factor = features.factor if factor is None else factor
    if factor is None:
        if op == "grow_state":
            raise ConfigError(
                f"--factor full is for models with heads to merge or mix; give a number for op {op} of "
                f"{config.MODEL_TYPE}"
            )
        factor = config.replace(statex=None).layer_geometry(config.recurrent_layers[0]).num_heads
    chosen = [
        LayerExpansion(
            layer=layer,
            op=op,
            factor=factor,
            init=init,
            seed=seed,
            reset_dynamics=reset_dynamics,
            features=features,
        )
        for layer in select_layers(layers, config.num_hidden_layers, config.recurrent_layers)
    ]
    return config.replace(statex=extend_plan(config.statex, chosen))


def new_expansions(source: ModelConfig, target: ModelConfig) -> ExpansionPlan:
    """Return the part of ``target``'s plan that ``source`` does not have yet."""
    assert target.statex is not None
    done = {e.layer for e in source.statex.layers} if source.statex else set()
    return ExpansionPlan(layers=tuple(e for e in target.statex.layers if e.layer not in done))


def tensor_mappings(before: ModelConfig, after: ModelConfig) -> dict[str, TensorMapping]:
    """Return what becomes of each tensor that an expansion changes or makes, by full name; the others are kept.

    Args:
        before: Config of the original model.
        after: The same with a plan (:func:`make_plan`).
    """
    family = family_of(before.MODEL_TYPE)
    result = {}
    for expansion in new_expansions(before, after).layers:
        prefix = family.names.layer(expansion.layer)
        for suffix, rows in family.checked_mappings(before, after, expansion).items():
            name = prefix + suffix
            result[name] = TensorMapping(name=name, layer=expansion.layer, rows=rows, seed=expansion.seed)
    return result


def expand_state_dict(
    tensors: dict[str, torch.Tensor], before: ModelConfig, after: ModelConfig
) -> dict[str, torch.Tensor]:
    """Expand a model in memory, by the same mappings as the offline tool.

    Args:
        tensors: The original model's tensors by full name.
        before: The original model's config.
        after: The expanded model's config.

    Returns:
        The tensors of the expanded model; those that are kept are the same objects.
    """
    import torch

    dtype = tensors[family_of(before.MODEL_TYPE).names.embeddings].dtype
    result = dict(tensors)
    for name, mapping in tensor_mappings(before, after).items():
        rows, old = mapping.rows, tensors.get(name)
        pieces = []
        for index, block in enumerate(rows.blocks):
            if isinstance(block, Keep):
                assert old is not None
                pieces.append(old[block.start : block.stop])
            else:
                size = block.rows * rows.row_numel
                values = torch.from_numpy(np.concatenate([*mapping.draw(index, size=max(size, 1))]))
                shape = (block.rows, *rows.shape[1:])
                pieces.append(values.to(dtype if old is None else old.dtype).view(shape))
        result[name] = torch.cat(pieces)
    return result


def parameter_roles(config: ModelConfig) -> dict[str, Role]:
    """Return every parameter's role in an expansion, so that an optimizer can treat the roles differently.

    ``mix``: a mixing matrix M. ``gain``: gains of features. ``new``: another tensor that an expansion added, grew or
    redrew. ``expanded``: the other tensors of expanded layers. ``base``: all the rest, and everything in a model
    without a plan.

    Args:
        config: The model's configuration with its plan.

    Returns:
        Roles by full name.
    """
    family, plan = family_of(config.MODEL_TYPE), config.statex
    layers = {expansion.layer for expansion in plan.layers} if plan else set()
    mappings = tensor_mappings(config.replace(statex=None), config) if plan else {}
    roles: dict[str, Role] = {}
    for name, spec in family.tensors(config).items():
        place = family.names.split(name)
        if place is None or place[0] not in layers:
            roles[name] = "base"
        elif name not in mappings or mappings[name].rows.change == "kept":
            roles[name] = "expanded"
        else:
            roles[name] = spec.role or "new"
    return roles

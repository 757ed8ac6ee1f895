"""The families, by the ``model_type`` of their ``config.json``. Adding one touches no other file.

Mixers pull in the scan kernels, so they are imported when a model is built, never when a checkpoint is only read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.config import ModelConfig, read_config_dict
from statex_dist.models.gla import expand as gla_expand
from statex_dist.models.gla import init as gla_init
from statex_dist.models.gla import layout as gla_layout
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.mamba2 import expand as mamba2_expand
from statex_dist.models.mamba2 import init as mamba2_init
from statex_dist.models.mamba2 import layout as mamba2_layout
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.state.plan import ExpansionPlan, Init, LayerExpansion, Op, extend_plan, select_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model family.

    Attributes:
        model_type: The ``model_type`` of its configs.
        config: Its config class.
        layout: Module with ``NAMES`` and ``layer_tensors``.
        expand: Module with ``OPS``, ``DEFAULT_OP``, ``expand_tensor`` and ``new_tensors``.
        initial_value: First values of a layer's tensor.
        mixer: Dotted name of the module with its ``Block``.
    """

    model_type: str
    config: type[ModelConfig]
    layout: ModuleType
    expand: ModuleType
    initial_value: Callable[..., torch.Tensor]
    mixer: str

    @property
    def names(self) -> Names:
        """Where the family keeps embeddings, layers and head."""
        return self.layout.NAMES

    def block_class(self) -> type[torch.nn.Module]:
        """Import and return the family's layer."""
        return importlib.import_module(self.mixer).Block

    def tensors(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """Return every tensor of a model, by full name."""
        specs = self.names.outside_layers(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, tied=config.tie_word_embeddings
        )
        for layer in range(config.num_hidden_layers):
            prefix = self.names.layer(layer)
            specs.update({prefix + name: spec for name, spec in self.layout.layer_tensors(config, layer).items()})
        return specs


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="gla",
            config=GLAConfig,
            layout=gla_layout,
            expand=gla_expand,
            initial_value=gla_init.initial_value,
            mixer="statex_dist.models.gla.mixer",
        ),
        Family(
            model_type="mamba2",
            config=Mamba2Config,
            layout=mamba2_layout,
            expand=mamba2_expand,
            initial_value=mamba2_init.initial_value,
            mixer="statex_dist.models.mamba2.mixer",
        ),
    )
}


def family_of(model_type: Any) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        CheckpointError: We have no such family.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Return the config that the contents of a ``config.json`` describe."""
    return family_of(values.get("model_type")).config.from_dict(values)


def read_config(model_dir: Path) -> ModelConfig:
    """Return the config of a model directory."""
    return config_from_dict(read_config_dict(model_dir))


def make_plan(
    config: ModelConfig, *, layers: str, factor: int | None, init: Init, seed: int = 0, op: Op | None = None
) -> ModelConfig:
    """Return ``config`` with an expansion plan in it.

    Args:
        config: The model to expand.
        layers: A rule of :func:`statex_dist.state.plan.select_layers`.
        factor: Growth of each layer's state; None means ``full``, all heads of a GLA layer.
        init: How the new state starts.
        seed: Seed of the random values.
        op: The operation; None takes the family's own (and ``mix_heads`` for a lossless GLA).

    Raises:
        ConfigError: The plan does not fit the model.
    """
    family = family_of(config.MODEL_TYPE)
    if op is None:
        op = "mix_heads" if init == "lossless" and "mix_heads" in family.expand.OPS else family.expand.DEFAULT_OP
    if factor is None:
        if op == "grow_state":
            raise ConfigError(f"--factor full is for models with heads to merge; give a number for {config.MODEL_TYPE}")
        factor = config.replace(statex=None).layer_geometry(0).num_heads
    chosen = [
        LayerExpansion(layer=layer, op=op, factor=factor, init=init, seed=seed)
        for layer in select_layers(layers, config.num_hidden_layers)
    ]
    return config.replace(statex=extend_plan(config.statex, chosen))


def new_expansions(source: ModelConfig, target: ModelConfig) -> ExpansionPlan:
    """Return the part of ``target``'s plan that ``source`` does not have yet."""
    assert target.statex is not None
    done = {e.layer for e in source.statex.layers} if source.statex else set()
    return ExpansionPlan(layers=tuple(e for e in target.statex.layers if e.layer not in done))


def expand_state_dict(
    tensors: dict[str, torch.Tensor], source: ModelConfig, target: ModelConfig
) -> dict[str, torch.Tensor]:
    """Expand a model in memory, through the same functions as the offline tool.

    Args:
        tensors: The original model's tensors by full name.
        source: The original model's config.
        target: The expanded model's config (:func:`make_plan`).

    Returns:
        The tensors of the expanded model.
    """
    family, plan = family_of(source.MODEL_TYPE), new_expansions(source, target)
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        place = family.names.split(name)
        expansion = plan.get(place[0]) if place else None
        if place is None or expansion is None:
            result[name] = tensor
            continue
        result[name] = family.expand.expand_tensor(place[1], tensor, config=source, expansion=expansion, name=name)
    dtype = tensors[family.names.embeddings].dtype
    for expansion in plan.layers:
        prefix = family.names.layer(expansion.layer)
        result.update(family.expand.new_tensors(config=source, expansion=expansion, prefix=prefix, dtype=dtype))
    return result

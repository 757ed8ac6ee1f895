"""The interface of a model family: one value that gives its names, tensors, first values and layers.

A family is a folder whose ``config`` (or ``tensors``) module makes a :class:`Family`, and a row of
:mod:`statex_dist.models.registry`. Its mixer pulls in torch and the scan kernels, so it is imported when a model is
built and never when a checkpoint is only read: this module and a family's others need numpy and nothing heavier.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from statex_dist.models.config import ModelConfig
from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.row_mapping import Distribution, RowMapping
from statex_dist.state.plan import LayerExpansion

if TYPE_CHECKING:
    from torch import nn

    from statex_dist.models.core.trunk import SharedInputs


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
        block: ``module:Class`` of the layer; a function ``shared_inputs`` may stand beside it. None where other
            software runs the models.
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
        assert self.block is not None, f"{self.model_type} is run by other software"
        return importlib.import_module(self.block.partition(":")[0])

    def block_classes(self, config: ModelConfig) -> list[type[nn.Module]]:
        """Import and return the class of each layer."""
        module = self._mixer_module()
        assert self.block is not None
        return [getattr(module, self.block.partition(":")[2])] * config.num_hidden_layers

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
        for layer in config.recurrent_layers:
            prefix = self.names.layer(layer)
            specs.update({prefix + name: spec for name, spec in self.layer_tensors(config, layer).items()})
        return {**specs, **behind}

    def checked_mappings(
        self, before: ModelConfig, after: ModelConfig, expansion: LayerExpansion
    ) -> dict[str, RowMapping]:
        """Return what becomes of a layer's tensors, by name without the prefix; those not named are kept.

        Raises:
            AssertionError: The mappings do not make the tensors that the layout of the expanded model asks for.
        """
        mappings = self.layer_mappings(before, after, expansion)
        old, new = self.layer_tensors(before, expansion.layer), self.layer_tensors(after, expansion.layer)
        made = {name: spec.shape for name, spec in old.items()} | {name: m.shape for name, m in mappings.items()}
        assert made == {name: spec.shape for name, spec in new.items()}, f"{self.model_type}: {expansion}"
        return mappings

"""A model of transformers with recurrent mixers of ours, as the language model that everything else here works with."""

from __future__ import annotations

import importlib
import logging
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, PreTrainedModel

from statex_dist.distributed.context_group import ContextShare
from statex_dist.errors import ConfigError, reason
from statex_dist.models.core.attention import positions_after
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.hybrid import attention
from statex_dist.models.hybrid.config import HybridConfig
from statex_dist.models.hybrid.mixers import HostCall, States
from statex_dist.models.hybrid.router_loss import asked_coefficient, has_experts, has_router_loss, router_loss
from statex_dist.models.layout import Part
from statex_dist.models.lm import Hidden, LMHead, Recompute, RecurrentLM
from statex_dist.models.registry import Role, parameter_roles
from statex_dist.ops.attention import KeyValues

logger = logging.getLogger(__name__)

_REFUSALS = (
    *(StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError),
    ValueError,
)
"""What transformers raises for values of a ``config.json`` that it cannot build a model of."""


class HostedLM(RecurrentLM):
    """A causal language model whose layers, but for the recurrent mixers, are transformers' own.

    Parameters have the names of transformers' model in memory; :meth:`file_parts` tells those of its files.

    Args:
        config: The model's configuration; its plan decides each recurrent layer's state.
    """

    config: HybridConfig

    def _build(self) -> None:
        self.trunk_name = "model"
        self.model = host_model(self.config)
        self.lm_head = LMHead(self.config.hidden_size, self.config.vocab_size)
        self.lm_head.factor = self.config.HOST.head_factor(self.config.text)
        self.router_coefficient = asked_coefficient(self.model)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding_table.weight

    @property
    def embedding_table(self) -> nn.Embedding:
        """The embedding table."""
        table: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[assignment]
        return table

    @property
    def layers(self) -> nn.ModuleList:
        """The host's layers."""
        layers: nn.ModuleList = self.model.layers  # type: ignore[assignment]
        return layers

    @property
    def final_norm_name(self) -> str:
        """Name of the norm behind the layers in the trunk."""
        return self.family.names.final_norm

    @property
    def recompute(self) -> Recompute:
        """Layers that are computed again in the backward pass."""
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: Recompute) -> None:
        self._recompute = recompute
        plan = self.config.statex
        for index, layer in enumerate(self.layers):
            expanded = plan is not None and plan.get(index) is not None
            setting: Any = layer
            setting.gradient_checkpointing = recompute == "block" or (recompute == "expanded" and expanded)
            setting._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    @property
    def state_places(self) -> list[tuple[int, str]]:
        """Layer and kind of each state, in the order of the states that a forward pass returns."""
        config = self.config
        recurrent, attends = set(config.recurrent_layers), set(config.attention_layers)
        kinds = (("recurrent", recurrent), ("attention", attends))
        return [(layer, kind) for layer in range(config.num_hidden_layers) for kind, of in kinds if layer in of]

    def finish_build(self, dtype: torch.dtype) -> None:
        """Give the parameters a dtype. Buffers keep theirs: frequencies and router biases are fp32 in a bf16 model."""
        self.model.tie_weights()  # blocks that layers share are apart after a build on ``meta``
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        restore_buffers(self.model)

    def make_buffers(self) -> None:
        """Give memory on the CPU to the buffers, before :meth:`finish_build`; one that modules share stays one."""
        made: dict[int, torch.Tensor] = {}
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = made.setdefault(id(buffer), torch.empty_like(buffer, device="cpu"))

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers that checkpoints hold, by name in memory; a tied one by its first name."""
        first: dict[int, str] = {}
        tensors: dict[str, torch.Tensor] = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in tensors.items() if first.setdefault(id(tensor), name) == name}

    def file_parts(self) -> dict[str, list[Part]]:
        """Return the tensors of the files that each of :meth:`stored_tensors` is made of, in order."""
        return {name: self.config.parts(name, tensor.shape) for name, tensor in self.stored_tensors().items()}

    def roles(self) -> dict[str, Role]:
        """Return the role of each parameter; the host's own are ``base``, or ``expanded`` in expanded layers.

        What several layers share is ``expanded`` where all of them are.
        """
        known, names, plan = parameter_roles(self.config), self.family.names, self.config.statex
        grown = {expansion.layer for expansion in plan.layers} if plan else set()
        users: dict[int, set[int]] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            place = names.split(self.config.parts(name, tensor.shape)[0].name)
            users.setdefault(id(tensor), set()).add(-1 if place is None else place[0])
        tensors = self.stored_tensors()
        return {
            name: known.get(parts[0].name, "expanded" if users[id(tensors[name])] <= grown else "base")
            for name, parts in self.file_parts().items()
        }

    def no_decay(self) -> set[str]:
        """Return the names of parameters without weight decay; of the host's own, those that are no matrices."""
        specs = self.family.tensors(self.config)
        found = set()
        for name, parts in self.file_parts().items():
            spec = specs.get(parts[0].name)
            if not spec.decay if spec else len(parts[0].shape) < 2:
                found.add(name)
        return found

    def _hidden(self, input_ids: torch.Tensor, sequences: Sequences, states: list[LayerState] | None) -> Hidden:
        """Run the host's layers; states of attention are :class:`KeyValues`."""
        places = self.state_places
        before: States = dict(zip(places, states, strict=True)) if states else {}
        call = HostCall(sequences=sequences, before=before)
        routed = self.training and self.router_coefficient > 0
        output = self.model(
            input_ids=input_ids,
            position_ids=self._positions(input_ids, sequences, before),
            use_cache=False,
            statex=call,
            output_router_logits=routed,
        )
        hidden = output.last_hidden_state.to(self.lm_head.weight.dtype)
        after = [call.after[place] for place in places if place in call.after]
        return Hidden(hidden, after, tuple(output.router_logits) if routed else ())

    def set_router_loss(self, coefficient: float | None) -> None:
        """Set the factor of the experts' load-balancing loss in training; None takes what the configuration asks for.

        Raises:
            ConfigError: The model has no experts, or transformers has no such loss for it.
        """
        kind = self.config.MODEL_TYPE
        if not has_experts(self.model):
            super().set_router_loss(coefficient)
            return
        if not has_router_loss(self.model):
            if coefficient:
                raise ConfigError(
                    f"engine.router_loss is {coefficient}, and transformers has no load-balancing loss for {kind}; "
                    "leave it out"
                )
            logger.info("%s: transformers has no load-balancing loss for its experts; none is added", kind)
            return
        self.router_coefficient = asked_coefficient(self.model) if coefficient is None else coefficient
        if self.router_coefficient:
            logger.info("%s: the load-balancing loss of its experts has the factor %g", kind, self.router_coefficient)
        else:
            logger.info(
                "%s: its experts are trained without a load-balancing loss; engine.router_loss gives it a factor", kind
            )

    def _router_loss(
        self, logits: tuple[torch.Tensor, ...], labels: torch.Tensor, padding: int, context: ContextShare | None
    ) -> torch.Tensor | None:
        """Return the load-balancing loss with its factor, times the number of targets."""
        top_k = self.model.config.num_experts_per_tok
        return self.router_coefficient * router_loss(logits, labels, top_k=top_k, padding=padding, context=context)

    def _positions(self, input_ids: torch.Tensor, sequences: Sequences, before: States) -> torch.Tensor:
        """Return each token's place in its sequence, ``[B, T]``: what rotary embeddings turn by."""
        read = next((KeyValues(*state).lengths for (_, kind), state in before.items() if kind == "attention"), None)
        return positions_after(input_ids, sequences, read)

    def check_drawable(self) -> None:
        """Refuse: a hybrid's first values are transformers'.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"a {self.config.MODEL_TYPE} model is trained from a checkpoint (model.path); make a new one with "
            "transformers (AutoModelForCausalLM.from_config) and save it first"
        )


def host_model(config: HybridConfig) -> PreTrainedModel:
    """Build transformers' model without its head, with our mixers, on the current device.

    Args:
        config: The model's configuration with its plan.

    Raises:
        ConfigError: transformers cannot build a model of this configuration.
    """
    host = config.HOST
    attention.register()
    module, _, name = host.model.partition(":")
    base: type[PreTrainedModel] = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    try:
        model = base._from_config(host_settings(config), attn_implementation=attention.NAME)
    except _REFUSALS as error:
        raise ConfigError(f"transformers cannot build this {config.MODEL_TYPE} model: {reason(error)}") from None
    layers = config.mixer_config()
    place, _, kind = host.mixer.rpartition(":")
    mixer = getattr(importlib.import_module(f"statex_dist.models.{place or 'hybrid.mixers'}"), kind)
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(partial(_name_layer, index), with_kwargs=True)
        if index in config.recurrent_layers:
            parent, _, leaf = config.place(index).rpartition(".")
            setattr(layer.get_submodule(parent), leaf, mixer(layers, index))
    return model


def host_settings(config: HybridConfig) -> Any:
    """Return transformers' configuration of the text model, without our plan."""
    values = {key: value for key, value in config.text.items() if key not in ("auto_map", "architectures", "statex")}
    model_type = values.pop("model_type", config.MODEL_TYPE)
    return CONFIG_MAPPING[model_type].from_dict(values)


def _name_layer(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tell the mixers of a layer which one it is: a host may share a module between layers."""
    call = kwargs.get("statex")
    return None if call is None else (args, {**kwargs, "statex": call.of(index)})


def restore_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds (of rotary embeddings), after a model was made on ``meta``."""
    with torch.no_grad():
        for module in model.modules():
            if module._non_persistent_buffers_set:
                model._init_weights(module)

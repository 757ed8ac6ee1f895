"""The language model of any family: embeddings, layers, final norm and head, mitigation, first values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from statex_dist.batch import IGNORE_INDEX
from statex_dist.distributed.context_group import ContextShare
from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.core.layers import RMSNorm
from statex_dist.models.core.mitigation import Mitigation
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.layout import Names, Part
from statex_dist.models.registry import Family, Role, SharedInputs, family_of, parameter_roles
from statex_dist.models.row_mapping import Constant, Distribution, Normal, generator_for
from statex_dist.ops.loss import LOSS_CHUNK_TOKENS, linear_cross_entropy

Recompute = Literal["none", "block", "expanded"]
"""Layers that keep only their input for the backward pass and compute the rest again: none, each, or the expanded."""


class Trunk(nn.Module):
    """Embeddings, layers and final norm under the attribute names of the family's checkpoints.

    Args:
        config: The model's configuration with its plan.
        names: Where the family keeps embeddings and norm.
        blocks: The class of each layer; it is called with ``config`` and the layer's index.
        shared: Shapes of parameters that the layers share, by name inside the trunk.
        shared_inputs: Computes each layer's inputs from them; a function of a module, so that a model can be pickled.

    Attributes:
        recompute: Layers that are computed again in the backward pass.
        state_kinds: Kinds of each layer's states, in order.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        names: Names,
        blocks: Sequence[Callable[[ModelConfig, int], nn.Module]],
        shared: Mapping[str, tuple[int, ...]] | None = None,
        shared_inputs: SharedInputs | None = None,
    ):
        super().__init__()
        self.config, self._shared_inputs = config, shared_inputs
        self.embedding_name, self.final_norm_name = names.embedding, names.final_norm
        self.add_module(names.embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        for name, shape in (shared or {}).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.layers = nn.ModuleList(block(config, layer) for layer, block in enumerate(blocks))
        self.add_module(names.final_norm, RMSNorm(config.hidden_size, eps=config.final_norm_eps))
        self.recompute: Recompute = "none"
        attention = {layer: config.attention_layer(layer) for layer in config.attention_layers}
        kinds = {layer: found.state_kinds for layer, found in attention.items() if found is not None}
        self.state_kinds = [kinds.get(layer, ("recurrent",)) for layer in range(config.num_hidden_layers)]

    @property
    def embedding_table(self) -> nn.Embedding:
        """The embedding table, under whatever name the family's checkpoints have for it."""
        return getattr(self, self.embedding_name)

    @property
    def final_norm(self) -> RMSNorm:
        """The norm behind the layers, under whatever name the family's checkpoints have for it."""
        return getattr(self, self.final_norm_name)

    def shared_inputs(self) -> Sequence[Sequence[torch.Tensor | None]]:
        """Return further arguments of the layers, each one per layer, from the parameters that they share."""
        return () if self._shared_inputs is None else self._shared_inputs(self)

    def _recomputes(self, layer: int) -> bool:
        if self.recompute == "expanded":
            return self.config.statex is not None and self.config.statex.get(layer) is not None
        return self.recompute == "block"

    def forward(
        self, input_ids: torch.Tensor, sequences: Sequences, states: list[LayerState] | None
    ) -> tuple[torch.Tensor, list[LayerState]]:
        """Return the final hidden states ``[B, T, hidden]`` and the layers' states.

        A layer with several states takes and returns them as a list.
        """
        hidden = self.embedding_table(input_ids)
        new_states: list[LayerState] = []
        shared, given = self.shared_inputs(), iter(states or ())
        for index, layer in enumerate(self.layers):
            before = [next(given) for _ in self.state_kinds[index]] if states else [None]
            inputs = (hidden, sequences, before[0] if len(before) == 1 else before, *(x[index] for x in shared))
            if self.training and self._recomputes(index):
                hidden, new_state = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                hidden, new_state = layer(*inputs)
            if new_state is not None:
                new_states += new_state if isinstance(new_state, list) else [new_state]
        norm = self.final_norm
        return norm(hidden.to(norm.weight.dtype)), new_states


class LMHead(nn.Linear):
    """Hidden states to logits, or to their summed cross entropy without ever holding all logits.

    Attributes:
        chunk_tokens: Tokens whose logits are held at once with labels; 0 holds them all.
        factor: Factor of the logits.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.chunk_tokens = LOSS_CHUNK_TOKENS
        self.factor = 1.0

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits ``[B, T, vocab]``; with ``labels [B, T]`` the sum of the cross entropy in nats.

        One call, whatever the number of chunks: ZeRO-3 gathers the weight once for it.
        """
        if self.factor != 1.0:
            hidden = hidden * self.factor
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            chunk_tokens=self.chunk_tokens,
        )


class LMOutput(NamedTuple):
    """Result of a forward pass; a tuple, because DeepSpeed's hooks look for tensors in tuples, lists and dicts only.

    Attributes:
        logits: ``[B, T, vocab]``; None where labels were given.
        loss_sum: Sum of the cross entropy over all target tokens, in nats; None without labels.
        router_loss: The load-balancing loss of experts with its factor, times the number of targets; None where a
            model is not trained with one.
        states: Each layer's state after the last token; None unless asked for.
    """

    logits: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    states: list[LayerState] | None = None
    router_loss: torch.Tensor | None = None


class Hidden(NamedTuple):
    """Results of the layers of a model.

    Attributes:
        hidden: ``[B, T, hidden]``, behind the final norm.
        states: Each layer's state after the tokens.
        router_logits: Of each layer with experts, ``[B * T, experts]``; empty where they are not needed.
    """

    hidden: torch.Tensor
    states: list[LayerState]
    router_logits: tuple[torch.Tensor, ...] = ()


class RecurrentLM(nn.Module):
    """A causal language model with recurrent layers.

    Args:
        config: A family's configuration; its plan decides each layer's state.

    Attributes:
        max_state_bytes: Bound of the chunk states that the scan of an expanded GLA layer holds at once on a GPU; None
            for its default.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.require_runnable()
        self.config = config
        self._build()
        self.max_state_bytes: int | None = None
        self._mitigation: Mitigation | None = None

    def _build(self) -> None:
        """Make trunk and head."""
        config, family = self.config, self.family
        self.trunk_name = family.names.trunk
        prefix = f"{family.names.trunk}."
        trunk = Trunk(
            config,
            names=family.names,
            blocks=family.block_classes(config),
            shared={name.removeprefix(prefix): spec.shape for name, spec in family.shared_tensors(config).items()},
            shared_inputs=family.shared_inputs(),
        )
        self.add_module(self.trunk_name, trunk)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding_table.weight

    @property
    def mitigation(self) -> Mitigation | None:
        """Mitigation of state collapse that the layers apply, or None.

        Raises:
            ConfigError: Set to one whose equation does not hold for the model.
        """
        return self._mitigation

    @mitigation.setter
    def mitigation(self, mitigation: Mitigation | None) -> None:
        if mitigation is not None:
            self.check_mitigation(mitigation)
        self._mitigation = mitigation

    def check_mitigation(self, mitigation: Mitigation) -> None:
        """Raise if a mitigation's equation does not hold for the model.

        Raises:
            ConfigError: It does not.
        """
        mitigation.check_model(self.config)

    def anywhere(self, found: bool) -> bool:
        """Return whether ``found`` holds in any process that has a part of the model."""
        return found

    @property
    def family(self) -> Family:
        """The model's family (not an attribute: its modules could not be pickled or copied with the model)."""
        return family_of(self.config.MODEL_TYPE)

    @property
    def trunk(self) -> Trunk:
        """Embeddings, layers and final norm."""
        return getattr(self, self.trunk_name)

    @property
    def embedding_table(self) -> nn.Embedding:
        """The embedding table."""
        return self.trunk.embedding_table

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        return self.trunk.layers

    @property
    def final_norm_name(self) -> str:
        """Name of the norm behind the layers in the trunk."""
        return self.trunk.final_norm_name

    @property
    def recompute(self) -> Recompute:
        """Layers that are computed again in the backward pass."""
        return self.trunk.recompute

    @recompute.setter
    def recompute(self, recompute: Recompute) -> None:
        self.trunk.recompute = recompute

    @property
    def state_places(self) -> list[tuple[int, str]]:
        """Layer and kind of each of the states that a forward pass returns, in order.

        Kinds are ``recurrent``, ``attention`` (keys and values) and ``convolution`` (of an attention layer's inputs).
        """
        return [(layer, kind) for layer, kinds in enumerate(self.trunk.state_kinds) for kind in kinds]

    def finish_build(self, dtype: torch.dtype) -> None:
        """Give the parameters a dtype, after the model was made on ``meta`` and moved to a device."""
        self.to(dtype)

    def make_buffers(self) -> None:
        """Give memory on the CPU to the buffers of a model whose parameters stay on ``meta``; our own have none."""
        assert not list(self.buffers()), "a model with buffers has its own make_buffers"

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Return what checkpoints hold of the model, by name in memory."""
        return dict(self.named_parameters())

    def file_parts(self) -> dict[str, list[Part]]:
        """Return the tensors of a model's files that each of :meth:`stored_tensors` is made of, in order."""
        return {name: [Part(name, spec.shape)] for name, spec in self.family.tensors(self.config).items()}

    def roles(self) -> dict[str, Role]:
        """Return the role of each parameter in an expansion (:func:`statex_dist.models.registry.parameter_roles`)."""
        return parameter_roles(self.config)

    def no_decay(self) -> set[str]:
        """Return the names of parameters without weight decay."""
        return {name for name, spec in self.family.tensors(self.config).items() if not spec.decay}

    def _hidden(self, input_ids: torch.Tensor, sequences: Sequences, states: list[LayerState] | None) -> Hidden:
        """Run embeddings, layers and final norm."""
        return Hidden(*self.trunk(input_ids, sequences, states))

    def set_router_loss(self, coefficient: float | None) -> None:
        """Set the factor of the experts' load-balancing loss in training; None takes what the configuration asks for.

        Raises:
            ConfigError: The model cannot be trained with one.
        """
        if coefficient:
            raise ConfigError(
                f"engine.router_loss is {coefficient}, and this {self.config.MODEL_TYPE} model has no experts; leave "
                "it out"
            )

    def _router_loss(
        self, logits: tuple[torch.Tensor, ...], labels: torch.Tensor, padding: int, context: ContextShare | None
    ) -> torch.Tensor | None:
        """Return the load-balancing loss with its factor, times the number of targets."""
        return None

    def forward(
        self,
        input_ids: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        states: list[LayerState] | None = None,
        output_states: bool = False,
        overwrite_states: bool = False,
        logits_to_keep: int | None = None,
        backend: str = "auto",
        chunk_size: int | None = None,
        context: ContextShare | None = None,
        padding: int = 0,
    ) -> LMOutput:
        """Run the model.

        Args:
            input_ids: ``[B, T]`` int64.
            labels: ``[B, T]`` int64, already shifted, -100 where there is no target. With them the loss is returned
                in place of the logits.
            cu_seqlens: ``[S + 1]`` borders of packed sequences (``B`` must be 1), or None.
            seq_idx: ``[1, T]`` int32, the same borders in mamba_ssm's form.
            states: Each layer's state before ``input_ids``, or None for zero.
            output_states: Whether to return the states after ``input_ids``.
            overwrite_states: Whether a step of one token may write the states after it over ``states``, which saves as
                much memory as they take and most of the step's time; without autograd alone.
            logits_to_keep: Number of last tokens whose logits are returned; None returns all. Not with ``labels``.
            backend: Scan implementation (``statex_dist.ops.backends.Backend``).
            chunk_size: Tokens per chunk of our own scans, a power of two; None picks one.
            context: How ``input_ids`` connect to the tokens of other ranks, or None. ``states`` are then those
                before and after the whole pack, ``[1, ...]``.
            padding: Tokens at the end of each row that are no text.

        Raises:
            ConfigError: The mitigation is for evaluation only, and the call trains or packs.
        """
        if self.mitigation is not None:
            self.mitigation.check_call(training=self.training, packed=cu_seqlens is not None or context is not None)
        sequences = Sequences(
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
            output_states=output_states,
            overwrite_states=overwrite_states,
            backend=backend,
            chunk_size=chunk_size,
            max_state_bytes=self.max_state_bytes,
            context=context,
            mitigation=self.mitigation,
        )
        hidden, new_states, routes = self._hidden(input_ids, sequences, states)
        if logits_to_keep is not None:
            assert labels is None, "a loss is taken over all tokens"
            hidden = hidden[:, -logits_to_keep:]
        result = self.lm_head(hidden, labels)
        return LMOutput(
            logits=result if labels is None else None,
            loss_sum=None if labels is None else result,
            states=new_states if output_states else None,
            router_loss=None if labels is None or not routes else self._router_loss(routes, labels, padding, context),
        )

    def check_drawable(self) -> None:
        """Raise if the first values of this model are not ours to draw.

        Raises:
            ConfigError: They are transformers'.
        """

    def first_value(self, name: str, shape: tuple[int, ...]) -> Distribution:
        """Return the distribution of a parameter's first values.

        Args:
            name: Name of the parameter.
            shape: Its shape; that of the parameter itself is lost once an engine has partitioned it.
        """
        names = self.family.names
        if place := names.split(name):
            attends = place[0] in self.config.attention_layers
            attention = self.config.attention_layer(place[0]) if attends else None
            if attention is not None:
                return attention.first_value(place[1], shape)
            return self.family.first_value(place[1], shape, config=self.config)
        if name in self.family.shared_tensors(self.config):
            return Constant(0.0)
        if name.endswith("norm.weight") or name.endswith(f"{names.final_norm}.weight"):
            return Constant(1.0)
        embedding_std = self.config.embedding_initializer_range if name == names.embeddings else None
        return Normal(embedding_std or self.config.initializer_range)

    @torch.no_grad()
    def init_parameters(self, seed: int) -> None:
        """Give every parameter its first value, fixed by ``seed`` and the parameter's name."""
        self.check_drawable()
        for name, parameter in self.named_parameters():
            first = self.first_value(name, tuple(parameter.shape))
            values = first.draw(generator_for(seed, name), 0, parameter.numel())
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))

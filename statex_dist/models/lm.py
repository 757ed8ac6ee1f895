"""The language model of any family: trunk and head, mitigation, first values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from statex_dist.distributed.context_group import ContextShare
from statex_dist.models.config import ModelConfig
from statex_dist.models.core.mitigation import Mitigation
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.core.trunk import LMHead, Trunk
from statex_dist.models.family import Family
from statex_dist.models.registry import family_of
from statex_dist.models.row_mapping import Constant, Distribution, Normal, generator_for


class LMOutput(NamedTuple):
    """Result of a forward pass; a tuple, because DeepSpeed's hooks look for tensors in tuples, lists and dicts only.

    Attributes:
        logits: ``[B, T, vocab]``; None where labels were given.
        loss_sum: Sum of the cross entropy over all target tokens, in nats; None without labels.
        states: Each layer's state after the last token; None unless asked for.
    """

    logits: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    states: list[LayerState] | None = None


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
        family = family_of(config.MODEL_TYPE)
        self.config, self.trunk_name = config, family.names.trunk
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
            self.lm_head.weight = self.trunk.embedding_table.weight
        self.max_state_bytes: int | None = None
        self._mitigation: Mitigation | None = None

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
        hidden, new_states = self.trunk(input_ids, sequences, states)
        if logits_to_keep is not None:
            assert labels is None, "a loss is taken over all tokens"
            hidden = hidden[:, -logits_to_keep:]
        result = self.lm_head(hidden, labels)
        return LMOutput(
            logits=result if labels is None else None,
            loss_sum=None if labels is None else result,
            states=new_states if output_states else None,
        )

    @torch.no_grad()
    def init_parameters(self, seed: int) -> None:
        """Give every parameter its first value, fixed by ``seed`` and the parameter's name."""
        shared = self.family.shared_tensors(self.config)
        first: Distribution
        for name, parameter in self.named_parameters():
            if place := self.family.names.split(name):
                first = self.family.first_value(place[1], tuple(parameter.shape), config=self.config)
            elif name in shared:
                first = Constant(0.0)
            elif name.endswith("norm.weight") or name.endswith(f"{self.family.names.final_norm}.weight"):
                first = Constant(1.0)
            else:
                std, embedding_std = self.config.initializer_range, self.config.embedding_initializer_range
                first = Normal(embedding_std if name == self.family.names.embeddings and embedding_std else std)
            values = first.draw(generator_for(seed, name), 0, parameter.numel())
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))

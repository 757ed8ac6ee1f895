"""Embeddings, layers, final norm and head: what stands around the layers of any family, or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from statex_dist.batch import IGNORE_INDEX
from statex_dist.models.config import ModelConfig
from statex_dist.models.core.layers import RMSNorm
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.layout import Names
from statex_dist.ops.loss import LOSS_CHUNK_TOKENS, linear_cross_entropy

Recompute = Literal["none", "block", "expanded"]
"""Layers that keep only their input for the backward pass and compute the rest again: none, each, or the expanded."""

SharedInputs = Callable[["Trunk"], Sequence[Sequence[torch.Tensor | None]]]
"""Computes each layer's inputs from shared parameters: further arguments of its forward, each one per layer."""


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
        """Return the final hidden states ``[B, T, hidden]`` and the layers' states."""
        hidden = self.embedding_table(input_ids)
        new_states: list[LayerState] = []
        shared = self.shared_inputs()
        for index, layer in enumerate(self.layers):
            inputs = (hidden, sequences, states[index] if states else None, *(x[index] for x in shared))
            if self.training and self._recomputes(index):
                hidden, new_state = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                hidden, new_state = layer(*inputs)
            if new_state is not None:
                new_states.append(new_state)
        norm = self.final_norm
        return norm(hidden.to(norm.weight.dtype)), new_states


class LMHead(nn.Linear):
    """Hidden states to logits, or to their summed cross entropy without ever holding all logits.

    Attributes:
        chunk_tokens: Tokens whose logits are held at once with labels; 0 holds them all.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.chunk_tokens = LOSS_CHUNK_TOKENS

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits ``[B, T, vocab]``; with ``labels [B, T]`` the sum of the cross entropy in nats.

        One call, whatever the number of chunks: ZeRO-3 gathers the weight once for it.
        """
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            chunk_tokens=self.chunk_tokens,
        )

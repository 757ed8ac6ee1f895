"""Embeddings, layers and final norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache import CACHE_NAME, LayerState, StateXCache, Tokens, check_fit, check_padding, given_memory
from .layers import RMSNorm


class Trunk(PreTrainedModel):
    """The model without its head; a family names its layers and where its checkpoints keep what."""

    _is_stateful = True
    _supports_cache_class = False
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers' own form
    block: type[nn.Module]
    embedding_name = "embeddings"
    final_norm_name = "norm"

    def __init__(self, config: Any):
        super().__init__(config)
        self.add_module(self.embedding_name, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(self.block(config, layer) for layer in range(config.num_hidden_layers))
        self.add_module(self.final_norm_name, RMSNorm(config.hidden_size, config.rms_eps))
        self.add_shared_parameters(config)
        self.post_init()

    def add_shared_parameters(self, config: Any) -> None:
        """Add parameters that the layers share: none."""

    def shared_inputs(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Return what the shared parameters give a layer: nothing."""
        return ()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        return self.get_submodule(self.embedding_name)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.add_module(self.embedding_name, value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: StateXCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_params: StateXCache | None = None,
        cache: StateXCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Read some tokens.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, or ``[B, all tokens so far]``: 0 for padding, which must be on the left unless
                no memory is used.
            past_key_values: The memory of the tokens before these, or None at the start of a text.
            inputs_embeds: ``[B, T, hidden]`` in place of ``input_ids``.
            use_cache: Whether to return the memory after the tokens; by default, unless training or padded on the
                right.
            output_hidden_states: Whether to return the inputs of all layers as well.
            return_dict: Whether to return a named output; by default.
            cache_params: Another name for ``past_key_values``.
            cache: The name that transformers 5 has for it.
            kwargs: What other models take; ignored.

        Raises:
            ValueError: There are no tokens, or the mask or the memory does not fit them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        given = given_memory(cache, past_key_values, cache_params)
        memory = StateXCache(len(self.layers)) if given is None else given
        check_fit(hidden, attention_mask, memory)
        tokens = self._tokens(hidden, attention_mask, memory)
        ends_in_padding = check_padding(tokens.keep, memory, needs_state=given is not None or bool(use_cache))
        if use_cache is None:
            use_cache = given is not None or not (self.training or ends_in_padding)
        states: list[LayerState | None] = []
        seen: tuple[torch.Tensor, ...] | None = () if output_hidden_states else None
        for index, layer in enumerate(self.layers):
            seen = None if seen is None else (*seen, hidden)
            hidden, state = layer(hidden, tokens, memory.layers[index], *self.shared_inputs(index))
            states.append(state)
        norm = self.get_submodule(self.final_norm_name)
        hidden = norm(hidden.to(norm.weight.dtype))  # type: ignore[arg-type]
        if use_cache:
            memory.layers = states
            memory.seen_tokens += hidden.shape[1]
            memory.text_tokens = tokens.positions[:, -1] + 1
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if seen is None else (*seen, hidden),
            **{CACHE_NAME: memory if use_cache else None},  # type: ignore[arg-type]
        )
        return output.to_tuple() if return_dict is False else output

    def _tokens(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, memory: StateXCache) -> Tokens:
        batch, num_tokens = hidden.shape[:2]
        keep = None
        if attention_mask is not None:
            keep = attention_mask[:, -num_tokens:].bool()
            keep = None if bool(keep.all()) else keep
        ones = torch.ones(batch, num_tokens, dtype=torch.int64, device=hidden.device)
        positions = (ones if keep is None else keep.long()).cumsum(1) - 1
        if memory.text_tokens is not None:
            positions = positions + memory.text_tokens.to(positions.device).unsqueeze(1)
        return Tokens(keep=keep, positions=positions)

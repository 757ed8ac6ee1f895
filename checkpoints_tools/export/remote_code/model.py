"""The model in the form of transformers' classes: cache, padding, loss, generation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from checkpoints_tools.export.remote_code.configuration import StateXConfig
from checkpoints_tools.export.remote_code.spans import TokenSpan, in_rows
from statex_dist.models.core.layers import RMSNorm
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.hgrn2.config import shared_tensors
from statex_dist.models.hgrn2.mixer import HGRN2Block, shared_inputs

CACHE_NAME = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
"""What this release of transformers calls the memory in outputs and keyword arguments."""

TRUNK = "model"
EMBEDDING = "embeddings"
FINAL_NORM = "norm"
"""Where the family's checkpoints keep the model without its head, and in it the embedding table and the last norm."""

SPAN_TOKENS = 4096
"""Tokens that a layer is given at once: it then takes a constant amount of memory, however long the text is."""


class StateXCache:
    """States of all layers after the tokens read so far; ``forward`` replaces them in place.

    Attributes:
        layers: Each layer's state; None before the first token.
        seen_tokens: Tokens read so far, padding included.
        text_tokens: ``[B]`` tokens of each text read so far, without padding; None before the first.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # in transformers 5 said of memories that do not count what they have read; this one does

    def __init__(self, num_layers: int):
        self.layers: list[LayerState | None] = [None] * num_layers
        self.seen_tokens = 0
        self.text_tokens: torch.Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens read so far."""
        return self.seen_tokens

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no longest text."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.layers = [None] * len(self.layers)
        self.seen_tokens, self.text_tokens = 0, None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give each beam the states of the beam that it continues."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map(self, function: Any) -> None:
        self.layers = [None if state is None else tuple(map(function, state)) for state in self.layers]
        if self.text_tokens is not None:
            self.text_tokens = function(self.text_tokens)


def given_memory(*memories: StateXCache | None) -> StateXCache | None:
    """Return the one memory that a call was given, under whatever name, or None.

    Raises:
        ValueError: It is another model's.
    """
    memory = next((memory for memory in memories if memory is not None), None)
    if memory is not None and not isinstance(memory, StateXCache):
        raise ValueError(f"the cache is a {type(memory).__name__}; this model has a StateXCache, which it makes itself")
    return memory


def check_fit(hidden: torch.Tensor, attention_mask: torch.Tensor | None, memory: StateXCache) -> None:
    """Raise unless mask and memory are of the tokens ``hidden [B, T, hidden]``.

    Raises:
        ValueError: They are not, or there are no tokens.
    """
    batch, num_tokens = hidden.shape[:2]
    if not batch * num_tokens:
        raise ValueError(f"there are no tokens: the input has {batch} rows of {num_tokens}")
    if memory.text_tokens is not None and len(memory.text_tokens) != batch:
        raise ValueError(f"the cache is of {len(memory.text_tokens)} rows, the input of {batch}")
    if attention_mask is None:
        return
    allowed = sorted({num_tokens, memory.seen_tokens + num_tokens})
    if tuple(attention_mask.shape) not in [(batch, length) for length in allowed]:
        shapes = " or ".join(f"[{batch}, {length}]" for length in allowed)
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; these tokens need {shapes}")


def check_padding(keep: torch.Tensor | None, memory: StateXCache, *, needs_state: bool) -> bool:
    """Return whether a text ends in padding, where it may.

    Args:
        keep: ``[B, T]``, false for padding; None where there is none.
        memory: What was read before.
        needs_state: Whether the state after the tokens, which must be those of texts, is used.

    Raises:
        ValueError: There is padding inside of a text, or at its end though the state is used.
    """
    if keep is None:
        return False
    before = torch.zeros_like(keep[:, :1]) if memory.text_tokens is None else memory.text_tokens.unsqueeze(1) > 0
    begun = (keep.cumsum(1) > 0) | before.to(keep.device)
    behind = begun & ~keep
    if bool((keep & (behind.cumsum(1) > 0)).any()):
        raise ValueError("attention_mask has padding inside of a text; pad on the left")
    ends_in_padding = bool(behind.any())
    if ends_in_padding and needs_state:
        raise ValueError("attention_mask has padding behind a text, whose state would be lost; pad on the left")
    return ends_in_padding


class StateXModel(PreTrainedModel):
    """The model without its head."""

    config_class = StateXConfig
    base_model_prefix = TRUNK
    _is_stateful = True
    _supports_cache_class = False
    _no_split_modules = ["HGRN2Block"]  # noqa: RUF012 - transformers' own form

    def __init__(self, config: Any):
        super().__init__(config)
        sizes = config.sizes()
        self.add_module(EMBEDDING, nn.Embedding(config.vocab_size, config.hidden_size))
        for name, spec in shared_tensors(sizes).items():
            self.register_parameter(name.removeprefix(f"{TRUNK}."), nn.Parameter(torch.zeros(spec.shape)))
        self.layers = nn.ModuleList(HGRN2Block(sizes, layer) for layer in range(config.num_hidden_layers))
        self.add_module(FINAL_NORM, RMSNorm(config.hidden_size, eps=sizes.final_norm_eps))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        return self.get_submodule(EMBEDDING)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.add_module(EMBEDDING, value)

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
        batch, num_tokens = hidden.shape[:2]
        keep = None if attention_mask is None else attention_mask[:, -num_tokens:].bool()
        keep = None if keep is None or bool(keep.all()) else keep.to(hidden.device)
        ends_in_padding = check_padding(keep, memory, needs_state=given is not None or bool(use_cache))
        if use_cache is None:
            use_cache = given is not None or not (self.training or ends_in_padding)
        borders, counts = None, torch.full((batch,), num_tokens, device=hidden.device)
        if keep is not None:
            counts = keep.sum(1)
            hidden, borders = hidden[keep].unsqueeze(0), F.pad(counts.cumsum(0), (1, 0)).int()
        states: list[LayerState | None] = []
        seen: tuple[torch.Tensor, ...] | None = () if output_hidden_states else None
        shared = shared_inputs(self)
        for index, layer in enumerate(self.layers):
            seen = None if seen is None else (*seen, in_rows(hidden, keep))
            inputs = tuple(of_layer[index] for of_layer in shared)
            hidden, state = _run_layer(layer, hidden, borders, memory.layers[index], inputs)
            states.append(state)
        norm = self.get_submodule(FINAL_NORM)
        hidden = in_rows(norm(hidden.to(norm.weight.dtype)), keep)  # type: ignore[arg-type]
        if use_cache:
            memory.layers = states
            memory.seen_tokens += num_tokens
            memory.text_tokens = counts if memory.text_tokens is None else memory.text_tokens.to(counts) + counts
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if seen is None else (*seen, hidden),
            **{CACHE_NAME: memory if use_cache else None},  # type: ignore[arg-type]
        )
        return output.to_tuple() if return_dict is False else output


def _run_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    borders: torch.Tensor | None,
    state: LayerState | None,
    shared: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor, LayerState]:
    """Run a layer span by span; return its outputs, and its state without memory that belongs to inputs."""
    outputs = []
    for number, span in enumerate(hidden.split(SPAN_TOKENS, dim=1)):
        cut = None if borders is None else (borders - number * SPAN_TOKENS).clamp(0, span.shape[1])
        output, state = layer(span, TokenSpan(cu_seqlens=cut), state, *shared)
        outputs.append(output)
    assert state is not None
    parts = (part.clone() if part.untyped_storage().nbytes() > part.nbytes else part for part in state)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), tuple(parts)


class StateXForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head; ``generate()`` does all that transformers offers but assisted decoding."""

    config_class = StateXConfig
    base_model_prefix = StateXModel.base_model_prefix
    _is_stateful = True
    _supports_cache_class = False
    _no_split_modules = StateXModel._no_split_modules
    _tied_weights_keys = {"lm_head.weight": f"{TRUNK}.{EMBEDDING}.weight"}  # noqa: RUF012 - transformers' own form

    def __init__(self, config: Any):
        super().__init__(config)
        self.add_module(self.base_model_prefix, StateXModel(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def trunk(self) -> StateXModel:
        """The model without its head."""
        return self.get_submodule(self.base_model_prefix)  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding table."""
        return self.trunk.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.trunk.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: StateXCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_params: StateXCache | None = None,
        cache: StateXCache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Predict the next token at each position; further arguments are those of :meth:`StateXModel.forward`.

        Args:
            labels: ``[B, T]``, the ``input_ids`` with -100 where there is no target; they are shifted here.
            logits_to_keep: Number of last tokens whose logits are returned, or the indices of tokens; 0 for all.
            token_type_ids: What tokenizers may add; ignored.

        Raises:
            ValueError: Labels ask for the logits that are to be left out, or the trunk refuses the input.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all tokens; leave logits_to_keep out")
        output = self.trunk(
            input_ids,
            attention_mask=attention_mask,
            cache=given_memory(cache, past_key_values, cache_params),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        memory = {CACHE_NAME: output[CACHE_NAME]} if CACHE_NAME in output else {}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=output.hidden_states, **memory)
        return result.to_tuple() if return_dict is False else result

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Begin ``generate()`` with an empty memory, unless it is given one or is not to use any."""
        given = given_memory(model_kwargs.pop("cache_params", None), model_kwargs.get(CACHE_NAME))
        if generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = StateXCache(len(self.trunk.layers)) if given is None else given

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: StateXCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = True,
        cache: StateXCache | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass: of ``input_ids`` those that the memory has not read yet."""
        memory = given_memory(cache, past_key_values)
        read = 0 if memory is None else memory.get_seq_length()
        inputs: dict[str, Any] = {"attention_mask": attention_mask, CACHE_NAME: memory, "use_cache": use_cache}
        if inputs_embeds is not None and not read:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            # The mask is of the whole text, also where the ids are only what is new.
            new: int | None = (input_ids if attention_mask is None else attention_mask).shape[1] - read
            if {"next_sequence_length", "is_first_iteration"} & kwargs.keys():  # transformers 5 says it itself
                new = kwargs.get("next_sequence_length")
            inputs["input_ids"] = input_ids if new is None else input_ids[:, -new:]
        if logits_to_keep is not None:
            inputs["logits_to_keep"] = logits_to_keep
        return inputs

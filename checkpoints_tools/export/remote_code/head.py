"""The language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import CACHE_NAME, StateXCache, given_memory
from .gla import StateXConfig, StateXModel


class StateXForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head; ``generate()`` does all that transformers offers but assisted decoding."""

    config_class = StateXConfig
    base_model_prefix = StateXModel.base_model_prefix
    _is_stateful = True
    _supports_cache_class = False
    _no_split_modules = StateXModel._no_split_modules
    _tied_weights_keys = {  # noqa: RUF012 - transformers' own form
        "lm_head.weight": f"{StateXModel.base_model_prefix}.{StateXModel.embedding_name}.weight"
    }

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
            logits_to_keep: Return the logits of so many last tokens, or of the tokens with these indices; 0 for all.
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

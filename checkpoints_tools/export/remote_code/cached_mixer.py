"""A recurrent mixer as a host calls its own, with the host's cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from checkpoints_tools.export.remote_code.spans import TokenSpan, in_rows
from statex_dist.models.core.mixer import RecurrentMixer
from statex_dist.models.core.sequences import LayerState


class CachedMixer(RecurrentMixer):
    """The call of the host around a mixer's own, with the host's cache; it stands before the recurrence's class."""

    layer_idx: int

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        cache_params: Any = None,
        past_key_values: Any = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Mix tokens ``[B, T, hidden]``.

        Args:
            hidden_states: The layer's input.
            cache: The host's cache, or None.
            attention_mask: ``[B, all tokens so far]``: 0 for padding, which no state reads; None without padding.
            cache_params: The cache's name in transformers 5.17 to 5.23.
            past_key_values: Another name of it.
            cu_seq_lens_q: ``[S + 1]`` borders of packed sequences (batch 1), or None.
            seq_idx: The same borders in mamba_ssm's form; ``cu_seq_lens_q`` has to be given beside it.
            **kwargs: The host's further arguments, which no recurrent mixer reads.

        Raises:
            ValueError: The borders are given as ``seq_idx`` alone, or the mask is not of two dimensions.
        """
        if seq_idx is not None and cu_seq_lens_q is None:
            raise ValueError("packed sequences need cu_seq_lens_q beside seq_idx")
        memory = next((given for given in (cache, cache_params, past_key_values) if given is not None), None)
        keep, borders, x = None, cu_seq_lens_q, hidden_states
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; [rows, tokens] is needed")
            keep = attention_mask[:, -x.shape[1] :].bool()
        if keep is not None and not bool(keep.all()):
            x, borders = x[keep].unsqueeze(0), F.pad(keep.sum(1).cumsum(0), (1, 0)).int()
        else:
            keep = None
        y, state = super().forward(x, TokenSpan(cu_seqlens=borders), self.state_before(memory))
        assert state is not None
        self.keep_state(memory, state)
        return in_rows(y, keep)

    def state_before(self, memory: Any) -> LayerState | None:
        """Return the layer's state in the host's cache, or None before the first token."""
        if memory is None:
            return None
        if hasattr(memory, "get_linear_cache"):  # MiniMax's
            held = memory.get_linear_cache(self.layer_idx)
            return held if held is None else (held,)
        if not memory.has_previous_state(self.layer_idx):
            return None
        held = memory.layers[self.layer_idx]
        columns = held.conv_states[0]
        return held.recurrent_states[0], columns[..., columns.shape[-1] + 1 - self.geometry.conv_kernel :]

    def keep_state(self, memory: Any, state: LayerState) -> None:
        """Write the layer's state to the host's cache, whose convolution states have one column more than ours."""
        if memory is None:
            return
        if hasattr(memory, "set_linear_cache"):
            memory.set_linear_cache(self.layer_idx, state[0])
            return
        recurrent, tail = state
        kernel = self.geometry.conv_kernel
        memory.update_conv_state(F.pad(tail, (1, 0)), self.layer_idx, conv_kernel_size=kernel)
        memory.update_recurrent_state(recurrent, self.layer_idx)

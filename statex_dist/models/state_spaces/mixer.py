"""Layers that mamba_ssm's models have beside plain Mamba2 ones: attention (``MHA``), and an MLP behind either.

Attribute names are those of mamba_ssm's checkpoints (its ``modules/block.py``, ``mha.py`` and ``mlp.py``).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.attention import AttentionMixer
from statex_dist.models.core.layers import RMSNorm
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.mamba2.mixer import Mamba2Mixer
from statex_dist.models.state_spaces.config import StateSpacesConfig
from statex_dist.ops.attention import KeyValues
from statex_dist.ops.conv import convolve_sequences

States = LayerState | list[LayerState] | None


class GatedMLP(nn.Module):
    """SwiGLU channel mixing with both inner projections in one matrix, the gate behind."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.fc2 = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``fc2(up(x) * silu(gate(x)))``."""
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(up * F.silu(gate))


class MHA(AttentionMixer):
    """Softmax attention of one layer, with a convolution over queries, keys and values where the model has it.

    The states are keys and values, and with a convolution a second one, its last inputs ``[S, D, W - 1]``. mamba_ssm
    2.3 keeps the convolution's outputs there after a prompt, so that its steps differ from its own whole pass.
    """

    def __init__(self, config: StateSpacesConfig, layer: int):
        found = config.attention_layer(layer)
        assert found is not None
        sizes, rows = found.sizes, sum(rows for _, rows in found.sizes.parts)
        super().__init__(sizes)
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=sizes.bias)
        if sizes.conv_kernel:
            self.conv1d = nn.Conv1d(rows, rows, sizes.conv_kernel, groups=rows)
        self.out_proj = nn.Linear(sizes.query_size, config.hidden_size, bias=sizes.out_bias)

    def forward(self, x: torch.Tensor, sequences: Sequences, state: States = None) -> tuple[torch.Tensor, States]:
        """Mix tokens; arguments are those of a recurrent mixer, with the states of the layer as a list."""
        qkv, tail = self.in_proj(x), None
        before, tail_before = None, None
        if state is not None:
            before, tail_before = (state[0], state[1][0]) if isinstance(state, list) else (state, None)
        if self.sizes.conv_kernel:
            qkv, tail = convolve_sequences(
                qkv,
                self.conv1d.weight,
                self.conv1d.bias,
                tail=tail_before,
                cu_seqlens=sequences.cu_seqlens,
                seq_idx=sequences.seq_idx,
                output_tail=sequences.output_states,
                context=sequences.context,
            )
        keys = self.num_kv_heads * self.sizes.head_dim
        q, k, v = qkv.split([self.num_heads * self.sizes.head_dim, keys, keys], dim=-1)
        o, after = self.attend(q, k, v, sequences, None if before is None else KeyValues(*before))
        y = self.out_proj(o)
        if after is None or tail is None:
            return y, after
        return y, [after, (tail,)]


class StateSpacesBlock(nn.Module):
    """One pre-norm Mamba2 layer, with an MLP behind it where the model has one."""

    mixing: ClassVar[type[nn.Module]] = Mamba2Mixer

    def __init__(self, config: StateSpacesConfig, layer: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = self.mixing(config, layer)
        self.mlp = None
        if config.gated_mlp_size:
            self.norm2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
            self.mlp = GatedMLP(config.hidden_size, config.gated_mlp_size)

    def forward(self, x: torch.Tensor, sequences: Sequences, state: States = None) -> tuple[torch.Tensor, States]:
        """Return the layer's output ``[B, T, hidden]`` and its states after ``x``."""
        mixed, new_state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), sequences, state)
        x = self._wide(x) + mixed
        if self.mlp is not None:
            x = self._wide(x) + self.mlp(self.norm2(x.to(self.norm2.weight.dtype)))
        return x, new_state

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        """Return a residual in fp32 where the model has it so."""
        return x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x


class AttentionBlock(StateSpacesBlock):
    """One pre-norm attention layer, with an MLP behind it where the model has one."""

    mixing = MHA

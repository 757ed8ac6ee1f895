"""The Mamba2 layer (arXiv 2405.21060)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import LayerState, Tokens
from .convolution import causal_convolution
from .gated_norm import GatedRMSNorm
from .layers import RMSNorm, mask_padding, wide
from .state_space import state_space


class Mamba2Mixer(nn.Module):
    """Token mixing of one layer; the plan changes its ``state_size`` alone."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.config = config
        grouped = config.n_groups * config.before_plan_state_size * config.key_growth(layer)
        self.inner_size = config.num_heads * config.head_dim
        self.conv_sizes = [self.inner_size, grouped, grouped]
        channels = sum(self.conv_sizes)
        rows = self.inner_size + channels + config.num_heads
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=config.use_bias)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(config.num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.num_heads))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        self.norm = GatedRMSNorm(self.inner_size, config.rms_eps, norm_before_gate=False, num_groups=config.n_groups)
        self.out_proj = nn.Linear(self.inner_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x: torch.Tensor, tokens: Tokens, state: LayerState | None) -> tuple[torch.Tensor, LayerState]:
        """Return ``[B, T, hidden]`` and the state after the tokens ``x [B, T, hidden]``."""
        config = self.config
        recurrent, tail = state or (None, None)
        z, xbc, dt = self.in_proj(x).split([self.inner_size, sum(self.conv_sizes), config.num_heads], dim=-1)
        xbc, tail = causal_convolution(mask_padding(xbc, tokens.keep), self.conv1d.weight, self.conv1d.bias, tail)
        inputs, B, C = F.silu(mask_padding(xbc, tokens.keep)).split(self.conv_sizes, dim=-1)
        inputs = inputs.unflatten(-1, (config.num_heads, config.head_dim))
        B, C = (y.unflatten(-1, (config.n_groups, -1)) for y in (B, C))
        dt = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*config.time_step_limit)
        y, recurrent = state_space(inputs, dt, -wide(self.A_log).exp(), B, C, recurrent)
        y = y.to(x.dtype) + inputs * self.D.to(x.dtype).unsqueeze(-1)
        return self.out_proj(self.norm(y.flatten(-2), z)), (recurrent, tail)


class Block(nn.Module):
    """One pre-norm Mamba2 layer."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mixer = Mamba2Mixer(config, layer)

    def forward(self, x: torch.Tensor, tokens: Tokens, state: LayerState | None) -> tuple[torch.Tensor, LayerState]:
        """Return the layer's output ``[B, T, hidden]`` and its state after the tokens."""
        mixed, state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), tokens, state)
        return (wide(x) if self.residual_in_fp32 else x) + mixed, state

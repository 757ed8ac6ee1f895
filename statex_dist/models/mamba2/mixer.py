"""The Mamba2 layer, with transformers' attribute names and numerics.

``d_state`` may differ from layer to layer (the plan in the configuration); nothing else does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import GatedRMSNorm, RMSNorm
from statex_dist.models.core.mixer import StateSpace, Tokens
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.ops.mitigations import Tensors


class Mamba2Mixer(StateSpace):
    """Token mixing of one layer (arXiv 2405.21060, figure 6)."""

    def __init__(self, config: Mamba2Config, layer: int):
        super().__init__(config.layer_geometry(layer))
        self.time_step_limit = config.time_step_limit
        channels = self.geometry.conv_channels
        num_rows = config.inner_size + channels + config.num_heads
        self.in_proj = nn.Linear(config.hidden_size, num_rows, bias=config.use_bias)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(config.num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.num_heads))
        self.D = nn.Parameter(torch.ones(config.num_heads))
        # Each group by itself, as mamba_ssm (which trained the models), Megatron and transformers from 5.23 on do;
        # earlier releases take the norm over all groups.
        self.norm = GatedRMSNorm(
            config.inner_size, eps=config.layer_norm_epsilon, norm_before_gate=False, num_groups=config.n_groups
        )
        self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=config.use_bias)
        self.add_expansion()

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return ``x | B | C``, which are convolved as one, and the gate ``z`` and the steps ``dt``."""
        heads = self.heads
        inner, grouped = heads.values * heads.value_dim, heads.keys * heads.key_dim
        z, xbc, dt = self.in_proj(x).split([inner, inner + 2 * grouped, heads.values], dim=-1)
        return (xbc,), (z, dt)

    def conv_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the convolution's weight and bias."""
        return self.conv1d.weight, self.conv1d.bias

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return ``x, dt, A, B, C``."""
        heads, (_, dt) = self.heads, tokens.others
        inner, grouped = heads.values * heads.value_dim, heads.keys * heads.key_dim
        x, B, C = tokens.convolved[0].split([inner, grouped, grouped], dim=-1)
        B, C = (y.unflatten(-1, (heads.keys, -1)) for y in (B, C))
        # The dynamics stay fp32 in bf16 training: a rounded decay is a different memory.
        wide = torch.promote_types(tokens.x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.time_step_limit)
        return x.unflatten(-1, (heads.values, -1)), dt, -self.A_log.to(wide).exp(), B, C

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the gated norm."""
        return self.out_proj(self.norm(o.flatten(-2), tokens.others[0]))


class Mamba2Block(nn.Module):
    """One pre-norm Mamba2 layer."""

    def __init__(self, config: Mamba2Config, layer: int):
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config, layer)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Return the layer's output ``[B, T, hidden]`` and its state after ``x``."""
        mixed, new_state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), sequences, state)
        residual = x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x
        return residual + mixed, new_state

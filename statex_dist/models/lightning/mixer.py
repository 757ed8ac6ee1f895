"""The Lightning layer of MiniMax models: linear attention with fixed decays, then a sparse mixture of experts.

Attribute names and numerics are transformers'. A merged or grown head consists of blocks of the original ``head_dim``
channels, each with the decay of the head that it came from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import RMSNorm, SparseExperts
from statex_dist.models.core.mixer import LinearAttention, Tokens
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.lightning.config import LightningConfig
from statex_dist.ops.mitigations import Tensors

OUTPUT_NORM_EPS = 1e-6
"""Of the norm behind the scan: transformers' layer leaves it at the norm's default, whatever ``rms_norm_eps`` says."""


class LightningAttention(LinearAttention):
    """Token mixing of one layer (arXiv 2401.04658; gate and norm of MiniMax-01, arXiv 2501.08313)."""

    def __init__(self, config: LightningConfig, layer: int):
        geometry, heads = config.layer_geometry(layer), config.num_attention_heads
        # The queries have no factor; m merged heads get that of their sum, as GLA's do.
        super().__init__(geometry, scale=(heads // geometry.num_heads) ** -0.5)
        self.config, hidden, inner = config, config.hidden_size, config.inner_size
        self.keys_per_head = geometry.projected_key_dim * geometry.num_heads // heads
        self.rates = config.decay_rates(layer)
        self.qkv_proj = nn.Linear(hidden, heads * (2 * self.keys_per_head + config.head_size), bias=False)
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        self.output_gate = nn.Linear(hidden, inner, bias=False)
        self.norm = RMSNorm(inner, eps=OUTPUT_NORM_EPS)
        self.add_expansion()

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, keys and values ``[B, T, channels]``.

        The rows of the whole projection come head by head of the original model. A tensor-parallel rank has those of
        all queries first: of a head that ranks cut some have keys and no values, so that blocks are not of one size.
        """
        blocks, sizes = self.config.num_attention_heads, [self.keys_per_head, self.keys_per_head, self.config.head_size]
        if not self.heads.all_here:
            keys = self.heads.keys * self.heads.key_dim
            blocks, sizes = 1, [keys, keys, self.heads.values * self.heads.value_dim]
        qkv = F.silu(self.qkv_proj(x)).unflatten(-1, (blocks, -1))
        return tuple(y.flatten(-2) for y in qkv.split(sizes, dim=-1)), ()

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return ``q, k, v, g``."""
        q, k, v = tokens.convolved
        q, k = (y.unflatten(-1, (self.heads.keys, -1)) for y in (q, k))
        rates = torch.tensor(self.rates, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        rates = rates.repeat_interleave(self.keys_per_head)[self.heads.key_channels]
        g = -rates.view(self.heads.keys, -1).expand_as(k)
        return q, k, v.unflatten(-1, (self.heads.values, -1)), g

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the gated norm of all heads' outputs."""
        return self.out_proj(torch.sigmoid(self.output_gate(tokens.x)) * self.norm(o.flatten(-2)))


class LightningBlock(nn.Module):
    """One layer; residuals branch off behind the norms, with MiniMax's factors."""

    def __init__(self, config: LightningConfig, layer: int):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LightningAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.block_sparse_moe = SparseExperts(
            config.hidden_size,
            config.intermediate_size,
            num_experts=config.num_local_experts,
            chosen=config.num_experts_per_tok,
        )

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Return the layer's output ``[B, T, hidden]`` and its state after ``x``."""
        config = self.config
        x = self.input_layernorm(x)
        mixed, new_state = self.self_attn(x, sequences, state)
        x = x * config.linear_attn_alpha_factor + mixed * config.linear_attn_beta_factor
        x = self.post_attention_layernorm(x)
        return x * config.mlp_alpha_factor + self.block_sparse_moe(x) * config.mlp_beta_factor, new_state

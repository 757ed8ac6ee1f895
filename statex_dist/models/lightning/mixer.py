"""The Lightning layer of MiniMax models: linear attention with fixed decays, then a sparse mixture of experts.

Attribute names and numerics are transformers'. A merged or grown head consists of blocks of the original ``head_dim``
channels, each with the decay of the head that it came from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.fla_block import add_mix, linear_attention
from statex_dist.models.layout import HeldHeads
from statex_dist.models.lightning.config import LightningConfig
from statex_dist.models.norm import RMSNorm
from statex_dist.models.sequence import LayerState, Sequences
from statex_dist.ops.precision import wide_dtype

OUTPUT_NORM_EPS = 1e-6
"""Of the norm behind the scan: transformers' layer leaves it at the norm's default, whatever ``rms_norm_eps`` says."""


class LightningAttention(nn.Module):
    """Token mixing of one layer (arXiv 2401.04658; gate and norm of MiniMax-01, arXiv 2501.08313).

    Args:
        config: The model's configuration with its plan.
        layer: Index of the layer.
    """

    mix: nn.Parameter | None

    def __init__(self, config: LightningConfig, layer: int):
        super().__init__()
        self.config, self.geometry = config, config.layer_geometry(layer)
        self.heads = HeldHeads.of(self.geometry)
        hidden, inner = config.hidden_size, config.inner_size
        self.keys_per_head = self.geometry.key_dim * self.geometry.num_heads // config.num_attention_heads
        rows = config.num_attention_heads * (2 * self.keys_per_head + config.head_size)
        self.rates = config.decay_rates(layer)
        self.qkv_proj = nn.Linear(hidden, rows, bias=False)
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        self.output_gate = nn.Linear(hidden, inner, bias=False)
        self.norm = RMSNorm(inner, eps=OUTPUT_NORM_EPS)
        add_mix(self, self.geometry)
        # The queries have no factor; m merged heads get that of their sum, as GLA's do.
        self.scale = (config.num_attention_heads // self.geometry.num_heads) ** -0.5

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Return ``[B, T, hidden]`` and the state after ``x [B, T, hidden]`` (None unless asked for)."""
        q, k, v = self.queries_keys_values(x)
        q, k = (y.unflatten(-1, (self.heads.keys, -1)) for y in (q, k))
        v = v.unflatten(-1, (self.heads.values, -1))
        rates = torch.tensor(self.rates, dtype=wide_dtype(x.dtype), device=x.device)
        rates = rates.repeat_interleave(self.keys_per_head)[self.heads.key_channels]
        g = -rates.view(self.heads.keys, -1).expand_as(k)
        state, memory = sequences.split(state)
        recurrent = state[0] if state else None
        o, recurrent, memory = linear_attention(
            q, k, v, g, recurrent, sequences, heads=self.heads, scale=self.scale, mix=self.mix, memory=memory
        )
        o = torch.sigmoid(self.output_gate(x)) * self.norm(o.to(x.dtype).flatten(-2))
        return self.out_proj(o), (None if recurrent is None else (recurrent, *memory))

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values ``[B, T, channels]``.

        The rows of the whole projection come head by head of the original model. A tensor-parallel rank has those of
        all queries first: of a head that ranks cut some have keys and no values, so that blocks are not of one size.
        """
        blocks, sizes = self.config.num_attention_heads, [self.keys_per_head, self.keys_per_head, self.config.head_size]
        if not self.heads.all_here:
            keys = self.heads.keys * self.heads.key_dim
            blocks, sizes = 1, [keys, keys, self.heads.values * self.heads.value_dim]
        qkv = F.silu(self.qkv_proj(x)).unflatten(-1, (blocks, -1))
        return tuple(y.flatten(-2) for y in qkv.split(sizes, dim=-1))


class Expert(nn.Module):
    """One SwiGLU expert."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.w1 = nn.Linear(hidden_size, inner_size, bias=False)
        self.w2 = nn.Linear(inner_size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``w2(silu(w1(x)) * w3(x))``."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseExperts(nn.Module):
    """The best ``num_experts_per_tok`` experts of each token, weighted by their softmax shares."""

    def __init__(self, config: LightningConfig):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.intermediate_size) for _ in range(config.num_local_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, hidden]``."""
        tokens = x.flatten(0, 1)
        logits = self.gate(tokens)
        shares = logits.to(wide_dtype(logits.dtype)).softmax(-1)
        weights, experts = shares.topk(self.chosen, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, place = (experts == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, place].unsqueeze(-1))
        return out.view_as(x)


class Block(nn.Module):
    """One layer; residuals branch off behind the norms, with MiniMax's factors."""

    def __init__(self, config: LightningConfig, layer: int):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LightningAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.block_sparse_moe = SparseExperts(config)

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

"""Lightning attention (arXiv 2401.04658) as in MiniMax models: fixed decays per head and layer, mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import LayerState, Tokens
from .configuration import PlannedConfig
from .layers import RMSNorm, mask_padding, wide
from .linear_attention import linear_attention
from .mixing import add_mix
from .trunk import Trunk


class StateXConfig(PlannedConfig):
    """Configuration of a MiniMax model without softmax attention."""

    model_type = "minimax"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without

    @property
    def rms_eps(self) -> float:
        """Epsilon of the norms."""
        return self.rms_norm_eps

    @property
    def head_size(self) -> int:
        """Key and value channels of a head before the plan."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class LightningAttention(nn.Module):
    """Token mixing of one layer.

    A merged or grown head consists of blocks of the original's key channels, each with the decay of its head.
    """

    mix: nn.Parameter | None

    def __init__(self, config: Any, layer: int):
        super().__init__()
        heads, size, hidden = config.num_attention_heads, config.head_size, config.hidden_size
        self.original_heads, self.value_channels, self.key_channels = heads, size, size * config.key_growth(layer)
        self.num_heads, num_partners = config.heads_and_partners(layer, heads)
        self.scale = (heads // self.num_heads) ** -0.5
        depth = 1 - layer / (config.num_hidden_layers - 1 + 1e-5) + 1e-5
        self.rates = [2 ** (-8 * (head + 1) / heads) * depth for head in range(heads)]
        self.qkv_proj = nn.Linear(hidden, heads * (2 * self.key_channels + size), bias=False)
        self.out_proj = nn.Linear(heads * size, hidden, bias=False)
        self.output_gate = nn.Linear(hidden, heads * size, bias=False)
        self.norm = RMSNorm(heads * size, 1e-6)
        add_mix(self, self.num_heads, num_partners)

    def forward(self, x: torch.Tensor, tokens: Tokens, state: LayerState | None) -> tuple[torch.Tensor, LayerState]:
        """Return ``[B, T, hidden]`` and the state after the tokens ``x [B, T, hidden]``."""
        qkv = F.silu(mask_padding(self.qkv_proj(x), tokens.keep)).unflatten(-1, (self.original_heads, -1))
        parts = qkv.split([self.key_channels, self.key_channels, self.value_channels], dim=-1)
        q, k, v = (y.flatten(-2).unflatten(-1, (self.num_heads, -1)) for y in parts)
        rates = torch.tensor(self.rates, dtype=wide(x).dtype, device=x.device)
        g = -rates.repeat_interleave(self.key_channels).view(self.num_heads, -1).expand_as(k)
        recurrent = state[0] if state else None
        o, recurrent = linear_attention(q, k, v, g, recurrent, scale=self.scale, mix=self.mix)
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(o.flatten(-2))), (recurrent,)


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
    """The best experts of each token, weighted by their softmax shares."""

    def __init__(self, config: Any):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.intermediate_size) for _ in range(config.num_local_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[B, T, hidden]``."""
        tokens = x.flatten(0, 1)
        weights, experts = wide(self.gate(tokens)).softmax(-1).topk(self.chosen, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, place = (experts == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, place].unsqueeze(-1))
        return out.view_as(x)


class Block(nn.Module):
    """One layer; residuals branch off behind the norms, with MiniMax's factors."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LightningAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = SparseExperts(config)

    def forward(self, x: torch.Tensor, tokens: Tokens, state: LayerState | None) -> tuple[torch.Tensor, LayerState]:
        """Return the layer's output ``[B, T, hidden]`` and its state after the tokens."""
        config = self.config
        x = self.input_layernorm(x)
        mixed, state = self.self_attn(x, tokens, state)
        x = x * config.linear_attn_alpha_factor + mixed * config.linear_attn_beta_factor
        x = self.post_attention_layernorm(x)
        return x * config.mlp_alpha_factor + self.block_sparse_moe(x) * config.mlp_beta_factor, state


class StateXModel(Trunk):
    """MiniMax without its head."""

    config_class = StateXConfig
    base_model_prefix = "model"
    embedding_name = "embed_tokens"
    block = Block

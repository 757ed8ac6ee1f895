"""Layers around the token mixing: norms (in fp32), MLP, sparse experts, flash-linear-attention's pre-norm block."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.ops.fused import gated_rms_norm, rms_norm, swiglu
from statex_dist.ops.precision import wide_dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x / rms(x) * weight`` in ``x``'s dtype."""
        return rms_norm(x, self.weight, eps=self.eps)


class GatedRMSNorm(RMSNorm):
    """RMS norm with a gate (SiLU or sigmoid), after the norm (GLA) or before it (Mamba2), of groups of channels."""

    def __init__(self, size: int, *, eps: float, norm_before_gate: bool, sigmoid: bool = False, num_groups: int = 1):
        super().__init__(size, eps=eps)
        self.norm_before_gate = norm_before_gate
        self.sigmoid = sigmoid
        self.num_groups = num_groups

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the gated norm of ``x`` in ``x``'s dtype."""
        return gated_rms_norm(
            x,
            gate,
            self.weight,
            eps=self.eps,
            norm_before_gate=self.norm_before_gate,
            sigmoid=self.sigmoid,
            num_groups=self.num_groups,
        )


class MLP(nn.Module):
    """SwiGLU channel mixing (arXiv 2002.05202).

    On a GPU three of its tensors ``[B, T, inner]`` are kept for the backward pass (``gate``, ``up`` and their product),
    of PyTorch's operators four.
    """

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``down(silu(gate(x)) * up(x))``."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class FLABlock(nn.Module):
    """One pre-norm layer of flash-linear-attention's models; a family names its token mixing in ``mixing``."""

    mixing: ClassVar[type[nn.Module]]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = self.mixing(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None, *shared: torch.Tensor | None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Return the layer's output ``[B, T, hidden]`` and its state after ``x``; ``shared`` goes to the mixing."""
        mixed, new_state = self.attn(self.attn_norm(x), sequences, state, *shared)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), new_state


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
    """The best ``chosen`` of ``num_experts`` experts of each token, weighted by their softmax shares."""

    def __init__(self, hidden_size: int, inner_size: int, *, num_experts: int, chosen: int):
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden_size, inner_size) for _ in range(num_experts))

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

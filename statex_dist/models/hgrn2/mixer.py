"""The HGRN2 layer: gated linear attention with ``k = 1 - f`` and forget gates bounded from below.

The bound rises from layer to layer: later layers remember for longer.
Attribute names are those of flash-linear-attention's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import FLABlock, RMSNorm
from statex_dist.models.core.mixer import LinearAttention, Tokens, depthwise
from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.ops.mitigations import Tensors

OUTPUT_NORM_EPS = 1e-5
"""Of the norm behind the scan: flash-linear-attention's layer leaves it at its kernel's default, whatever ``norm_eps``
says, in every release from 0.1.0 to 0.6.0."""


def shared_inputs(trunk: nn.Module) -> list[list[torch.Tensor | None]]:
    """Return each layer's lower bound of the forget gate ``[hidden]``: a cumulative softmax, zero for the first."""
    logits = getattr(trunk, "lower_bounds", None)
    if logits is None:
        return []
    shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)
    return [[None, *(shares.cumsum(0) - shares[0])[1:].unbind(0)]]


class HGRN2Attention(LinearAttention):
    """Token mixing of one layer (arXiv 2404.07904, section 3); the trunk gives it the forget gate's lower bound."""

    CONV_SILU = False

    def __init__(self, config: HGRN2Config, layer: int):
        super().__init__(config.layer_geometry(layer))
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.f_proj = nn.Linear(hidden, hidden, bias=False)
        self.i_proj = nn.Linear(hidden, hidden, bias=False)
        if config.use_short_conv:
            self.q_conv1d, self.f_conv1d, self.i_conv1d = (depthwise(hidden, config.conv_size) for _ in range(3))
        self.g_norm = RMSNorm(hidden, eps=OUTPUT_NORM_EPS)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.add_expansion()

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, forget gates and values."""
        return (self.q_proj(x), self.f_proj(x), self.i_proj(x)), ()

    def conv_weights(self) -> tuple[torch.Tensor, None]:
        """Return the weight of all three convolutions."""
        return torch.cat([self.q_conv1d.weight, self.f_conv1d.weight, self.i_conv1d.weight]), None

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return ``q, k, v, g``."""
        q, f, v = tokens.convolved
        lower_bound = tokens.shared[0] if tokens.shared else None
        q = F.silu(q)
        g = F.logsigmoid(f.to(torch.promote_types(f.dtype, torch.float32)))
        if lower_bound is not None:
            lower_bound = lower_bound[self.heads.key_channels]
            g = torch.logaddexp(lower_bound.log(), torch.log1p(-lower_bound) + g)
        k = (1 - g.exp()).to(v.dtype)
        q, k, g = (y.unflatten(-1, (self.heads.keys, -1)) for y in (q, k, g))
        return q, k, v.unflatten(-1, (self.heads.values, -1)), g

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the normed outputs."""
        return self.o_proj(self.g_norm(o.flatten(-2)))


class HGRN2Block(FLABlock):
    """One pre-norm HGRN2 layer."""

    mixing = HGRN2Attention

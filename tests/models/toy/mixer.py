"""The toy layer: projections, the inputs of the scan, the output; the core has all the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.models.core.layers import FLABlock
from statex_dist.models.core.mixer import LinearAttention, Tokens, depthwise
from tests.models.toy.config import ToyConfig


class ToyAttention(LinearAttention):
    def __init__(self, config: ToyConfig, layer: int):
        super().__init__(config.layer_geometry(layer))
        hidden = config.hidden_size
        self.rate = nn.Parameter(torch.ones(hidden))
        self.add_expansion()
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.conv = depthwise(hidden, 4)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def project(self, x):
        """One kernel for keys alone: the core convolves what stands first."""
        return (self.k_proj(x),), (self.q_proj(x), self.v_proj(x))

    def conv_weights(self):
        return self.conv.weight, None

    def scan_inputs(self, tokens: Tokens):
        (k,), (q, v) = tokens.convolved, tokens.others
        g = -F.softplus(self.rate).expand_as(k)
        q, k, g = (y.unflatten(-1, (self.heads.keys, -1)) for y in (q, k, g))
        return q, k, v.unflatten(-1, (self.heads.values, -1)), g

    def output(self, o, tokens: Tokens):
        return self.o_proj(o.flatten(-2))


class ToyBlock(FLABlock):
    mixing = ToyAttention

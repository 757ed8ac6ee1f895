"""HGRN2 (arXiv 2404.07904): gated linear attention with ``k = 1 - f`` and forget gates bounded from below."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import LayerState, Tokens
from .configuration import PlannedConfig
from .fla_block import FLABlock, FLAConfig, add_convolutions, short_convolutions
from .layers import RMSNorm, wide
from .linear_attention import linear_attention
from .mixing import add_mix
from .trunk import Trunk


class StateXConfig(FLAConfig):
    """Configuration of an HGRN2 model."""

    model_type = "hgrn2"
    __init__ = PlannedConfig.__init__  # transformers 5 makes one of its own for a class without

    @property
    def heads(self) -> int:
        """Heads of a layer before the plan."""
        return self.num_heads if self.expand_ratio is None else self.hidden_size // self.expand_ratio


class HGRN2Attention(nn.Module):
    """Token mixing of one layer."""

    mix: nn.Parameter | None

    def __init__(self, config: Any, layer: int):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, num_partners = config.heads_and_partners(layer, config.heads)
        # A merged head has a scale of its own; mixed ones keep that of the original keys.
        self.scale = (hidden // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.f_proj = nn.Linear(hidden, hidden, bias=False)
        self.i_proj = nn.Linear(hidden, hidden, bias=False)
        if config.use_short_conv:
            add_convolutions(self, dict.fromkeys("qfi", hidden), config.conv_size)
        self.g_norm = RMSNorm(hidden, 1e-5)  # whatever norm_eps says, as in flash-linear-attention
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        add_mix(self, self.num_heads, num_partners)

    def forward(
        self, x: torch.Tensor, tokens: Tokens, state: LayerState | None, lower_bound: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, LayerState]:
        """Return ``[B, T, hidden]`` and the state after the tokens ``x``; ``lower_bound [hidden]`` is of the gate."""
        recurrent, *tail = state or (None,)
        inputs = (self.q_proj(x), self.f_proj(x), self.i_proj(x))
        (q, f, i), tail_after = short_convolutions(self, "qfi", inputs, tokens, *(tail or (None,)))
        g = F.logsigmoid(wide(f))
        if lower_bound is not None:
            g = torch.logaddexp(lower_bound.log(), torch.log1p(-lower_bound) + g)
        k = (1 - g.exp()).to(i.dtype)
        q, k, v, g = (y.unflatten(-1, (self.num_heads, -1)) for y in (F.silu(q), k, i, g))
        o, recurrent = linear_attention(q, k, v, g, recurrent, scale=self.scale, mix=self.mix)
        return self.o_proj(self.g_norm(o.flatten(-2))), (recurrent, *tail_after)


class Block(FLABlock):
    """One HGRN2 layer."""

    mixing = HGRN2Attention


class StateXModel(Trunk):
    """HGRN2 without its head; the layers share the logits of their gates' lower bounds."""

    config_class = StateXConfig
    base_model_prefix = "model"
    block = Block

    def add_shared_parameters(self, config: Any) -> None:
        """Add the logits ``lower_bounds [layers, hidden]``."""
        if config.use_lower_bound:
            self.lower_bounds = nn.Parameter(torch.zeros(config.num_hidden_layers, config.hidden_size))

    def shared_inputs(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Return a layer's lower bound: a cumulative softmax over the layers, none for the first."""
        if layer == 0 or not self.config.use_lower_bound:
            return ()
        shares = wide(self.lower_bounds).softmax(0)
        return ((shares.cumsum(0) - shares[0])[layer],)

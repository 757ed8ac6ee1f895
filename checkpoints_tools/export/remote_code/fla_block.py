"""What the models of flash-linear-attention have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import LayerState, Tokens
from .configuration import PlannedConfig
from .convolution import causal_convolution
from .layers import RMSNorm, mask_padding


class FLAConfig(PlannedConfig):
    """Sizes that follow from the keys of flash-linear-attention's configurations."""

    @property
    def rms_eps(self) -> float:
        """Epsilon of the norms."""
        return self.norm_eps

    @property
    def mlp_size(self) -> int:
        """Inner size of the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        size = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
        return 256 * ((size + 255) // 256)


class MLP(nn.Module):
    """SwiGLU channel mixing."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``down(silu(gate(x)) * up(x))``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FLABlock(nn.Module):
    """One pre-norm layer; a family names its token mixing."""

    mixing: type[nn.Module]

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = self.mixing(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(
        self, x: torch.Tensor, tokens: Tokens, state: LayerState | None, *shared: torch.Tensor
    ) -> tuple[torch.Tensor, LayerState]:
        """Return the layer's output ``[B, T, hidden]`` and its state after the tokens."""
        mixed, state = self.attn(self.attn_norm(x), tokens, state, *shared)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


def add_convolutions(module: nn.Module, channels: dict[str, int], kernel_size: int) -> None:
    """Give a module one depthwise convolution ``<name>_conv1d`` per entry of ``channels``."""
    for name, count in channels.items():
        module.add_module(f"{name}_conv1d", nn.Conv1d(count, count, kernel_size, groups=count, bias=False))


def short_convolutions(
    module: nn.Module, names: str, inputs: Sequence[torch.Tensor], tokens: Tokens, tail: torch.Tensor | None
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Convolve several inputs ``[B, T, D]`` where the module has convolutions for them, padding being zero.

    Args:
        module: Has the convolutions of :func:`add_convolutions`, or none.
        names: One letter per input.
        inputs: What is convolved; the last are the values that go into the state.
        tokens: Which tokens are padding.
        tail: Inputs before these ``[B, W - 1, all D]``, or None.

    Returns:
        The outputs, and the new tail (nothing without convolutions).
    """
    joined = mask_padding(torch.cat(list(inputs), dim=-1), tokens.keep)
    state: tuple[torch.Tensor, ...] = ()
    if hasattr(module, f"{names[0]}_conv1d"):
        weight = torch.cat([module.get_submodule(f"{name}_conv1d").weight for name in names])  # type: ignore[misc]
        joined, tail = causal_convolution(joined, weight, None, tail)
        joined, state = mask_padding(joined, tokens.keep), (tail,)
    return list(joined.split([x.shape[-1] for x in inputs], dim=-1)), state

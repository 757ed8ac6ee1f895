"""Recurrent mixers with the parameters of a host's, called as the host calls its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from statex_dist.errors import ConfigError
from statex_dist.models.core.layers import GatedRMSNorm
from statex_dist.models.core.mixer import DeltaRule, RecurrentMixer, Tokens
from statex_dist.models.core.sequences import LayerState, Sequences
from statex_dist.models.gated_deltanet.mixer import unit
from statex_dist.models.hybrid.delta import GatedDeltaLayers
from statex_dist.models.hybrid.mamba2 import Mamba2Layers
from statex_dist.models.mamba2.mixer import Mamba2Mixer
from statex_dist.ops.mitigations import Tensors

States = dict[tuple[int, str], LayerState]
"""States by layer and kind (``recurrent`` or ``attention``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCall:
    """The argument ``statex`` of a host's layers: how our forward pass reaches the mixers through the host.

    An argument and no variable of the context: a layer that is computed again in the backward pass is called with the
    same ones, whichever way checkpointing takes.

    Attributes:
        sequences: Borders of packed sequences and what to return.
        before: States before the tokens.
        after: States after them, filled by the layers; a layer that is computed again writes the same.
        layer: The layer that is called.
    """

    sequences: Sequences
    before: States = field(default_factory=dict)
    after: States = field(default_factory=dict)
    layer: int = -1

    def of(self, layer: int) -> HostCall:
        """Return the call of one layer."""
        return replace(self, layer=layer)

    def state(self, kind: str) -> LayerState | None:
        """Return the layer's state of a kind before the tokens, or None for an empty one."""
        return self.before.get((self.layer, kind))

    def keep(self, kind: str, state: LayerState | None) -> None:
        """Keep the layer's state of a kind after the tokens, if there is one."""
        if state is not None:
            self.after[self.layer, kind] = state


class HostedMixer(RecurrentMixer):
    """The call of a host around the mixer's own; it stands before the recurrence's class."""

    def forward(self, hidden_states: torch.Tensor, *, statex: HostCall | None = None, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Mix tokens ``[B, T, hidden]``.

        Args:
            hidden_states: The layer's input.
            statex: Our forward pass.
            **kwargs: The host's further arguments: masks and caches, which our own forward pass does not use.

        Raises:
            ConfigError: The host was called without us.
        """
        if statex is None:
            raise ConfigError("the host's layers were called without our forward pass: call the model itself")
        y, state = self.mix_tokens(hidden_states, statex.sequences, statex.state("recurrent"))
        statex.keep("recurrent", state)
        return y

    def observed(self, args: Any, kwargs: dict[str, Any], output: Any) -> tuple[Any, LayerState]:
        """Return the arguments of ``mix_tokens`` and the state after the tokens, from a hook on :meth:`forward`."""
        call: HostCall = kwargs["statex"]
        x = args[0] if args else kwargs["hidden_states"]
        return (x, call.sequences, call.state("recurrent")), call.after[call.layer, "recurrent"]


class HostedMamba2(HostedMixer, Mamba2Mixer):
    """Mamba2 layers of Bamba, Granite-H, Nemotron-H, Falcon-H1, Zamba2."""

    norm: GatedRMSNorm | None  # type: ignore[assignment]

    def __init__(self, config: Mamba2Layers, layer: int):
        super().__init__(config, layer)
        self.layers = config
        self.norm = None
        if config.gated_norm:
            self.norm = GatedRMSNorm(
                config.inner_size,
                eps=config.layer_norm_epsilon,
                norm_before_gate=config.norm_before_gate,
                num_groups=config.n_groups,
            )
        if config.out_bias != config.use_bias:
            self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=config.out_bias)

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return ``x | B | C``, which are convolved as one, and the gate ``z`` and the steps ``dt``."""
        config, heads = self.layers, self.heads
        if config.in_factor != 1.0:
            x = x * config.in_factor
        (xbc,), (z, dt) = super().project(x)
        if config.row_factors:
            # Of the parts and not of the config's geometry, so that grown parts have theirs.
            inner, grouped = heads.values * heads.value_dim, heads.keys * heads.key_dim
            of_z, *of_parts, of_dt = config.row_factors
            parts = xbc.split([inner, grouped, grouped], dim=-1)
            xbc = torch.cat([part * factor for part, factor in zip(parts, of_parts, strict=True)], dim=-1)
            z, dt = z * of_z, dt * of_dt
        return (xbc,), (z, dt)

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the gated norm, or of the gated output where the model has no norm."""
        z, o = tokens.others[0], o.flatten(-2)
        return self.out_proj(o * F.silu(z) if self.norm is None else self.norm(o, z))


class HostedGatedDelta(HostedMixer, DeltaRule):
    """Gated DeltaNet layers of Qwen3-Next, whose projections hold queries, keys, values, gates of each key head."""

    NORM, OUT = "norm", "out_proj"

    def __init__(self, config: GatedDeltaLayers, layer: int):
        super().__init__(config.layer_geometry(layer))
        self.layers = config
        self.beta_factor = 2 if config.allow_neg_eigval else 1
        channels = self.geometry.conv_channels
        self.conv1d = nn.Conv1d(channels, channels, config.conv_size, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(config.value_heads))
        self.A_log = nn.Parameter(torch.zeros(config.value_heads))
        self.add_projections(config)
        sigmoid = config.output_gate_activation == "sigmoid"
        norm = GatedRMSNorm(config.head_value_dim, eps=config.norm_eps, norm_before_gate=True, sigmoid=sigmoid)
        self.add_module(self.NORM, norm)
        self.add_module(self.OUT, nn.Linear(config.value_dim, config.hidden_size, bias=False))
        self.add_expansion()

    def add_projections(self, config: GatedDeltaLayers) -> None:
        """Add the input projections under the host's names."""
        rows = 2 * config.key_dim + 2 * config.value_dim
        self.in_proj_qkvz = nn.Linear(config.hidden_size, rows, bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * config.value_heads, bias=False)

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return queries, keys and values, and ``z``, ``b``, ``a`` beside them."""
        keys, size = self.layers.num_heads, self.layers.head_dim
        shared = self.layers.value_heads // keys
        values = shared * self.layers.head_value_dim
        parts = self.in_proj_qkvz(x).unflatten(-1, (keys, -1)).split([size, size, values, values], dim=-1)
        q, k, v, z = (part.flatten(-2) for part in parts)
        b, a = (part.flatten(-2) for part in self.in_proj_ba(x).unflatten(-1, (keys, -1)).split(shared, dim=-1))
        return (q, k, v), (z, b, a)

    def conv_weights(self) -> tuple[torch.Tensor, None]:
        """Return the convolution's weight."""
        return self.conv1d.weight, None

    def queries_keys_values(self, tokens: Tokens) -> Tensors:
        """Return queries, keys and values ``[B, T, channels]``."""
        return tokens.convolved

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return ``q, k, v, g, beta``."""
        (q, k, v), (_, b, a) = self.queries_keys_values(tokens), tokens.others
        q, k = (unit(y.unflatten(-1, (self.heads.keys, -1))) for y in (q, k))
        wide = torch.promote_types(b.dtype, torch.float32)
        beta = torch.sigmoid(b.to(wide)) * self.beta_factor
        step = F.softplus(a.to(wide) + self.dt_bias.to(wide))
        g = (-self.A_log.to(wide).exp() * step).unsqueeze(-1)
        return q, k, v.unflatten(-1, (self.heads.values, -1)), g, beta

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return the projection of the normed and gated outputs."""
        z = tokens.others[0].unflatten(-1, o.shape[-2:])
        return self.get_submodule(self.OUT)(self.get_submodule(self.NORM)(o, z).flatten(-2))

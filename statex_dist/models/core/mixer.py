"""The recurrent mixer: all of a layer's token mixing that is the same in every family.

A segment of tokens passes through seven steps:

1. the layer's state is split into its named parts;
2. ``project``, the family's: what goes through the convolution, and what does not;
3. the causal convolution, from the tail that the state holds, and its activation;
4. ``scan_inputs``, the family's: queries, keys, values, decays. Queries and keys are final here: activated, normalised,
   rotated. An expansion that changes them has its place behind this step and nowhere else;
5. the recurrence: its scan, or its step for one token, under the model's mitigation, over the heads in this process
   and, through the context, the tokens of other ranks;
6. ``output``, the family's: norm, gate, output projection;
7. the parts after the segment are joined.

A family derives from the class of its recurrence (:class:`LinearAttention`, :class:`DeltaRule`,
:class:`StateSpace`) and supplies the two or three steps that are its own. The modules may be anybody's: the mixer
asks for tensors and never for a projection by its name.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from statex_dist.models.core.mitigation import Mitigation, Scanned
from statex_dist.models.core.mixed_head_tp import PartnerHeads
from statex_dist.models.core.sequences import LayerParts, LayerState, Sequences
from statex_dist.models.layout import HeldHeads
from statex_dist.ops.conv import convolve_sequences
from statex_dist.ops.cu_seqlens import borders_of
from statex_dist.ops.delta_rule import delta_decode, delta_rule
from statex_dist.ops.features import Features, widened_delta, widened_gla, widened_ssd
from statex_dist.ops.gla import gla, gla_decode
from statex_dist.ops.mitigations import Scan, Tensors
from statex_dist.ops.ssd import ssd, ssd_decode

if TYPE_CHECKING:
    from statex_dist.state.geometry import StateGeometry

State = torch.Tensor | None


class Tokens(NamedTuple):
    """The values that a mixer has computed of a segment before the recurrence.

    Attributes:
        x: The mixer's input ``[B, T, hidden]``.
        convolved: What ``project`` returned first, after the convolution (where there is one), ``[B, T, channels]``.
        others: What ``project`` returned beside it.
        positions: ``[B, T]``, in a layer with positions.
        shared: What the trunk gives this layer of parameters that all layers share.
    """

    x: torch.Tensor
    convolved: Tensors
    others: Tensors = ()
    positions: torch.Tensor | None = None
    shared: tuple[torch.Tensor | None, ...] = ()


class RecurrentMixer(nn.Module):
    """Token mixing of one layer.

    Args:
        geometry: The layer's state under the plan.
        scale: Factor of the queries; None takes that of the layer's key channels.

    Attributes:
        heads: The heads in this process.
        mix: ``[H, r]`` mixing matrix, or None (:meth:`add_expansion`).
        feature_gain: ``[G, n K]`` gains of features, or None.
    """

    HAS_POSITIONS: ClassVar[bool] = False
    """Whether the layer counts tokens, in its state."""
    CONV_SILU: ClassVar[bool] = True
    """Whether a SiLU follows the convolution."""

    mix: nn.Parameter | None
    feature_gain: nn.Parameter | None

    def __init__(self, geometry: StateGeometry, *, scale: float | None = None):
        super().__init__()
        self.geometry, self.heads = geometry, HeldHeads.of(geometry)
        self.scale = geometry.projected_key_dim**-0.5 if scale is None else scale

    def add_expansion(self) -> None:
        """Add the parameters that the geometry asks for; a family calls it where its other parameters have them."""
        geometry = self.geometry
        self.register_parameter("mix", None)
        self.register_parameter("feature_gain", None)
        if geometry.values_per_key > 1:
            self.mix = nn.Parameter(torch.zeros(geometry.num_heads, geometry.values_per_key))
        if geometry.features is not None:
            added = geometry.key_dim - geometry.projected_key_dim
            self.feature_gain = nn.Parameter(torch.zeros(geometry.num_key_groups, added))

    @property
    def features(self) -> Features | None:
        """The layer's features with the gains in this process, or None."""
        if self.geometry.features is None:
            return None
        assert self.feature_gain is not None
        return Features(self.geometry.features, self.feature_gain)

    def project(self, x: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return what the convolution takes of ``x [B, T, hidden]``, ``[B, T, channels]`` each, and what passes it."""
        raise NotImplementedError

    def conv_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight ``[D, 1, W]`` and bias of the convolution over all that ``project`` returned first."""
        raise NotImplementedError

    def scan_inputs(self, tokens: Tokens) -> Tensors:
        """Return the inputs of the recurrence, ``[B, T, heads, ...]`` each."""
        raise NotImplementedError

    def widened(self, inputs: Tensors, features: Features) -> Tensors:
        """Return the inputs of a recurrence that has no features and computes the same."""
        raise NotImplementedError

    def scan(
        self, inputs: Tensors, before: State, sequences: Sequences, mix: State, features: Features | None
    ) -> tuple[torch.Tensor, State]:
        """Run the recurrence over a segment, or its step where the segment is one token.

        Args:
            inputs: Of :meth:`scan_inputs`.
            before: The state before the segment, or None for zero.
            sequences: How the tokens form sequences, and the scan's backend.
            mix: The mixing matrix, or None.
            features: The layer's features, or None.
        """
        raise NotImplementedError

    def mitigated(self, mitigation: Mitigation, scan: Scan, inputs: Tensors, state: State, memory: Tensors) -> Scanned:
        """Run the recurrence under a mitigation."""
        raise NotImplementedError

    def output(self, o: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Return ``[B, T, hidden]`` from the recurrence's outputs ``o [B, T, heads, V]``."""
        raise NotImplementedError

    def forward(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None, *shared: torch.Tensor | None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Mix tokens.

        Args:
            x: ``[B, T, hidden]``.
            sequences: Borders of packed sequences and what to return.
            state: The layer's state before ``x``, or None for zero.
            *shared: What the trunk gives this layer of parameters that all layers share.

        Returns:
            ``[B, T, hidden]`` and the state after ``x`` (None unless asked for).
        """
        return self.mix_tokens(x, sequences, state, *shared)

    def observed(self, args: Any, kwargs: dict[str, Any], output: Any) -> tuple[Any, LayerState]:
        """Return the arguments of :meth:`mix_tokens` and the state after the tokens, from a hook on :meth:`forward`."""
        return args, output[1]

    def mix_tokens(
        self, x: torch.Tensor, sequences: Sequences, state: LayerState | None = None, *shared: torch.Tensor | None
    ) -> tuple[torch.Tensor, LayerState | None]:
        """Mix tokens; arguments and result are those of :meth:`forward`, which a host calls in another way."""
        has_conv = self.geometry.conv_kernel > 0
        before = LayerParts()
        if state:
            before = LayerParts.split(state, sequences.mitigation, has_position=self.HAS_POSITIONS, has_tail=has_conv)
        projected, others = self.project(x)
        tail = position = positions = None
        if has_conv:
            projected, tail = self._convolve(projected, sequences, before.tail)
        if self.HAS_POSITIONS:
            positions, position = token_positions(x, sequences, before.position)
        tokens = Tokens(x, projected, others, positions, shared)
        o, recurrent, memory = self._recur(self.scan_inputs(tokens), before, sequences)
        y = self.output(o.to(x.dtype), tokens)
        if not sequences.output_states:
            return y, None
        assert recurrent is not None
        return y, LayerParts(recurrent, position, tail, memory).join()

    def _convolve(
        self, inputs: Tensors, sequences: Sequences, tail: torch.Tensor | None
    ) -> tuple[Tensors, torch.Tensor | None]:
        """Convolve several inputs as one tensor (channels are not mixed), and return the tail after them too."""
        weight, bias = self.conv_weights()
        out, after = convolve_sequences(
            inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=-1),
            weight,
            bias,
            tail=tail,
            cu_seqlens=sequences.cu_seqlens,
            seq_idx=sequences.seq_idx,
            output_tail=sequences.output_states,
            context=sequences.context,
            silu=self.CONV_SILU,
        )
        return ((out,) if len(inputs) == 1 else out.split([y.shape[-1] for y in inputs], dim=-1)), after

    def _recur(self, inputs: Tensors, before: LayerParts, sequences: Sequences) -> Scanned:
        """Run the recurrence as the model's mitigation and the heads in this process ask for."""
        mix = self.mix
        pairs = None if mix is None else PartnerHeads.where_needed(self.heads)
        if pairs is not None:
            inputs, mix = pairs.inputs(inputs), None
        features = self.features
        if features is not None and sequences.mitigation is not None:
            # A mitigation scales keys and queries, and features are not linear in them.
            inputs, features = self.widened(inputs, features), None
        scan = partial(self.scan, sequences=sequences, mix=mix, features=features)
        if sequences.mitigation is None:
            o, after = scan(inputs, before.recurrent)
            memory: Tensors = ()
        else:
            o, after, memory = self.mitigated(sequences.mitigation, scan, inputs, before.recurrent, before.memory)
        if pairs is not None:
            assert self.mix is not None
            o = pairs.read(o, self.mix)
        return Scanned(o, after, memory)


def depthwise(channels: int, kernel_size: int) -> nn.Conv1d:
    """Return a convolution of each channel by itself, as a holder of its weight."""
    return nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)


def mixer_of(layer: nn.Module) -> RecurrentMixer | None:
    """Return the recurrent token mixing of a layer, or None."""
    return next((module for module in layer.modules() if isinstance(module, RecurrentMixer)), None)


class LinearAttention(RecurrentMixer):
    """Gated linear attention: ``scan_inputs`` returns ``q, k, v, g``, wide log decays ``g`` per key channel."""

    def widened(self, inputs: Tensors, features: Features) -> Tensors:
        """Return ``q, k, v, g`` with the features as key channels."""
        return widened_gla(inputs, features)

    def scan(
        self, inputs: Tensors, before: State, sequences: Sequences, mix: State, features: Features | None
    ) -> tuple[torch.Tensor, State]:
        """Run :func:`statex_dist.ops.gla.gla` or its step."""
        if before is not None and sequences.is_step(inputs[0]):
            q, k, v, g = (y.squeeze(1) for y in inputs)
            added: dict[str, Any] = {"scale": self.scale, "mix": mix, "features": features}
            o, after = gla_decode(q, k, v, g, before, overwrite=sequences.overwrites, **added)
            return o.unsqueeze(1), after
        q, k, v, g = inputs
        options = {**sequences.scan_options, "max_state_bytes": sequences.max_state_bytes}
        return gla(q, k, v, g, scale=self.scale, mix=mix, features=features, initial_state=before, **options)

    def mitigated(self, mitigation: Mitigation, scan: Scan, inputs: Tensors, state: State, memory: Tensors) -> Scanned:
        """Run the recurrence under a mitigation."""
        return mitigation.gla(scan, inputs, state, memory)


class DeltaRule(RecurrentMixer):
    """The gated delta rule: ``scan_inputs`` returns ``q, k, v, g, beta``, queries and keys normalised."""

    def widened(self, inputs: Tensors, features: Features) -> Tensors:
        """Return ``q, k, v, g, beta`` with the features as key channels."""
        return widened_delta(inputs, features)

    def scan(
        self, inputs: Tensors, before: State, sequences: Sequences, mix: State, features: Features | None
    ) -> tuple[torch.Tensor, State]:
        """Run :func:`statex_dist.ops.delta_rule.delta_rule` or its step."""
        added: dict[str, Any] = {"scale": self.scale, "mix": mix, "features": features}
        if before is not None and sequences.is_step(inputs[0]):
            q, k, v, g, beta = (y.squeeze(1) for y in inputs)
            o, after = delta_decode(q, k, v, g, beta, before, overwrite=sequences.overwrites, **added)
            return o.unsqueeze(1), after
        q, k, v, g, beta = inputs
        options = {name: value for name, value in sequences.scan_options.items() if name != "output_final_state"}
        return delta_rule(q, k, v, g, beta, initial_state=before, **added, **options)  # which always returns the state

    def mitigated(self, mitigation: Mitigation, scan: Scan, inputs: Tensors, state: State, memory: Tensors) -> Scanned:
        """Run the recurrence under a mitigation."""
        return mitigation.delta_rule(scan, inputs, state, memory)


class StateSpace(RecurrentMixer):
    """The Mamba2 scan: ``scan_inputs`` returns ``x, dt, A, B, C``, ``A`` per head; ``D [H]`` is its skip term."""

    D: nn.Parameter

    def widened(self, inputs: Tensors, features: Features) -> Tensors:
        """Return ``x, dt, A, B, C`` with the features as state rows."""
        return widened_ssd(inputs, features)

    def scan(
        self, inputs: Tensors, before: State, sequences: Sequences, mix: State, features: Features | None
    ) -> tuple[torch.Tensor, State]:
        """Run :func:`statex_dist.ops.ssd.ssd` or its step."""
        x, dt, A, B, C = inputs
        skip = self.D if sequences.mitigation is None else None
        if before is not None and sequences.is_step(x):
            x, dt, B, C = (y.squeeze(1) for y in (x, dt, B, C))
            y, after = ssd_decode(x, dt, A, B, C, before, D=skip, features=features, overwrite=sequences.overwrites)
            return y.unsqueeze(1), after
        options = {**sequences.scan_options, "seq_idx": sequences.seq_idx}
        return ssd(x, dt, A, B, C, D=skip, features=features, initial_state=before, **options)

    def mitigated(self, mitigation: Mitigation, scan: Scan, inputs: Tensors, state: State, memory: Tensors) -> Scanned:
        """Run the recurrence under a mitigation, and add the skip term behind it.

        A mitigation may reduce the input of the state. It must not reduce the skip term.
        """
        y, after, memory = mitigation.ssd(scan, inputs, state, memory)
        return Scanned(y + inputs[0] * self.D.to(inputs[0].dtype).unsqueeze(-1), after, memory)


def token_positions(
    x: torch.Tensor, sequences: Sequences, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's position ``[B, T]`` and, per sequence, that of the token after its last ``[S]``."""
    if sequences.cu_seqlens is None:
        lengths = [(0, x.shape[1])] * x.shape[0]
    else:
        lengths = borders_of(sequences.cu_seqlens)
    counts = torch.tensor([stop - start for start, stop in lengths], device=x.device)
    starts = torch.zeros_like(counts) if before is None else before
    after = starts + counts
    if sequences.context is not None:
        # A position is carried on as a state is: it grows by the share's tokens, undecayed.
        last = counts[-1:].double()
        first, after = (y.to(counts.dtype) for y in sequences.context.exchange(last, torch.ones_like(last), before))
        starts = torch.cat([first, starts.new_zeros(len(counts) - 1)])
    rows = [
        torch.arange(stop - start, device=x.device) + first
        for (start, stop), first in zip(lengths, starts, strict=True)
    ]
    packed = sequences.cu_seqlens is not None
    return (torch.cat(rows).unsqueeze(0) if packed else torch.stack(rows)), after

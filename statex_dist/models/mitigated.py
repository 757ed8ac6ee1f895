"""A layer's recurrence under a remedy against state collapse: which equation applies to which of its inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

from statex_dist.models.mitigation import ForgetMore, Mitigation, SlidingWindow, StateNorm
from statex_dist.ops.mitigations import (
    Scan,
    Tensors,
    forget_more_delta,
    forget_more_gla,
    forget_more_ssd,
    limit_norm,
    limit_or_learn_norm,
    scan_in_pieces,
    windowed_gla,
    windowed_ssd,
)
from statex_dist.ops.precision import wide_dtype


class Scanned(NamedTuple):
    """Outputs ``[B, T, ...]``, the state after them, and what the remedy adds to the layer's state."""

    outputs: torch.Tensor
    state: torch.Tensor | None
    memory: Tensors


def mitigated_gla(
    mitigation: Mitigation, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors
) -> Scanned:
    """Run gated linear attention under a remedy.

    Args:
        mitigation: The remedy.
        scan: Takes ``q, k, v, g`` (shapes of :func:`statex_dist.ops.gla.gla`) and a state.
        inputs: ``q, k, v, g``.
        state: Before the inputs, or None.
        memory: What the remedy had added to the layer's state, or empty.
    """
    q, k, v, g = inputs
    match mitigation:
        case ForgetMore(decay=decay, insert=insert):
            k, g = forget_more_gla(k, g, decay=decay, insert=insert)
            return Scanned(*scan((q, k, v, g), state), ())
        case SlidingWindow(tokens=width):
            o, state, memory = windowed_gla(scan, _widened(inputs), state, memory, width=width)
            return Scanned(o.to(v.dtype), state, memory)
    return _normalized(mitigation, scan, inputs, state, memory)


def mitigated_ssd(
    mitigation: Mitigation, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors
) -> Scanned:
    """Run the Mamba2 scan without its skip term under a remedy.

    Args:
        mitigation: The remedy.
        scan: Takes ``x, dt, A, B, C`` (shapes of :func:`statex_dist.ops.ssd.ssd`) and a state.
        inputs: ``x, dt, A, B, C``.
        state: Before the inputs, or None.
        memory: What the remedy had added to the layer's state, or empty.
    """
    x, dt, A, B, C = inputs

    def scan_tokens(tokens: Tensors, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, dt, B, C = tokens
        return scan((x, dt, A, B, C), before)

    match mitigation:
        case ForgetMore(decay=decay, insert=insert):
            x, dt, A = forget_more_ssd(x, dt, A, decay=decay, insert=insert)
            return Scanned(*scan((x, dt, A, B, C), state), ())
        case SlidingWindow(tokens=width):
            y, state, memory = windowed_ssd(scan_tokens, _widened((x, dt, B, C)), A, state, memory, width=width)
            return Scanned(y.to(x.dtype), state, memory)
    return _normalized(mitigation, scan_tokens, (x, dt, B, C), state, memory)


def mitigated_delta(
    mitigation: Mitigation, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors
) -> Scanned:
    """Run the delta rule under a remedy; arguments as in :func:`mitigated_gla`, but for ``beta`` after ``q, k, v, g``.

    There is no sliding window: :meth:`~statex_dist.models.mitigation.SlidingWindow.check_model` refuses it.
    """
    q, k, v, g, beta = inputs
    if isinstance(mitigation, ForgetMore):
        v, g = forget_more_delta(v, g, decay=mitigation.decay, insert=mitigation.insert)
        return Scanned(*scan((q, k, v, g, beta), state), ())
    return _normalized(mitigation, scan, inputs, state, memory)


def _widened(inputs: Tensors) -> Tensors:
    """Return fp32 or float64: what leaves a window has to be what entered it, and bf16 rounds the two apart."""
    return tuple(y.to(wide_dtype(y.dtype)) for y in inputs)


def _normalized(
    mitigation: Mitigation, scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors
) -> Scanned:
    assert isinstance(mitigation, StateNorm), mitigation
    limit, learn = mitigation.limit, mitigation.learn
    if learn is None:
        assert limit is not None

        def bounded(after: torch.Tensor, num_tokens: int) -> torch.Tensor:
            return limit_norm(after, limit)

        return Scanned(*scan_in_pieces(scan, inputs, state, every=mitigation.every, after_piece=bounded), ())
    kept = memory

    def learned(after: torch.Tensor, num_tokens: int) -> torch.Tensor:
        nonlocal kept
        limits, count = kept or (after.new_zeros(after.shape[:2]), after.new_zeros(len(after), dtype=torch.int64))
        count = count + num_tokens
        after, limits = limit_or_learn_norm(after, limits, count, learn_tokens=learn)
        kept = (limits, count)
        return after

    o, state = scan_in_pieces(scan, inputs, state, every=mitigation.every, after_piece=learned)
    return Scanned(o, state, kept)

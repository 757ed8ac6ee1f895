"""Mitigations of state collapse that need no training (arXiv 2410.07145, section 4.2), around any form of the scans.

A model whose state is too large for its training length never learned to forget; past that length the state fills up
and the loss rises. Each mitigation changes the recurrence ``h_t = a_t h_{t-1} + k_t v_t^T`` and not a weight:

- forget more, remember less: ``log a' = log a - delta``, and the input that is inserted times a factor below 1;
- state normalisation: ``h <- h min(1, p / ||h||)`` for each head;
- sliding window: ``h_t - a_{t-r+1} ... a_t h_{t-r}``, the state of a recurrence that saw the last ``r`` tokens alone.

``scan`` stands for the scan or the step of a recurrence: it takes inputs ``[B, T, ...]`` and a state
(None for zero), and returns outputs and the state after them (None only where the caller does not ask for it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from statex_dist.ops.cu_seqlens import reverse_cumsum

Tensors = tuple[torch.Tensor, ...]
Scan = Callable[[Tensors, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]

_SMALLEST_RATE = 1e-20
"""Of a Mamba2 head: a step size can stand for a decay only where the rate is not zero."""


def forget_more_gla(k: torch.Tensor, g: torch.Tensor, *, decay: float, insert: float) -> Tensors:
    """Return keys times ``insert`` and log decays less ``decay``."""
    return k * insert, g - decay


def forget_more_delta(v: torch.Tensor, g: torch.Tensor, *, decay: float, insert: float) -> Tensors:
    """Return values times ``insert`` and log decays less ``decay``.

    A key of the delta rule also erases, with the strength ``beta``; only the value is insertion alone.
    """
    return v * insert, g - decay


def forget_more_ssd(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, *, decay: float, insert: float) -> Tensors:
    """Return ``x, dt, A`` for which the scan decays by ``dt A - decay`` and inserts ``insert dt x B^T``.

    Decay and input share the step size: ``dt' = dt - decay / A`` gives the decay, ``x' = insert x dt / dt'`` the input.
    The skip term is the caller's, of the ``x`` that it had.

    Args:
        x: ``[B, T, H, P]`` inputs.
        dt: ``[B, T, H]`` step sizes.
        A: ``[H]`` negative decay rates.
        decay: Further log decay per token, 0 or more.
        insert: Factor of the input.
    """
    A = A.clamp(max=-_SMALLEST_RATE)
    longer = dt - decay / A
    share = insert * torch.where(longer > 0, dt / longer, 1.0)
    return (x * share.unsqueeze(-1)).to(x.dtype), longer, A


def limit_norm(state: torch.Tensor, limit: torch.Tensor | float) -> torch.Tensor:
    """Return ``state [S, H, ., .]`` with the Frobenius norm of each head at most ``limit``, a number or ``[S, H]``."""
    return state * (limit / head_norms(state)).clamp(max=1).unsqueeze(-1).unsqueeze(-1)


def head_norms(state: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norms ``[S, H]`` of ``state [S, H, ., .]``, a zero one as the smallest normal number."""
    norms = torch.linalg.vector_norm(state, dim=(-2, -1))
    return norms.clamp(min=torch.finfo(norms.dtype).tiny)


def limit_or_learn_norm(
    state: torch.Tensor, limit: torch.Tensor, count: torch.Tensor, *, learn_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the norms of each sequence's states to the largest that they had within its first tokens.

    Args:
        state: ``[S, H, ., .]``.
        limit: ``[S, H]`` largest norms so far.
        count: ``[S]`` int64, tokens of each sequence up to this state.
        learn_tokens: Up to this number of tokens a state stays as it is, and its norm raises the limit.

    Returns:
        The states and the limits.
    """
    learning = (count <= learn_tokens).unsqueeze(-1)
    norms = head_norms(state)
    limit = torch.where(learning, torch.maximum(limit, norms), limit)
    factor = torch.where(learning, 1.0, (limit / norms).clamp(max=1))
    return state * factor.unsqueeze(-1).unsqueeze(-1), limit


def scan_in_pieces(
    scan: Scan,
    inputs: Tensors,
    state: torch.Tensor | None,
    *,
    every: int,
    after_piece: Callable[[torch.Tensor, int], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan pieces of ``every`` tokens one after another, the state between them as ``after_piece`` makes it.

    Args:
        scan: The recurrence.
        inputs: ``[B, T, ...]`` each.
        state: Before the inputs.
        every: Tokens of a piece; the last one may have fewer.
        after_piece: Takes the state after a piece and the piece's number of tokens.

    Returns:
        Outputs ``[B, T, ...]`` and the state.
    """
    outputs = []
    for piece in zip(*(y.split(every, dim=1) for y in inputs), strict=True):
        o, state = scan(piece, state)
        assert state is not None
        state = after_piece(state, piece[0].shape[1])
        outputs.append(o)
    assert state is not None
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def window_sums(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sums over every ``width`` neighbours of ``x [B, N, ...]``, ``[B, N - width + 1, ...]``.

    A window is the end of one block of ``width`` and the start of the next, each summed by itself. The difference of
    two running sums would cost the digits that a far larger sum before the window took, and ``-inf`` makes it NaN.
    """
    num_windows = x.shape[1] - width + 1
    if num_windows == 1:
        return x.sum(1, keepdim=True)
    # Where the window is one whole block, the start of the next is its empty start.
    num_blocks = num_windows // width + 2
    blocks = _pad_tokens(x, 0, num_blocks * width - x.shape[1]).unflatten(1, (num_blocks, width))
    ends = reverse_cumsum(blocks, 2).flatten(1, 2)
    starts = _pad_tokens(blocks[:, :, :-1].cumsum(2).flatten(0, 1), 1, 0).unflatten(0, (-1, num_blocks)).flatten(1, 2)
    return ends[:, :num_windows] + starts[:, width : width + num_windows]


def _pad_tokens(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Return ``x [B, T, ...]`` with zeros before and after its tokens."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (before, after))


def windowed_gla(
    scan: Scan, inputs: Tensors, state: torch.Tensor | None, memory: Tensors, *, width: int
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Scan as if every token had come with only the ``width - 1`` tokens before it.

    What left the window during this segment is a second scan, ``width`` tokens behind and from zero; its inputs have
    decayed by the sum of the log decays of a whole window, ``G``, before they leave:

        h_t = scan(k, v, g; h_0)_t - exp(G_t) scan(k_{t-r}, v_{t-r}, g_{t-r}; 0)_t,   G_t = g_{t-r+1} + ... + g_t

    Only the window's own state is carried from segment to segment: it does not grow with the text, and its rounding
    only as a random walk does, where nothing is ever forgotten.

    Args:
        scan: Gated linear attention over ``q, k, v, g``, shapes as in :func:`statex_dist.ops.gla.gla`.
        inputs: ``q, k, v, g``; what leaves has to be what entered, so they should be fp32 or float64.
        state: Of the window before the segment, or None.
        memory: ``k, v, g`` of the last ``width`` tokens, ``[B, width, ...]``, zeros where there were none; or empty.
        width: Tokens in the window, ``r``.

    Returns:
        Outputs, the window's state and its memory after the segment.
    """
    q, *tokens = inputs
    before, leaving, last = _move_window(tokens, memory, width)
    fade = window_sums(torch.cat([before[-1][:, 1:], tokens[-1]], dim=1), width).exp()
    o, state = scan(inputs, state)
    assert state is not None
    left_o, left = scan(((q * fade).to(q.dtype), *leaving), _zero_for_step(q, state))
    assert left is not None
    return o - left_o, state - left * fade[:, -1].unsqueeze(-1), last


def windowed_ssd(
    scan: Scan, inputs: Tensors, A: torch.Tensor, state: torch.Tensor | None, memory: Tensors, *, width: int
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Run :func:`windowed_gla` for Mamba2, whose decay is one number per head: it scales the outputs, not the queries.

    Args:
        scan: The Mamba2 scan over ``x, dt, B, C`` without the skip term, shapes as in
            :func:`statex_dist.ops.ssd.ssd`.
        inputs: ``x, dt, B, C``.
        A: ``[H]`` negative decay rates.
        state: Of the window before the segment, or None.
        memory: ``x, dt, B`` of the last ``width`` tokens, ``[B, width, ...]``, zeros where there were none; or empty.
        width: Tokens in the window.

    Returns:
        Outputs, the window's state and its memory after the segment.
    """
    *tokens, C = inputs
    before, leaving, last = _move_window(tokens, memory, width)
    fade = window_sums(torch.cat([before[1][:, 1:], tokens[1]], dim=1) * A, width).exp()
    y, state = scan(inputs, state)
    assert state is not None
    left_y, left = scan((*leaving, C), _zero_for_step(C, state))
    assert left is not None
    fade_state = fade[:, -1].unsqueeze(-1).unsqueeze(-1)
    return y - left_y * fade.unsqueeze(-1).to(y.dtype), state - left * fade_state, last


def _move_window(tokens: Sequence[torch.Tensor], memory: Tensors, width: int) -> tuple[Tensors, Tensors, Tensors]:
    """Return the ``width`` tokens before a segment, those that leave the window during it, and those in it afterwards.

    At the start of a text the tokens before are zeros. What is in the window afterwards is never a view.
    """
    if memory:
        before = tuple(old.to(new.dtype) for old, new in zip(memory, tokens, strict=True))
    else:
        before = tuple(new.new_zeros(new.shape[0], width, *new.shape[2:]) for new in tokens)
    num_tokens = tokens[0].shape[1]
    pairs = list(zip(before, tokens, strict=True))
    if num_tokens <= width:
        leaving = tuple(old[:, :num_tokens] for old, _ in pairs)
        return before, leaving, tuple(torch.cat([old[:, num_tokens:], new], dim=1) for old, new in pairs)
    leaving = tuple(torch.cat([old, new[:, :-width]], dim=1) for old, new in pairs)
    return before, leaving, tuple(new[:, -width:].clone() for new in tokens)


def _zero_for_step(inputs: torch.Tensor, state: torch.Tensor) -> torch.Tensor | None:
    """Return the zero state of the scan of what leaves; one token's step wants it written out."""
    return torch.zeros_like(state) if inputs.shape[1] == 1 else None

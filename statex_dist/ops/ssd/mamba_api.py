"""The only file that imports mamba_ssm's kernels, and what makes them safe to call.

The package's ``__init__`` imports a CUDA extension that a build without a compiler lacks. The SSD kernels are Triton
and need none of it, so they are imported without it (:mod:`statex_dist.bare_package`).

The kernel computes some cases wrongly without a word; :func:`mamba_ssd` turns each of them into calls that it computes
rightly:

1. Offsets are int32 (mamba issue 1015), and the third axis of a grid ends at 65535. Longer inputs are cut into pieces
   of whole chunks, and the state after one piece is the initial state of the next.
2. Packed sequences are told apart by ``seq_idx``, but an initial state reaches only the one with index 0, and only the
   last one's final state comes out. Where either is asked for, sequences become rows of a batch.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections import defaultdict
from functools import cache
from typing import Any, NamedTuple

import torch

from statex_dist.bare_package import import_from_bare
from statex_dist.errors import ConfigError
from statex_dist.ops.cu_seqlens import read_borders, sequence_index

CHUNK_SIZE = 256
INT32_NUMBERS = 2**31
"""Elements of one buffer from which on the kernels' offsets overflow."""
GRID_PROGRAMS = 65535
"""Programs along the second and the third axis of a CUDA grid."""


@cache
def has_mamba_ssm() -> bool:
    """Return whether mamba_ssm's Triton kernels are installed (they need triton, not a GPU)."""
    return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "triton", "einops"))


@cache
def _scan_kernel() -> Any:
    return import_from_bare("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


class _ScanInputs(NamedTuple):
    """The inputs of one scan: ``x [B, T, H, P]``, ``dt [B, T, H]``, ``A [H]``, ``B, C [B, T, G, N]``."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor

    def rows(self, rows: slice) -> _ScanInputs:
        """Return some sequences of the batch."""
        return _ScanInputs(self.x[rows], self.dt[rows], self.A, self.B[rows], self.C[rows])

    def tokens(self, tokens: slice) -> _ScanInputs:
        """Return the same tokens of every sequence."""
        return _ScanInputs(self.x[:, tokens], self.dt[:, tokens], self.A, self.B[:, tokens], self.C[:, tokens])


def mamba_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    output_final_state: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the Mamba2 scan on mamba_ssm's Triton kernels, right for every length, packing and state.

    Arguments and results are those of ``naive_ssd``, but for these:

    Args:
        seq_idx: ``[1, T]`` int32, the same borders in mamba_ssm's form; derived from ``cu_seqlens`` where None.
        output_final_state: Whether the final states are needed. Packed sequences cost less without.
        chunk_size: Tokens per chunk.

    Raises:
        ConfigError: mamba_ssm is not installed, the inputs are float64, or a single chunk is too large for it.
    """
    if not has_mamba_ssm():
        raise ConfigError("mamba_ssm's kernels are not installed; run `make setup`, or use backend 'chunked'")
    if x.dtype == torch.float64:
        raise ConfigError("mamba_ssm computes in float32 at most, not in float64; use backend 'chunked'")
    # Cutting along tokens shortens an offset only where tokens are the slowest axis of a sequence.
    x, dt, B, C = (y if y.stride(1) >= y.stride(2) else y.contiguous() for y in (x, dt, B, C))
    scan = _ScanInputs(x, dt, A, B, C)
    if cu_seqlens is None:
        y, state = _run(scan, initial_state, None, chunk_size)
        return y, state if output_final_state else None
    if initial_state is not None or output_final_state:
        y, state = _run_documents(scan, initial_state, cu_seqlens, chunk_size)
        return y, state if output_final_state else None
    if seq_idx is None:
        seq_idx = sequence_index(cu_seqlens, x.shape[1]).int().unsqueeze(0)
    return _run(scan, None, seq_idx, chunk_size)[0], None


def _run(
    scan: _ScanInputs, initial_state: torch.Tensor | None, seq_idx: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan with as few kernel calls as its limits allow; ``initial_state`` and ``seq_idx`` as the kernel takes them."""
    batch, num_tokens = scan.x.shape[:2]
    if num_tokens == 0:
        shape = (batch, *scan.x.shape[2:], scan.B.shape[3])
        return scan.x, scan.x.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state
    chunks = -(-num_tokens // chunk_size)
    limit = _chunks_per_call(scan, chunk_size)
    # The rows of a slice lie as far apart as those of the whole tensor.
    apart = max(y.stride(0) for y in scan if y is not scan.A) if batch > 1 else 0
    if batch * chunks <= limit and batch * apart < INT32_NUMBERS:
        return _call(scan, initial_state, seq_idx, chunk_size)
    if batch > 1:
        size = max(1, min(limit // chunks, (INT32_NUMBERS - 1) // apart))
        groups = [slice(start, min(start + size, batch)) for start in range(0, batch, size)]
        parts = [
            _run(scan.rows(g), None if initial_state is None else initial_state[g], None, chunk_size) for g in groups
        ]
        return torch.cat([y for y, _ in parts]), torch.cat([state for _, state in parts])
    outputs, state, piece_idx = [], initial_state, seq_idx
    for start in range(0, num_tokens, limit * chunk_size):
        tokens = slice(start, start + limit * chunk_size)
        if seq_idx is not None and start:
            # Index 0 is then the sequence that the last piece ended in: the kernel hands the state on to it alone.
            piece_idx = seq_idx - seq_idx[:, start - 1 : start]
        piece_idx_here = None if piece_idx is None else piece_idx[:, tokens]
        y, state = _call(scan.tokens(tokens), state, piece_idx_here, chunk_size)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def _chunks_per_call(scan: _ScanInputs, chunk_size: int) -> int:
    """Return how many chunks one call may hold.

    The limit follows from the kernels' largest tensor, per chunk, forward and backward (the names are mamba_ssm's).
    ``dB``, ``dC`` and ``dCB`` have one more axis, of groups of heads, but only while a call has fewer chunks than the
    GPU has multiprocessors.
    """
    heads, head_dim, groups, d_state = *scan.x.shape[2:], *scan.B.shape[2:]
    elements = max(
        *(chunk_size * y.stride(1) for y in scan if y is not scan.A),  # x, B and C are slices of one wider row
        chunk_size * heads * head_dim,  # out, dx
        chunk_size * groups * d_state,  # dB, dC
        heads * head_dim * d_state,  # states, dstates
        groups * chunk_size**2,  # CB, dCB
        heads * chunk_size * -(-chunk_size // 32),  # ddA_cumsum, one per 32 tokens
        heads * chunk_size * -(-max(head_dim, d_state) // 32),  # ddt, ddA_cumsum in deterministic mode
    )
    chunks = min((INT32_NUMBERS - 1) // elements, GRID_PROGRAMS // groups)
    if chunks == 0:
        raise ConfigError(
            f"one chunk of {chunk_size} tokens takes {elements} numbers, and mamba_ssm counts to {INT32_NUMBERS}; "
            "use backend 'chunked'"
        )
    return chunks


def _call(
    scan: _ScanInputs, initial_state: torch.Tensor | None, seq_idx: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    y, state = _scan_kernel()(
        *scan, chunk_size=chunk_size, initial_states=initial_state, seq_idx=seq_idx, return_final_states=True
    )
    if y.requires_grad:
        # The backward kernels index the gradient too, which may come as a slice of something wider.
        y.register_hook(torch.Tensor.contiguous)
    return y, state


def _run_documents(
    scan: _ScanInputs, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan packed sequences that have states, with sequences of equally many chunks as the rows of one batch.

    Each sequence fills up its last chunk, which it would in a call of its own too: padding costs nothing, and there are
    at most about ``sqrt(2 T / chunk_size)`` calls (23 at T = 64K), however many sequences there are. Padded tokens
    have ``dt = 0``: they decay nothing and write nothing.
    """
    borders = read_borders(cu_seqlens)
    device = scan.x.device
    groups: dict[int, list[int]] = defaultdict(list)
    for document, (start, end) in enumerate(itertools.pairwise(borders)):
        groups[-(-(end - start) // chunk_size)].append(document)
    outputs, states, order = [], [], []
    places, num_outputs = torch.empty(borders[-1], dtype=torch.long), 0  # where each token's output is
    for chunks, documents in groups.items():
        first = None if initial_state is None else initial_state.index_select(0, torch.tensor(documents, device=device))
        if len(documents) == 1:
            tokens = slice(borders[documents[0]], borders[documents[0] + 1])
            rows = scan.tokens(tokens)
            places[tokens] = num_outputs + torch.arange(rows.x.shape[1])
        else:
            starts, ends = (torch.tensor([borders[d + side] for d in documents]).unsqueeze(1) for side in (0, 1))
            index = starts + torch.arange(chunks * chunk_size)
            real = index < ends
            places[index[real]] = num_outputs + real.flatten().nonzero().squeeze(1)
            rows = _gather(scan, index.minimum(ends - 1).to(device), real.to(device))
        y, state = _run(rows, first, None, chunk_size)
        outputs.append(y.flatten(0, 1))
        num_outputs += len(outputs[-1])
        states.append(state)
        order += documents
    y = torch.cat(outputs).index_select(0, places.to(device)).unsqueeze(0)
    return y, torch.cat(states).index_select(0, torch.tensor(order).argsort().to(device))


def _gather(scan: _ScanInputs, index: torch.Tensor, real: torch.Tensor) -> _ScanInputs:
    """Return the tokens ``index [S, L]`` of one packed row as a batch; those that are not real get ``dt = 0``."""
    x, dt, B, C = (
        y[0].index_select(0, index.flatten()).unflatten(0, index.shape) for y in (scan.x, scan.dt, scan.B, scan.C)
    )
    return _ScanInputs(x, dt * real.unsqueeze(-1), scan.A, B, C)

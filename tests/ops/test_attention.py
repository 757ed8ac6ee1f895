"""Attention of packs, rows and segments against float64 attention with a dense mask."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.ops import packed_attention
from statex_dist.ops.attention import KeyValues, attention
from statex_dist.ops.packed_attention import ScoreRule
from tests.ops.scan_cases import borders

HEADS, KEY_HEADS, KEYS, VALUES = 4, 2, 6, 5


def inputs(tokens: int, *, batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    sizes = [(HEADS, KEYS), (KEY_HEADS, KEYS), (KEY_HEADS, VALUES)]
    return [torch.randn(batch, heads, tokens, size, generator=rng, dtype=torch.float64) for heads, size in sizes]


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Attention under one mask over all tokens; ``documents [T]`` numbers each token's."""
    k, v = (y.repeat_interleave(HEADS // KEY_HEADS, dim=1) for y in (k, v))
    scores = q @ k.transpose(-1, -2) * KEYS**-0.5
    place = torch.arange(len(documents))
    seen = (documents[:, None] == documents) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    cuts=st.sets(st.integers(1, 44), max_size=4),
    window=st.none() | st.integers(1, 6),
)
@mock.patch("statex_dist.ops.packed_attention._WINDOW_QUERIES", 2)
def test_segments_of_packs_equal_dense_attention(lengths: list[int], cuts: set[int], window: int | None):
    total = sum(lengths)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    q, k, v = (y.requires_grad_() for y in inputs(total))
    expected = dense(q, k, v, documents, window)
    marks = sorted({0, total, *(cut for cut in cuts if cut < total)})
    state: KeyValues | None = None
    parts = []
    for start, stop in itertools.pairwise(marks):
        inside = [0, *(b - start for b in itertools.accumulate(lengths) if start < b < stop), stop - start]
        goes_on = start > 0 and documents[start - 1] == documents[start]
        o, state = attention(
            *(y[:, :, start:stop] for y in (q, k, v)),
            cu_seqlens=torch.tensor(inside, dtype=torch.int32),
            before=state if goes_on else None,
            window=window,
            output_final_state=True,
        )
        parts.append(o)
        assert state is not None
        assert int(state.lengths[0]) == state.keys.shape[2]
    found = torch.cat(parts, dim=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad((y * weights).sum(), (q, k, v), retain_graph=True) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("steps", [1, 3])
def test_rows_of_unequal_lengths_are_read_on(steps: int, window: int | None):
    lengths, width = [2, 7, 4], 7
    q, k, v = inputs(width + steps, batch=3)
    keys, values = (y[:, :, :width].clone() for y in (k, v))
    for row, length in enumerate(lengths):
        for y in (keys, values):
            y[row, :, : width - length] = 0
    before = KeyValues(keys, values, torch.tensor(lengths))
    rows = (y[:, :, width:] for y in (q, k, v))
    found, after = attention(*rows, before=before, window=window, output_final_state=True)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        expected = dense(*(y[one, :, width - length :] for y in (q, k, v)), torch.zeros(length + steps), window)
        torch.testing.assert_close(found[one], expected[:, :, length:], rtol=0, atol=1e-12)
    assert after is not None
    assert after.lengths.tolist() == [length + steps for length in lengths]


def test_dropout_changes_scores_in_training_alone():
    q, k, v = inputs(8)
    marks = borders([3, 5])
    kept, _ = attention(q, k, v, cu_seqlens=marks)
    dropped, _ = attention(q, k, v, cu_seqlens=marks, dropout=0.5)
    assert not torch.equal(kept, dropped)


@pytest.mark.parametrize("history", [0, 5])
def test_many_documents_of_unequal_lengths(history: int):
    lengths = [3, 1, 40, 3, 41, 9, 10, 9, 3, 37, 1, 600, 601]
    q, k, v = (y.requires_grad_() for y in inputs(history + sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([history + 3, *lengths[1:]]))
    expected = dense(q, k, v, documents)[:, :, history:]
    marks = [0, *itertools.accumulate(lengths)]
    found = packed_attention.packed(q[:, :, history:], k, v, marks, ScoreRule(), history=history)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_documents_of_similar_lengths_share_a_call(monkeypatch):
    calls, product = [], ScoreRule.product
    monkeypatch.setattr(ScoreRule, "product", lambda *a, **mask: calls.append(a[1].shape) or product(*a, **mask))
    lengths = [1 + place % 16 for place in range(512)]
    attention(*inputs(sum(lengths)), cu_seqlens=borders(lengths))
    assert len(calls) <= 12
    assert sum(shape[0] * shape[2] for shape in calls) <= 1.25 * sum(lengths)


def test_no_mask_over_a_long_history(monkeypatch):
    monkeypatch.setattr(packed_attention, "_MASK_ELEMENTS", 256)
    masks, product = [], ScoreRule.product
    monkeypatch.setattr(
        ScoreRule, "product", lambda *a, **mask: masks.append(mask.get("attn_mask")) or product(*a, **mask)
    )
    q, k, v = (y.requires_grad_() for y in inputs(64))
    found = packed_attention.causal(q[:, :, 40:], k, v, ScoreRule())
    expected = dense(q, k, v, torch.zeros(64))[:, :, 40:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert all(mask.numel() <= 256 for mask in masks if mask is not None)


def kernel(q, k, v, of_queries, of_keys, most_queries, most_keys, *, scale, window_size, enable_gqa):
    """What torch's varlen_attn computes with ``window_size=(tokens before each, 0)``; CPUs do not have it."""
    assert (window_size[1], enable_gqa) == (0, True)
    score = ScoreRule(scale, window=None if window_size[0] < 0 else window_size[0] + 1)
    assert len({y.shape[-1] for y in (q, k, v)}) == 1
    assert q.shape[-1] % 8 == 0
    outputs, sizes = [], []
    for (a, b), (c, d) in zip(
        itertools.pairwise(of_queries.tolist()), itertools.pairwise(of_keys.tolist()), strict=True
    ):
        rows = (y.transpose(0, 1) for y in (q[a:b], k[c:d], v[c:d]))
        outputs.append(packed_attention.causal(*(y[None] for y in rows), score)[0].transpose(0, 1))
        sizes.append((b - a, d - c))
    assert (most_queries, most_keys) == tuple(map(max, zip(*sizes, strict=True)))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("history", [0, 7])
def test_the_kernel_of_gpus_gets_what_it_needs(monkeypatch, history: int, window: int | None):
    q, k, v = inputs(history + 20)
    arguments = (q[:, :, history:], k, v, [0, 6, 6, 7, 20], ScoreRule(window=window))
    expected = packed_attention.packed(*arguments, history=history)
    monkeypatch.setattr(packed_attention, "takes_varlen", lambda *_: True)
    monkeypatch.setattr(packed_attention, "varlen_kernel", lambda: kernel)
    torch.testing.assert_close(packed_attention.packed(*arguments, history=history), expected, rtol=0, atol=1e-12)

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.ops.cu_seqlens import chunk_layout, sequence_lengths
from statex_dist.ops.gla.torch_forms import chunked_gla
from tests.raising import raises

CPU = torch.device("cpu")


def test_sequence_lengths():
    assert sequence_lengths(3, 7, None) == (7, 7, 7)
    assert sequence_lengths(1, 7, torch.tensor([0, 0, 3, 7])) == (0, 3, 4)
    for marks in ([0, 3], [1, 7], [0, 5, 3, 7]):
        with raises(ValueError, "cu_seqlens", "from 0", "tokens 7"):
            sequence_lengths(1, 7, torch.tensor(marks))


def test_borders_are_read_from_the_device_once(monkeypatch):
    cu_seqlens = torch.tensor([0, 3, 8])
    reads = []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or read(self))
    assert [sequence_lengths(1, 8, cu_seqlens) for _ in range(3)] == [(3, 5)] * 3
    assert len(reads) == 1
    cu_seqlens[1] = 4
    assert sequence_lengths(1, 8, cu_seqlens) == (4, 4)
    with torch.inference_mode():
        inner = torch.tensor([0, 2, 8])
        assert sequence_lengths(1, 8, inner) == (2, 6)
        inner[1] = 5
        assert sequence_lengths(1, 8, inner) == (5, 3)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8).map(tuple), chunk_size=st.sampled_from([1, 4, 8, 16])
)
def test_every_token_has_one_place_and_comes_back(lengths, chunk_size):
    layout = chunk_layout(lengths, chunk_size, CPU)
    total = sum(lengths)
    assert layout.num_chunks == sum(-(-n // chunk_size) for n in lengths)
    places = layout.gather[layout.gather < total]
    assert sorted(places.tolist()) == list(range(total))
    assert torch.equal(layout.gather[layout.scatter], torch.arange(total))
    x = torch.arange(1.0, total + 1).reshape(1, total, 1)
    chunks = layout.to_chunks(x)
    assert chunks.shape == (layout.num_chunks, 1, chunk_size)
    assert torch.equal(layout.from_chunks(chunks, 1), x)
    assert chunks.sum() == x.sum(), "fillers must be zero"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8).map(tuple),
    chunk_size=st.sampled_from([1, 4, 8]),
    with_state=st.booleans(),
)
def test_carry_is_a_loop_over_each_sequence(lengths, chunk_size, with_state):
    layout = chunk_layout(lengths, chunk_size, CPU)
    rng = torch.Generator().manual_seed(sum(lengths))
    # Values per token, equal within a chunk, so that each chunk can be found in its sequence again.
    update, decay = (torch.rand(layout.num_chunks, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    initial = torch.rand(len(lengths), 2, generator=rng, dtype=torch.float64) if with_state else None
    starts, final = layout.carry(decay, update, layout.first_state(update, initial))
    final = final[layout.rank]
    chunk_of_token = layout.scatter // chunk_size
    offset = 0
    for i, length in enumerate(lengths):
        state = torch.zeros(2, dtype=torch.float64) if initial is None else initial[i]
        for chunk in chunk_of_token[offset : offset + length : chunk_size].tolist():
            torch.testing.assert_close(starts[chunk], state)
            state = decay[chunk] * state + update[chunk]
        torch.testing.assert_close(final[i], state)
        offset += length


def test_short_documents_are_carried_together():
    layout = chunk_layout((10,) * 50 + (640,), 64, CPU)
    assert layout.active == (51, *[1] * 9)


def test_equal_whole_chunks_need_no_copy():
    assert chunk_layout((64, 64), 64, CPU).identity
    assert chunk_layout((128,), 64, CPU).identity
    assert not chunk_layout((128, 64), 32, CPU).identity
    assert not chunk_layout((65,), 64, CPU).identity


def test_gradient_of_the_rearrangement_is_its_inverse():
    layout = chunk_layout((5, 0, 9), 4, CPU)
    x = torch.randn(1, 14, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: layout.to_chunks(y) ** 2, x)
    chunks = torch.randn(layout.num_chunks, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: layout.from_chunks(y, 1) ** 2, chunks)


def test_a_layout_made_in_inference_mode_serves_training_too():
    chunk_layout.cache_clear()
    q = torch.randn(1, 20, 2, 4)
    with torch.inference_mode():
        chunked_gla(q, q, q, -q.abs(), scale=1.0)
    x = q.clone().requires_grad_()
    o, _ = chunked_gla(x, x, x, -x.abs(), scale=1.0)
    o.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0

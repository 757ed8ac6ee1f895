from __future__ import annotations

import pytest
import torch

from statex_dist.ops.cu_seqlens import sequence_lengths


def test_sequence_lengths():
    assert sequence_lengths(3, 7, None) == (7, 7, 7)
    assert sequence_lengths(1, 7, torch.tensor([0, 0, 3, 7])) == (0, 3, 4)
    for marks in ([0, 3], [1, 7], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens 7"):
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

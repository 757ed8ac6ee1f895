"""Conversions with numpy against torch, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statex_dist.checkpoint.dtypes import TORCH_NAMES, cast, encode, has_nonfinite
from statex_dist.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, TORCH_NAMES[name])


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy().copy()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64), st.sampled_from(FLOATS))
def test_every_bit_pattern_of_fp32_rounds_as_torch_does(bits, target):
    values = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))
    ours = torch.from_numpy(cast(as_bytes(values), "F32", target)).view(torch_dtype(target))
    theirs = values.to(torch_dtype(target))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_every_pair(source, target):
    values = (torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3).to(
        torch_dtype(source)
    )
    ours = torch.from_numpy(cast(as_bytes(values), source, target)).view(torch_dtype(target))
    theirs = values.to(torch_dtype(target))
    if (source, target) == ("F64", "BF16"):
        theirs = values.float().bfloat16()  # by way of fp32, as new values are drawn
    assert torch.equal(ours, theirs)


def test_ties_go_to_the_even_neighbour():
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000], dtype=np.uint32).view(np.float32)
    assert encode(ties, "BF16").view(np.uint16).tolist() == [0x3F80, 0x3F82, 0xBF80]


@pytest.mark.parametrize("dtype", [*FLOATS, "F8_E4M3", "F8_E5M2"])
def test_every_byte_pair_is_judged_as_torch_does(dtype):
    size = torch_dtype(dtype).itemsize
    patterns = np.arange(65536, dtype=np.uint16)
    columns = [(patterns >> 8).astype(np.uint8), (patterns & 255).astype(np.uint8)]
    block = np.zeros((65536, max(size, 1)), dtype=np.uint8)
    for index, column in enumerate(columns[: min(size, 2)]):
        block[:, size - 1 - index] = column
    values = torch.from_numpy(block.reshape(-1)).view(torch_dtype(dtype)).to(torch.float64)
    for row in (*range(0, 65536, 97), *np.flatnonzero(~values.isfinite().numpy())[:50]):
        assert has_nonfinite(block[row], dtype) == (not bool(values[row].isfinite())), hex(row)
    finite = block[values.isfinite().numpy()].reshape(-1)
    assert not has_nonfinite(finite, dtype)
    assert not has_nonfinite(finite, dtype, np.empty(10, dtype=np.uint8))
    assert not has_nonfinite(finite, dtype, np.empty(len(finite) + 8, dtype=np.uint8))
    assert has_nonfinite(block.reshape(-1), dtype, np.empty(block.size, dtype=np.uint8))


def test_integers_are_finite_and_nothing_is_nothing():
    assert not has_nonfinite(np.full(8, 255, dtype=np.uint8), "I64")
    assert not has_nonfinite(np.empty(0, dtype=np.uint8), "F32")


@pytest.mark.parametrize(("source", "target"), [("F8_E4M3", "BF16"), ("F32", "I64"), ("BOOL", "F32")])
def test_what_is_not_converted(source, target):
    with pytest.raises(CheckpointError, match=r": F64, F32, F16, BF16$"):
        cast(np.zeros(8, dtype=np.uint8), source, target)
    with pytest.raises(CheckpointError, match="I32"):
        encode(np.zeros(2, dtype=np.float32), "I32")

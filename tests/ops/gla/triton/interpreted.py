"""Run the kernels of expanded layers in Triton's interpreter against the recurrence: a subprocess of a test."""

from __future__ import annotations

import sys

import torch

from statex_dist.ops.features import Features
from statex_dist.ops.gla import gla
from statex_dist.state.geometry import FeatureMap
from tests.ops.interpreter import enter_interpreter
from tests.ops.scan_cases import assert_close, borders, gla_inputs, run_with_gradients

SIZES = {"tokens": 100, "heads": 2, "keys": 37, "values": 21}
"""Neither keys nor values are a power of two or fill a tile."""

CASES = {
    "one segment": {},
    "a segment per chunk": {"chunk_size": 32, "segment_chunks": 1},
    "several blocks per chunk": {"tokens": 150, "chunk_size": 128, "segment_chunks": 1},
    "packed": {"lengths": [30, 1, 0, 50, 19], "chunk_size": 32, "segment_chunks": 2},
    "batch": {"tokens": 40, "batch": 2, "chunk_size": 16},
    "bursty gates": {"tokens": 70, "gate": "bursty", "chunk_size": 64, "keys": 10, "tolerance": 2e-4},
    "bursty gates, packed and mixed": {
        "gate": "bursty",
        "lengths": [40, 25],
        "chunk_size": 16,
        "keys": 10,
        "mix": "random",
        "tolerance": 2e-4,
    },
    "strong gates": {"tokens": 40, "gate": "constant:-50", "chunk_size": 16, "keys": 10},
    "M = I": {"mix": "identity", "chunk_size": 64, "segment_chunks": 1},
    "M = ones": {"mix": "ones", "chunk_size": 64},
    "M, packed": {"mix": "random", "lengths": [70, 30], "chunk_size": 32, "segment_chunks": 2},
    "several tiles": {"tokens": 33, "heads": 1, "keys": 80, "values": 150, "chunk_size": 32},
    "every block of the default chunk": {
        "tokens": 300,
        "heads": 1,
        "keys": 7,
        "values": 5,
        "chunk_size": 256,
        "segment_chunks": 1,
    },
    "a transposed M": {"tokens": 40, "mix": "transposed", "chunk_size": 16},
    "no final states": {"lengths": [30, 30], "chunk_size": 16, "segment_chunks": 1, "wants_final": False},
    "bf16, mixed": {"tokens": 70, "mix": "random", "chunk_size": 32, "dtype": torch.bfloat16, "tolerance": 2e-2},
    "features": {
        "tokens": 33,
        "keys": 7,
        "values": 6,
        "chunk_size": 16,
        "segment_chunks": 1,
        "features": {"rolls": [3, 1]},
    },
    "squares after relu, at the old norms, packed": {
        "lengths": [20, 1, 0, 9],
        "heads": 1,
        "keys": 5,
        "values": 8,
        "chunk_size": 16,
        "segment_chunks": 2,
        "features": {"rolls": [0, 2], "relu": True, "match_norm": True},
    },
    "features, strong gates": {
        "tokens": 20,
        "heads": 1,
        "gate": "constant:-50",
        "chunk_size": 16,
        "keys": 6,
        "features": {"rolls": [1]},
    },
    "features, bf16": {
        "tokens": 30,
        "heads": 1,
        "keys": 9,
        "chunk_size": 32,
        "features": {"rolls": [1, 2], "match_norm": True},
        "dtype": torch.bfloat16,
        "tolerance": 2e-2,
    },
    "bf16": {"tokens": 150, "chunk_size": 64, "dtype": torch.bfloat16, "tolerance": 2e-2},
}


def mixing_matrix(kind: str, heads: int) -> torch.Tensor:
    if kind == "identity":
        return torch.tensor([[1.0, 0.0]] * heads, dtype=torch.float64)
    if kind == "ones":
        return torch.ones(heads, 2, dtype=torch.float64)
    rng = torch.Generator().manual_seed(3)
    if kind == "transposed":
        return torch.randn(2, heads, dtype=torch.float64, generator=rng).t()
    return torch.randn(heads, 2, dtype=torch.float64, generator=rng)


def compare(
    *,
    lengths: list[int] | None = None,
    mix: str | None = None,
    features: dict | None = None,
    segment_chunks: int = 100,
    chunk_size: int | None = None,
    gate: str = "soft",
    dtype: torch.dtype = torch.float32,
    wants_final: bool = True,
    tolerance: float = 2e-5,
    **sizes: int,
) -> None:
    sizes = SIZES | sizes
    if lengths:
        sizes["tokens"] = sum(lengths)
    inputs = {name: x if name == "g" else x.to(dtype).double() for name, x in gla_inputs(**sizes, gate=gate).items()}
    matrix = None if mix is None else mixing_matrix(mix, sizes["heads"])
    width = sizes["values"] * (1 if matrix is None else matrix.shape[1])
    keys, products = sizes["keys"], None if features is None else FeatureMap(**features)
    if products is not None:
        keys *= products.factor
        gains = torch.randn(sizes["heads"], keys - sizes["keys"], generator=torch.Generator().manual_seed(2))
        inputs["gain"] = gains.double()
        inputs["k"][:, 3] = 0  # its norm has no gradient
    sequences = len(lengths) if lengths else sizes.get("batch", 1)
    rng = torch.Generator().manual_seed(1)
    state = torch.randn(sequences, sizes["heads"], keys, width, generator=rng, dtype=torch.float64)
    options = {"cu_seqlens": borders(lengths) if lengths else None}

    def scan(gain=None, **kwargs):
        if products is not None:
            kwargs |= {"features": Features(products, gain)}
        out, final = gla(**kwargs, output_final_state=wants_final)
        return out, out.new_zeros(()) if final is None else final

    expected = run_with_gradients(scan, inputs, backend="naive", initial_state=state, mix=matrix, **options)
    narrow = {name: x.to(torch.float32 if name in ("g", "gain") else dtype) for name, x in inputs.items()}
    state_bytes = sizes["heads"] * keys * width * dtype.itemsize
    actual = run_with_gradients(
        scan,
        narrow,
        backend="triton",
        initial_state=state.float(),
        mix=None if matrix is None else matrix.float(),
        chunk_size=chunk_size,
        max_state_bytes=2 * segment_chunks * state_bytes,
        **options,
    )
    assert_close(actual, expected, tolerance)


def check_second_backward() -> None:
    """The states kept between segments are not touched by a backward pass: the second one gives the same."""
    inputs = [x.float().requires_grad_() for x in gla_inputs(tokens=60, heads=1, keys=8, values=8).values()]
    out, _ = gla(*inputs, backend="triton", chunk_size=16, max_state_bytes=1)
    first, second = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def main() -> None:
    enter_interpreter()
    for name, options in CASES.items():
        compare(**options)
        print(f"ok {name}", flush=True)  # noqa: T201
    check_second_backward()
    assert "statex_dist.ops.gla.triton.scores" in sys.modules, "the PyTorch pieces ran in place of the kernels"


if __name__ == "__main__":
    main()

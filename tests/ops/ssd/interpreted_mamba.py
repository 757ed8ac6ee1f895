"""Run a Mamba2 layer's kernels in Triton's interpreter and compare them with the oracles: a subprocess of a test.

mamba_ssm's scan with every guard of ``mamba_api`` against the recurrence, and fla-core's convolution against ours.

Shims, for this process only: no driver means no timing, so the smallest blocks are taken (the interpreter computes
whole blocks, and the cases are tiny), and there is no device to ask for or to switch to. Triton's check of every
integer sum for an overflow is off: it takes half of the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from statex_dist.ops.conv.torch_forms import causal_conv
from statex_dist.ops.fla_api import fla_causal_conv
from statex_dist.ops.ssd import mamba_api, ssd
from statex_dist.ops.ssd.mamba_api import mamba_ssd
from statex_dist.ops.ssd.torch_forms import naive_ssd
from tests.ops.interpreter import enter_interpreter
from tests.ops.scan_cases import assert_close, borders, run_with_gradients, ssd_inputs

CHUNK = 16
SMALL: dict[str, Any] = {"heads": 1, "head_dim": 4, "groups": 1, "state": 16}
LENGTHS = (5, 40, 0, 1, 16, 30, 1)
"""Borders inside chunks and on them; of one, two and three chunks, and none."""

# calls: how often the kernel has to be called; a larger number wastes time, a smaller one is wrong.
CASES: dict[str, dict[str, Any]] = {
    "plain, batch 2, two groups": {
        "sizes": {"batch": 2, "tokens": 37, "heads": 4, "head_dim": 8, "groups": 2, "state": 16},
        "state": True,
        "calls": 1,
    },
    "d_state 512": {"sizes": {"tokens": 17, "heads": 1, "head_dim": 4, "groups": 1, "state": 512}, "calls": 1},
    "packed": {"lengths": LENGTHS, "final": False, "calls": 1},
    "packed with initial and final states": {"lengths": LENGTHS, "state": True, "calls": 3},
    "packed with final states": {"lengths": (20, 7, 32), "calls": 2},
    "packed with initial states alone": {"lengths": (20, 7, 32), "state": True, "final": False, "calls": 2},
    # A limit of chunks per call: 32 tokens a piece.
    "split": {"sizes": SMALL | {"tokens": 90}, "state": True, "chunks": 2, "calls": 3},
    "split by rows and tokens": {
        "sizes": SMALL | {"batch": 3, "tokens": 45},
        "state": True,
        "chunks": 2,
        "calls": 6,
    },
    "split by rows": {"sizes": SMALL | {"batch": 3, "tokens": 30}, "state": True, "chunks": 4, "calls": 2},
    "split, packed, sequences cut": {"lengths": (5, 60, 1, 30), "final": False, "chunks": 2, "calls": 3},
    "split, packed, a border on the cut": {"lengths": (10, 22, 25, 9), "final": False, "chunks": 2, "calls": 3},
    "split, packed with states, one cut": {"lengths": (5, 60, 1, 30), "state": True, "chunks": 2, "calls": 4},
}
DISPATCHED = "dispatch, with D"

CONV_CASES: dict[str, dict[str, Any]] = {
    "convolution, batch 2": {"tokens": 70, "batch": 2, "state": True},
    "convolution, packed": {"lengths": (5, 0, 1, 64, 66, 2), "silu": True},
    "convolution, packed with states": {"lengths": (5, 0, 1, 64, 66, 2), "state": True, "silu": True},
    "convolution of a slice, width 3, no bias": {"tokens": 7, "sliced": True, "width": 3, "bias": False},
}


def run_case(name: str, case: dict[str, Any], calls: list[int]) -> None:
    lengths = case.get("lengths")
    inputs = ssd_inputs(**(case["sizes"] if lengths is None else SMALL | {"tokens": sum(lengths)}))
    options: dict[str, Any] = {"cu_seqlens": borders(list(lengths)) if lengths else None}
    final = case.get("final", True)
    state = None
    if case.get("state"):
        rows = len(lengths) if lengths else inputs["x"].shape[0]
        shape = (rows, *inputs["x"].shape[2:], inputs["B"].shape[3])
        state = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def with_states(scan, **more):
        def run(**tensors):
            y, after = scan(**tensors, **options, **more)
            return y, after if final else y[:0]

        return run

    expected = run_with_gradients(with_states(naive_ssd), inputs, initial_state=state)
    mamba_api.GRID_PROGRAMS = case.get("chunks", 65535)  # one group: its programs are the chunks
    calls.clear()
    actual = run_with_gradients(
        with_states(mamba_ssd, chunk_size=CHUNK, output_final_state=final),
        {key: x.float() for key, x in inputs.items()},
        initial_state=None if state is None else state.float(),
    )
    mamba_api.GRID_PROGRAMS = 65535
    assert_close(actual, expected, 5e-5)
    assert len(calls) == case["calls"], f"{len(calls)} calls"
    print(f"ok {name}", flush=True)  # noqa: T201


def run_dispatched() -> None:
    """The public entry, at the kernel's own chunk length; seq_idx given as the batch carries it."""
    inputs = ssd_inputs(tokens=30, heads=2, head_dim=4, groups=1, state=16) | {
        "D": torch.linspace(-1, 1, 2, dtype=torch.float64)
    }
    packed = {"cu_seqlens": borders([11, 19]), "seq_idx": torch.tensor([[0] * 11 + [1] * 19], dtype=torch.int32)}

    def scan(**tensors):
        y, state = ssd(**tensors, **packed, output_final_state=False)
        assert state is None
        return y, y[:0]

    expected = run_with_gradients(scan, inputs, backend="naive")
    actual = run_with_gradients(scan, {key: x.float() for key, x in inputs.items()}, backend="kernel")
    assert_close(actual, expected, 5e-5)
    print(f"ok {DISPATCHED}", flush=True)  # noqa: T201


def run_conv(name: str, case: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    lengths, width, channels = case.get("lengths"), case.get("width", 4), 20
    inputs = {"x": draw(case.get("batch", 1), sum(lengths) if lengths else case["tokens"], channels)}
    inputs["weight"] = draw(channels, 1, width)
    if case.get("bias", True):
        inputs["bias"] = draw(channels)
    if case.get("state"):
        inputs["initial_state"] = draw(len(lengths) if lengths else case["batch"], channels, width - 1)
    silu, options = case.get("silu", False), {"cu_seqlens": borders(list(lengths)) if lengths else None}

    def ours(**tensors):
        y = causal_conv(**tensors, **options)
        return F.silu(y) if silu else y, y[:0]

    def theirs(**tensors):
        if case.get("sliced"):
            tensors["x"] = F.pad(tensors["x"], (3, 2))[..., 3:-2]
        y = fla_causal_conv(**tensors, **options, silu=silu)
        return y, y[:0]

    expected = run_with_gradients(ours, inputs)
    assert_close(run_with_gradients(theirs, {key: x.float() for key, x in inputs.items()}), expected, 5e-6)
    print(f"ok {name}", flush=True)  # noqa: T201


def main() -> None:
    enter_interpreter()
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    Autotuner._bench = lambda *_, config, **__: [float(math.prod(config.kwargs.values()))] * 3
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=4)

    kernel, calls = mamba_api._scan_kernel(), []

    def counted(*args, **kwargs):
        calls.append(args[0].shape[1])
        return kernel(*args, **kwargs)

    mamba_api._scan_kernel = lambda: counted
    for name, case in CASES.items():
        run_case(name, case, calls)
    run_dispatched()
    for name, case in CONV_CASES.items():
        run_conv(name, case)


if __name__ == "__main__":
    main()

"""Run fla-core's GLA kernels in Triton's interpreter and compare them with the recurrence: a subprocess of a test.

Three shims, for this process only: no driver means no timing, so the first tuning choice is taken; the kernels call
``.to`` on loop counters, which are plain ints here, so ``range`` yields ints that have it.
"""

from __future__ import annotations

import builtins
import importlib
import os

import torch

from statex_dist.ops.dispatch import gla
from tests.ops.scan_cases import assert_close, borders, gla_inputs, run_with_gradients

CASES = {
    "recurrent": {"tokens": 40, "heads": 2, "keys": 16, "values": 16},
    "chunk": {"tokens": 100, "heads": 1, "keys": 32, "values": 32},
    "packed": {"tokens": 80, "heads": 2, "keys": 16, "values": 16, "lengths": [30, 50]},
}


class Counter(int):
    def to(self, *_):
        return self


def counting_range(*args):
    return map(Counter, builtins.range(*args))


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
    for name in ("fla.ops.common.chunk_h", "fla.ops.gla.chunk"):
        importlib.import_module(name).range = counting_range
    for case, sizes in CASES.items():
        sizes = dict(sizes)
        lengths = sizes.pop("lengths", None)
        inputs = gla_inputs(**sizes)
        num_sequences = len(lengths or [0])
        rng = torch.Generator().manual_seed(1)
        shape = (num_sequences, sizes["heads"], sizes["keys"], sizes["values"])
        state = torch.randn(shape, generator=rng, dtype=torch.float64)
        options = {"cu_seqlens": borders(lengths) if lengths else None}
        expected = run_with_gradients(gla, inputs, backend="naive", initial_state=state, **options)
        narrow = {key: x.float() for key, x in inputs.items()}
        actual = run_with_gradients(gla, narrow, backend="kernel", initial_state=state.float(), **options)
        assert_close(actual, expected, 5e-5)
        print(f"ok {case}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

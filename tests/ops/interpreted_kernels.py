"""Run fla-core's kernels in Triton's interpreter and compare them with the recurrences: a subprocess of a test.

The kernels call ``.to`` on loop counters, which are plain ints here, so ``range`` yields ints that have it.
"""

from __future__ import annotations

import builtins
import importlib
import sys

import torch

from statex_dist.ops.delta_rule import delta_rule
from statex_dist.ops.gla import gla
from tests.ops.interpreter import enter_interpreter
from tests.ops.scan_cases import assert_close, borders, delta_inputs, gla_inputs, run_with_gradients

GLA_CASES = {
    "recurrent": {"tokens": 40, "heads": 2, "keys": 16, "values": 16},
    "chunk": {"tokens": 100, "heads": 1, "keys": 32, "values": 32},
    "packed": {"tokens": 80, "heads": 2, "keys": 16, "values": 16, "lengths": [30, 50]},
}
DELTA_CASES = {
    "gated delta rule": {"tokens": 70, "value_heads": 4},
    "gated delta rule, packed": {"tokens": 80, "lengths": [30, 50]},
    "kda": {"tokens": 70, "channels": 16},
}
CASES = [*GLA_CASES, *DELTA_CASES]


class Counter(int):
    def to(self, *_):
        return self


def counting_range(*args):
    return map(Counter, builtins.range(*args))


def compare(case, scan, inputs, value_heads, lengths) -> None:
    rng = torch.Generator().manual_seed(1)
    shape = (len(lengths or [0]), value_heads, inputs["k"].shape[-1], inputs["v"].shape[-1])
    state = torch.randn(shape, generator=rng, dtype=torch.float64)
    options = {"cu_seqlens": borders(lengths) if lengths else None}
    expected = run_with_gradients(scan, inputs, backend="naive", initial_state=state, **options)
    narrow = {key: x.float() for key, x in inputs.items()}
    actual = run_with_gradients(scan, narrow, backend="kernel", initial_state=state.float(), **options)
    assert_close(actual, expected, 5e-5)
    print(f"ok {case}", flush=True)  # noqa: T201


def main() -> None:
    enter_interpreter()
    for name in ("fla.ops.gla", "fla.ops.gated_delta_rule", "fla.ops.kda"):
        importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = counting_range
    for case, sizes in GLA_CASES.items():
        sizes = dict(sizes)
        lengths = sizes.pop("lengths", None)
        compare(case, gla, gla_inputs(**sizes), sizes["heads"], lengths)
    for case, sizes in DELTA_CASES.items():
        sizes = dict(sizes)
        lengths = sizes.pop("lengths", None)
        compare(case, delta_rule, delta_inputs(**sizes), sizes.get("value_heads", 2), lengths)


if __name__ == "__main__":
    main()

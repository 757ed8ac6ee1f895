"""Scans of a 1.3 B model's layers on one GPU: ``python -m benchmarks.gpu.scan [--sweep] [--out FILE.json]``.

It reports, for GLA and Mamba2 by length: time of forward and of forward and backward, peak memory, chunk states,
achieved TFLOP/s, and shares of the ceilings that the same run measured (:mod:`benchmarks.gpu.cost` has the counting
rules). The goals of our path on a merged head at 65,536 tokens: at least 3 times as fast, forward and backward, as
``chunk_gla``, with at most 1/8 of its chunk states, and at least 60 % of the roofline.

Before that it computes the relative L2 error of the output and of every gradient against the chunked form in float64 on
the same rounded inputs. A path that fails gets a row with its error, and the other paths continue. ``--sweep`` instead
times our path over chunk lengths and limits of its states. ``--device cpu`` runs the same code at small sizes, to show
that it works; its times have no meaning.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any

import torch

from benchmarks.gpu.paths import FULL, TINY, Path, Sizes, Tensors, batched_path, dtype_on, gla_paths, ssd_paths
from benchmarks.measure import GIB, Ceilings, Record, figure, free, heading, machine, markdown, peak_bytes, time_call

GOAL_TOKENS = 65536
LENGTHS = (65536, 131072, 4096, 16384, 32768, 8192)
"""The length of the goals comes first, so that an interrupted run has measured it."""
CPU_LENGTHS = (128, 256)
PARITY_TOKENS = 1024
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Largest relative L2 error of the output and of every gradient."""
DECAYS, DECAY_FACTOR = ("dg", "ddt", "dA"), 3
"""Gradients of the decays, whose largest error is this factor larger: they sum small differences of rounded states."""
SWEEP_CHUNKS = (64, 128, 256, 512)
SWEEP_STATES = (128 * 2**20, 256 * 2**20, 512 * 2**20, 2 * GIB)
PACKAGES = ("triton", "fla-core", "mamba-ssm", "causal-conv1d")


def forward_backward(path: Path, leaves: Tensors, probe: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the output and the gradients of all inputs under the output's gradient ``probe``."""
    out = path.scan(leaves)
    return out, *torch.autograd.grad(out, list(leaves.values()), probe)


def parity(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the relative L2 errors of the output and of every gradient, and their tolerances."""
    leaves = {name: x.requires_grad_() for name, x in path.make(PARITY_TOKENS, device).items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    expected = path.exact(wide)
    probe = torch.randn_like(expected).to(dtype_on(device))
    gradients = torch.autograd.grad(expected, list(wide.values()), probe.double())
    actual = forward_backward(path, leaves, probe)
    names = ("out", *(f"d{name}" for name in leaves))
    pairs = zip(names, actual, (expected, *gradients), strict=True)
    errors = {name: ((got.double() - want).norm() / want.norm()).item() for name, got, want in pairs}
    bound = TOLERANCES[dtype_on(device)]
    return {"errors": errors, "tolerances": {name: bound * (DECAY_FACTOR if name in DECAYS else 1) for name in names}}


def measure(path: Path, tokens: int, device: torch.device, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    """Return the figures of one path at one length."""
    leaves = {name: x.requires_grad_() for name, x in path.make(tokens, device).items()}
    probe = torch.randn_like(path.scan(leaves))
    forward = time_call(lambda: path.scan(leaves), device, budget=budget / 2)
    both = time_call(lambda: forward_backward(path, leaves, probe), device, budget=budget)
    row: dict[str, Any] = {"forward_s": forward.median, "forward_least_s": forward.least}
    row |= {"both_s": both.median, "both_least_s": both.least, "runs": both.runs}
    row["peak_bytes"] = peak_bytes(lambda: forward_backward(path, leaves, probe), device)
    if path.cost is not None:
        cost = path.cost(tokens, dtype_on(device).itemsize)
        row |= {"flops_per_s": cost.all_flops / both.median, "bytes_per_s": cost.all_bytes / both.median}
        row |= {"roofline_s": cost.predicted_seconds(ceilings), "state_bytes": cost.state_bytes}
    return row


def attempt(record: Record, row: dict[str, Any], path: Path, device: torch.device, figures: Any) -> None:
    """Add a row with what ``figures`` returns, or with what stopped it."""
    row = {"path": path.name, "family": path.family, "role": path.role, **row}
    if missing := path.missing(device):
        row["failed"] = missing
    else:
        try:
            row |= figures()
        except Exception as error:  # out of memory, or a kernel that does not compile: a result, not the end
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    record.add(row)
    outcome = row.get("failed") or (f"{1e3 * row['both_s']:.3g} ms" if "both_s" in row else "errors measured")
    print(f"{row['kind']} {path.name}, {row['tokens']} tokens: {outcome}", file=sys.stderr, flush=True)
    free(device)  # last: it raises where a kernel has broken the device, and ends the run with its rows written


def compare(
    paths: Iterable[Path], lengths: Iterable[int], device: torch.device, record: Record, *, budget: float, check: bool
) -> None:
    """Measure all paths, errors first, then length by length."""
    paths = list(paths)
    assert record.ceilings is not None
    ceilings = record.ceilings
    if check:
        for path in paths:
            row = {"kind": "parity", "tokens": PARITY_TOKENS}
            attempt(record, row, path, device, lambda path=path: parity(path, device))
    for tokens, path in itertools.product(lengths, paths):
        row = {"kind": "speed", "tokens": tokens}
        attempt(
            record, row, path, device, lambda path=path, n=tokens: measure(path, n, device, ceilings, budget=budget)
        )


def sweep(sizes: Sizes, lengths: Iterable[int], device: torch.device, record: Record, *, budget: float) -> None:
    """Time our path over chunk lengths and bounds of the states held at once."""
    assert record.ceilings is not None
    ceilings = record.ceilings
    for tokens, mixed, chunk, bound in itertools.product(lengths, (False, True), SWEEP_CHUNKS, SWEEP_STATES):
        path = batched_path(sizes, mixed=mixed, chunk_size=chunk, max_state_bytes=bound)
        row = {"kind": "sweep", "tokens": tokens, "chunk_size": chunk, "max_state_bytes": bound}
        attempt(
            record, row, path, device, lambda path=path, n=tokens: measure(path, n, device, ceilings, budget=budget)
        )


def render(document: dict[str, Any]) -> str:
    """Return a document's tables in Markdown."""
    kinds = {kind: [row for row in document["rows"] if row["kind"] == kind] for kind in ("parity", "speed", "sweep")}
    parts = [heading(document)]
    if kinds["parity"]:
        parts.append(f"Relative L2 errors at {PARITY_TOKENS} tokens; * is above its tolerance.")
        parts.append(markdown(("path", "errors", "within"), map(_parity_cells, kinds["parity"])))
    if kinds["speed"]:
        parts.append(_speed_table(kinds["speed"], document["ceilings"]))
        parts.append(_goals(kinds["speed"]))
    if kinds["sweep"]:
        rows = sorted(kinds["sweep"], key=lambda row: (row["tokens"], row["path"], row.get("both_s", float("inf"))))
        columns = (
            "path",
            "tokens",
            "chunk",
            "bound of states, MiB",
            "forward ms",
            "both ms",
            "peak GiB",
            "of roofline",
        )
        parts.append(markdown(columns, map(_sweep_cells, rows)))
    return "\n\n".join(parts)


def _parity_cells(row: dict[str, Any]) -> tuple[str | None, ...]:
    if "failed" in row:
        return row["path"], row["failed"], None
    errors, allowed = row["errors"], row["tolerances"]
    cells = [f"{name} {error:.1e}{'' if error <= allowed[name] else '*'}" for name, error in errors.items()]
    bounds = sorted(set(allowed.values()))
    special = ", ".join(name for name in allowed if allowed[name] == bounds[-1]) if len(bounds) > 1 else ""
    return row["path"], ", ".join(cells), f"{bounds[0]:g}" + (f" ({bounds[-1]:g}: {special})" if special else "")


def _speed_table(rows: list[dict[str, Any]], ceilings: dict[str, float]) -> str:
    columns = (
        *("path", "tokens", "forward ms", "forward + backward ms (least)", "peak GiB", "chunk states GiB", "TFLOP/s"),
        *("of product", "of copy", "of roofline", "authors' time / its", "states / authors'", "time / original layer"),
    )
    references = {(row["family"], row["tokens"], row["role"]): row for row in rows if "failed" not in row}
    order = {name: i for i, name in enumerate(dict.fromkeys(row["path"] for row in rows))}
    cells = []
    for row in sorted(rows, key=lambda row: (row["family"], row["tokens"], order[row["path"]])):
        if "failed" in row:
            cells.append((row["path"], f"{row['tokens']:,}", row["failed"], *[None] * (len(columns) - 3)))
            continue
        authors, original = (references.get((row["family"], row["tokens"], role)) for role in ("authors", "original"))
        gain = None if authors is None else authors["both_s"] / row["both_s"]
        slowdown = None if original is None else row["both_s"] / original["both_s"]
        states = None
        if authors is not None and "state_bytes" in row:
            states = row["state_bytes"] / authors["state_bytes"]
        cells.append(
            (
                *(row["path"], f"{row['tokens']:,}", figure(row["forward_s"], 1e3)),
                f"{figure(row['both_s'], 1e3)} ({figure(row['both_least_s'], 1e3)})",
                *(figure(row["peak_bytes"], 1 / GIB), figure(row.get("state_bytes"), 1 / GIB)),
                figure(row.get("flops_per_s"), 1e-12),
                _percent(row.get("flops_per_s"), ceilings["product_flops"]),
                _percent(row.get("bytes_per_s"), ceilings["copy_bytes"]),
                _percent(row.get("roofline_s"), row["both_s"]),
                *(figure(gain), figure(states), figure(slowdown)),
            )
        )
    return markdown(columns, cells)


def _goals(rows: list[dict[str, Any]]) -> str:
    """Return the goals with the measured values, for our path on a merged head."""
    at = {row["role"]: row for row in reversed(rows) if row["family"] == "gla" and row["tokens"] == GOAL_TOKENS}
    ours, authors = at.get("ours"), at.get("authors")
    speed = states = roofline = "not measured"
    if ours and "failed" not in ours:
        roofline = f"{100 * ours['roofline_s'] / ours['both_s']:.0f} %"
        if authors and "failed" not in authors:
            speed = f"{authors['both_s'] / ours['both_s']:.2f}"
            states = f"1/{authors['state_bytes'] / ours['state_bytes']:.1f}"
    return (
        f"Goals, merged head, {GOAL_TOKENS:,} tokens: authors' time / ours {speed} (>= 3), our chunk states / authors' "
        f"{states} (<= 1/8), of roofline {roofline} (>= 60 %)."
    )


def _sweep_cells(row: dict[str, Any]) -> tuple[str | None, ...]:
    start = (row["path"], f"{row['tokens']:,}", str(row["chunk_size"]), f"{row['max_state_bytes'] / 2**20:.0f}")
    if "failed" in row:
        return *start, row["failed"], None, None, None
    times = (figure(row["forward_s"], 1e3), figure(row["both_s"], 1e3), figure(row["peak_bytes"], 1 / GIB))
    return *start, *times, _percent(row["roofline_s"], row["both_s"])


def _percent(part: float | None, whole: float) -> str | None:
    return None if part is None else f"{100 * part / whole:.0f} %"


def main(argv: list[str]) -> int:
    """Run the comparison, or the sweep, and print it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--family", nargs="+", choices=("gla", "ssd"), default=("gla", "ssd"))
    parser.add_argument("--tokens", nargs="+", type=int, help="lengths, in this order (default: 4K to 128K)")
    parser.add_argument("--budget", type=float, help="seconds of timed runs per row (default: 1; on a CPU 0.1)")
    parser.add_argument("--no-parity", action="store_true", help="leave out the comparison in float64")
    parser.add_argument("--sweep", action="store_true", help="time our path over chunk lengths and bounds instead")
    parser.add_argument("--out", type=FilePath, help="write the figures to this JSON file too")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu.scan: no CUDA device found; --device cpu runs small sizes", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device, on_gpu = torch.device(args.device), args.device == "cuda"
    sizes, budget = (FULL, args.budget or 1.0) if on_gpu else (TINY, args.budget or 0.1)
    record = Record(machine(device, PACKAGES), Ceilings.measure(device), out=args.out)
    if args.sweep:
        sweep(sizes, args.tokens or ((GOAL_TOKENS,) if on_gpu else CPU_LENGTHS[:1]), device, record, budget=budget)
    else:
        paths = [
            *(gla_paths(sizes) if "gla" in args.family else ()),
            *(ssd_paths(sizes) if "ssd" in args.family else ()),
        ]
        lengths = args.tokens or (LENGTHS if on_gpu else CPU_LENGTHS)
        compare(paths, lengths, device, record, budget=budget, check=not args.no_parity)
    print(render(record.document()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

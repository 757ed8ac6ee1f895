"""What do features cost on a CPU? ``python -m benchmarks.cpu_features``: products against grown keys.

Both have a state of the same size. *Grown keys* are the scan on inputs of ``(1 + n) K`` channels, as the projections of
a layer with op ``grow_state`` make them; the projections themselves are not in the figures. *Features* are the scan on
``K`` channels with ``n`` blocks of products. Each measurement is a process of its own with one thread: CPU time of a
forward and backward pass after one to warm up, and the largest resident set beyond that before the first pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_scan import delta_tensors, gla_tensors, ssd_tensors
from benchmarks.measure import Record, alone, figure, heading, machine, markdown, resident_peak, time_cpu
from statex_dist.ops.delta_rule import delta_rule
from statex_dist.ops.features import Features
from statex_dist.ops.gla import gla
from statex_dist.ops.ssd import ssd
from statex_dist.state.geometry import FeatureMap

FACTOR = 4
FORMS = ("grown keys", "features")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One problem.

    Attributes:
        label: Its name in the table.
        kind: Which scan.
        sizes: Heads, projected keys and values, or heads, head size and state (Mamba2).
        lengths: Numbers of tokens.
    """

    label: str
    kind: str
    sizes: tuple[int, int, int]
    lengths: tuple[int, ...]


CASES = (
    Case(label="GLA 4 x 8 x 16", kind="gla", sizes=(4, 8, 16), lengths=(2048,)),
    Case(label="GLA 4 x 64 x 64", kind="gla", sizes=(4, 64, 64), lengths=(4096, 16384)),
    Case(label="Mamba2 8 x 64 x 32", kind="ssd", sizes=(8, 64, 32), lengths=(4096, 16384)),
    Case(label="gated delta rule 4 x 32 x 64", kind="delta", sizes=(4, 32, 64), lengths=(4096, 16384)),
    Case(label="KDA 4 x 32 x 64", kind="kda", sizes=(4, 32, 64), lengths=(4096,)),
)


def scan(kind: str, form: str, tokens: int, sizes: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    """Return the forward pass of one form of a case."""
    heads, first, last = sizes
    growth = FACTOR if form == "grown keys" else 1
    keys = last if kind == "ssd" else first
    features, groups = None, 1 if kind == "ssd" else heads
    if form == "features":
        rolls = list(range(1, FACTOR))
        gain = torch.full((groups, len(rolls) * keys), 0.1, requires_grad=True)
        features = Features(FeatureMap(rolls=rolls), gain)
    if kind == "ssd":
        inputs = ssd_tensors(tokens, heads, first, growth * last)
        return lambda: ssd(*inputs, features=features, backend="chunked")[0]
    if kind == "gla":
        inputs = gla_tensors(tokens, heads, growth * first, last)
        return lambda: gla(*inputs, features=features, backend="chunked")[0]
    inputs = delta_tensors(tokens, heads, growth * first, last, 1 if kind == "delta" else growth * first)
    return lambda: delta_rule(*inputs, features=features, backend="chunked")[0]


def timed(kind: str, form: str, tokens: int, sizes: tuple[int, int, int]) -> tuple[float, int]:
    """Return seconds of a forward and backward pass, and the bytes that it took at most."""
    torch.set_num_threads(1)
    forward = scan(kind, form, tokens, sizes)
    before = resident_peak()
    seconds = time_cpu(lambda: forward().square().mean().backward()).least
    return seconds, resident_peak() - before


def render(document: dict[str, Any]) -> str:
    """Return a document's table in Markdown."""
    columns = ("case (heads x keys x values)", "tokens", "grown keys ms", "features ms", "ratio", "MiB", "MiB", "ratio")
    rows = []
    for row in document["rows"]:
        (grown_s, grown_bytes), (own_s, own_bytes) = (row[form] for form in FORMS)
        times = figure(grown_s, 1e3), figure(own_s, 1e3), figure(own_s / grown_s)
        space = f"{grown_bytes / 2**20:.0f}", f"{own_bytes / 2**20:.0f}", figure(own_bytes / max(1, grown_bytes))
        rows.append((row["case"], f"{row['tokens']:,}", *times, *space))
    return f"{heading(document)}\n\n{markdown(columns, rows)}"


def main(argv: list[str]) -> None:
    """Run the comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = sorted({case.kind for case in CASES})
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="kinds of scans")
    parser.add_argument("--longest", type=int, default=16384, help="leave out longer sequences")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    args = parser.parse_args(argv)
    record = Record(machine(), out=args.out)
    for case in CASES:
        for tokens in case.lengths:
            if case.kind in args.only and tokens <= args.longest:
                row = {form: alone(timed, case.kind, form, tokens, case.sizes) for form in FORMS}
                record.add({"case": case.label, "tokens": tokens, **row})
    print(render(json.loads(json.dumps(record.document()))))


if __name__ == "__main__":
    main(sys.argv[1:])

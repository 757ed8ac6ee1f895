"""How fast are the PyTorch scans on a CPU? ``python -m benchmarks.cpu_scan``: forward and backward, against the peers.

Peers, on the same tensors and in the same run:

- *fla naive*: flash-linear-attention's own reference, what its users have without a GPU: for GLA the recurrence, which
  indexes ``x[:, :, i]`` (goal: ours at least 20 times as fast at 4,096 tokens), for the delta rules its chunked form;
- *transformers*: ``Mamba2Mixer``, whose PyTorch form runs where the CUDA kernels are missing (goal: 50 times),
  with its default chunk of 256 tokens, that of the published models, and with one of 64, which suits it better. It is a
  whole mixer with projections, convolution and norm, and is compared with our whole mixer on the same weights;
- *good loop*: one token at a time, slices taken by ``unbind`` (our ``naive_gla``, ``naive_ssd``, ``naive_delta_rule``).

Ours is the chunked form, which ``auto`` takes on a CPU; *batched products* are the GPU's algorithm with its PyTorch
pieces. Each measurement is a process of its own with one thread: CPU time after a run to warm up, the least of up to
five (one where they are long), and the largest resident set beyond that before the first run.

transformers builds arrays of ``tokens x chunk x heads x d_state`` numbers. The mixer has 8 heads, and not the 64 of a
1.3 B model, so that they fit a machine of 24 GiB.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize

from benchmarks.measure import Record, alone, figure, heading, machine, markdown, resident_peak, time_cpu
from statex_dist.models.core.sequences import Sequences
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.mamba2.mixer import Mamba2Mixer
from statex_dist.ops.delta_rule import delta_rule
from statex_dist.ops.gla import gla
from statex_dist.ops.ssd import ssd

LONG, SHORT = 4096, 256
OURS = "chunked"
Forward = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One problem.

    Attributes:
        label: What the table calls it.
        kind: Which scan.
        sizes: Heads, keys and values (GLA, delta rules) or heads, head size and state (Mamba2).
        peers: Forms to compare with, by the numbers of tokens at which they are.
    """

    label: str
    kind: str
    sizes: tuple[int, int, int]
    peers: dict[str, tuple[int, ...]]


CASES = (
    Case(
        label="GLA 4 x 64 x 128",
        kind="gla",
        sizes=(4, 64, 128),
        peers={"fla naive": (SHORT, LONG), "good loop": (SHORT, LONG), "batched products": (SHORT, LONG)},
    ),
    Case(
        label="GLA merged 1 x 256 x 512",
        kind="gla",
        sizes=(1, 256, 512),
        peers={"fla naive": (SHORT, LONG), "good loop": (SHORT, LONG), "batched products": (SHORT, LONG)},
    ),
    Case(
        label="whole Mamba2 mixer 8 x 64 x 128",
        kind="mixer",
        sizes=(8, 64, 128),
        peers={"transformers": (SHORT, LONG), "transformers, chunk 64": (SHORT, LONG)},
    ),
    Case(label="Mamba2 scan 8 x 64 x 128", kind="ssd", sizes=(8, 64, 128), peers={"good loop": (SHORT, LONG)}),
    Case(label="Mamba2 scan 8 x 64 x 512", kind="ssd", sizes=(8, 64, 512), peers={"good loop": (SHORT, LONG)}),
    Case(
        label="gated delta rule 4 x 64 x 128",
        kind="delta",
        sizes=(4, 64, 128),
        peers={"fla naive": (SHORT, LONG), "good loop": (SHORT, LONG)},
    ),
    Case(
        label="KDA 4 x 64 x 128",
        kind="kda",
        sizes=(4, 64, 128),
        peers={"fla naive": (SHORT, LONG), "good loop": (SHORT, LONG)},
    ),
)
GOALS = {("gla", "fla naive"): 20, ("mixer", "transformers"): 50}
"""How many times as fast ours is to be at :data:`LONG` tokens."""

BACKENDS = {OURS: "chunked", "good loop": "naive", "batched products": "triton"}


def gla_tensors(tokens: int, heads: int, keys: int, values: int) -> list[torch.Tensor]:
    """Return q, k, v and log decays of one sequence, as a trained model's gates would have them."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, tokens, heads, size, generator=rng) for size in (keys, keys, values, keys))
    return [x.requires_grad_() for x in (q, k, v, logsigmoid(g).div_(16))]


def ssd_tensors(tokens: int, heads: int, head_dim: int, state: int) -> list[torch.Tensor]:
    """Return x, dt, A, B and C of one sequence with one group."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, heads, head_dim, generator=rng)
    dt = torch.rand(1, tokens, heads, generator=rng) * 0.1
    B, C = (torch.randn(1, tokens, 1, state, generator=rng) for _ in range(2))
    return [y.requires_grad_() for y in (x, dt, -torch.arange(1.0, heads + 1), B, C)]


def delta_tensors(tokens: int, heads: int, keys: int, values: int, channels: int) -> list[torch.Tensor]:
    """Return normalised q and k, v, ``channels`` log decays a head and beta of one sequence."""
    q, k, v, g = (x.detach() for x in gla_tensors(tokens, heads, keys, values))
    q, k = (normalize(x, dim=-1) for x in (q, k))
    beta = torch.full(q.shape[:3], 0.5)
    return [x.requires_grad_() for x in (q, k, v, g[..., :channels].contiguous(), beta)]


def _gla(form: str, tokens: int, sizes: tuple[int, int, int]) -> Forward:
    tensors = gla_tensors(tokens, *sizes)
    if form == "fla naive":
        from fla.ops.gla.naive import naive_recurrent_gla

        return lambda: naive_recurrent_gla(*tensors)[0]
    return lambda: gla(*tensors, backend=BACKENDS[form])[0]  # type: ignore[arg-type]


def _ssd(form: str, tokens: int, sizes: tuple[int, int, int]) -> Forward:
    tensors = ssd_tensors(tokens, *sizes)
    return lambda: ssd(*tensors, backend=BACKENDS[form])[0]  # type: ignore[arg-type]


def _delta(form: str, tokens: int, sizes: tuple[int, int, int], channels: int = 1) -> Forward:
    q, k, v, g, beta = delta_tensors(tokens, *sizes, channels)
    if form == "fla naive" and channels == 1:
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

        return lambda: naive_chunk_gated_delta_rule(q, k, v, g[..., 0], beta)[0]
    if form == "fla naive":
        from fla.ops.kda.naive import naive_chunk_kda

        return lambda: naive_chunk_kda(q, k, v, g, beta)[0]
    return lambda: delta_rule(q, k, v, g, beta, backend=BACKENDS[form])[0]  # type: ignore[arg-type]


def _kda(form: str, tokens: int, sizes: tuple[int, int, int]) -> Forward:
    return _delta(form, tokens, sizes, channels=sizes[1])


def _mixer(form: str, tokens: int, sizes: tuple[int, int, int]) -> Forward:
    """Return the forward pass of a whole mixer: ours, or transformers' with the same weights."""
    import transformers
    from transformers.models.mamba2 import modeling_mamba2

    heads, head_dim, state = sizes
    common: dict[str, Any] = {"vocab_size": 8, "num_hidden_layers": 1, "hidden_size": heads * head_dim // 2}
    common |= {"num_heads": heads, "head_dim": head_dim, "state_size": state, "n_groups": 1}
    if form == "transformers, chunk 64":
        common["chunk_size"] = 64
    torch.manual_seed(0)
    theirs = modeling_mamba2.Mamba2Mixer(transformers.Mamba2Config(**common), 0)
    x = torch.randn(1, tokens, common["hidden_size"], requires_grad=True)
    if form != OURS:
        return lambda: theirs(x)
    ours = Mamba2Mixer(Mamba2Config(**common), 0)
    ours.load_state_dict(theirs.state_dict())
    return lambda: ours(x, Sequences(backend="chunked"), None)[0]


FORMS = {"gla": _gla, "ssd": _ssd, "delta": _delta, "kda": _kda, "mixer": _mixer}


def timed(kind: str, form: str, tokens: int, sizes: tuple[int, int, int]) -> tuple[float, int]:
    """Return seconds of a forward and backward pass, and the bytes that it took at most, of one form of a case."""
    torch.set_num_threads(1)
    forward = FORMS[kind](form, tokens, sizes)
    before = resident_peak()
    seconds = time_cpu(lambda: forward().square().mean().backward()).least
    return seconds, resident_peak() - before


def compare(case: Case, lengths: Sequence[int], record: Record) -> None:
    """Measure ours and every peer of a case at the lengths that both are to be run at."""
    for tokens in lengths:
        ours, our_bytes = alone(timed, case.kind, OURS, tokens, case.sizes)
        for peer, where in case.peers.items():
            if tokens not in where:
                continue
            theirs, their_bytes = alone(timed, case.kind, peer, tokens, case.sizes)
            row = {"case": case.label, "tokens": tokens, "ours_s": ours, "ours_bytes": our_bytes, "peer": peer}
            row |= {"peer_s": theirs, "peer_bytes": their_bytes}
            if tokens == LONG and (case.kind, peer) in GOALS:
                row["goal"] = GOALS[case.kind, peer]
            record.add(row)
            print(f"{case.label}, {tokens} tokens, {peer}: {theirs / ours:.3g}x", file=sys.stderr, flush=True)


def render(document: dict[str, Any]) -> str:
    """Return a document's table in Markdown."""
    columns = ("case (heads x key x value)", "tokens", "ours ms", "peer", "its ms", "ratio", "goal", "MiB", "its MiB")
    rows = [
        (
            *(row["case"], f"{row['tokens']:,}", figure(row["ours_s"], 1e3), row["peer"], figure(row["peer_s"], 1e3)),
            f"{figure(row['peer_s'] / row['ours_s'])}x",
            f">= {row['goal']}x" if "goal" in row else None,
            *(f"{row[name] / 2**20:.0f}" for name in ("ours_bytes", "peer_bytes")),
        )
        for row in document["rows"]
    ]
    return f"{heading(document)}\n\n{markdown(columns, rows)}"


def main(argv: list[str]) -> None:
    """Run the comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(FORMS), default=list(FORMS), help="kinds of scans")
    parser.add_argument("--tokens", nargs="+", type=int, choices=(SHORT, LONG), default=(SHORT, LONG))
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record = Record(machine(packages=("fla-core", "transformers")), out=args.out)
    for case in CASES:
        if case.kind in args.only:
            compare(case, args.tokens, record)
    print(render(json.loads(json.dumps(record.document()))))


if __name__ == "__main__":
    main(sys.argv[1:])

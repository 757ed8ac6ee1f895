"""How fast are the PyTorch scans? ``python -m benchmarks.scan``: forward and backward, against plainer forms.

Baselines, in the same process and on the same tensors:

- *good loop*: one token at a time, slices taken by ``unbind`` (our ``naive_gla``, ``naive_ssd``, ``naive_delta_rule``);
- *fla naive*: flash-linear-attention's own reference: for GLA the recurrence, which indexes ``x[:, :, i]``, for the
  delta rules its chunked form;
- *transformers*: ``Mamba2Mixer.torch_forward``, what a CPU runs when the CUDA kernels are missing. It is a whole mixer
  (projections, convolution, norm), so it is compared with our whole mixer on the same weights, not with the scan.

The last two grow so fast that they are timed at a short length only. All run on one thread and are measured in that
thread's CPU time, the least of several runs, so that other jobs on the machine hardly show.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.mamba2.mixer import Mamba2Mixer
from statex_dist.models.sequence import Sequences
from statex_dist.ops.dispatch import delta_rule, gla, ssd

LONG, SHORT = 2048, 256


def least_time(step: Callable[[], torch.Tensor], *, repeats: int, warmup: int = 1) -> float:
    """Return the shortest CPU time of ``step`` and its backward pass, in seconds."""
    times = []
    for i in range(warmup + repeats):
        start = time.process_time()
        step().square().mean().backward()
        if i >= warmup:
            times.append(time.process_time() - start)
    return min(times)


def gla_tensors(tokens: int, heads: int, keys: int, values: int) -> list[torch.Tensor]:
    """Return q, k, v and log decays of one sequence, as a trained model's gates would have them."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, tokens, heads, size, generator=rng) for size in (keys, keys, values, keys))
    return [x.requires_grad_() for x in (q, k, v, torch.nn.functional.logsigmoid(g).div_(16))]


def ssd_tensors(tokens: int, heads: int, head_dim: int, state: int) -> list[torch.Tensor]:
    """Return x, dt, A, B and C of one sequence with one group."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, heads, head_dim, generator=rng)
    dt = torch.rand(1, tokens, heads, generator=rng) * 0.1
    B, C = (torch.randn(1, tokens, 1, state, generator=rng) for _ in range(2))
    return [y.requires_grad_() for y in (x, dt, -torch.arange(1.0, heads + 1), B, C)]


def compare_gla(rows: list[dict]) -> None:
    """Time GLA at its usual shape, and a merged head of the same width."""
    from fla.ops.gla.naive import naive_recurrent_gla

    for label, shape in (("GLA 4 x 64 x 128", (4, 64, 128)), ("GLA merged 1 x 256 x 512", (1, 256, 512))):
        for tokens in (SHORT, LONG):
            q, k, v, g = gla_tensors(tokens, *shape)
            ours = least_time(lambda x=(q, k, v, g): gla(*x, backend="chunked")[0], repeats=5)
            row = {"case": label, "tokens": tokens, "chunked": ours}
            if shape[0] > 1 or tokens == SHORT:
                row["good loop"] = least_time(
                    lambda x=(q, k, v, g): gla(*x, backend="naive")[0], repeats=1 if tokens == LONG else 2, warmup=0
                )
            if tokens == SHORT:
                row["fla naive"] = least_time(lambda x=(q, k, v, g): naive_recurrent_gla(*x)[0], repeats=1, warmup=0)
            rows.append(row)


def compare_ssd(rows: list[dict]) -> None:
    """Time the Mamba2 scan at two state sizes."""
    for state in (128, 512):
        for tokens in (SHORT, LONG):
            tensors = ssd_tensors(tokens, 8, 64, state)
            ours = least_time(lambda x=tensors: ssd(*x, backend="chunked")[0], repeats=5)
            row = {"case": f"SSD 8 x 64 x {state}", "tokens": tokens, "chunked": ours}
            if state == 128:
                row["good loop"] = least_time(lambda x=tensors: ssd(*x, backend="naive")[0], repeats=1, warmup=0)
            rows.append(row)


def compare_delta(rows: list[dict]) -> None:
    """Time the gated delta rule with one decay per head (Gated DeltaNet) and per key channel (KDA)."""
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
    from fla.ops.kda.naive import naive_chunk_kda

    for label, channels, theirs in (
        ("gated delta rule 4 x 64 x 128", 1, lambda q, k, v, g, b: naive_chunk_gated_delta_rule(q, k, v, g[..., 0], b)),
        ("KDA 4 x 64 x 128", 64, naive_chunk_kda),
    ):
        for tokens in (SHORT, LONG):
            q, k, v, g = gla_tensors(tokens, 4, 64, 128)
            q, k = (torch.nn.functional.normalize(x.detach(), dim=-1).requires_grad_() for x in (q, k))
            g = g.detach()[..., :channels].requires_grad_()
            beta = torch.full(q.shape[:3], 0.5).requires_grad_()
            tensors = (q, k, v, g, beta)
            row = {
                "case": label,
                "tokens": tokens,
                "chunked": least_time(lambda x=tensors: delta_rule(*x, backend="chunked")[0], repeats=5),
                "good loop": least_time(lambda x=tensors: delta_rule(*x, backend="naive")[0], repeats=1, warmup=0),
            }
            if tokens == SHORT:
                row["fla naive"] = least_time(lambda x=tensors, f=theirs: f(*x)[0], repeats=1, warmup=0)
            rows.append(row)


def compare_mixers(rows: list[dict]) -> None:
    """Time a whole Mamba2 mixer against transformers' torch form on the same weights."""
    import transformers
    from transformers.models.mamba2 import modeling_mamba2

    sizes = {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "state_size": 128, "n_groups": 1, "chunk_size": 64}
    ours = Mamba2Mixer(Mamba2Config(vocab_size=8, num_hidden_layers=1, **sizes), 0)
    theirs = modeling_mamba2.Mamba2Mixer(transformers.Mamba2Config(vocab_size=8, num_hidden_layers=1, **sizes), 0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, SHORT, 256, requires_grad=True)
    gap = (ours(x, Sequences(), None)[0] - theirs.torch_forward(x)).abs().max().item()
    assert gap < 1e-4, f"the two mixers disagree by {gap}"
    row = {"case": "Mamba2 mixer 8 x 64 x 128", "tokens": SHORT}
    row["chunked"] = least_time(lambda: ours(x, Sequences(backend="chunked"), None)[0], repeats=5)
    row["transformers"] = least_time(lambda: theirs.torch_forward(x), repeats=1, warmup=0)
    rows.append(row)


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    model = "unknown CPU"
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    names = ("torch", "fla-core", "transformers")
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def main(argv: list[str]) -> None:
    """Run all comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict] = []
    for compare in (compare_gla, compare_ssd, compare_delta, compare_mixers):
        compare(rows)
    if args.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=2))
        return
    baselines = ("good loop", "fla naive", "transformers")
    table = Table("case (heads x key x value)", "tokens", "chunked ms", *(f"{name} ms" for name in baselines), "ratios")
    for row in rows:
        given = [name for name in baselines if name in row]
        table.add_row(
            row["case"],
            str(row["tokens"]),
            f"{row['chunked'] * 1e3:.1f}",
            *(f"{row[name] * 1e3:.0f}" if name in row else "-" for name in baselines),
            " ".join(f"{row[name] / row['chunked']:.0f}x" for name in given) or "-",
        )
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()), soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])

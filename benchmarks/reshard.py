"""Resharding a ZeRO-3 checkpoint to safetensors: ours against DeepSpeed's ``zero_to_fp32 --safe_serialization``.

Run ``python -m benchmarks.reshard [--layers 12] [--ranks 8] [--dir DIR]``. The checkpoint is synthesised with
DeepSpeed's layout (flat fp32 weights and both Adam moments), so that its size is free; that real files are read rightly
is tested elsewhere. Each tool runs in a process of its own, alternately and several times; wall time is that of the
whole process with a ``sync`` after it, memory the peak resident set (mapped file pages included). Medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from statex_dist.models.kinds import config_from_dict, family_of

SHAPE = {
    "model_type": "gla",
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_heads": 4,
    "tie_word_embeddings": False,
}

_REPORT = "; import pathlib; print('PEAK', [l.split()[1] for l in pathlib.Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')][0])"  # noqa: E501 - a program for python -c
_OURS = (
    "import sys; from checkpoints_tools.reshard import reshard; reshard(sys.argv[1], sys.argv[2], dtype=sys.argv[3])"
)
_THEIRS = (
    "import sys; from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict as convert; "
    "convert(sys.argv[1], sys.argv[2], dtype={'fp32': 'float32', 'bf16': 'bfloat16'}[sys.argv[3]], "
    "safe_serialization=True)"
)


def write_zero3(
    tag: Path,
    tensors: Mapping[str, torch.Tensor],
    world_size: int,
    *,
    moments: bool = True,
    sub_group_size: int = 10**9,
) -> None:
    """Write tensors as the files of one ZeRO-3 tag, bf16 run.

    Args:
        tag: Directory to make.
        tensors: The logical parameters, fp32.
        world_size: Ranks.
        moments: Whether to write Adam's moments too, as a real checkpoint does.
        sub_group_size: Elements of a rank after which a new flat group begins.
    """
    tag.mkdir(parents=True)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if filled >= sub_group_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += -(-tensor.numel() // world_size)
    shapes = [{name: tensors[name].shape for name in group} for group in groups]
    for rank in range(world_size):
        flats = [torch.cat([_part(tensors[name], rank, world_size) for name in group]) for group in groups]
        state = {i: {"exp_avg": f * 0.5, "exp_avg_sq": f * f} for i, f in enumerate(flats)} if moments else {}
        optim = {
            "zero_stage": 3,
            "partition_count": world_size,
            "optimizer_state_dict": {"state": state, "param_groups": []},
            "fp32_flat_groups": flats,
        }
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": shapes,
            "frozen_param_shapes": None,
            "shared_params": {},
            "dp_world_size": world_size,
            "global_steps": 1,
        }
        torch.save(
            {"optimizer_state_dict": optim, "ds_version": "synthetic"},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (tag.parent / "latest").write_text(tag.name)


def _part(tensor: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """Return a rank's part of a tensor, padded with a number that must never be read."""
    part = -(-tensor.numel() // world_size)
    piece = tensor.reshape(-1)[rank * part : (rank + 1) * part]
    return torch.cat([piece, torch.full((part - piece.numel(),), 1e30)])


def measure(program: str, source: Path, target: Path, dtype: str) -> tuple[float, float]:
    """Return wall seconds (with sync) and peak MiB of one conversion in a fresh process."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program + _REPORT, str(source), str(target), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    os.sync()
    seconds = time.perf_counter() - start
    return seconds, int(done.stdout.rsplit("PEAK", 1)[1]) / 1024


def main() -> None:
    """Synthesise the checkpoint, time both tools and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="directory for the files (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    args = parser.parse_args()
    config = config_from_dict({**SHAPE, "num_hidden_layers": args.layers})
    specs = family_of("gla").tensors(config)
    count = sum(spec.numel for spec in specs.values())
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        root = Path(name)
        tensors = {name: torch.randn(spec.shape) for name, spec in specs.items()}
        write_zero3(root / "source/global_step1", tensors, args.ranks)
        del tensors
        rows = []
        for dtype in ("fp32", "bf16"):
            runs: dict[str, list[tuple[float, float]]] = {"ours": [], "zero_to_fp32": []}
            for _ in range(args.repeats):
                for tool, program in (("ours", _OURS), ("zero_to_fp32", _THEIRS)):
                    runs[tool].append(measure(program, root / "source", root / f"{tool}-{dtype}", dtype))
            rows += [
                {
                    "dtype": dtype,
                    "tool": tool,
                    "seconds": statistics.median(run[0] for run in measured),
                    "seconds_all": [round(run[0], 2) for run in measured],
                    "peak_mib": statistics.median(run[1] for run in measured),
                }
                for tool, measured in runs.items()
            ]
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores {platform.processor() or platform.machine()}, "
        f"python {platform.python_version()}, torch {torch.__version__}, deepspeed {version('deepspeed')}"
    )
    print(
        f"{count / 1e6:.1f} M parameters, {args.ranks} ranks, {count * 12 / 1e9:.2f} GB of optimizer states, warm cache"
    )
    for tool, module in (("ours", "checkpoints_tools.reshard"), ("zero_to_fp32", "deepspeed.utils.zero_to_fp32")):
        seconds, peak = measure_import(module)
        print(f"{tool}: of this, starting the process and importing takes {seconds:.1f} s and {peak:.0f} MiB")
    print()
    print("| to | tool | wall s (all runs) | peak MiB | wall, ours / theirs | peak, ours / theirs |")
    print("|---|---|---|---|---|---|")
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        ratios = f"{ours['seconds'] / theirs['seconds']:.2f} | {ours['peak_mib'] / theirs['peak_mib']:.2f}"
        for row, tail in ((ours, ratios), (theirs, " | ")):
            print(
                f"| {row['dtype']} | {row['tool']} | {row['seconds']:.1f} {row['seconds_all']} | "
                f"{row['peak_mib']:.0f} | {tail} |"
            )
    if args.json:
        args.json.write_text(json.dumps({"parameters": count, "ranks": args.ranks, "rows": rows}, indent=1) + "\n")


def measure_import(module: str) -> tuple[float, float]:
    """Return wall seconds and peak MiB of a process that only imports a module."""
    start = time.perf_counter()
    command = [sys.executable, "-c", f"import {module}" + _REPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.rsplit("PEAK", 1)[1]) / 1024


if __name__ == "__main__":
    main()

"""Expanding a 1.3 B checkpoint on disk: ours against ``cp`` of the same bytes, and against doing it in memory.

Run ``python -m benchmarks.expand [--family gla mamba2] [--repeats 3] [--shards 1] [--dir DIR]``. The checkpoints are
synthesised in bf16 at the published shapes (2.7 GB each). Ours and the peers run alternately, each in a process of its
own, from a cold page cache where the system lets us drop it (as root), and everything is on disk when the clock stops:
ours syncs by itself, the others are followed by ``sync``. Memory is the largest resident set of the process. The peer
loads the whole model (Mamba2 with transformers' class; transformers has none for GLA, so with safetensors), expands the
state dict in memory by the same recipes, and saves it as transformers does.
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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from checkpoints_tools.formats.safetensors import index_of, lay_out
from statex_dist.checkpoint.formats.safetensors import SINGLE_NAME
from statex_dist.checkpoint.formats.tensor_io import TensorInfo
from statex_dist.models.registry import config_from_dict, family_of

MODELS = {
    "gla": {
        "model_type": "gla",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_heads": 4,
        "expand_k": 0.5,
        "expand_v": 1.0,
        "tie_word_embeddings": False,
    },
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": 50288,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_heads": 64,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "tie_word_embeddings": False,
    },
}
PLANS = {
    "gla": ["--layers", "every:6", "--init", "reinit"],
    "mamba2": ["--layers", "all", "--factor", "4", "--init", "lossless"],
}
IN_MEMORY = """
import sys, torch
from pathlib import Path
from checkpoints_tools.plan.options import PlanOptions, plan_model
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from statex_dist.models.registry import read_config
from statex_dist.models.registry import expand_state_dict
source, target, plan = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
before = read_config(source)
options = {key.removeprefix("--"): value for key, value in zip(plan[::2], plan[1::2])}
after = plan_model(before, PlanOptions(**options))
if before.MODEL_TYPE == "mamba2":
    from transformers import Mamba2ForCausalLM
    tensors = dict(Mamba2ForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict())
else:
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(path))
tensors = expand_state_dict(tensors, before, after)
target.mkdir()
save_torch_state_dict(tensors, target)
(target / "config.json").write_text(after.to_json())
"""


def write_model(directory: Path, values: dict, shards: int) -> int:
    """Write a random bf16 checkpoint of a config's shapes and return the bytes of its weights."""
    directory.mkdir(parents=True)
    config = config_from_dict(values)
    specs = family_of(config.MODEL_TYPE).tensors(config)
    infos = [TensorInfo(name=name, shape=spec.shape, dtype="BF16") for name, spec in specs.items()]
    total = sum(info.nbytes for info in infos)
    layouts = lay_out(infos, total if shards == 1 else total // shards)
    rng = np.random.default_rng(0)
    for layout in layouts:
        with (directory / layout.file).open("wb") as file:
            file.write(layout.header)
            for info in layout.tensors:
                values32 = rng.standard_normal(info.numel, dtype=np.float32)
                values32 *= np.float32(0.02)
                file.write((values32.view("<u4") >> 16).astype("<u2").tobytes())
    if len(layouts) > 1:
        (directory / f"{SINGLE_NAME}.index.json").write_text(json.dumps(index_of(layouts)))
    (directory / "config.json").write_text(json.dumps({**values, "torch_dtype": "bfloat16"}))
    return total


def drop_cache() -> bool:
    """Empty the page cache; False where the system does not let us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def measure(command: Sequence[str], target: Path) -> tuple[float, float]:
    """Run a command from a cold cache; return wall seconds, with everything on disk, and peak MiB."""
    shutil.rmtree(target, ignore_errors=True)
    drop_cache()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {os.waitstatus_to_exitcode(status)}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def compare(family: str, root: Path, repeats: int, shards: int, workers: int) -> list[dict]:
    """Measure all three on one family and return their rows."""
    source, target = root / family, root / "target"
    # In a process of its own: Linux counts what the parent held at the fork to a child's largest resident set.
    with ProcessPoolExecutor(max_workers=1) as pool:
        size = pool.submit(write_model, source, MODELS[family], shards).result()
    statex = [str(Path(sys.executable).with_name("statex"))]
    commands = {
        "statex expand": [
            *statex,
            *("expand", "--source", str(source), "--target", str(target), "--workers", str(workers)),
            *PLANS[family],
        ],
        "cp": ["cp", "-r", str(source), str(target)],
        "in memory": [sys.executable, "-c", IN_MEMORY, str(source), str(target), *PLANS[family]],
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(measure(command, target))
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(source)
    ours = statistics.median(seconds for seconds, _ in runs["statex expand"])
    ours_peak = statistics.median(peak for _, peak in runs["statex expand"])
    rows = []
    for name, measured in runs.items():
        seconds, peak = (statistics.median(column) for column in zip(*measured, strict=True))
        rows.append(
            {
                "family": family,
                "gigabytes": size / 1e9,
                "tool": name,
                "seconds": seconds,
                "all": [round(s, 2) for s, _ in measured],
                "peak_mib": peak,
                "time_ratio": ours / seconds,
                "memory_ratio": peak / ours_peak,
            }
        )
    return rows


def main() -> None:
    """Synthesise the checkpoints, time all tools and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=1, help="safetensors files of the source")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--dir", type=Path, default=None, help="directory for the files (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        rows = [
            row
            for family in args.family
            for row in compare(family, Path(name), args.repeats, args.shards, args.workers)
        ]
    cold = "cold page cache" if drop_cache() else "warm page cache (not root)"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores {platform.processor() or platform.machine()}, "
        f"load {os.getloadavg()[0]:.1f}, python {platform.python_version()}, numpy {np.__version__}, "
        f"torch {version('torch')}, transformers {version('transformers')}; {args.shards} shard(s), {cold}"
    )
    print()
    print("| model | tool | wall s (all runs) | peak MiB | ours / its time | its / our memory |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['family']} {row['gigabytes']:.2f} GB | {row['tool']} | {row['seconds']:.1f} {row['all']} | "
            f"{row['peak_mib']:.0f} | {row['time_ratio']:.2f} | {row['memory_ratio']:.1f} |"
        )


if __name__ == "__main__":
    main()

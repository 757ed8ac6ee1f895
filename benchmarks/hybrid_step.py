"""Measure a training step of a hybrid of 100 M parameters beside transformers' own step on the same documents.

Run as ``python -m benchmarks.hybrid_step``. Ours runs the documents as one pack in the plain engine. transformers'
model runs them one by one, so that they do not mix, and adds the gradients up. Both take AdamW's step in fp32.
Each measurement is a process of its own, and the two kinds alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

KINDS = ("ours", "host")
PATTERN = "M-M-M*-M-M-M-M-M*-M-M-M-"
SETTINGS: dict[str, Any] = {
    **{"vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1920},
    **{"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN)},
    **{"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64},
    **{"mamba_num_heads": 20, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 1},
}
LENGTHS = (512, 256, 192, 64)


def main() -> None:
    """Measure both kinds in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=2, help="steps of a process, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--copies", type=int, default=1, help="how often the documents are in the pack")
    parser.add_argument("--worker", choices=("save", *KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(_work(args)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        parameters = _run("save", args, folder)["parameters"]
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(args.repeats):
            for kind in KINDS:
                found[kind].append(_run(kind, args, folder))
                print(kind, found[kind][-1], file=sys.stderr, flush=True)
    lengths = LENGTHS * args.copies
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, load "
        f"{load:.1f}, torch {version('torch')}, transformers {version('transformers')}; Nemotron-H of "
        f"{parameters / 1e6:.0f} M parameters, {len(lengths)} documents, {sum(lengths)} tokens; best of "
        f"{args.repeats} processes each"
    )
    best = {
        kind: {name: min(run[name] for run in runs) for name in ("wall_s", "cpu_s", "peak_mib", "loss")}
        for kind, runs in found.items()
    }
    print("| step | wall s | CPU s | peak MiB | loss of the first step |")
    print("| --- | --- | --- | --- | --- |")
    for kind, row in best.items():
        print(f"| {kind} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} | {row['peak_mib']:.0f} | {row['loss']:.6f} |")
    ratios = [f"{best['host'][name] / best['ours'][name]:.2f}x" for name in ("wall_s", "cpu_s", "peak_mib")]
    print(f"| host / ours | {' | '.join(ratios)} | |")


def _run(worker: str, args: argparse.Namespace, folder: str) -> dict[str, float]:
    options = [f"--{name}={getattr(args, name)}" for name in ("steps", "threads", "copies")]
    command = [sys.executable, "-m", "benchmarks.hybrid_step", "--worker", worker, "--folder", folder, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _work(args: argparse.Namespace) -> dict[str, float]:
    """Measure one kind in this process."""
    # transformers takes Triton kernels that are installed when it imports a model, also on a CPU.
    sys.modules.update(dict.fromkeys(("fla", "mamba_ssm", "causal_conv1d")) if args.worker != "ours" else {})
    import torch
    from transformers import AutoModelForCausalLM, NemotronHConfig

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.worker == "save":
        model = AutoModelForCausalLM.from_config(NemotronHConfig(**SETTINGS))
        model.save_pretrained(args.folder)
        return {"parameters": sum(p.numel() for p in model.parameters())}
    lengths = LENGTHS * args.copies
    ids = torch.randint(3, SETTINGS["vocab_size"], (1, sum(lengths)))
    step = (_ours if args.worker == "ours" else _host)(args.folder, ids, lengths)
    losses, walls, cpus = [], [], []
    for _ in range(1 + args.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall_s": min(walls[1:]), "cpu_s": min(cpus[1:]), "peak_mib": peak, "loss": losses[0]}


def _ours(folder: Path, ids: Any, lengths: tuple[int, ...]) -> Any:
    import torch

    from statex_dist.batch import IGNORE_INDEX, PackedBatch
    from statex_dist.engine.plain import PlainEngine
    from statex_dist.models.hf import from_pretrained

    model = from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    engine = PlainEngine(model, optimizer, schedule, gradient_clipping=1.0, device=torch.device("cpu"))
    sizes = torch.tensor(lengths)
    marks = torch.tensor([0, *sizes.cumsum(0)], dtype=torch.int32)
    labels = ids.roll(-1)
    labels[:, marks[1:].long() - 1] = IGNORE_INDEX
    pack = PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(size) for size in lengths])[None],
        cu_seqlens=marks,
        seq_idx=torch.repeat_interleave(torch.arange(len(lengths)), sizes)[None].int(),
    )

    def step() -> float:
        loss = engine.forward_backward([pack])
        engine.step()
        return loss

    return step


def _host(folder: Path, ids: Any, lengths: tuple[int, ...]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    targets = sum(lengths) - len(lengths)

    def step() -> float:
        total = 0.0
        for document in ids.split(lengths, 1):
            share = (document.shape[1] - 1) / targets
            loss = model(document, labels=document, use_cache=False).loss * share
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


if __name__ == "__main__":
    main()

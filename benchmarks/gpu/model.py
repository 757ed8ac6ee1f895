"""A training step of whole models on one GPU: ``python -m benchmarks.gpu.model [--out FILE.json]``.

Tokens per second, memory and model FLOPs utilisation of the 340M and 1.3B shapes, GLA and Mamba2, expanded and not,
under the library's own engine with ZeRO-3 in a process group of one: packed sequences of 64K tokens in random
documents, bf16, every block recomputed, loss in chunks, AdamW. Goal: a step of the 1.3B shape with 4 of 24 layers
expanded takes at most 5 % more than one without.

Each model is a process of its own, with a time limit; one that fails is a row. Steps are timed on the host's clock with
the device idle before and after. ``--device cpu --tiny`` runs the same with real DeepSpeed on a machine without a GPU:
its times say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shapes import MODELS, TINY_MODELS, UNEXPANDED, expanded_config, expansions, random_model
from benchmarks.measure import GIB, Record, Timing, figure, heading, machine, markdown, run_limited
from statex_dist.batch import IGNORE_INDEX, PackedBatch
from statex_dist.data.config import DataConfig
from statex_dist.distributed.env import read_env
from statex_dist.engine.config import EngineConfig
from statex_dist.models.flops import training_flops_per_token
from statex_dist.models.registry import parameter_roles
from statex_dist.run_config import ModelSource, RunConfig
from statex_dist.run_parts import build_engine
from statex_dist.train.config import TrainConfig
from statex_dist.train.mfu import utilisation

WARM_UP = 2
PACKAGES = ("deepspeed", "triton", "fla-core", "mamba-ssm", "causal-conv1d")


def synthetic_pack(tokens: int, vocab_size: int, documents: int, seed: int = 0) -> PackedBatch:
    """Return a full pack of random ids in documents of random lengths."""
    rng = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(tokens - 1, generator=rng)[: documents - 1].sort().values + 1
    borders = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])
    lengths = borders.diff()
    ids = torch.randint(vocab_size, (1, tokens), generator=rng)
    labels = ids.roll(-1, dims=1)
    labels[0, borders[1:] - 1] = IGNORE_INDEX
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=(torch.arange(tokens) - borders[:-1].repeat_interleave(lengths))[None],
        cu_seqlens=borders.int(),
        seq_idx=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None],
    )


def train_steps(model: dict[str, Any], expansion: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run training steps of one model in this process and return its row."""
    env = read_env()
    on_gpu = env.device.type == "cuda"
    settings = expanded_config(model, expansion)
    config = RunConfig(
        run_dir="not written",
        model=ModelSource(config=json.loads(settings.to_json())),
        data=DataConfig(path="synthetic", seq_len=args.tokens, packs_per_step=args.packs),
        train=TrainConfig(num_steps=WARM_UP + args.steps),
        engine=EngineConfig(precision="bf16" if on_gpu else "fp32", activation_checkpointing=args.recompute),
    )
    built = random_model(settings, env.device, torch.bfloat16 if on_gpu else torch.float32)
    config.optimizer.freeze_in(built.named_parameters(), roles=parameter_roles(built.config))
    config.engine.prepare(built)
    parameters = sum(p.numel() for p in built.parameters())
    engine = build_engine(config, built, env)
    batches = [synthetic_pack(args.tokens, settings.vocab_size, args.documents, seed) for seed in range(args.packs)]
    seconds = []
    for step in range(WARM_UP + args.steps):
        if on_gpu and step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()  # building the model and tuning kernels are no part of a step
        engine.barrier()
        start = time.perf_counter()
        loss = engine.forward_backward(batches)
        engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    timing = Timing.of(seconds[WARM_UP:])
    tokens_per_s = args.tokens * args.packs / timing.median
    flops = training_flops_per_token(settings)
    used = utilisation(flops, device=env.device, ranks=1)
    row = {
        "parameters": parameters,
        "state_numbers": settings.state_elements,
        "expanded_layers": len(settings.statex.layers) if settings.statex else 0,
        "layers": settings.num_hidden_layers,
        "step_s": timing.median,
        "step_least_s": timing.least,
        "first_step_s": seconds[0],
        "tokens_per_s": tokens_per_s,
        "flops_per_s": flops * tokens_per_s,
        "utilisation": None if used is None else used.share(tokens_per_s),
        "peak_bytes": engine.peak_memory(),
        "loss": loss,
    }
    engine.close()
    return row


def render(document: dict[str, Any]) -> str:
    """Return a document's table in Markdown."""
    columns = (
        *("model", "state", "layers expanded", "parameters M", "tokens/s", "s per step (least)"),
        *("over unexpanded (goal: <= +5 %)", "peak GiB", "model TFLOP/s", "MFU"),
    )
    measured = [row for row in document["rows"] if "failed" not in row]
    plain = {row["model"]: row["step_s"] for row in measured if row["expansion"] == UNEXPANDED}
    cells = []
    for row in document["rows"]:
        start = (row["model"], row["expansion"])
        if "failed" in row:
            cells.append((*start, row["failed"], *[None] * (len(columns) - 3)))
            continue
        base = plain.get(row["model"])
        over = None if base is None or row["expansion"] == UNEXPANDED else f"{100 * (row['step_s'] / base - 1):+.1f} %"
        cells.append(
            (
                *start,
                f"{row['expanded_layers']} of {row['layers']}",
                figure(row["parameters"], 1e-6),
                figure(row["tokens_per_s"]),
                f"{figure(row['step_s'])} ({figure(row['step_least_s'])})",
                over,
                figure(row["peak_bytes"], 1 / GIB),
                figure(row["flops_per_s"], 1e-12),
                None if row["utilisation"] is None else f"{100 * row['utilisation']:.1f} %",
            )
        )
    settings = ", ".join(f"{name} {value}" for name, value in document["settings"].items())
    return f"{heading(document)}; {settings}\n\n{markdown(columns, cells)}"


def launch(name: str, expansion: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one model in a process of its own and return its row."""
    row: dict[str, Any] = {"model": name, "expansion": expansion}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        options = [f"--{key}={getattr(args, key)}" for key in ("device", "tokens", "packs", "documents", "steps")]
        command = [sys.executable, "-m", "benchmarks.gpu.model", "--worker", name, expansion, "--result", str(result)]
        environment = dict(os.environ)
        if args.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        failed = run_limited([*command, *options, f"--recompute={args.recompute}"], args.limit, env=environment)
        if result.exists():
            return row | json.loads(result.read_text(encoding="utf-8"))
        return row | {"failed": failed or "left no result"}


def main(argv: list[str]) -> int:
    """Run every model and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="names of models (default: all)")
    parser.add_argument("--tokens", type=int, help="tokens of a pack (default: 65,536; with --tiny 128)")
    parser.add_argument("--packs", type=int, default=1, help="packs of a step; more than one accumulate")
    parser.add_argument("--documents", type=int, default=8, help="documents of a pack")
    parser.add_argument("--steps", type=int, default=5, help=f"timed steps, after {WARM_UP} to warm up")
    parser.add_argument("--recompute", choices=("none", "block", "expanded"), default="block")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one model may take")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (128 if args.tiny else 65536)
    if args.worker:
        name, expansion = args.worker
        row = train_steps((MODELS | TINY_MODELS)[name], expansion, args)
        args.result.write_text(json.dumps(row), encoding="utf-8")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu.model: no CUDA device found; --device cpu --tiny shows that it works", file=sys.stderr)
        return 2
    models = TINY_MODELS if args.tiny else MODELS
    if unknown := sorted(set(args.only or ()) - set(models)):
        parser.error(f"--only {unknown[0]!r} is no model; models: {', '.join(models)}")
    settings = {"tokens a pack": args.tokens, "packs a step": args.packs, "documents a pack": args.documents}
    settings |= {"recomputed": args.recompute, "timed steps": args.steps}
    record = Record(machine(torch.device(args.device), PACKAGES), out=args.out, settings=settings)
    for name in args.only or models:
        for expansion in expansions(models[name]):
            row = launch(name, expansion, args)
            record.add(row)
            outcome = row.get("failed") or f"{row['tokens_per_s']:.0f} tokens/s"
            print(f"{name}, {expansion}: {outcome}", file=sys.stderr, flush=True)
    print(render(record.document()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Decoding of whole models on one GPU: ``python -m benchmarks.gpu.decode [--out FILE.json]``.

It reports tokens per second and the bytes of states that a step reads and writes, by batch size, for GLA and Mamba2
before and after an expansion. A step is one call of the model with one token per sequence and the states of the call
before, in bf16, from eager PyTorch. At small batches the kernel launches of the host limit the speed, not the memory.

A step moves at least the weights once and every sequence's states twice. The share of the machine's measured copy speed
that this reaches shows the possible gain. ``--device cpu --tiny`` runs the same code on a machine without a GPU; its
times have no meaning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shapes import MODELS, TINY_MODELS, UNEXPANDED, expanded_config, expansions, random_model
from benchmarks.measure import GIB, Ceilings, Record, figure, free, heading, machine, markdown, time_call
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM

BATCHES = (1, 8, 32, 128, 256)
TINY_BATCHES = (1, 4)
PROMPT = 64
STEPS = 8
PACKAGES = ("triton", "fla-core", "mamba-ssm", "causal-conv1d")


def states_of_prompt(model: RecurrentLM, batch: int, device: torch.device) -> list[LayerState]:
    """Return the states of ``batch`` sequences after the same prompt."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
    states = model(ids, output_states=True).states
    return [tuple(part.expand(batch, *part.shape[1:]).contiguous() for part in layer) for layer in states]


def state_bytes(states: list[LayerState]) -> int:
    """Return the bytes of all layers' states."""
    return sum(part.numel() * part.element_size() for layer in states for part in layer)


def decode(model: RecurrentLM, ids: torch.Tensor, states: list[LayerState], steps: int) -> torch.Tensor:
    """Run ``steps`` greedy steps and return the last tokens ``[B, 1]``."""
    for _ in range(steps):
        output = model(ids, states=states, output_states=True, overwrite_states=True)
        states, ids = output.states, output.logits.argmax(-1)
    return ids


@torch.inference_mode()
def measure(model: RecurrentLM, batch: int, device: torch.device, ceilings: Ceilings, budget: float) -> dict[str, Any]:
    """Return the figures of one model at one batch size."""
    states = states_of_prompt(model, batch, device)
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    seconds = time_call(lambda: decode(model, ids, states, STEPS), device, budget=budget).median / STEPS
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tie_word_embeddings:  # of the embedding table a step reads one row a sequence
        table = model.embedding_table.weight
        weights -= table.numel() * table.element_size()
    moved = weights + 2 * state_bytes(states)
    return {
        "step_s": seconds,
        "tokens_per_s": batch / seconds,
        "sequence_bytes": state_bytes(states) // batch,
        "state_bytes_moved": 2 * state_bytes(states),
        "weight_bytes": weights,
        "bytes_per_s": moved / seconds,
        "copy_share": moved / seconds / ceilings.copy_bytes,
    }


def render(document: dict[str, Any]) -> str:
    """Return a document's table in Markdown."""
    columns = (
        *("model", "state", "batch", "tokens/s", "over unexpanded", "ms per step", "states MiB a sequence"),
        *("states GiB a step", "weights GiB", "GB/s", "of copy"),
    )
    plain = {
        (row["model"], row["batch"]): row["tokens_per_s"]
        for row in document["rows"]
        if row["expansion"] == UNEXPANDED and "failed" not in row
    }
    cells = []
    for row in document["rows"]:
        start = (row["model"], row["expansion"], row["batch"])
        if "failed" in row:
            cells.append((*start, row["failed"], *[None] * (len(columns) - 4)))
            continue
        base = plain.get((row["model"], row["batch"]))
        gain = None if base is None or row["expansion"] == UNEXPANDED else figure(row["tokens_per_s"] / base, unit="x")
        cells.append(
            (
                *start,
                *(figure(row["tokens_per_s"]), gain, figure(row["step_s"], 1e3)),
                figure(row["sequence_bytes"], 1 / 2**20),
                figure(row["state_bytes_moved"], 1 / GIB),
                figure(row["weight_bytes"], 1 / GIB),
                figure(row["bytes_per_s"], 1e-9),
                f"{100 * row['copy_share']:.0f} %",
            )
        )
    return f"{heading(document)}\n\n{markdown(columns, cells)}"


def main(argv: list[str]) -> int:
    """Run every model at every batch size and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand parameters")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="names of models (default: those of 1.3 B)")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of timed steps per row")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu.decode: no CUDA device found; --device cpu --tiny shows that it works", file=sys.stderr)
        return 2
    models = TINY_MODELS if args.tiny else MODELS
    names = args.only or [name for name in models if args.tiny or "1.3B" in name]
    if unknown := sorted(set(names) - set(models)):
        parser.error(f"--only {unknown[0]!r} is no model; models: {', '.join(models)}")
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ceilings = Ceilings.measure(device)
    record = Record(machine(device, PACKAGES), ceilings, out=args.out)
    for name in names:
        for expansion in expansions(models[name]):
            model = random_model(expanded_config(models[name], expansion), device, dtype).eval()
            for batch in args.batches or (TINY_BATCHES if args.tiny else BATCHES):
                row: dict[str, Any] = {"model": name, "expansion": expansion, "batch": batch}
                try:
                    row |= measure(model, batch, device, ceilings, args.budget)
                except Exception as error:  # out of memory is a result, not the end
                    row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                record.add(row)
                outcome = row.get("failed") or f"{row['tokens_per_s']:.0f} tokens/s"
                print(f"{name}, {expansion}, batch {batch}: {outcome}", file=sys.stderr, flush=True)
                free(device)
            del model
            free(device)
    print(render(record.document()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Reading and writing text on a CPU: ``python -m benchmarks.inference [--out FILE.json] [--parts PART ...]``.

Three tables, each measurement in a process of its own with one thread, in CPU time after a run to warm up:

- *decode*: tokens per second by batch size, and the bytes of states that each sequence holds, before and after an
  expansion. A step reads the weights once and every sequence's states once, and writes those again;
- *prefill*: tokens per second of prompts up to 1M tokens, and the process's largest resident set beyond that before the
  prompt: it must not grow with the prompt's length;
- *peer*: ``generate`` of transformers' Mamba2 on the same weights and prompts, greedily, to the same tokens (checked).
  Without CUDA kernels transformers reads prompts with arrays of ``tokens x chunk x heads x d_state`` numbers. Reading
  and a further step are also timed alone, the peer's step without what ``generate`` does around it. Goal: ours at
  least 3 times as fast in all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Record, alone, figure, heading, machine, markdown, resident_peak, time_cpu
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.inference.decoding import DecodingLoop, Row, Sampling
from statex_dist.inference.generate import stream_continuations
from statex_dist.inference.prefill import evaluating, prefill
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict, make_plan

GOAL = 3.0
BATCHES = (1, 8, 32)
LENGTHS = (4096, 65536, 1 << 20)
PROMPTS = ((1, 64), (1, 512), (4, 512))
NEW_TOKENS = 64
STEPS = 16
PARTS = ("decode", "prefill", "peer")

_GLA = {"model_type": "gla", "num_heads": 4, "intermediate_size": 1024}
_MAMBA2 = {"model_type": "mamba2", "head_dim": 64, "state_size": 64, "n_groups": 1}
_DECODED = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4}
_READ = {"vocab_size": 258, "hidden_size": 64, "num_hidden_layers": 2}
_PEER = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_heads": 8}

MODELS: dict[str, dict[str, Any]] = {
    "GLA": {**_GLA, **_DECODED},
    "GLA, every layer merged x4": {**_GLA, **_DECODED, "expand": {"layers": "all", "factor": 4, "init": "inherit"}},
    "GLA, 1 of 4 layers merged x4": {**_GLA, **_DECODED, "expand": {"layers": "0", "factor": 4, "init": "inherit"}},
    "Mamba2": {**_MAMBA2, **_DECODED, "num_heads": 16},
    "Mamba2, d_state x4": {
        **_MAMBA2,
        **_DECODED,
        "num_heads": 16,
        "expand": {"layers": "all", "factor": 4, "init": "inherit"},
    },
}
READERS = {"GLA": {**_GLA, **_READ}, "Mamba2": {**_MAMBA2, **_READ, "num_heads": 2}}


def build(values: dict[str, Any]) -> RecurrentLM:
    """Return a model of random weights from a ``config.json``'s contents and, under ``expand``, its expansion."""
    torch.set_num_threads(1)
    expansion = values.get("expand")
    config = config_from_dict({name: value for name, value in values.items() if name != "expand"} | _more(values))
    if expansion is not None:
        config = make_plan(config, **expansion)
    model = RecurrentLM(config)
    model.init_parameters(0)
    return model


def _more(values: dict[str, Any]) -> dict[str, Any]:
    # "expand" is a key of Mamba2's own config too: its default is meant.
    return {"expand": 2} if values["model_type"] == "mamba2" else {}


def decode(values: dict[str, Any], batch: int) -> dict[str, Any]:
    """Return seconds a step and bytes of states a sequence of a model of random weights."""
    return decode_step(build(values), batch)


def decode_step(model: RecurrentLM, batch: int) -> dict[str, Any]:
    """Return seconds a step and bytes of states a sequence."""
    ids = torch.randint(model.config.vocab_size, (batch, 16), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        logits, states = prefill(model, ids)
        loop = DecodingLoop(model, BytesTokenizer())
        sampling = Sampling(max_tokens=1 << 20, ignore_eos=True)
        loop.add([Row(key=i, sampling=sampling) for i in range(batch)], logits, states)
        seconds = time_cpu(lambda: [loop.step() for _ in range(STEPS)]).least / STEPS
    return {"seconds": seconds, "state_bytes": loop.state_bytes // batch}


def read(values: dict[str, Any], length: int) -> dict[str, Any]:
    """Return seconds and bytes that a prompt of ``length`` tokens takes."""
    model = build(values)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        prefill(model, ids[:, :2048])  # the first segment allocates what all others use again
        before = resident_peak()
        start = time.process_time()
        prefill(model, ids)
        seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": resident_peak() - before}


def generate(ours: bool, batch: int, prompt: int) -> dict[str, Any]:
    """Return the seconds of reading with one new token, of one more step, and of all, and the tokens."""
    values = {**_MAMBA2, **_PEER}
    model = build(values)
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    side = _Ours(model, ids) if ours else _Theirs(_transformers(values, model), ids)
    first, whole = (time_cpu(lambda n=n: side.run(n), budget=20, most=3).least for n in (1, NEW_TOKENS))
    return {"first": first, "step": side.step_seconds(), "whole": whole, "tokens": side.run(NEW_TOKENS)}


class _Ours:
    def __init__(self, model: RecurrentLM, ids: torch.Tensor):
        self.model, self.ids = model, ids

    def run(self, tokens: int) -> list[list[int]]:
        sampling, done = Sampling(max_tokens=tokens, ignore_eos=True), {}
        options = {"tokenizer": BytesTokenizer(), "batch_size": len(self.ids)}
        for progress in stream_continuations(self.model, self.ids.tolist(), sampling, **options):
            if progress.finish_reason:
                done[progress.key] = list(progress.tokens)
        return [done[row] for row in range(len(self.ids))]

    def step_seconds(self) -> float:
        with evaluating(self.model):
            loop = DecodingLoop(self.model, BytesTokenizer())
            sampling = Sampling(max_tokens=1 << 20, ignore_eos=True)
            loop.add([Row(key=i, sampling=sampling) for i in range(len(self.ids))], *prefill(self.model, self.ids))
            return time_cpu(lambda: [loop.step() for _ in range(STEPS)]).least / STEPS


class _Theirs:
    def __init__(self, model: Any, ids: torch.Tensor):
        self.model, self.ids = model, ids

    @torch.inference_mode()
    def run(self, tokens: int) -> list[list[int]]:
        mask = torch.ones_like(self.ids)
        found = self.model.generate(self.ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        return found[:, self.ids.shape[1] :].tolist()

    @torch.inference_mode()
    def step_seconds(self) -> float:
        """Return the seconds of bare forward steps, without what ``generate`` does around each."""
        output = self.model(self.ids, use_cache=True)
        cache, token = output.cache_params, output.logits[:, -1:].argmax(-1)
        position = torch.tensor([self.ids.shape[1]])

        def steps() -> None:
            for _ in range(STEPS):
                self.model(token, cache_params=cache, cache_position=position, use_cache=True)

        return time_cpu(steps).least / STEPS


def _transformers(values: dict[str, Any], model: RecurrentLM) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(**{k: v for k, v in values.items() if k != "model_type"}, expand=2, eos_token_id=None)
    peer = Mamba2ForCausalLM(config).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def measure(parts: list[str], record: Record) -> None:
    """Measure the parts and add a row for each figure."""
    if "decode" in parts:
        for label, values in MODELS.items():
            for batch in BATCHES:
                record.add({"part": "decode", "model": label, "batch": batch, **alone(decode, values, batch)})
    if "prefill" in parts:
        for label, values in READERS.items():
            for length in LENGTHS:
                record.add({"part": "prefill", "model": label, "length": length, **alone(read, values, length)})
    if "peer" in parts:
        for batch, prompt in PROMPTS:
            ours, theirs = (alone(generate, mine, batch, prompt) for mine in (True, False))
            same = ours.pop("tokens") == theirs.pop("tokens")
            record.add({"part": "peer", "batch": batch, "prompt": prompt, "ours": ours, "theirs": theirs, "same": same})


def render(document: dict[str, Any]) -> str:
    """Return a document's tables in Markdown."""
    rows = document["rows"]
    return "\n\n".join([heading(document), *filter(None, (_decoded(rows), _read_table(rows), _compared(rows)))]) + "\n"


def _decoded(rows: list[dict[str, Any]]) -> str | None:
    found = [row for row in rows if row["part"] == "decode"]
    plain = {(row["model"], row["batch"]): row["seconds"] for row in found}
    columns = ("model", "batch", "tokens/s", "ms per step", "over unexpanded", "state KiB a sequence")
    cells = [
        (
            row["model"],
            row["batch"],
            figure(row["batch"] / row["seconds"]),
            figure(row["seconds"], 1e3),
            figure(plain[row["model"].split(",")[0], row["batch"]] / row["seconds"], unit="x"),
            figure(row["state_bytes"] / 1024, digits=4),
        )
        for row in found
        if (row["model"].split(",")[0], row["batch"]) in plain
    ]
    return markdown(columns, cells) if cells else None


def _read_table(rows: list[dict[str, Any]]) -> str | None:
    cells = [
        (
            row["model"],
            f"{row['length']:,}",
            figure(row["length"] / row["seconds"]),
            figure(row["seconds"]),
            figure(row["bytes"] / 2**20),
        )
        for row in rows
        if row["part"] == "prefill"
    ]
    return markdown(("model", "prompt", "tokens/s", "s", "MiB beyond the first segments"), cells) if cells else None


def _compared(rows: list[dict[str, Any]]) -> str | None:
    cells = []
    for row in (row for row in rows if row["part"] == "peer"):
        ours, theirs = row["ours"], row["theirs"]
        cells.append(
            (
                f"{row['batch']} x {row['prompt']}",
                figure(ours["first"], 1e3),
                figure(theirs["first"], 1e3),
                figure(theirs["first"] / ours["first"], unit="x"),
                figure(ours["step"], 1e3),
                figure(theirs["step"], 1e3),
                figure(theirs["step"] / ours["step"], unit="x"),
                figure(theirs["whole"] / ours["whole"], unit="x"),
                f">= {GOAL:g}x",
                "yes" if row["same"] else "NO",
            )
        )
    columns = (
        *("prompts", "read ms", "its", "ratio", "step ms", "its", "ratio"),
        *(f"whole ({NEW_TOKENS} new)", "goal", "same tokens"),
    )
    return markdown(columns, cells) if cells else None


def main() -> None:
    """Measure, print the tables and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(machine(packages=("transformers",)), out=options.out)
    measure(options.parts, record)
    sys.stdout.write(render(json.loads(json.dumps(record.document()))))


if __name__ == "__main__":
    main()

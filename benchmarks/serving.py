"""``statex serve`` under clients on the same machine: ``python -m benchmarks.serving [--out FILE.json]``.

It reports, for 1, 4 and 16 clients with one open request each: tokens and requests per second of whole answers and of
streams, and the time to a stream's first token. It also reports the speed of the decoding loop alone with the same
number of rows, in a separate process. The difference is the cost of HTTP, the event loop and the clients. Times are
wall-clock times: server and clients share the machine's cores, and other processes on the machine affect the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI

from benchmarks.measure import Record, alone, figure, heading, machine, markdown
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.inference.decoding import DecodingLoop, Row, Sampling
from statex_dist.inference.prefill import evaluating, read_contexts
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict

CLIENTS = (1, 4, 16)
PROMPT = "The river rose in the night, and they"
NEW_TOKENS = 64
SECONDS = 8.0
MODELS = {
    "2 layers of width 16": {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 32},
    "8 layers of width 512": {"hidden_size": 512, "num_hidden_layers": 8, "num_heads": 4},
}


def write_model(values: dict[str, Any], directory: Path) -> Path:
    """Write a GLA of random weights that reads bytes."""
    model = RecurrentLM(config_from_dict({"model_type": "gla", "vocab_size": 258, **values}))
    model.init_parameters(0)
    save_pretrained(model, directory)
    BytesTokenizer().save(directory)
    return directory


def bare(directory: str, rows: int) -> float:
    """Return the tokens per second of the loop alone; every batch reads its prompts again."""
    model, tokenizer = from_pretrained(Path(directory)), BytesTokenizer()
    torch.set_num_threads(1)
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=1.0, ignore_eos=True)
    contexts = [tokenizer.encode(PROMPT).tolist()] * rows
    produced, start = 0, time.perf_counter()
    with evaluating(model):
        while time.perf_counter() < start + SECONDS:
            loop = DecodingLoop(model, tokenizer)
            states = [read_contexts(model, [context], segment_length=1024) for context in contexts]
            for i, (logits, state) in enumerate(states):
                loop.add([Row(key=i, sampling=sampling, seed=i)], logits, state)
            while len(loop):
                produced += len(loop.step())
    return produced / (time.perf_counter() - start)


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Run the real command and give its address."""
    command = [sys.executable, "-m", "launch.cli", "serve", "--model", str(directory), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            yield line.split(" at ")[1].split(": ")[0]
        finally:
            server.terminate()
            server.wait(60)


def ask(client: OpenAI, name: str, seed: int, *, stream: bool) -> tuple[int, float]:
    """Send one request; return its tokens and the seconds to the first piece of its answer."""
    start = time.perf_counter()
    options: dict[str, Any] = {"seed": seed, "extra_body": {"ignore_eos": True}}
    if not stream:
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=NEW_TOKENS, **options)
        return answer.usage.completion_tokens, time.perf_counter() - start
    options["stream_options"] = {"include_usage": True}
    first, tokens = None, 0
    for chunk in client.completions.create(model=name, prompt=PROMPT, max_tokens=NEW_TOKENS, stream=True, **options):
        first = time.perf_counter() - start if first is None else first
        tokens = chunk.usage.completion_tokens if chunk.usage is not None else tokens
    assert first is not None
    return tokens, first


def load(address: str, name: str, clients: int, *, stream: bool) -> dict[str, float]:
    """Keep ``clients`` requests open for some seconds; return tokens and requests per second and the first token's."""
    end = time.perf_counter() + SECONDS

    def work(number: int) -> list[tuple[int, float]]:
        client, done = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), []
        while time.perf_counter() < end:
            done.append(ask(client, name, 1000 * number + len(done), stream=stream))
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for done in pool.map(work, range(clients)) for answer in done]
    seconds = time.perf_counter() - start
    return {
        "tokens_per_s": sum(tokens for tokens, _ in answers) / seconds,
        "requests_per_s": len(answers) / seconds,
        "first_s": statistics.median(first for _, first in answers),
    }


def measure(record: Record, directory: Path) -> None:
    """Measure every model with every number of clients."""
    for label, values in MODELS.items():
        model = write_model(values, directory / label.replace(" ", "-"))
        with served(model) as address:
            load(address, model.name, 1, stream=False)  # to warm up
            for clients in CLIENTS:
                kinds = {
                    kind: load(address, model.name, clients, stream=kind == "stream") for kind in ("whole", "stream")
                }
                record.add({"model": label, "clients": clients, **kinds})
        for row in record.rows[-len(CLIENTS) :]:
            row["bare"] = alone(bare, str(model), row["clients"])


def render(document: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    cells = [
        (
            row["model"],
            row["clients"],
            figure(row["bare"]),
            figure(row["whole"]["tokens_per_s"]),
            figure(row["whole"]["tokens_per_s"] / row["bare"], unit="x"),
            figure(row["whole"]["requests_per_s"]),
            figure(row["stream"]["tokens_per_s"]),
            figure(row["stream"]["first_s"], 1e3),
        )
        for row in document["rows"]
    ]
    columns = (
        "model",
        "clients",
        "loop alone, tokens/s",
        "served, tokens/s",
        "ratio",
        "requests/s",
        "streamed, tokens/s",
    )
    return f"{heading(document)}\n\n{markdown((*columns, 'first token ms'), cells)}\n"


def main() -> None:
    """Measure, print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    record = Record(machine(packages=("fastapi", "uvicorn", "openai")))
    with tempfile.TemporaryDirectory() as directory:
        measure(record, Path(directory))
    if options.out is not None:
        options.out.write_text(json.dumps(record.document(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(render(record.document()))


if __name__ == "__main__":
    main()

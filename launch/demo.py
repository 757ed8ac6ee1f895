"""The whole road on a tiny model: what a user does on their own checkpoint, in the same commands.

A small model is pre-trained on text and associative recall until its state, not its training, limits what it recalls.
Then it is post-trained twice on the same tokens, seeds and steps: as it is (LPT) and after its state was expanded
(StateX). Both are resharded to safetensors and measured alike.

Every step is a real command, printed before it runs; the two post-training arms are DeepSpeed ZeRO-3 jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from launch.demo_data import library_pieces, recall_documents, write_sources
from launch.demo_report import ARMS, NUM_PAIRS, draw_plot, make_table
from statex_dist.durable.files import write_durably
from statex_dist.errors import ConfigError, StateXError
from statex_dist.models.registry import family_of, read_config
from statex_dist.train.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES: dict[str, tuple[str, ...]] = {
    "gla": ("--layers", "all", "--factor", "full", "--init", "inherit"),
    "mamba2": ("--layers", "all", "--op", "grow_features", "--factor", "4"),
}
"""How each family is expanded; docs/demo.md has the figures of the other choices."""

EVALUATION_DOCUMENTS = 128
MARKER = ".statex-demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """One data set: recall documents with these numbers of pairs, and pieces of text."""

    num_pairs: tuple[int, ...] = ()
    recall_tokens: int = 0
    text_pieces: int = 0


CORPORA = {
    "recall": Corpus(num_pairs=(4, 8, 16), recall_tokens=1_400_000),
    "short": Corpus(num_pairs=(4, 8, 16), recall_tokens=1_150_000, text_pieces=150),
    "long": Corpus(num_pairs=NUM_PAIRS, recall_tokens=2_600_000, text_pieces=350),
    "held_out": Corpus(text_pieces=60),
}
"""Pre-training sees short contexts, first recall alone (text would drown its faint gradient), then recall and text.
Post-training sees longer contexts, for which a state is grown; the last one measures perplexity."""


class Demo:
    """Runs the demo into one folder.

    Args:
        out: The folder.
        family: ``gla`` or ``mamba2``.
        seeds: Number of repetitions: other parameters, expansions and orders of the same data.
        ranks: Processes of the ZeRO-3 jobs.
        scale: Fraction of the training steps.
        overwrite: Whether a folder that is not empty is replaced.

    Raises:
        ConfigError: A wrong argument, or the folder is not empty.
    """

    def __init__(
        self, out: str, *, family: str, seeds: int = 1, ranks: int = 2, scale: float = 1.0, overwrite: bool = False
    ):
        if seeds < 1:
            raise ConfigError(f"--seeds must be 1 or more, not {seeds}")
        if family not in FAMILIES:
            raise ConfigError(f"--family {family!r} is not one of {', '.join(FAMILIES)}")
        if ranks < 1 or not 0 < scale <= 1:
            raise ConfigError(f"--ranks must be 1 or more and --scale in (0, 1], not {ranks} and {scale}")
        if not (REPOSITORY / "configs").is_dir():
            raise ConfigError("statex demo reads configs/ of the repository; install it with pip install -e")
        self.out, self.family, self.seeds, self.ranks, self.scale = Path(out), family, seeds, ranks, scale
        if self.out.is_file():
            raise ConfigError(f"--out {out} is a file; give a folder")
        if self.out.is_dir() and any(self.out.iterdir()):
            if not overwrite:
                raise ConfigError(f"--out {out} is not empty; pass --overwrite to replace an earlier demo there")
            if not (self.out / MARKER).is_file():
                raise ConfigError(f"--out {out} is not empty and no earlier demo ({MARKER}); give another folder")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARKER).touch()
        self.console = Console(stderr=True, highlight=False)
        self.started = time.monotonic()

    def run(self, *, as_json: bool = False) -> dict[str, Any]:
        """Go the whole way and write ``demo.json`` and ``demo.png``.

        Args:
            as_json: Print the result as JSON to standard output, instead of the table.

        Returns:
            The contents of ``demo.json``.
        """
        self.make_data()
        arms: dict[str, dict[str, Any]] = {}
        for seed in range(self.seeds):
            for arm, (model, record) in self.train_and_measure(seed).items():
                config = read_config(model)
                numbers = config.state_elements
                tensors = family_of(config.MODEL_TYPE).tensors(config)
                entry = arms.setdefault(
                    arm,
                    {"state_numbers": numbers, "parameters": sum(s.numel for s in tensors.values()), "seeds": []},
                )
                entry["seeds"].append(record)
        result = {"family": self.family, "arms": arms}
        write_durably(self.out / "demo.json", json.dumps(result, indent=1) + "\n")
        draw_plot(result, self.out / "demo.png")
        minutes = (time.monotonic() - self.started) / 60
        self.console.print(f"\n{self.out / 'demo.json'} and {self.out / 'demo.png'} written; {minutes:.1f} minutes")
        model = self.out / "seed0" / "statex" / "model"
        self.console.print(
            f"use the model: statex generate --model {model} --prompt 'The ' or statex serve --model {model}",
            markup=False,
            soft_wrap=True,
        )
        if as_json:
            sys.stdout.write(json.dumps(result) + "\n")
        else:
            Console().print(make_table(result))
        return result

    def make_data(self) -> None:
        """Write text and recall documents and turn them into shards."""
        data = self.out / "data"
        data.mkdir()
        pieces = library_pieces(sum(corpus.text_pieces for corpus in CORPORA.values()))
        for name, corpus in CORPORA.items():
            recall = recall_documents(corpus.num_pairs, int(corpus.recall_tokens * self.scale))
            text = [{"text": pieces.pop()} for _ in range(corpus.text_pieces)]
            sources = write_sources(data, name, recall=recall, text=text)
            self.statex("prepare", *sources, "--out", data / name)

    def train_and_measure(self, seed: int) -> dict[str, tuple[Path, dict[str, Any]]]:
        """Run all arms of one seed; return each arm's model directory and record."""
        folder = self.out / f"seed{seed}"
        base, expanded = folder / "base" / "model", folder / "expanded"
        self.train("start", folder, f"demo_{self.family}.yaml", "recall", "--seed", seed)
        self.train(
            "base", folder, "demo_continue.yaml", "short", "--seed", seed, "--model.path", folder / "start/model"
        )
        self.statex("plan", base, *FAMILIES[self.family])
        self.statex("expand", "--source", base, "--target", expanded, "--seed", seed, *FAMILIES[self.family])
        for arm, model in (("lpt", base), ("statex", expanded)):
            self.train(arm, folder, "demo_posttrain.yaml", "long", "--seed", seed + 1000, "--model.path", model)
        return {arm: (folder / arm / "model", self.measure(folder / arm, seed)) for arm in ARMS}

    def train(self, arm: str, folder: Path, config: str, data: str, *arguments: object) -> None:
        """Train one arm with ``deepspeed`` and reshard the result to safetensors."""
        run, file = folder / arm / "run", REPOSITORY / "configs" / config
        steps = yaml.safe_load(file.read_text(encoding="utf-8"))["train"]["num_steps"]
        options = ["--config", file, "--run_dir", run, "--data.path", self.out / "data" / data, *arguments]
        if self.scale < 1:
            options += ["--train.num_steps", max(1, int(steps * self.scale)), "--schedule.warmup_steps", 0]
        script = REPOSITORY / "launch" / "train.py"
        self._show("deepspeed", "--num_accelerators", self.ranks, script, *options)
        launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", self.ranks, "--master_port", _free_port()]
        # A model this small gains nothing from a GPU, and the figures are then the same everywhere.
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        done = subprocess.run(
            [str(part) for part in (sys.executable, *launcher, script, *options)],
            env=environment,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise StateXError(f"training of {run} ended with exit code {done.returncode}; its messages are above")
        self.statex("reshard", "--source", run, "--target", folder / arm / "model", "--to", "hf")

    def measure(self, arm: Path, seed: int) -> dict[str, Any]:
        """Evaluate one arm's model."""
        model, recall, perplexity = ("--model", arm / "model", "--device", "cpu"), arm / "mqar", arm / "perplexity"
        pairs = ",".join(map(str, NUM_PAIRS))
        # fmt: off
        self.statex("eval", "mqar", *model, "--out", recall, "--num-pairs", pairs,
                    "--num-samples", EVALUATION_DOCUMENTS)
        self.statex("eval", "perplexity", *model, "--out", perplexity,
                    "--data", self.out / "data" / "held_out")
        # fmt: on
        mqar = json.loads((recall / "mqar.json").read_text(encoding="utf-8"))["by_num_pairs"]
        loss = json.loads((perplexity / "perplexity.json").read_text(encoding="utf-8"))
        rates = [record["tokens_per_s"] for record in read_metrics(arm / "run")]
        return {
            "seed": seed,
            "recall": {n: estimate["accuracy"] for n, estimate in mqar.items()},
            "perplexity": loss["perplexity"],
            "tokens_per_s": round(statistics.median(rates)),
        }

    def statex(self, *arguments: object) -> None:
        """Run a ``statex`` command in this process, as the shell would."""
        from launch.cli import main

        self._show("statex", *arguments)
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the demo's own table or JSON
            failed = main([str(argument) for argument in arguments])
        if failed:
            raise StateXError(f"statex {arguments[0]} failed; its message is above")

    def _show(self, *command: object) -> None:
        seconds = int(time.monotonic() - self.started)
        line = shlex.join(str(part) for part in command)
        self.console.print(f"[{seconds // 60}:{seconds % 60:02d}] $ {line}", style="bold", markup=False, soft_wrap=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

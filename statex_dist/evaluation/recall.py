"""The ``recall`` suite: key-value pairs by number (mqar) and a passkey by depth and length (needle)."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from statex_dist.data.progress import ProgressLine
from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation import mqar, needle
from statex_dist.evaluation.report import RESULT_VERSION, Estimate, bootstrap, plot_curve, plot_heat_map, write_results
from statex_dist.evaluation.streaming import DEFAULT_SEGMENT_LENGTH, check_segment_length
from statex_dist.models.lm import RecurrentLM

TASKS = ("mqar", "needle")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallSettings:
    """What the suite measures.

    Attributes:
        tasks: Of :data:`TASKS`.
        num_pairs: Numbers of key-value pairs.
        mqar_samples: Documents for each number of pairs.
        keys: First id of the keys and one past the last.
        values: First id of the values and one past the last.
        lengths: Needle: tokens of a prompt.
        depths: Needle: number of depths.
        needle_samples: Needle: prompts for each length and depth.
        haystack: Needle: a text file; None for made-up sentences.
        batch_size: Samples per forward pass.
        segment_length: Tokens per forward pass.
        seed: Of all documents and of the intervals.
    """

    tasks: tuple[str, ...] = TASKS
    num_pairs: tuple[int, ...] = (8, 16, 32, 64)
    mqar_samples: int = 256
    keys: tuple[int, int] = (mqar.DEFAULT_KEYS.start, mqar.DEFAULT_KEYS.stop)
    values: tuple[int, int] = (mqar.DEFAULT_VALUES.start, mqar.DEFAULT_VALUES.stop)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: int = 5
    needle_samples: int = 20
    haystack: str | None = None
    batch_size: int = 32
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"no task given; tasks of recall: {', '.join(TASKS)}")
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(f"task {task!r} is unknown; tasks of recall: {', '.join(TASKS)}")
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks {list(self.tasks)} name one twice; name each once")
        for name in ("mqar_samples", "needle_samples", "depths", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, not {getattr(self, name)}")
        check_segment_length(self.segment_length)
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, not {self.seed}")
        for name in ("num_pairs", "lengths"):
            numbers = getattr(self, name)
            if not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
                raise ConfigError(f"{name} must be different numbers of 1 or more, not {list(numbers)}")
        for name in ("keys", "values"):
            first, end = getattr(self, name)
            if not 0 <= first < end:
                raise ConfigError(f"{name} must be FIRST:END with 0 <= FIRST < END, not {first}:{end}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallResult:
    """What the suite found.

    Attributes:
        settings: What was asked for.
        mqar: Accuracy by number of pairs; empty if the task was not run.
        needle: Accuracy by length and depth; empty if the task was not run.
        needle_by_length: Accuracy by length, all depths together.
        samples: One record a document or prompt.
        seconds: Wall time of each task.
    """

    settings: RecallSettings
    mqar: dict[int, Estimate]
    needle: dict[tuple[int, float], Estimate]
    needle_by_length: dict[int, Estimate]
    samples: list[dict[str, Any]]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the tasks' figures in the form of ``recall.json``."""
        tasks: dict[str, Any] = {}
        if self.mqar:
            tasks["mqar"] = {
                "by_num_pairs": {
                    str(n): {**estimate.to_dict(), "guessing": guessing_accuracy(n, self.settings)}
                    for n, estimate in self.mqar.items()
                }
            }
        if self.needle:
            tasks["needle"] = {
                "by_length": {str(length): estimate.to_dict() for length, estimate in self.needle_by_length.items()},
                "cells": [{"length": n, "depth": d, **estimate.to_dict()} for (n, d), estimate in self.needle.items()],
            }
        return {"tasks": tasks, "settings": dataclasses.asdict(self.settings), "seconds": self.seconds}


def guessing_accuracy(num_pairs: int, settings: RecallSettings) -> float:
    """Return the accuracy of a model that knows which values are in the context, but not whose they are."""
    first, end = settings.values
    return 1 / num_pairs + (1 - 1 / num_pairs) / (end - first)


def run_recall(model: RecurrentLM, settings: RecallSettings, *, tokenizer: Tokenizer | None = None) -> RecallResult:
    """Run the suite.

    Args:
        model: The model, fp32 where the figures are to be compared.
        settings: What to measure.
        tokenizer: The model's; only needle needs it.

    Raises:
        ConfigError: The settings do not fit the model or each other; found before anything is run.
        DataError: The haystack cannot be read.
        CheckpointError: The model's output is not finite.
    """
    haystack = _check(model, settings, tokenizer)
    result = RecallResult(settings=settings, mqar={}, needle={}, needle_by_length={}, samples=[], seconds={})
    for task in settings.tasks:
        begin = time.monotonic()
        if task == "mqar":
            _run_mqar(model, result)
        else:
            assert tokenizer is not None
            _run_needle(model, result, tokenizer, haystack)
        result.seconds[task] = round(time.monotonic() - begin, 3)
    return result


def _check(model: RecurrentLM, settings: RecallSettings, tokenizer: Tokenizer | None) -> needle.Haystack | None:
    vocab_size = model.config.vocab_size
    if "mqar" in settings.tasks:
        for name, (first, end) in (("keys", settings.keys), ("values", settings.values)):
            if end > vocab_size:
                raise ConfigError(
                    f"mqar {name} {first}:{end} do not fit the model's vocabulary of {vocab_size}; "
                    f"set --{name[:-1]}-ids FIRST:END with END at most {vocab_size}"
                )
        first, end = settings.keys
        if max(settings.num_pairs) > end - first:
            raise ConfigError(
                f"mqar cannot draw {max(settings.num_pairs)} distinct keys from {first}:{end}; "
                f"set --num-pairs to at most {end - first} or a wider --key-ids"
            )
    if "needle" not in settings.tasks:
        return None
    if tokenizer is None:
        raise ConfigError("the needle task needs the model's tokenizer; set --tokenizer bytes or a directory")
    check_vocabulary(model, tokenizer)
    if min(settings.lengths) <= (shortest := needle.min_length(tokenizer)):
        raise ConfigError(
            f"needle: length {min(settings.lengths)} leaves no room for a haystack; the prompt alone takes "
            f"{shortest} tokens: set --lengths above that"
        )
    return needle.file_haystack(Path(settings.haystack), tokenizer) if settings.haystack else None


def check_vocabulary(model: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Raise if the tokenizer has ids that the model has no embedding for.

    Raises:
        ConfigError: It has.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.spec!r} has {tokenizer.vocab_size} ids, the model a vocabulary of "
            f"{model.config.vocab_size}; set --tokenizer to the one that the model was trained with"
        )


def _run_mqar(model: RecurrentLM, result: RecallResult) -> None:
    settings = result.settings
    with ProgressLine("mqar", len(settings.num_pairs), "numbers of pairs") as progress:
        for num_pairs in settings.num_pairs:
            tokens, mask = mqar.generate_mqar(
                num_pairs,
                settings.mqar_samples,
                seed=settings.seed,
                keys=range(*settings.keys),
                values=range(*settings.values),
            )
            accuracy = mqar.score_mqar(model, tokens, mask, batch_size=settings.batch_size)
            result.mqar[num_pairs] = bootstrap(accuracy, seed=settings.seed)
            result.samples.extend(
                {"task": "mqar", "num_pairs": num_pairs, "sample": i, "accuracy": value}
                for i, value in enumerate(accuracy.tolist())
            )
            progress.advance(1, tokens.size)


def _run_needle(
    model: RecurrentLM, result: RecallResult, tokenizer: Tokenizer, haystack: needle.Haystack | None
) -> None:
    settings = result.settings
    depths = needle.depth_values(settings.depths)
    with ProgressLine("needle", len(settings.lengths) * len(depths), "cells") as progress:
        for length in settings.lengths:
            of_length: list[bool] = []
            for depth in depths:
                prompts = needle.build_prompts(
                    length,
                    depth,
                    settings.needle_samples,
                    seed=settings.seed,
                    tokenizer=tokenizer,
                    haystack=haystack,
                )
                answers = needle.answer_prompts(
                    model,
                    prompts,
                    tokenizer=tokenizer,
                    batch_size=settings.batch_size,
                    segment_length=settings.segment_length,
                )
                right = [answer == key for answer, key in zip(answers, prompts.keys, strict=True)]
                result.needle[length, depth] = bootstrap(right, seed=settings.seed)
                of_length.extend(right)
                place = {"task": "needle", "length": length, "depth": depth}
                result.samples.extend(
                    {**place, "sample": i, "key": prompts.keys[i], "answer": answers[i], "right": right[i]}
                    for i in range(len(right))
                )
                progress.advance(1, prompts.tokens.size)
            result.needle_by_length[length] = bootstrap(of_length, seed=settings.seed)


def write_recall(result: RecallResult, directory: Path, *, model: dict[str, Any]) -> list[Path]:
    """Write ``recall.json``, ``recall.jsonl`` and a PNG for each task.

    Args:
        result: What :func:`run_recall` returned.
        directory: An existing directory.
        model: What is known of the model; ``directory`` and ``seed`` should be in it or in the settings.

    Returns:
        The files, the summary first.
    """
    plots: dict[str, bytes] = {}
    if result.mqar:
        pairs = sorted(result.mqar)
        plots["recall_mqar.png"] = plot_curve(
            pairs,
            [result.mqar[n] for n in pairs],
            title="Associative recall",
            x_label="key-value pairs in the context",
            y_label="accuracy (band: 95 % interval)",
            y_limits=(-0.03, 1.03),
            reference=([guessing_accuracy(n, result.settings) for n in pairs], "any value of the context"),
        )
    if result.needle:
        lengths, depths = sorted(result.needle_by_length), sorted({depth for _, depth in result.needle})
        plots["recall_needle.png"] = plot_heat_map(
            np.array([[result.needle[length, depth].mean for length in lengths] for depth in depths]),
            columns=[str(length) for length in lengths],
            rows=[f"{100 * depth:.0f} %" for depth in depths],
            title="Passkey in a haystack",
            x_label="context length (tokens)",
            y_label="depth of the needle",
        )
    summary = {"version": RESULT_VERSION, "suite": "recall", "model": model, **result.to_dict()}
    return write_results(directory, "recall", summary, result.samples, plots)

"""The ``recall`` suite: facts hidden in long prompts, by length of the prompt and depth of the fact.

Tasks: the passkey of :mod:`~statex_dist.evaluation.needle` and the eight of :mod:`~statex_dist.evaluation.ruler`. All
prompts of a batch are of one length and are read side by side, segment by segment with a carried state, then answered
greedily; decoding ends when every row has said all its answers or EOS. Nothing but the tokens grows with the length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation import needle, ruler
from statex_dist.evaluation.journal import EvalUnit, Record
from statex_dist.evaluation.needle import (
    SentenceSource,
    fresh_sentences,
    made_up_sentences,
    read_haystack,
    running_text,
    split_sentences,
)
from statex_dist.evaluation.report import (
    Estimate,
    bootstrap,
    check_different,
    check_reading,
    plot_heat_map,
    write_results,
)
from statex_dist.evaluation.scoring import decode_greedily
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH, device_of, evaluating
from statex_dist.inference.text import continuation_text, text_window
from statex_dist.inference.vocabulary import check_vocabulary
from statex_dist.models.lm import RecurrentLM

PASSKEY = "passkey"
TASKS = (PASSKEY, *ruler.RULER_TASKS)
DEFAULT_TASKS = (PASSKEY, "niah_single_1", "niah_single_2", "niah_single_3")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallSettings:
    """Settings of the ``recall`` suite.

    Attributes:
        tasks: Names of :data:`TASKS`.
        lengths: Tokens of a prompt.
        depths: Number of depths.
        num_samples: Prompts for each task, length and depth.
        haystack: Text to hide the facts in; None for made-up sentences. ``niah_single_1`` and ``niah_multikey_2`` and
            ``_3`` have haystacks of their own.
        max_new_tokens: Tokens that a model may produce for a RULER prompt; a passkey takes six.
        batch_size: Prompts per forward pass.
        segment_length: Tokens per forward pass.
        seed: Seed of all prompts and of the intervals.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    lengths: tuple[int, ...] = (4096, 8192, 16384)
    depths: int = 5
    num_samples: int = 20
    haystack: str | None = None
    max_new_tokens: int = ruler.MAX_NEW_TOKENS
    batch_size: int = 32
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"no task given; tasks of recall: {', '.join(TASKS)}")
        for task in self.tasks:
            if task == "mqar":
                raise ConfigError("mqar is a suite of its own: statex eval mqar")
            if task not in TASKS:
                raise ConfigError(f"task {task!r} is unknown; tasks of recall: {', '.join(TASKS)}")
        if len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks {list(self.tasks)} name one twice; name each once")
        check_reading(self, "num_samples", "depths", "max_new_tokens")
        check_different("lengths", self.lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A prompt of any task, and how its answer is scored."""

    tokens: np.ndarray
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    positions: tuple[int, ...]


def recall_units(model: RecurrentLM, settings: RecallSettings, tokenizer: Tokenizer) -> list[EvalUnit]:
    """Return the suite's units: a batch of prompts of one task, length and depth each.

    Args:
        model: The model, fp32 where the figures are to be compared.
        settings: What to measure.
        tokenizer: The model's.

    Raises:
        ConfigError: The tokenizer does not fit the model or cannot write the answers, or a length is below what the
            prompt itself takes.
        DataError: The haystack cannot be read.
    """
    check_vocabulary(model, tokenizer)
    for task in settings.tasks:
        own = needle.min_length(tokenizer) if task == PASSKEY else ruler.min_length(task, tokenizer)
        if min(settings.lengths) <= own:
            raise ConfigError(
                f"{task}: length {min(settings.lengths)} leaves no room for a haystack; the prompt alone takes up to "
                f"{own} tokens: set --lengths above that"
            )
    passkey_haystack, essay, digest = _haystacks(settings, tokenizer)
    depths = needle.depth_values(settings.depths)

    def prompts(task: str, length: int, depth: int, samples: range) -> list[_Asked]:
        if task == PASSKEY:
            drawn = needle.build_prompts(
                length,
                depths[depth],
                len(samples),
                seed=settings.seed,
                tokenizer=tokenizer,
                haystack=passkey_haystack,
                first_sample=samples.start,
            )
            rows = zip(drawn.tokens, drawn.keys, drawn.positions.tolist(), strict=True)
            return [
                _Asked(tokens=tokens, answers=(key,), depths=(depths[depth],), positions=(position,))
                for tokens, key, position in rows
            ]
        made = (
            ruler.build_ruler_prompt(
                task,
                length,
                depth,
                depths=depths,
                seed=settings.seed,
                sample=sample,
                tokenizer=tokenizer,
                essay=essay,
            )
            for sample in samples
        )
        return [_Asked(tokens=p.tokens, answers=p.answers, depths=p.depths, positions=p.positions) for p in made]

    def run(task: str, length: int, depth: int, samples: range) -> list[Record]:
        asked = prompts(task, length, depth, samples)
        said = _answer(model, task, asked, settings, tokenizer)
        records: list[Record] = []
        for sample, prompt, text in zip(samples, asked, said, strict=True):
            right = _score(task, text, prompt.answers)
            places = zip(prompt.depths, prompt.positions, right, strict=True)
            records.append(
                {
                    **{"task": task, "length": length, "depth": depths[depth], "sample": sample},
                    **{"answers": list(prompt.answers), "said": text, "score": sum(right) / len(right)},
                    "needles": [{"depth": d, "position": p, "right": ok} for d, p, ok in places],
                }
            )
        return records

    for task in settings.tasks:
        _check_answers(task, prompts(task, min(settings.lengths), 0, range(1))[0], tokenizer)
    units: list[EvalUnit] = []
    for task in settings.tasks:
        for length in settings.lengths:
            for depth in range(settings.depths):
                for start in range(0, settings.num_samples, settings.batch_size):
                    samples = range(start, min(start + settings.batch_size, settings.num_samples))
                    name = f"{task}, length {length}, depth {depth}, samples {samples.start}..{samples.stop - 1}"
                    units.append(
                        EvalUnit(
                            key=f"{name}, haystack {digest}",
                            run=functools.partial(run, task, length, depth, samples),
                            tokens=length * len(samples),
                        )
                    )
    return units


def _haystacks(settings: RecallSettings, tokenizer: Tokenizer) -> tuple[needle.Haystack, SentenceSource, str]:
    """Return filler for passkeys and for RULER, and a digest of the text that it comes from."""
    if settings.haystack is None:
        return needle.filler_haystack(tokenizer), fresh_sentences(made_up_sentences, tokenizer), "made up"
    text = read_haystack(Path(settings.haystack), tokenizer)
    sentences = running_text(split_sentences(text), tokenizer)
    digest = xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))
    return lambda rng, num_tokens: sentences(rng, num_tokens)[0], sentences, digest


def _answer(
    model: RecurrentLM, task: str, asked: Sequence[_Asked], settings: RecallSettings, tokenizer: Tokenizer
) -> list[str]:
    # One token for a space and one for each digit is the most that any tokenizer needs for a passkey.
    num_tokens = needle.NUM_DIGITS + 1 if task == PASSKEY else settings.max_new_tokens

    ends: dict[int, int] = {}
    contexts = [text_window(tokenizer, prompt.tokens.tolist()) for prompt in asked]

    def text(row: int, produced: list[int]) -> str:
        return continuation_text(tokenizer, contexts[row], produced)

    def enough(row: int, produced: list[int]) -> bool:
        done = produced[-1] in tokenizer.end_tokens or (
            task != PASSKEY and all(ruler.score_answer(text(row, produced), asked[row].answers))
        )
        if done:
            ends[row] = len(produced)
        return done

    ids = torch.as_tensor(np.stack([prompt.tokens for prompt in asked]), device=device_of(model))
    with evaluating(model):
        produced = decode_greedily(model, ids, num_tokens, segment_length=settings.segment_length, stop=enough)
    # Text that a row produces while others continue is no part of its answer: it would depend on the batch.
    said = [row[: ends.get(i)] for i, row in enumerate(produced.cpu().tolist())]
    return [text(i, _before_end(row, tokenizer)) for i, row in enumerate(said)]


def _before_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in tokenizer.end_tokens), len(ids))]


def _check_answers(task: str, asked: _Asked, tokenizer: Tokenizer) -> None:
    """Raise if no model could be right, because the tokenizer's tokens do not make up the answers."""
    right = tokenizer.encode(f" {' '.join(asked.answers)}").tolist()
    said = continuation_text(tokenizer, asked.tokens.tolist(), right)
    if not all(_score(task, said, asked.answers)):
        raise ConfigError(
            f"{task}: tokenizer {tokenizer.spec!r} turns the answer {asked.answers[0]!r} into {said[:40]!r}; no answer "
            "could be right: give the model's tokenizer, or leave the task out"
        )


def _score(task: str, text: str, answers: Sequence[str]) -> list[bool]:
    if task == PASSKEY:
        return [text.lstrip()[: needle.NUM_DIGITS] == answers[0]]
    return ruler.score_answer(text, answers)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """Accuracies of a task: shares of right answers.

    Attributes:
        overall: All lengths and depths together.
        by_length: Accuracy by length.
        cells: Accuracy by length and depth: each asked needle counts at its own depth.
    """

    overall: Estimate
    by_length: dict[int, Estimate]
    cells: dict[tuple[int, float], Estimate]


def summarise_recall(records: Sequence[Record], settings: RecallSettings) -> dict[str, TaskResult]:
    """Return each task's accuracies, with intervals over prompts."""
    results: dict[str, TaskResult] = {}
    for task in settings.tasks:
        of_task = [record for record in records if record["task"] == task]
        cells: dict[tuple[int, float], Estimate] = {}
        by_length: dict[int, Estimate] = {}
        for length in settings.lengths:
            of_length = [record for record in of_task if record["length"] == length]
            by_length[length] = _mean(of_length, settings)
            for depth in needle.depth_values(settings.depths):
                # A prompt with several asked needles may have none, one or more of them at this depth.
                right = [[n["right"] for n in record["needles"] if n["depth"] == depth] for record in of_length]
                right = [row for row in right if row]
                cells[length, depth] = bootstrap(
                    [sum(row) / len(row) for row in right], weights=[len(row) for row in right], seed=settings.seed
                )
        results[task] = TaskResult(overall=_mean(of_task, settings), by_length=by_length, cells=cells)
    return results


def _mean(records: Sequence[Record], settings: RecallSettings) -> Estimate:
    return bootstrap([record["score"] for record in records], seed=settings.seed)


def write_recall(
    records: Sequence[Record],
    directory: Path,
    settings: RecallSettings,
    *,
    model: Mapping[str, Any],
    timing: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``recall.json``, ``recall.jsonl`` and a heat map ``recall_TASK.png`` for each task."""
    results = summarise_recall(records, settings)
    lengths, depths = sorted(settings.lengths), needle.depth_values(settings.depths)
    plots = {
        f"recall_{task}.png": plot_heat_map(
            np.array([[result.cells[length, depth].mean for length in lengths] for depth in depths]),
            columns=[length_name(length) for length in lengths],
            rows=[f"{100 * depth:.0f} %" for depth in depths],
            title=task,
            x_label="context length (tokens)",
            y_label="depth of the needle",
        )
        for task, result in results.items()
    }
    summary = {
        "model": model,
        "tasks": {
            task: {
                "overall": result.overall.to_dict(),
                "by_length": {str(length): estimate.to_dict() for length, estimate in result.by_length.items()},
                "cells": [{"length": n, "depth": d, **e.to_dict()} for (n, d), e in result.cells.items()],
            }
            for task, result in results.items()
        },
        "overall": _mean(records, settings).to_dict(),
        "settings": dataclasses.asdict(settings),
        "timing": timing or {},
    }
    return write_results(directory, "recall", summary, records, plots)


def length_name(length: int) -> str:
    """Return ``4K`` for 4096, and the number itself where it is no multiple of 1024."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)

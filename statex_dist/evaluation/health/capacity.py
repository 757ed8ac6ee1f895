"""The ``capacity`` suite: the longest context from which a model recalls a passkey.

A ladder of lengths, each with prompts at several depths; a length *passes* where at least 95 % of the answers are right
("Stuffed Mamba", arXiv 2410.07145, section 5). The capacity is the longest length that passes. Recall need not fall
with the length: the whole ladder is reported, and whether a shorter length fails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation import needle
from statex_dist.evaluation.health.plots import plot_ladder
from statex_dist.evaluation.journal import EvalUnit, Record
from statex_dist.evaluation.needle import read_haystack
from statex_dist.evaluation.report import bootstrap, check_different, check_reading, write_results
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH
from statex_dist.models.lm import RecurrentLM

DEFAULT_LENGTHS = tuple(256 << i for i in range(7))


@dataclass(frozen=True, kw_only=True, slots=True)
class CapacitySettings:
    """Settings of the ``capacity`` suite.

    Attributes:
        lengths: Tokens of a prompt: the steps of the ladder.
        depths: Depths of the passkey at each length.
        num_samples: Prompts for each length and depth.
        threshold: Share of right answers at which a length passes.
        haystack: A text file; None for made-up sentences.
        batch_size: Prompts per forward pass.
        segment_length: Tokens per forward pass.
        seed: Seed of the prompts and of the intervals.
    """

    lengths: tuple[int, ...] = DEFAULT_LENGTHS
    depths: int = 5
    num_samples: int = 20
    threshold: float = 0.95
    haystack: str | None = None
    batch_size: int = 32
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        check_reading(self, "depths", "num_samples")
        check_different("lengths", self.lengths)
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold must be a share above 0 and at most 1, not {self.threshold}")


def capacity_units(model: RecurrentLM, settings: CapacitySettings, tokenizer: Tokenizer) -> list[EvalUnit]:
    """Return the suite's work: a unit for each batch of prompts of a length and depth, with a digest of the haystack.

    Raises:
        ConfigError: A length is too short for a haystack, or the tokenizer cannot write digits.
        DataError: The haystack cannot be read.
    """
    needle.check_digits(tokenizer)
    shortest = needle.min_length(tokenizer)
    if min(settings.lengths) <= shortest:
        raise ConfigError(
            f"capacity: length {min(settings.lengths)} leaves no room for a haystack; the prompt alone takes "
            f"{shortest} tokens: set --lengths above that"
        )
    haystack, digest = None, "made up"
    if settings.haystack is not None:
        haystack = needle.file_haystack(Path(settings.haystack), tokenizer)
        text = read_haystack(Path(settings.haystack), tokenizer)
        digest = xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))
    units: list[EvalUnit] = []
    for length in sorted(settings.lengths):
        for depth in needle.depth_values(settings.depths):
            for first in range(0, settings.num_samples, settings.batch_size):
                count = min(settings.batch_size, settings.num_samples - first)

                def run(length: int = length, depth: float = depth, first: int = first, count: int = count) -> Any:
                    prompts = needle.build_prompts(
                        length,
                        depth,
                        count,
                        seed=settings.seed,
                        tokenizer=tokenizer,
                        haystack=haystack,
                        first_sample=first,
                    )
                    answers = needle.answer_prompts(
                        model,
                        prompts,
                        tokenizer=tokenizer,
                        batch_size=settings.batch_size,
                        segment_length=settings.segment_length,
                    )
                    return [
                        {"length": length, "depth": depth, "sample": first + i, "key": key, "answer": answer}
                        | {"right": answer == key}
                        for i, (key, answer) in enumerate(zip(prompts.keys, answers, strict=True))
                    ]

                key = f"{length}/{depth:.6f}/{first}, haystack {digest}"
                units.append(EvalUnit(key=key, run=run, tokens=count * length))
    return units


def exact_interval(right: int, total: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a proportion (Clopper and Pearson 1934).

    If every answer is right, a bootstrap interval has no width: it does not account for prompts that were not drawn.
    The exact interval has a width in this case too.
    """

    def tail(p: float, first: int, end: int) -> float:
        # Summed from logarithms: a binomial coefficient of hundreds of samples is beyond a float.
        logs = math.log(p), math.log1p(-p)
        choose = [math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) for i in range(first, end)]
        return math.fsum(
            math.exp(c + i * logs[0] + (total - i) * logs[1]) for i, c in zip(range(first, end), choose, strict=True)
        )

    def solve(first: int, end: int, *, rising: bool) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (tail(middle, first, end) < 0.025) == rising else (low, middle)
        return (low + high) / 2

    lower = 0.0 if right == 0 else solve(right, total + 1, rising=True)
    upper = 1.0 if right == total else solve(0, right + 1, rising=False)
    return lower, upper


def climb(records: Sequence[Record], settings: CapacitySettings) -> list[dict[str, Any]]:
    """Return the ladder, shortest length first: recall with both intervals, by depth, and whether it passes."""
    ladder = []
    for length in sorted(settings.lengths):
        rows = [record for record in records if record["length"] == length]
        right = [record["right"] for record in rows]
        estimate = bootstrap(right, seed=settings.seed)
        low, high = exact_interval(sum(right), len(right))
        depths = sorted({record["depth"] for record in rows})
        by_depth = [(depth, [record["right"] for record in rows if record["depth"] == depth]) for depth in depths]
        ladder.append(
            {
                **{"length": length, **estimate.to_dict(), "exact_low": low, "exact_high": high},
                "passes": estimate.mean >= settings.threshold,
                "by_depth": [{"depth": depth, "accuracy": sum(values) / len(values)} for depth, values in by_depth],
            }
        )
    return ladder


def capacity_of(ladder: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, Any]:
    """Return the capacity that a ladder shows.

    ``tokens`` is the longest length that passes. ``low`` is the longest length whose exact interval lies completely at
    or above the threshold: the samples *prove* this length. ``high`` is the longest length whose interval reaches the
    threshold. Each is None if there is no such length. ``at_least``: the longest length of the ladder passes, so the
    capacity may be larger. ``monotone``: no length below ``tokens`` fails. ``next_failing``: the shortest length above
    ``tokens`` that fails.
    """

    def longest(wanted: Any) -> int | None:
        return max((rung["length"] for rung in ladder if wanted(rung)), default=None)

    tokens = longest(lambda rung: rung["passes"])
    failing = [rung["length"] for rung in ladder if not rung["passes"]]
    return {
        "tokens": tokens,
        "low": longest(lambda rung: rung["exact_low"] >= threshold),
        "high": longest(lambda rung: rung["exact_high"] >= threshold),
        "at_least": tokens is not None and tokens == max(rung["length"] for rung in ladder),
        "monotone": tokens is None or all(length > tokens for length in failing),
        "next_failing": min((length for length in failing if tokens is None or length > tokens), default=None),
    }


def write_capacity(
    records: Sequence[Record],
    directory: Path,
    settings: CapacitySettings,
    *,
    model: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> list[Path]:
    """Write ``capacity.json``, ``capacity.jsonl`` (a prompt a line) and ``capacity.png``."""
    ladder = climb(records, settings)
    summary = {
        "model": dict(model),
        "settings": {**dataclasses.asdict(settings), "lengths": list(settings.lengths)},
        "timing": dict(timing),
        "ladder": ladder,
        "capacity": capacity_of(ladder, settings.threshold),
    }
    plots = {"capacity.png": plot_ladder(ladder, settings.threshold)}
    return write_results(directory, "capacity", summary, records, plots)

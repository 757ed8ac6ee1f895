"""The figures of a model card's evaluation, read from the result files of ``statex eval``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import DataError, reason, shown

RESULT_VERSION = 2
"""Version of the result files that this release reads (``statex_dist.evaluation.report`` writes it)."""

_Figure = tuple[str, str]
"""A name and a value as people read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """What one suite found.

    Attributes:
        suite: Its name.
        data: What it was measured on, as far as the file says so.
        figures: Names and values.
    """

    suite: str
    data: str | None
    figures: Sequence[_Figure]


def read_evaluations(directories: Sequence[str | Path], *, state_numbers: int) -> list[Evaluated]:
    """Read the results of ``statex eval``.

    Args:
        directories: Each holds the result files of one or more suites.
        state_numbers: State numbers of the model that the card is of.

    Raises:
        DataError: A directory is missing or has no results, a file is damaged or of another release, or the model that
            was evaluated has a state of another size.
    """
    evaluated = []
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise DataError(
                f"--evaluation {directory}: no such directory; give one that `statex eval` wrote (its --out)"
            )
        paths = [directory / f"{suite}.json" for suite in _READERS]
        found = [_read(path, state_numbers) for path in paths if path.is_file()]
        if not found:
            names = ", ".join(path.name for path in paths)
            raise DataError(f"--evaluation {directory} holds no results of `statex eval`; looked for {names}")
        evaluated += found
    return evaluated


def _read(path: Path, state_numbers: int) -> Evaluated:
    try:
        summary = read_json(path)
        if summary["version"] != RESULT_VERSION:
            raise DataError(
                f"{path} has version {shown(summary['version'])}, this release reads {RESULT_VERSION}; evaluate again"
            )
        if (evaluated := summary["model"]["state_numbers"]) != state_numbers:
            raise DataError(
                f"{path} is of another model: its state has {evaluated:,} numbers, this model's has {state_numbers:,}"
            )
        data = summary.get("data")
        return Evaluated(
            suite=path.stem,
            data=Path(data).name if isinstance(data, str) else None,
            figures=list(_READERS[path.stem](summary)),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is not what `statex eval` of this release writes ({reason(error)}); evaluate again or leave it out"
        ) from None


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.4g}"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return _number(value) if low is None or high is None else f"{_number(value)} ({_number(low)} .. {_number(high)})"


def _accuracy(entry: Mapping[str, Any]) -> str:
    return _interval(entry["accuracy"], entry["low"], entry["high"])


def _recall(summary: Mapping[str, Any]) -> Iterator[_Figure]:
    for task, found in summary["tasks"].items():
        yield f"{task}: accuracy, all lengths", _accuracy(found["overall"])
        for length, entry in found["by_length"].items():
            yield f"{task}: accuracy, {int(length):,} tokens", _accuracy(entry)


def _mqar(summary: Mapping[str, Any]) -> Iterator[_Figure]:
    for pairs, entry in summary["by_num_pairs"].items():
        yield f"accuracy, {pairs} pairs", _accuracy(entry)


def _icl(summary: Mapping[str, Any]) -> Iterator[_Figure]:
    for shots, entry in summary["by_shots"].items():
        yield f"accuracy, {shots} shots", _accuracy(entry)
    yield "accuracy by chance", _number(summary["chance"])


def _perplexity(summary: Mapping[str, Any]) -> Iterator[_Figure]:
    yield "perplexity", _number(summary["perplexity"])
    yield "loss (nats per token)", _interval(summary["loss"], summary["loss_low"], summary["loss_high"])
    if summary["bits_per_byte"] is not None:
        yield "bits per byte", _number(summary["bits_per_byte"])
    yield "target tokens", _number(summary["tokens"])


def _collapse(summary: Mapping[str, Any]) -> Iterator[_Figure]:
    verdict = summary["verdict"]
    position = verdict["position"]
    seen = "at an unknown position" if position is None else f"at {position:,} tokens"
    yield "state collapse", seen if verdict["collapsed"] else "none seen"
    yield "heads that collapse", f"{verdict['heads_collapsed']} of {verdict['heads']}"


def _capacity(summary: Mapping[str, Any]) -> Iterator[_Figure]:
    found = summary["capacity"]
    tokens = found["tokens"]
    told = "below the shortest tried" if tokens is None else f"{'at least ' * found['at_least']}{tokens:,}"
    yield f"tokens with {summary['settings']['threshold']:.0%} recall of a passkey", told


def _lm_eval(summary: Mapping[str, Any]) -> Iterator[_Figure]:
    for found in summary["figures"]:
        filtered = "" if found["filter"] == "none" else f" ({found['filter']})"
        yield f"{found['task']}: {found['metric']}{filtered}", _interval(found["value"], found["low"], found["high"])


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[_Figure]]] = {
    "recall": _recall,
    "mqar": _mqar,
    "icl": _icl,
    "perplexity": _perplexity,
    "collapse": _collapse,
    "capacity": _capacity,
    "lm-eval": _lm_eval,
}

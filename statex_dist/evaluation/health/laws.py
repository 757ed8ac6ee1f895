"""Fits of both laws of state size (:mod:`statex_dist.state.laws`) to the results of ``collapse`` and ``capacity``.

A *forget threshold* needs models of one state size that were trained at several lengths: it is the shortest length from
which on none collapses, and lies above the longest at which one does. A size whose models all collapse, or none, only
bounds it, and is not fitted. A *capacity* is the longest that any model of a size reaches; one that ends at the top of
its ladder only bounds it.

A law is one of one family, and of one way to measure: results that differ in either are refused, not mixed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from statex_dist.checkpoint.json_file import read_json
from statex_dist.errors import ConfigError, DataError, reason
from statex_dist.evaluation.health.plots import plot_laws
from statex_dist.evaluation.report import RESULT_VERSION, write_results
from statex_dist.state.laws import MILLION, THOUSAND_TOKENS, Law, fit_exponential, fit_line

Judge = Literal["model", "heads"]
JUDGES = ("model", "heads")

_OF_MODEL: dict[str, tuple[type, ...]] = {
    "model.directory": (str,),
    "model.model_type": (str,),
    "model.state_numbers": (int,),
}
_NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "collapse": {
        **_OF_MODEL,
        "settings.train_length": (int,),
        "settings.length": (int,),
        "settings.prompts": (list,),
        "settings.loss_rise": (int, float),
        "settings.variance_factor": (int, float),
        "settings.sustained": (int, float),
        "verdict.collapsed": (bool,),
        "verdict.heads_collapsed": (int,),
    },
    "capacity": {
        **_OF_MODEL,
        "settings.threshold": (int, float),
        "settings.haystack": (str, type(None)),
        "capacity.tokens": (int, type(None)),
        "capacity.at_least": (bool,),
    },
}
"""Keys that are read from a result, by suite, with their types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The measured length of one state size.

    Attributes:
        state_numbers: State elements of the model.
        tokens: The length; None where the results only bound it.
        low: Lower bound of the length, or None.
        used: Whether the fit uses the point.
        why: Why the fit does not use it; empty if it does.
        models: Directories of the models.
    """

    state_numbers: int
    tokens: int | None
    low: int | None
    used: bool
    why: str
    models: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Laws:
    """Both fits; a law is None where it was refused, and then it says why.

    ``model_type`` is the family of all models, ``criteria`` by suite how all of them were measured.
    """

    model_type: str | None
    criteria: dict[str, dict[str, Any]]
    forget: Law | None
    forget_refused: str | None
    forget_points: tuple[Point, ...]
    recall: Law | None
    recall_refused: str | None
    recall_points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the form of ``laws.json``."""
        return {
            "model_type": self.model_type,
            "criteria": self.criteria,
            "units": {"state": "million numbers", "length": f"thousand ({THOUSAND_TOKENS}) tokens"},
            "forget": None if self.forget is None else self.forget.to_dict(),
            "forget_refused": self.forget_refused,
            "recall": None if self.recall is None else self.recall.to_dict(),
            "recall_refused": self.recall_refused,
            "forget_points": [asdict(point) for point in self.forget_points],
            "recall_points": [asdict(point) for point in self.recall_points],
        }


def find_results(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the summaries of ``collapse`` and ``capacity`` below directories, of models without a mitigation.

    Each with its path as ``file``: results of one model differ in that alone.

    Raises:
        ConfigError: A directory is missing, or nothing is below them.
        DataError: A summary is damaged or of another version.
    """
    found: dict[Path, dict[str, Any]] = {}
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory; give directories that `statex eval` wrote results into")
        for suite in ("collapse", "capacity"):
            for path in sorted(directory.rglob(f"{suite}.json")):
                found[path.resolve()] = _read(path, suite)
    if not found:
        names = ", ".join(map(str, directories))
        raise ConfigError(f"no collapse.json or capacity.json below {names}; run `statex eval collapse` or `capacity`")
    # A mitigation changes the behaviour of a state of a given size: such results belong to another law.
    return [summary for summary in found.values() if summary["model"].get("mitigation") is None]


def _read(path: Path, suite: str) -> dict[str, Any]:
    try:
        summary = read_json(path)
        if summary["suite"] != suite or summary["version"] != RESULT_VERSION:
            raise ValueError(f"suite {summary['suite']!r}, version {summary['version']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a result of `statex eval {suite}`: {reason(error)}; run it again") from None
    for name, kinds in _NEEDED[suite].items():
        section, key = name.split(".")
        values = summary.get(section)
        if not isinstance(values, dict) or key not in values:
            raise DataError(f"{path} is not a result of `statex eval {suite}`: it has no {name}; run it again")
        value = values[key]
        # JSON's true is an int in Python, and no number.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise DataError(f"{path} is not a result of `statex eval {suite}`: {name} is {value!r}; run it again")
    for name in ("model.state_numbers", "settings.train_length"):
        section, key = name.split(".")
        if summary[section].get(key, 1) < 1:
            raise DataError(f"{path} is not a result of `statex eval {suite}`: {name} is below 1; run it again")
    return {**summary, "file": str(path)}


def shared_criteria(
    summaries: Sequence[Mapping[str, Any]], judge: Judge = "model"
) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """Return the family of all results, and by suite the settings of the measurement.

    Settings that do not change a verdict may differ: seeds, the number of positions, a ladder's lengths.

    Raises:
        ConfigError: Results differ in the family or a setting. The message names it, with one file of each kind.
    """
    criteria: dict[str, dict[str, Any]] = {}
    for suite in ("collapse", "capacity"):
        rows = [summary for summary in summaries if summary["suite"] == suite]
        for row in rows:
            for name, value in _criteria(row, judge).items():
                known = criteria.setdefault(suite, {}).setdefault(name, value)
                if known != value:
                    _refuse(f"{suite} results", name, (rows[0], known), (row, value))
    family: tuple[Mapping[str, Any], str] | None = None
    for row in summaries:
        found = row["model"]["model_type"]
        family = family or (row, found)
        if family[1] != found:
            _refuse("results", "model_type", family, (row, found))
    return None if family is None else family[1], criteria


def _criteria(summary: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    settings = summary["settings"]
    if summary["suite"] == "capacity":
        return {name: settings[name] for name in ("threshold", "haystack")}
    threshold = {"model": "loss_rise", "heads": "variance_factor"}[judge]
    return {
        threshold: settings[threshold],
        "sustained": settings["sustained"],
        "prompts": sorted(map(str, settings["prompts"])),
        "length / train_length": round(settings["length"] / settings["train_length"], 3),
    }


def _refuse(what: str, name: str, *found: tuple[Mapping[str, Any], Any]) -> NoReturn:
    kinds = ", ".join(f"{json.dumps(value)} ({row['file']})" for row, value in found)
    raise ConfigError(
        f"{what} differ in {name}: {kinds}; a law is one of one family, measured in one way: give results that agree"
    )


def forget_points(summaries: Sequence[Mapping[str, Any]], judge: Judge = "model") -> list[Point]:
    """Return what results of ``collapse`` say of the forget threshold, by state size.

    Args:
        summaries: Of any suite; others are left out.
        judge: Whether a model collapses by its loss, or as soon as one head does.
    """
    by_size: dict[int, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    models: dict[int, list[str]] = defaultdict(list)
    for summary in summaries:
        if summary["suite"] != "collapse":
            continue
        size, verdict = summary["model"]["state_numbers"], summary["verdict"]
        fallen = verdict["collapsed"] if judge == "model" else verdict["heads_collapsed"] > 0
        by_size[size][summary["settings"]["train_length"]].append(fallen)
        models[size].append(summary["model"]["directory"])
    points = []
    for size, lengths in sorted(by_size.items()):
        # Of several models with one size and length (seeds) the majority decides, collapse at a tie.
        fallen_at = [length for length, verdicts in sorted(lengths.items()) if 2 * sum(verdicts) >= len(verdicts)]
        last = max(fallen_at, default=0)
        healthy = [length for length in sorted(lengths) if length > last]
        why = ""
        if not healthy:
            why = f"above {last:,} tokens: the longest training length collapses too"
        elif not fallen_at:
            why = f"at most {healthy[0]:,} tokens: no training length collapses"
        points.append(
            Point(
                state_numbers=size,
                tokens=None if why else healthy[0],
                low=last or None,
                used=not why,
                why=why,
                models=tuple(sorted(set(models[size]))),
            )
        )
    return points


def recall_points(summaries: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return what results of ``capacity`` say of the recall law, by state size; others are left out."""
    by_size: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for summary in summaries:
        if summary["suite"] == "capacity":
            by_size[summary["model"]["state_numbers"]].append(summary)
    points = []
    for size, rows in sorted(by_size.items()):
        reached = [row["capacity"]["tokens"] for row in rows if row["capacity"]["tokens"] is not None]
        best = max(reached, default=None)
        why = ""
        if best is None:
            why = "no length passes"
        elif any(row["capacity"]["at_least"] and row["capacity"]["tokens"] == best for row in rows):
            why = f"at least {best:,} tokens: the longest length asked passes"
        models = tuple(sorted({row["model"]["directory"] for row in rows}))
        point = Point(state_numbers=size, tokens=best, low=None, used=not why, why=why, models=models)
        points.append(replace(point, tokens=None, low=best) if why else point)
    return points


def fit_laws(summaries: Sequence[Mapping[str, Any]], judge: Judge = "model") -> Laws:
    """Fit both laws to the results that there are; each may be refused by itself.

    Raises:
        ConfigError: The results are of different families, or were measured in different ways.
    """
    model_type, criteria = shared_criteria(summaries, judge)
    forget, recall = forget_points(summaries, judge), recall_points(summaries)
    forget_law, forget_refused = _fit(fit_line, forget, model_type)
    recall_law, recall_refused = _fit(fit_exponential, recall, model_type)
    return Laws(
        model_type=model_type,
        criteria=criteria,
        forget=forget_law,
        forget_refused=forget_refused,
        forget_points=tuple(forget),
        recall=recall_law,
        recall_refused=recall_refused,
        recall_points=tuple(recall),
    )


def _fit(
    fit: Callable[[Sequence[float], Sequence[float]], Law], points: Sequence[Point], model_type: str | None
) -> tuple[Law | None, str | None]:
    used = [(p.state_numbers / MILLION, p.tokens / THOUSAND_TOKENS) for p in points if p.used and p.tokens is not None]
    try:
        return replace(fit([x for x, _ in used], [y for _, y in used]), model_type=model_type), None
    except ConfigError as error:
        return None, str(error)


def write_laws(laws: Laws, directory: Path, *, judge: Judge = "model") -> list[Path]:
    """Write ``laws.json``, ``laws.jsonl`` (a state size a line) and ``laws.png``."""
    summary = {"settings": {"judge": judge}, **laws.to_dict()}
    rows = [
        {"law": law, **asdict(point)}
        for law, points in (("forget", laws.forget_points), ("recall", laws.recall_points))
        for point in points
    ]
    plots = {
        "laws.png": plot_laws(
            {
                "forget threshold": (laws.forget, laws.forget_points),
                "recall capacity": (laws.recall, laws.recall_points),
            }
        )
    }
    return write_results(directory, "laws", summary, rows, plots)

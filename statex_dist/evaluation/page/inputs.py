"""What ``statex report`` finds in the directories that it is given: training runs, results of suites, expansions.

A directory may be any of these or hold several of them, a few levels deep. Checkpoints of a run are not walked through;
of the newest one the plan is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, CONFIG_NAME, MODEL_DIR, complete_tags
from statex_dist.errors import DataError, reason
from statex_dist.evaluation.page.runs import TrainingRun, distinct_names, read_json, read_runs
from statex_dist.evaluation.report import RESULT_VERSION
from statex_dist.evaluation.suites.base import Result
from statex_dist.evaluation.suites.registry import find_suite, suite_names
from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import config_from_dict
from statex_dist.train.metrics import METRICS_NAME

DEPTH = 3
"""Levels below a directory that are searched."""

EXPANSION_REPORT = "expansion_report.json"

_MOST_DIRECTORIES = 5000
_TELLS_LITTLE = (MODEL_DIR, "checkpoint", "final", "latest")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpandedModel:
    """An expanded model.

    Attributes:
        name: What to call it.
        config: Its configuration with the plan.
        parameters: Elements of all tensors before and after, where an account of the expansion says so.
    """

    name: str
    config: ModelConfig
    parameters: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Everything that was found.

    Attributes:
        runs: Training runs.
        results: Results, by suite in the order of the registry.
        models: Names of the evaluated models, as they were found.
        expansions: Expanded models.
        notes: What was left out, and why.
    """

    runs: Sequence[TrainingRun]
    results: Sequence[Result]
    models: Sequence[str]
    expansions: Sequence[ExpandedModel]
    notes: Sequence[str]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the contents of a result file into one line about it.

    Raises:
        DataError: A figure is missing or of another kind than this release writes.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} does not hold what this release writes ({reason(error)}); evaluate again, or leave it out"
        ) from None


def read_inputs(directories: Sequence[Path]) -> Inputs:
    """Read all that the directories hold.

    Raises:
        DataError: A directory is missing, given twice or holds nothing to report, or a file is damaged.
    """
    resolved = [directory.resolve() for directory in directories]
    if len(set(resolved)) != len(resolved):
        raise DataError(f"a run is given twice: {', '.join(map(str, directories))}")
    runs: dict[Path, Path] = {}
    results: dict[Path, tuple[str, dict[str, Any]]] = {}
    expanded: dict[Path, Path] = {}
    notes: list[str] = []
    for directory in directories:
        if not directory.is_dir():
            raise DataError(f"run directory not found: {directory}")
        before = (len(runs), len(results), len(expanded), len(notes))
        places = list(_walk(directory, DEPTH))
        for place in places:
            if (place / METRICS_NAME).is_file():
                if place == directory or _has_record(place):
                    runs.setdefault(place.resolve(), place)
                else:
                    notes.append(f"{place} is a training run that has not finished a step")
            for suite in suite_names():
                path = place / f"{suite}.json"
                if not path.is_file() or (summary := read_json(path)).get("suite") != suite:
                    continue
                if why := _unreadable(summary):
                    if place == directory:
                        raise DataError(f"{path} {why}; evaluate again")
                    notes.append(f"{path} {why}")
                else:
                    results.setdefault(path, (suite, summary))
            if (place / CONFIG_NAME).is_file() and read_json(place / CONFIG_NAME).get("statex"):
                expanded.setdefault(place.resolve(), place)
        if before == (len(runs), len(results), len(expanded), len(notes)):
            raise DataError(
                f"{directory} holds no {METRICS_NAME}: not the directory of a training run; and, up to {DEPTH} levels "
                f"below it, no results of `statex eval` and no expanded model"
            )
    found, named = read_runs(list(runs.values())), _named(results)
    return Inputs(
        runs=found,
        results=sorted(named, key=lambda result: suite_names().index(result.suite)),
        models=list(dict.fromkeys(result.model for result in named if find_suite(result.suite).of_model)),
        expansions=[*_of_models(list(expanded.values())), *_of_runs(found)],
        notes=notes,
    )


def _has_record(directory: Path) -> bool:
    with (directory / METRICS_NAME).open("rb") as file:
        return file.readline().endswith(b"\n")


def _walk(directory: Path, depth: int, seen: list[Path] | None = None) -> Iterator[Path]:
    """Yield a directory and those below it, in the order of their names."""
    seen = [] if seen is None else seen
    seen.append(directory)
    if len(seen) > _MOST_DIRECTORIES:
        raise DataError(f"{seen[0]} holds more than {_MOST_DIRECTORIES} directories; name those to be reported")
    yield directory
    if depth == 0:
        return
    is_run = (directory / METRICS_NAME).is_file()
    for child in sorted(directory.iterdir()):
        hidden = child.name.startswith(".") or child.name.endswith(".unfinished")
        if not hidden and child.is_dir() and not child.is_symlink() and not (is_run and child.name == CHECKPOINTS_DIR):
            yield from _walk(child, depth - 1, seen)


def _unreadable(summary: Mapping[str, Any]) -> str | None:
    """Return why this release cannot read a summary, or None."""
    if summary.get("version") != RESULT_VERSION:
        return f"has version {summary.get('version')!r}, this release reads {RESULT_VERSION}"
    if find_suite(summary["suite"]).of_model and not isinstance(summary.get("model"), dict):
        return "does not say which model it is of"
    return None


def _named(found: Mapping[Path, tuple[str, dict[str, Any]]]) -> list[Result]:
    """Give each model a name, and two results of one suite and model the names of their directories besides."""
    keys = {path: _model_key(summary) for path, (_, summary) in found.items()}
    # A model evaluated under another spelling of its path is the same one: it is called as it was first.
    directories: dict[str, Path] = {}
    for path, (_, summary) in found.items():
        directories.setdefault(keys[path][0], Path((summary.get("model") or {}).get("directory", "")))
    short = dict(zip(directories, distinct_names(list(directories.values()), tells_little=_TELLS_LITTLE), strict=True))
    names = {}
    for fingerprint, mitigation in keys.values():
        # A directory whose weights were replaced holds two models.
        twice = sum(name == short[fingerprint] for name in short.values()) > 1
        name = short[fingerprint] + (f" {fingerprint[:6]}" if twice else "")
        names[fingerprint, mitigation] = name + (f" with {mitigation}" if mitigation else "")
    places = dict(zip(found, distinct_names([path.parent for path in found]), strict=True))
    results = []
    for path, (suite, summary) in found.items():
        alike = [other for other in found if found[other][0] == suite and keys[other] == keys[path]]
        name = names[keys[path]] + (f" ({places[path]})" if len(alike) > 1 else "")
        results.append(Result(suite=suite, model=name, path=path, summary=summary))
    return results


def _model_key(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return what tells a model from another: its fingerprint and its mitigation, not the spelling of its path."""
    model = summary.get("model") or {}
    return str(model.get("fingerprint") or model.get("directory", "")), str(model.get("mitigation") or "")


def _of_models(directories: Sequence[Path]) -> Iterator[ExpandedModel]:
    names = distinct_names([directory.resolve() for directory in directories], tells_little=_TELLS_LITTLE)
    for name, directory in zip(names, directories, strict=True):
        account = read_json(directory / EXPANSION_REPORT)
        with reading(directory / EXPANSION_REPORT):
            counts = (int(account["parameters_before"]), int(account["parameters_after"])) if account else None
        yield ExpandedModel(name=name, config=config_from_dict(read_json(directory / CONFIG_NAME)), parameters=counts)


def _of_runs(runs: Sequence[TrainingRun]) -> Iterator[ExpandedModel]:
    for run in runs:
        checkpoints = run.directory / CHECKPOINTS_DIR
        for tag in complete_tags(checkpoints)[:1]:
            values = read_json(checkpoints / tag / MODEL_DIR / CONFIG_NAME)
            if values.get("statex") and values.get("model_type"):
                yield ExpandedModel(name=run.name, config=config_from_dict(values), parameters=None)

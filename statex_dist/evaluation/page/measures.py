"""What the results of suites say in figures: one by one, with their intervals and as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from statex_dist.evaluation.page.figures import short_number
from statex_dist.evaluation.page.inputs import Result, reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A figure of a result.

    Attributes:
        name: What it is.
        value: The figure; None where it is not finite, or only words tell it.
        low: Lower end of its 95 % interval; None for none.
        high: Upper end.
        samples: Samples that it is made of.
        words: What is shown in place of the value.
        headline: Whether it stands in the page's first table.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    samples: int | None = None
    words: str | None = None
    headline: bool = False

    @property
    def text(self) -> str:
        """The figure as people read it."""
        if self.words is not None:
            return self.words
        if self.value is None:
            return "not finite"
        if self.low is not None and self.high is not None:
            return f"{number(self.value)} ({number(self.low)} .. {number(self.high)})"
        return number(self.value) + (" (1 sample)" if self.samples == 1 else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the figure, JSON-able."""
        return {key: value for key, value in asdict(self).items() if key != "headline"}


def number(value: float) -> str:
    """Return a number as people read it."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.4g}"


def estimate_of(name: str, e: Mapping[str, Any], *, key: str = "accuracy", headline: bool = False) -> Measured:
    """Return an estimate of a summary, its value under ``key``."""
    return Measured(name=name, value=e[key], low=e["low"], high=e["high"], samples=e.get("samples"), headline=headline)


def _recall(summary: Mapping[str, Any]) -> Iterator[Measured]:
    for task, found in summary["tasks"].items():
        yield estimate_of(f"{task}, all lengths", found["overall"], headline=True)
        for length, estimate in found["by_length"].items():
            yield estimate_of(f"{task}, {short_number(int(length))} tokens", estimate)


def _mqar(summary: Mapping[str, Any]) -> Iterator[Measured]:
    last = max(summary["by_num_pairs"], key=int)
    for pairs, e in summary["by_num_pairs"].items():
        yield estimate_of(f"accuracy, {pairs} pairs", e, headline=pairs == last)
    best = max(summary["by_num_pairs"].values(), key=lambda e: e["pairs_recalled"])
    ends = (best["pairs_recalled_low"], best["pairs_recalled_high"])
    yield Measured(
        name="pairs recalled rather than named at random, at most",
        value=best["pairs_recalled"],
        low=ends[0],
        high=ends[1],
        samples=best.get("samples"),
        headline=True,
    )
    capacity = summary["capacity"]
    pairs = capacity["num_pairs"]
    yield Measured(
        name=f"most pairs with {capacity['threshold']:.0%} right",
        value=pairs,
        words="none" if pairs is None else str(pairs),
    )


def _icl(summary: Mapping[str, Any]) -> Iterator[Measured]:
    last = max(summary["by_shots"], key=int)
    for shots, e in summary["by_shots"].items():
        yield estimate_of(f"accuracy, {shots} shots", e, headline=shots == last)
    yield Measured(name="chance", value=summary["chance"])


def _perplexity(summary: Mapping[str, Any]) -> Iterator[Measured]:
    loss, low, high = (summary[key] for key in ("loss", "loss_low", "loss_high"))
    ends = [math.exp(value) if value is not None and value < 700 else None for value in (low, high)]
    documents = summary["documents"]
    yield Measured(
        name="perplexity", value=summary["perplexity"], low=ends[0], high=ends[1], samples=documents, headline=True
    )
    yield Measured(name="loss (nats per token)", value=loss, low=low, high=high, samples=documents)
    if summary["bits_per_byte"] is not None:
        yield Measured(name="bits per byte", value=summary["bits_per_byte"])
    yield Measured(name="target tokens", value=summary["tokens"])
    for bucket in summary["by_position"]:
        yield estimate_of(f"loss at {bucket['start']} .. {bucket['end'] - 1}", bucket, key="loss")


def _collapse(summary: Mapping[str, Any]) -> Iterator[Measured]:
    verdict = summary["verdict"]
    yield position_of("collapse", verdict["collapsed"], verdict["position"], f" ({verdict['prompt']})", headline=True)
    heads = f"{verdict['heads_collapsed']} of {verdict['heads']}"
    yield Measured(name="heads that collapse", value=verdict["heads_collapsed"], words=heads, headline=True)
    for prompt, told in summary["prompts"].items():
        own, ratio = told["verdict"], told["loss"]["ratio"]
        why = f" ({own['why']})" if own["why"] else ""
        yield position_of(f"{prompt}: collapse", own["collapsed"], own["position"], why)
        yield Measured(
            name=f"{prompt}: heads that collapse",
            value=told["heads"]["collapsed"],
            words=f"{told['heads']['collapsed']} of {told['heads']['total']}",
        )
        yield Measured(name=f"{prompt}: loss past the training length, ratio", value=ratio)


def position_of(name: str, collapsed: bool, position: int | None, more: str, *, headline: bool = False) -> Measured:
    """Return where a collapse was seen, with ``more`` to say of one."""
    words = (
        "none seen" if not collapsed else "at an unknown position" if position is None else f"at {position:,} tokens"
    )
    return Measured(name=name, value=position, words=words + (more if collapsed else ""), headline=headline)


def _capacity(summary: Mapping[str, Any]) -> Iterator[Measured]:
    found = summary["capacity"]
    tokens, low, high = found["tokens"], found["low"], found["high"]
    if tokens is None:
        words = "below the shortest tried"
    else:
        words = f"{'at least ' if found['at_least'] else ''}{tokens:,}"
        words += "" if low is None or high is None else f" ({low:,} .. {high:,})"
    name = f"tokens with {summary['settings']['threshold']:.0%} recall"
    yield Measured(name=name, value=tokens, low=low, high=high, words=words, headline=True)
    for step in summary["ladder"]:
        # The interval that is drawn, and that decides what is kept.
        exact = {**step, "low": step["exact_low"], "high": step["exact_high"]}
        yield estimate_of(f"accuracy, {short_number(step['length'])} tokens", exact)


def _laws(summary: Mapping[str, Any]) -> Iterator[Measured]:
    for law in ("forget", "recall"):
        fit = summary[law]
        if fit is None:
            yield Measured(name=f"{law}: fit", value=None, words=summary[f"{law}_refused"] or "not asked for")
            continue
        for name, value in fit["parameters"].items():
            error = fit["errors"][name]
            ends = (None, None) if error is None else (value - error, value + error)
            yield Measured(name=f"{law}: {name}", value=value, low=ends[0], high=ends[1])
        yield Measured(name=f"{law}: R squared", value=fit["r_squared"])


def _lm_eval(summary: Mapping[str, Any]) -> Iterator[Measured]:
    for f in summary["figures"]:
        name = f"{f['task']} {f['metric']}" + ("" if f["filter"] == "none" else f" ({f['filter']})")
        words = None
        if f["value"] is not None and f["low"] is None and f["stderr"] is not None:
            words = f"{number(f['value'])} ± {number(f['stderr'])}"
        yield Measured(name=name, value=f["value"], low=f["low"], high=f["high"], samples=f["samples"], words=words)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Measured]]] = {
    "recall": _recall,
    "mqar": _mqar,
    "icl": _icl,
    "perplexity": _perplexity,
    "collapse": _collapse,
    "capacity": _capacity,
    "laws": _laws,
    "lm-eval": _lm_eval,
}


def measured(result: Result) -> list[Measured]:
    """Return a result's figures.

    Raises:
        DataError: The summary does not hold what this release writes.
    """
    with reading(result.path):
        return list(_READERS[result.suite](result.summary))

"""The ``lm-eval`` suite: tasks of lm-evaluation-harness, answered unit by unit.

The harness's requests are cut into units, so that an evaluation can be interrupted and shared by several processes;
when all are answered the harness makes its figures of them, and we add intervals where a figure is a mean over samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from statex_dist.data.tokenizer import Tokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.journal import EvalUnit, Record
from statex_dist.evaluation.lm_eval_api import Harness, StateXLM
from statex_dist.evaluation.report import Estimate, bootstrap, check_reading, write_results
from statex_dist.inference.prefill import DEFAULT_SEGMENT_LENGTH
from statex_dist.models.lm import RecurrentLM

SUITE = "lm-eval"

_BATCHES_PER_UNIT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LmEvalSettings:
    """Settings of the harness's tasks, and of reading their documents.

    Attributes:
        tasks: Names or patterns of tasks, groups and tags, or paths of task files.
        include_path: A directory with more task files.
        num_fewshot: Examples before a question; None leaves each task its own number.
        limit: Number of documents of each task, or below 1 their share; None for all.
        max_length: Tokens of context that the model may see; None for all there are.
        batch_size: Rows per forward pass.
        segment_length: Most tokens per forward pass.
        bootstrap_iters: Resamples of the harness's standard errors.
        fewshot_seed: Seed of the choice of examples; None for the harness's own.
        seed: Seed of sampled continuations and of our intervals.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    max_length: int | None = None
    batch_size: int = 8
    segment_length: int = DEFAULT_SEGMENT_LENGTH
    bootstrap_iters: int = 100_000
    fewshot_seed: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("no task given; set --tasks to names with commas, such as hellaswag,piqa")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"--include-path {self.include_path}: no such directory; give one with task files (YAML)")
        check_reading(self)
        bounds = {"num_fewshot": 0, "max_length": 2, "bootstrap_iters": 0, "fewshot_seed": 0}
        for name, least in bounds.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be {least} or more, not {value}")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))):
            raise ConfigError(f"limit must be a whole number of documents, or a share below 1, not {self.limit:g}")

    def harness(self) -> Harness:
        """Return the tasks, loaded, with their requests."""
        return Harness(
            self.tasks,
            include_path=self.include_path,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            fewshot_seed=self.fewshot_seed,
        )


def units_of(harness: Harness, settings: LmEvalSettings, model: RecurrentLM, tokenizer: Tokenizer) -> list[EvalUnit]:
    """Return all requests as units of a few batches; those that share a context stand in one unit.

    Args:
        harness: The tasks.
        settings: How to read.
        model: The model, fp32 where the figures are to be compared.
        tokenizer: Its tokenizer.
    """
    lm = StateXLM(
        model,
        tokenizer,
        batch_size=settings.batch_size,
        segment_length=settings.segment_length,
        max_length=settings.max_length,
        seed=settings.seed,
    )

    def unit(kind: str, start: int, numbers: Sequence[int]) -> EvalUnit:
        asked = [harness.requests[kind][i] for i in numbers]

        def run() -> list[Record]:
            answers = getattr(lm, kind)(asked)
            return [{"kind": kind, "request": i, "answer": a} for i, a in zip(numbers, answers, strict=True)]

        tokens = sum(len(lm.tok_encode(text)) for text in {request.args[0] for request in asked})
        return EvalUnit(key=f"{kind}:{start}", run=run, tokens=tokens)

    units = []
    for kind, requests in harness.requests.items():
        contexts = [request.args[0] for request in requests]
        # The longest first: what is too long for the memory fails at once.
        order = [i for *_, i in sorted((-len(context), context, i) for i, context in enumerate(contexts))]
        starts = [i for i, number in enumerate(order) if not i or contexts[number] != contexts[order[i - 1]]]
        starts = [*starts[:: settings.batch_size * _BATCHES_PER_UNIT], len(order)]
        units += [unit(kind, a, order[a:b]) for a, b in itertools.pairwise(starts)]
    return units


def write_lm_eval(
    records: Sequence[Record],
    directory: Path,
    *,
    harness: Harness,
    settings: LmEvalSettings,
    model: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> list[Path]:
    """Let the harness score the answers, and write ``lm-eval.json`` and ``lm-eval.jsonl``."""
    answers: dict[str, list[Any]] = {kind: [None] * len(requests) for kind, requests in harness.requests.items()}
    for record in records:
        answers[record["kind"]][record["request"]] = record["answer"]
    results = harness.score(answers, bootstrap_iters=settings.bootstrap_iters)
    samples = results.pop("samples")
    summary = {
        "model": model,
        "settings": asdict(settings),
        "timing": timing,
        "lm_eval_version": harness.version,
        "seeds": harness.seeds,
        "figures": list(_figures(results, samples, seed=settings.seed)),
        **results,
    }
    rows = ({"task": task, **sample} for task, found in samples.items() for sample in found)
    return write_results(directory, SUITE, summary, rows, {})


def _figures(results: Mapping[str, Any], samples: Mapping[str, Any], *, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the harness's figures, one metric of one task each, with our interval where we can make it."""
    # Depending on its release the harness has its groups among the results as well.
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float | None):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            of_samples = [s[metric] for s in samples.get(task, ()) if s["filter"] == chosen and metric in s]
            interval = _interval(value, metric, of_samples, seed=seed)
            yield {
                "task": task,
                "metric": metric,
                "filter": chosen,
                "value": value,
                "stderr": error if isinstance(error, int | float) else None,
                "low": interval and interval.low,
                "high": interval and interval.high,
                "samples": len(of_samples) or None,
                "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
            }


def _interval(value: float | None, metric: str, of_samples: Sequence[Any], *, seed: int) -> Estimate | None:
    """Return the bootstrap interval of a metric that is a mean of its samples' values, or a function of one.

    How a task puts its samples together may be code of its own. Only where our figure is the harness's is the interval
    that of the same thing.
    """
    if value is None or not of_samples:
        return None
    if all(isinstance(v, bool | int | float) for v in of_samples):
        found = bootstrap(of_samples, seed=seed)
    elif all(isinstance(v, list) and len(v) == 2 and v[1] for v in of_samples):
        # (log-likelihood, number of words or bytes) of each text.
        loss = bootstrap([-v[0] / v[1] for v in of_samples], weights=[v[1] for v in of_samples], seed=seed)

        def told(x: float) -> float:
            return x / math.log(2) if metric == "bits_per_byte" else math.exp(min(x, 700.0))

        found = Estimate(
            mean=told(loss.mean),
            low=None if loss.low is None else told(loss.low),
            high=None if loss.high is None else told(loss.high),
            samples=loss.samples,
        )
    else:
        return None
    return found if math.isclose(found.mean, value, rel_tol=1e-6, abs_tol=1e-12) else None

"""Files of the ``collapse`` suite: the summary, and a line per head and sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from statex_dist.evaluation.health.collapse import STATISTICS, CollapseSettings, finite
from statex_dist.evaluation.health.plots import plot_losses, plot_norms
from statex_dist.evaluation.health.verdict import (
    HeadVerdict,
    Judged,
    LossCurve,
    ModelVerdict,
    collapse_index,
    judge,
    worst_heads,
)
from statex_dist.evaluation.journal import Record
from statex_dist.evaluation.report import RESULT_VERSION, write_results


def write_collapse(
    records: Sequence[Record],
    settings: CollapseSettings,
    directory: Path,
    *,
    model: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> list[Path]:
    """Write ``collapse.json``, ``collapse.jsonl``, ``collapse_loss.png`` and ``collapse_norm.png``.

    Args:
        records: Of the units of :func:`~statex_dist.evaluation.health.collapse.collapse_units`.
        settings: What was asked for.
        directory: An existing directory.
        model: What is known of the model.
        timing: Seconds and ranks.

    Returns:
        The files, the summary first.
    """
    judged = judge(records, settings)
    summary = {
        "version": RESULT_VERSION,
        "suite": "collapse",
        "model": dict(model),
        "settings": {**asdict(settings), "prompts": list(settings.prompts), "length": settings.tokens},
        "timing": dict(timing),
        "positions": settings.positions,
        "verdict": _overall(judged),
        "doubt": settings.doubt,
        "prompts": {prompt: _summary(*parts, settings) for prompt, parts in judged.items()},
    }
    plots = {"collapse_loss.png": plot_losses(judged, settings), "collapse_norm.png": plot_norms(judged, settings)}
    return write_results(directory, "collapse", summary, _rows(judged, settings), plots)


def _overall(judged: Mapping[str, Judged]) -> dict[str, Any]:
    """Return the verdict over all prompts: the model's earliest collapse, heads that collapsed under any."""
    places = [(verdict.position, prompt) for prompt, (_, verdict, _) in judged.items() if verdict.position is not None]
    position, prompt = min(places, default=(None, None))
    heads = {(head.layer, head.head) for verdicts, _, _ in judged.values() for head in verdicts}
    fallen = {(head.layer, head.head) for verdicts, _, _ in judged.values() for head in verdicts if head.collapsed}
    return {
        "collapsed": position is not None,
        "position": position,
        "prompt": prompt,
        "heads_collapsed": len(fallen),
        "heads": len(heads),
    }


def _summary(
    heads: Sequence[HeadVerdict], verdict: ModelVerdict, curve: LossCurve, settings: CollapseSettings
) -> dict[str, Any]:
    positions = settings.positions
    fallen = [head.position for head in heads if head.position is not None]
    starts = [1, *(end + 1 for end in positions)]
    ends = ([None] * len(positions) if values is None else finite(values) for values in (curve.low, curve.high))
    columns = zip(starts, positions, finite(curve.mean), *ends, strict=False)
    return {
        "sequences": len(curve.by_sequence),
        "loss": {
            "by_position": [
                {"start": start, "end": end, "loss": loss, "low": low, "high": high}
                for start, end, loss, low, high in columns
            ],
            "reference": curve.reference,
            "threshold": curve.threshold,
            "ratio": curve.ratio,
        },
        "verdict": asdict(verdict),
        "heads": {"total": len(heads), "collapsed": len(fallen), "position": min(fallen, default=None)},
        "worst_heads": [head.to_dict() for head in worst_heads(heads)],
    }


def _rows(judged: Mapping[str, Judged], settings: CollapseSettings) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for prompt, (heads, _, curve) in judged.items():
        rows.extend(
            {"kind": "head", "prompt": prompt, **head.to_dict()}
            | {name: finite(head.series[name]) for name in STATISTICS}
            for head in heads
        )
        for number, loss in enumerate(curve.by_sequence):
            index, _ = collapse_index(loss, curve.threshold, settings.sustained)
            place = None if index is None else settings.positions[index]
            rows.append(
                {"kind": "sequence", "prompt": prompt, "sequence": number, "loss": finite(loss)}
                | {"collapsed": index is not None, "position": place}
            )
    return rows

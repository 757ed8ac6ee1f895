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
from statex_dist.evaluation.report import write_results


def write_collapse(
    records: Sequence[Record],
    directory: Path,
    settings: CollapseSettings,
    *,
    model: Mapping[str, Any],
    timing: Mapping[str, Any],
    train_length_from: str,
) -> list[Path]:
    """Write ``collapse.json``, ``collapse.jsonl``, ``collapse_loss.png`` and ``collapse_norm.png``."""
    judged = judge(records, settings)
    summary: dict[str, Any] = {
        "model": dict(model),
        "settings": {**asdict(settings), "prompts": list(settings.prompts), "length": settings.tokens},
        "train_length_from": train_length_from,
        "timing": dict(timing),
        "positions": settings.positions,
        "verdict": _overall(judged),
        "doubt": settings.doubt,
        "prompts": {prompt: _summary(*parts, settings) for prompt, parts in judged.items()},
    }
    summary["says"] = conclusion(summary)
    plots = {"collapse_loss.png": plot_losses(judged, settings), "collapse_norm.png": plot_norms(judged, settings)}
    return write_results(directory, "collapse", summary, _rows(judged, settings), plots)


def conclusion(summary: Mapping[str, Any]) -> str:
    """Return in plain sentences what a summary found of the loss and of the states, what it means and what helps.

    The loss decides whether the model is usable, the states whether it may stop being so; newlines count last, as they
    are far from any text.
    """
    prompts: Mapping[str, Any] = summary["prompts"]
    advice = f"{_advice(summary)} (docs/state_health.md)."
    return f"Loss: {_of_loss(prompts, summary['settings']['length'])}. States: {_of_heads(prompts)}. {advice}"


def _of_loss(prompts: Mapping[str, Any], length: int) -> str:
    fallen = {name: told["verdict"] for name, told in prompts.items() if told["verdict"]["collapsed"]}
    parts = [
        f"{'not finite' if verdict['why'] == 'not finite' else 'collapses'} on {name} from {verdict['position']:,} "
        "tokens on"
        for name, verdict in fallen.items()
    ]
    held = [name for name in prompts if name not in fallen]
    if held:
        parts.append(f"no collapse up to {length:,} tokens on {' and '.join(held)}")
    return ", ".join(parts)


def _of_heads(prompts: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for name, told in prompts.items():
        heads = told["heads"]
        first = "" if heads["position"] is None else f" (from {heads['position']:,} tokens on)"
        what = "heads run away on" if not parts else "on"
        parts.append(f"{heads['collapsed']} of {heads['total']} {what} {name}{first}")
    return ", ".join(parts)


def _advice(summary: Mapping[str, Any]) -> str:
    prompts, train_length = summary["prompts"], summary["settings"]["train_length"]
    texts = {name: told for name, told in prompts.items() if name != "newlines"}
    loss = [told["verdict"]["position"] for told in texts.values() if told["verdict"]["collapsed"]]
    states = any(told["heads"]["collapsed"] for told in texts.values())
    if loss and min(loss) <= train_length:
        return (
            f"That begins within the training length of {train_length:,} tokens: check the model, its tokenizer and "
            "the training length before anything else"
        )
    if loss:
        another = "another" if summary["model"].get("mitigation") else "a"
        advice = (
            f"Do not rely on it past {min(loss):,} tokens: train it on longer documents, or with state passing "
            "(train.state_passing)"
        )
        if not states:
            return f"{advice}; no state runs away there, so it may merely be unused to such lengths"
        return f"{advice}; without training, try {another} --mitigation"
    if states:
        return (
            "States leave the range that they had in training, and the loss may follow farther on: read further "
            "(--length), and train on longer documents or with state passing before longer contexts are relied on"
        )
    if any(told["verdict"]["collapsed"] or told["heads"]["collapsed"] for told in prompts.values()):
        if not texts:
            return "The state can run away, but newlines are far from any text: read --prompts text, or --data, too"
        return f"The state can run away, but {' and '.join(texts)} did not make it: nothing to do for texts like these"
    if summary["doubt"] is not None:
        return "Nothing was found, but too little was read to call the heads healthy: give a longer --length"
    return "Nothing to do up to that length; beyond it nothing is known"


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

"""The conclusions of the ``collapse`` suite from its series: for each head, and for the model.

Thresholds are conventions, not laws of nature. All are options, and the result holds the series beside the verdict.

- A **head** has collapsed at the first position past which its state's variance is above ``variance_factor`` times the
  largest that it had within the training length. In training, the head and the layers that read it have not seen such
  a state. The variance of a head that never forgets grows without limit: with the number of tokens if the written
  values vary, with its square if the same values are written again and again.
- The **model** has collapsed at the first position past which its loss is ``loss_rise`` nats above its best within the
  training length: the lowest mean over one of the last three octaves, ``T/8..T/4``, ``T/4..T/2``, ``T/2..T``. Single
  intervals are too noisy for a best.
- *Past which*: at that position and at ``sustained`` (90 %) of all positions from it to the end, three at least. So
  the rule cannot distinguish a collapse in the last two positions from a fluctuation.
- A state or a loss that is NaN or infinite is a collapse at the first position that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from statex_dist.evaluation.health.collapse import (
    LEAST_POSITIONS,
    STATISTICS,
    CollapseSettings,
    finite,
    recurrent_layers,
    series,
)
from statex_dist.evaluation.journal import Record

_RESAMPLES = 2000
_WORST = 10

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadVerdict:
    """One head under one prompt.

    Attributes:
        layer: Index of the layer.
        head: Index of the head within it.
        collapsed: Whether it has collapsed.
        position: Where; None if it has not.
        why: ``variance`` or ``not finite``; None if it has not.
        sc_ratio: Largest variance past the training length over the largest within it; None where that is not finite
            (or 0 within).
        retention: Share of a state that is left after the training length
            (:meth:`~statex_dist.evaluation.health.retention.RetentionProbe.retention`); None where not measured.
        retention_slowest: The same of the row of the state that forgets slowest.
        largest_within: Largest entry within the training length.
        largest_beyond: Largest entry past it; None where that is not finite.
        series: By statistic ``[P]``, the mean over sequences (``largest``: the maximum); NaN where not finite.
    """

    layer: int
    head: int
    collapsed: bool
    position: int | None
    why: str | None
    sc_ratio: float | None
    retention: float | None
    retention_slowest: float | None
    largest_within: float | None
    largest_beyond: float | None
    series: dict[str, Floats]

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict for JSON, without the series."""
        values = asdict(self)
        del values["series"]
        return values

    @property
    def badness(self) -> tuple[float, ...]:
        """Sorts heads, the worst last: collapsed, early, a large ratio."""
        if self.collapsed:
            assert self.position is not None
            return (1.0, -float(self.position), np.inf if self.sc_ratio is None else self.sc_ratio)
        return (0.0, 0.0, self.sc_ratio or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVerdict:
    """The model under one prompt.

    Attributes:
        collapsed: Whether its loss shows a collapse.
        position: Where; None if not.
        low: 2.5 % quantile of the position over resampled sequences; None with one sequence, or without a collapse.
        high: 97.5 % quantile.
        share: Share of the resamples that collapse; None with one sequence.
        why: ``loss`` or ``not finite``; None if it has not.
    """

    collapsed: bool
    position: int | None
    low: int | None
    high: int | None
    share: float | None
    why: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurve:
    """Loss by position under one prompt.

    Attributes:
        mean: ``[P]`` nats a token over all sequences, NaN where not finite.
        low: ``[P]`` 2.5 % quantile over resampled sequences; None with one sequence.
        high: ``[P]`` 97.5 % quantile; None with one.
        by_sequence: ``[S, P]``.
        reference: Best within the training length; None where nothing is finite.
        threshold: What counts as collapsed.
        ratio: Loss over ``2T..4T`` by that over ``T/2..T``; None where it is not finite or not measured.
    """

    mean: Floats
    low: Floats | None
    high: Floats | None
    by_sequence: Floats
    reference: float | None
    threshold: float | None
    ratio: float | None


def sustained_from(above: npt.NDArray[np.bool_], share: float) -> int | None:
    """Return the first index from which on ``above`` holds, at it and at ``share`` of all from it to the end.

    None where there is none, or where fewer than three positions are left.
    """
    left = np.arange(len(above), 0, -1)
    held = np.cumsum(above[::-1])[::-1] / left
    found = np.flatnonzero(above & (held >= share) & (left >= LEAST_POSITIONS))
    return int(found[0]) if len(found) else None


def collapse_index(values: Floats, threshold: float | None, share: float) -> tuple[int | None, str | None]:
    """Return where values are above a threshold for good, or first not finite, whichever comes first, and which.

    Args:
        values: ``[P]``.
        threshold: None asks only for values that are not finite.
        share: Of the remaining positions at which they must be above.

    Returns:
        The index and ``above`` or ``not finite``, or two None.
    """
    broken = ~np.isfinite(values)
    first_broken = int(np.flatnonzero(broken)[0]) if broken.any() else None
    rising = None
    if threshold is not None:
        rising = sustained_from(broken | (np.nan_to_num(values, nan=np.inf) > threshold), share)
    if rising is not None and (first_broken is None or rising < first_broken):
        return rising, "above"
    return first_broken, None if first_broken is None else "not finite"


def judge_heads(records: Sequence[Record], settings: CollapseSettings) -> list[HeadVerdict]:
    """Return the verdict on every head from the records of one prompt's sequences."""
    positions = np.array(settings.positions)
    within = positions <= settings.train_length
    together: dict[tuple[int, int], dict[str, Floats]] = {}
    for name in STATISTICS:
        by_sequence = [list(series(record, name)) for record in records]
        for rows in zip(*by_sequence, strict=True):
            layer, head, _ = rows[0]
            stacked = np.stack([row[2] for row in rows])
            joined = stacked.max(0) if name == "largest" else stacked.mean(0)
            together.setdefault((layer, head), {})[name] = joined
    verdicts = []
    for (layer, head), values in together.items():
        variance, largest = values["variance"], values["largest"]
        base = float(variance[within].max())
        threshold = settings.variance_factor * base if np.isfinite(base) else None
        index, why = collapse_index(variance, threshold, settings.sustained)
        beyond = float(variance[~within].max())
        ratio = beyond / base if base > 0 else np.nan
        kept = [_mean_retention(records, name, layer, head) for name in ("retention", "retention_slowest")]
        verdicts.append(
            HeadVerdict(
                layer=layer,
                head=head,
                collapsed=index is not None,
                position=None if index is None else int(positions[index]),
                why="variance" if why == "above" else why,
                sc_ratio=finite([ratio])[0],
                retention=kept[0],
                retention_slowest=kept[1],
                largest_within=finite([largest[within].max()])[0],
                largest_beyond=finite([largest[~within].max()])[0],
                series=values,
            )
        )
    return verdicts


def _mean_retention(records: Sequence[Record], name: str, layer: int, head: int) -> float | None:
    measured = [record for record in records if record[name] is not None]
    values = [record[name][recurrent_layers(record).index(layer)][head] for record in measured]
    if not values or None in values:
        return None
    return finite([np.mean(values)])[0]


def worst_heads(verdicts: Sequence[HeadVerdict]) -> list[HeadVerdict]:
    """Return at most ten heads, the worst first."""
    return sorted(verdicts, key=lambda verdict: verdict.badness, reverse=True)[:_WORST]


def judge_loss(records: Sequence[Record], settings: CollapseSettings) -> tuple[ModelVerdict, LossCurve]:
    """Return the verdict on the model, and its loss by position, from the records of one prompt's sequences."""
    losses = np.array([record["loss"] for record in records], np.float64)
    mean, positions = losses.mean(0), np.array(settings.positions)
    index, why, reference = _collapse_of(mean, positions, settings)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((settings.seed, len(losses)))))
    low, high, found, share = None, None, [], None
    if len(losses) > 1:
        drawn = np.stack([losses[rng.integers(len(losses), size=len(losses))].mean(0) for _ in range(_RESAMPLES)])
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        found = [i for i in (_collapse_of(row, positions, settings)[0] for row in drawn) if i is not None]
        share = len(found) / _RESAMPLES
    ends = None
    if found and index is not None:
        ends = np.quantile(positions[found], (0.025, 0.975), method="nearest")
    verdict = ModelVerdict(
        collapsed=index is not None,
        position=None if index is None else int(positions[index]),
        low=None if ends is None else int(ends[0]),
        high=None if ends is None else int(ends[1]),
        share=share,
        why="loss" if why == "above" else why,
    )
    length = settings.train_length
    early, late = (
        _mean_between(mean, positions, *place) for place in ((length // 2, length), (2 * length, 4 * length))
    )
    curve = LossCurve(
        mean=mean,
        low=low,
        high=high,
        by_sequence=losses,
        reference=reference,
        threshold=None if reference is None else reference + settings.loss_rise,
        ratio=None if early is None or late is None or early <= 0 else finite([late / early])[0],
    )
    return verdict, curve


def _collapse_of(
    loss: Floats, positions: npt.NDArray[np.int64], settings: CollapseSettings
) -> tuple[int | None, str | None, float | None]:
    """Return where one loss curve collapses, why, and the best loss within the training length."""
    octaves = [settings.train_length >> shift for shift in range(4)]
    means = [_mean_between(loss, positions, start, end) for end, start in pairwise(octaves)]
    reference = min((value for value in means if value is not None), default=None)
    threshold = None if reference is None else reference + settings.loss_rise
    return *collapse_index(loss, threshold, settings.sustained), reference


def _mean_between(loss: Floats, positions: npt.NDArray[np.int64], start: int, end: int) -> float | None:
    """Return the mean loss of the intervals that end in ``start < position <= end``, by tokens; None if not finite."""
    inside = (positions > start) & (positions <= end)
    if not inside.any():
        return None
    widths = np.diff(positions, prepend=0)[inside]
    value = float((loss[inside] * widths).sum() / widths.sum())
    return value if np.isfinite(value) else None


Judged = tuple[list[HeadVerdict], ModelVerdict, LossCurve]


def judge(records: Sequence[Record], settings: CollapseSettings) -> dict[str, Judged]:
    """Return the verdicts by prompt, in the order of the settings."""
    judged = {}
    for prompt in settings.prompts:
        rows = [record for record in records if record["prompt"] == prompt]
        judged[prompt] = (judge_heads(rows, settings), *judge_loss(rows, settings))
    return judged

"""A forecast of a run's data from the plan and the curriculum: passes over each source, and the longest text."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from statex_dist.data.mixture import Mixture, Stage, StreamPosition
from statex_dist.data.store import ShardStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeats:
    """How often a source will have been seen at the end of a run.

    Attributes:
        source: Its name.
        tokens: Tokens of the source.
        passes: Passes at the end.
        stages: First step, one past the last, and passes of each stage that is still to come.
    """

    source: str
    tokens: int
    passes: float
    stages: tuple[tuple[int, int, float], ...]


def forecast(
    mixture: Mixture, place: StreamPosition, *, num_steps: int, packs_per_step: int, above: float
) -> list[Repeats]:
    """Return the sources that will have been seen more than ``above`` times after ``num_steps`` steps.

    Passes before ``place`` are exact. Those after it are computed from the weights, with the padding of the
    first window of each source.
    """
    tokens = {
        name: sum(map(plan.store.num_tokens, range(plan.store.num_shards))) for name, plan in mixture.plans.items()
    }
    stages = _stages_to_come(mixture, place, num_steps)
    # Without padding the figures are an upper bound. Windows are planned only for sources that it puts above the limit.
    before = mixture.passes(place)
    bound = {
        name: before[name] + sum(s[2] for s in _passes(mixture, stages, name, tokens, packs_per_step, padded=False))
        for name in tokens
    }
    found = []
    for name in (name for name, passes in bound.items() if passes > above):
        parts = tuple(_passes(mixture, stages, name, tokens, packs_per_step, padded=True))
        total = before[name] + math.fsum(part[2] for part in parts)
        if total > above:
            found.append(Repeats(source=name, tokens=tokens[name], passes=total, stages=parts))
    return found


def warn_of_repeats(repeats: list[Repeats], *, num_steps: int, limit: float) -> None:
    """Log a warning for each source of :func:`forecast`."""
    for source in repeats:
        parts = ", ".join(f"steps {first + 1} to {last}: {passes:.4g}" for first, last, passes in source.stages)
        logger.warning(
            "source %s (%d tokens) will be seen %.4g times by step %d (%s), more than data.warn_epochs=%g: give it "
            "more data, a lower weight or fewer steps",
            *(source.source, source.tokens, source.passes, num_steps, parts, limit),
        )


def _stages_to_come(mixture: Mixture, place: StreamPosition, num_steps: int) -> list[tuple[Stage, int, int]]:
    """Return the stages that remain of the curriculum, each with its first step and the step after its last."""
    ends = [stage.from_step for stage in mixture.stages[1:]] + [num_steps]
    spans = [
        (stage, max(stage.from_step, place.step), min(end, num_steps))
        for stage, end in zip(mixture.stages, ends, strict=True)
    ]
    return [(stage, first, end) for stage, first, end in spans if first < end]


def _passes(
    mixture: Mixture,
    stages: list[tuple[Stage, int, int]],
    name: str,
    tokens: dict[str, int],
    packs_per_step: int,
    *,
    padded: bool,
) -> list[tuple[int, int, float]]:
    """Return the passes over a source in each stage that uses it."""
    found = []
    for stage, first, end in stages:
        weights = mixture.weights(stage)
        if name not in weights:
            continue
        # A pack of source s holds seq_len * fill(s) tokens, so a token of s takes 1 / fill(s) positions.
        positions = sum(
            weight / (1 - mixture.plans[source].report(stage.seq_len, max_windows=1).waste if padded else 1.0)
            for source, weight in weights.items()
        )
        per_step = packs_per_step * stage.seq_len * weights[name] / positions
        found.append((first, end, (end - first) * per_step / tokens[name]))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedLength:
    """The longest text that a model reads without its state being emptied, by steps.

    That is the longest document of the sources that are read, cut at the length of a pack.

    Attributes:
        stages: The curriculum, in order.
        longest: Tokens of the longest document of each source.
        carry: Whether the state is kept where a document is cut, so that the whole document is one text.
    """

    stages: Sequence[Stage]
    longest: Mapping[str, int]
    carry: bool

    @classmethod
    def of(cls, stages: Sequence[Stage], stores: Mapping[str, ShardStore], *, carry: bool) -> TrainedLength:
        """Read the documents' lengths of every source."""
        longest = {
            name: max((int(store.lengths(shard).max(initial=0)) for shard in range(store.num_shards)), default=0)
            for name, store in stores.items()
        }
        return cls(stages=stages, longest=longest, carry=carry)

    def __call__(self, after: int, step: int) -> int:
        """Return the longest text, in tokens, of the steps above ``after`` up to ``step``; 0 where there are none."""
        ends = [stage.from_step for stage in self.stages[1:]] + [step]
        return max(
            (
                self._of(stage)
                for stage, end in zip(self.stages, ends, strict=True)
                if max(stage.from_step, after) < min(end, step)
            ),
            default=0,
        )

    def _of(self, stage: Stage) -> int:
        read = self.longest if stage.weights is None else [name for name, weight in stage.weights.items() if weight]
        longest = max((self.longest[name] for name in read), default=0)
        return longest if self.carry else min(longest, stage.seq_len)

"""Several sources as one pack stream: weights by tokens, and a curriculum over steps.

Every pack comes from one source. The next one comes from the source that is furthest behind its share of the tokens
packed since the stage began, so any stretch of the stream holds the sources in proportion, up to a pack. The schedule
has no random part: it is a function of the packs' lengths, and its state is one count of tokens for each source.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from statex_dist.data.plan import PLAN_VERSION, Cursor, PackPlan, WindowPlan
from statex_dist.errors import CheckpointError, ConfigError

MAX_SEQ_LEN = 2**31 - 1
"""``cu_seqlens`` are 32-bit numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The composition of the steps from ``from_step`` on.

    Attributes:
        from_step: First optimizer step of the stage, counted from 0.
        seq_len: Tokens of a pack.
        weights: Share of the tokens by source, any positive scale; a source that is left out rests. ``None``: all
            sources alike.
    """

    from_step: int = 0
    seq_len: int
    weights: Mapping[str, float] | None = None


class StreamPosition(NamedTuple):
    """A place in the mixed stream: what the next step begins with.

    Attributes:
        step: Global steps before it.
        cursors: The place in each source.
        tokens: Tokens taken from each source since the stage began.
    """

    step: int
    cursors: dict[str, Cursor]
    tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """One pack of the stream."""

    source: str
    window: WindowPlan = field(repr=False)
    pack: int


class Mixture:
    """The pack stream of one or several sources.

    Raises:
        ConfigError: The stages are not in order, or a weight is of an unknown source or not positive.
    """

    def __init__(self, plans: Mapping[str, PackPlan], stages: Sequence[Stage]):
        if not plans or not stages:
            raise ConfigError("a mixture needs at least one source and one stage")
        if stages[0].from_step != 0:
            raise ConfigError(f"the first stage begins at step {stages[0].from_step}; it must begin at 0")
        for before, stage in itertools.pairwise(stages):
            if stage.from_step <= before.from_step:
                raise ConfigError(
                    f"a stage from step {stage.from_step} follows one from step {before.from_step}; put them in order"
                )
        for stage in stages:
            _check_stage(stage, plans)
        if len(plans) > 1 and any(plan.carry for plan in plans.values()):
            raise ConfigError("long_documents 'carry' works with one source; use 'restart' in a mixture")
        self.plans = dict(plans)
        self.stages = list(stages)

    def begin(self) -> StreamPosition:
        """Return the place of the first step."""
        return StreamPosition(0, {name: Cursor() for name in self.plans}, dict.fromkeys(self.plans, 0))

    def stage(self, step: int) -> Stage:
        """Return the stage that ``step`` belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.from_step <= step)

    def take(self, place: StreamPosition, count: int) -> tuple[list[PlannedPack], StreamPosition]:
        """Return the ``count`` packs of the step at ``place``, and the place of the next step."""
        stage = self.stage(place.step)
        weights = self.weights(stage)
        tokens = dict(place.tokens)
        if place.step == stage.from_step:
            tokens = dict.fromkeys(self.plans, 0)
        cursors = dict(place.cursors)
        taken: list[PlannedPack] = []
        while len(taken) < count:
            total = sum(tokens.values())
            # The first of the sources that are furthest behind; all figures are the same on every rank.
            name = max(weights, key=lambda source: weights[source] * total - tokens[source])
            # A single source is taken in one go: the plan needs to see whole steps to carry states.
            batch = count if len(weights) == 1 else 1
            packs, cursors[name] = self.plans[name].take(cursors[name], batch, stage.seq_len)
            taken.extend(PlannedPack(name, window, pack) for window, pack in packs)
            tokens[name] += sum(window.tokens(pack) for window, pack in packs)
        return taken, StreamPosition(place.step + 1, cursors, tokens)

    def passes(self, place: StreamPosition) -> dict[str, float]:
        """Return how often each source has been seen."""
        return {name: plan.passes(place.cursors[name]) for name, plan in self.plans.items()}

    def state(self, place: StreamPosition) -> dict[str, Any]:
        """Return ``place`` as a JSON-able loader state that says which plans it belongs to."""
        sources = {}
        for name, plan in self.plans.items():
            cursor = place.cursors[name]
            sources[name] = {
                **cursor._asdict(),
                "taken": [list(run) for run in cursor.taken],
                "tokens": place.tokens[name],
                "passes": plan.passes(cursor),  # for records and logs only
                "plan_hash": plan.hash,
                **plan.settings,
            }
        weights = self.weights(self.stage(place.step))
        return {"version": PLAN_VERSION, "step": place.step, "weights": weights, "sources": sources}

    def place(self, state: dict[str, Any]) -> StreamPosition:
        """Return the place that ``state`` (of :meth:`state`) marks.

        Stages may have changed: what is left of a window is then laid into packs of the new length, and other shares
        hold from here on. A source that is new begins at its beginning.

        Raises:
            CheckpointError: It is not a loader state of this version.
            ConfigError: It belongs to other data or another plan, or names a source that is not here.
        """
        if not isinstance(state, dict) or not {"version", "step", "weights", "sources"} <= set(state):
            raise CheckpointError("not a loader state: it lacks version, step, weights or sources")
        if state["version"] != PLAN_VERSION:
            raise CheckpointError(f"loader state of version {state['version']}; this release reads {PLAN_VERSION}")
        if gone := sorted(set(state["sources"]) - set(self.plans)):
            raise ConfigError(
                f"the saved loader state has a source {gone[0]!r} that is not in the data (there are: "
                f"{', '.join(self.plans)}); restore it, with no weight if it is to rest"
            )
        begin = self.begin()
        step = _integer(state, "step")
        for name, saved in state["sources"].items():
            begin.cursors[name] = _cursor(self.plans[name], saved, name if len(self.plans) > 1 else "")
            begin.tokens[name] = _integer(saved, "tokens")
        # If the shares differ from before, the counts begin at 0: no source has to catch up with its old share.
        same = state["weights"] == self.weights(self.stage(step))
        return StreamPosition(step, begin.cursors, begin.tokens if same else dict.fromkeys(self.plans, 0))

    def weights(self, stage: Stage) -> dict[str, float]:
        """Return the share of the tokens of each source that does not rest in ``stage``."""
        weights = stage.weights or dict.fromkeys(self.plans, 1.0)
        total = sum(weights.values())
        return {name: weights[name] / total for name in self.plans if weights.get(name)}


def _check_stage(stage: Stage, plans: Mapping[str, PackPlan]) -> None:
    where = f"stage from step {stage.from_step}"
    if not 1 <= stage.seq_len <= MAX_SEQ_LEN:
        raise ConfigError(f"{where}: seq_len is {stage.seq_len}; it must be at least 1, and at most {MAX_SEQ_LEN}")
    for name, weight in (stage.weights or {}).items():
        if name not in plans:
            raise ConfigError(f"{where}: a weight for {name!r}, which is no source; there are: {', '.join(plans)}")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"{where}: the weight of {name!r} is {weight}; it must be 0 or more")
    if stage.weights is not None and not any(stage.weights.values()):
        raise ConfigError(f"{where}: no source has a weight above 0")


def _cursor(plan: PackPlan, saved: dict[str, Any], name: str) -> Cursor:
    wanted = {"plan_hash", "tokens", *Cursor._fields, *plan.settings}
    if not isinstance(saved, dict) or not wanted <= set(saved):
        missing = ", ".join(sorted(wanted - set(saved))) if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(f"not a loader state: it lacks {missing}")
    differing = [f"{key} was {saved[key]!r}, now {now!r}" for key, now in plan.settings.items() if saved[key] != now]
    if differing or saved["plan_hash"] != plan.hash:
        raise ConfigError(
            f"the saved loader state{f' of source {name!r}' * bool(name)} is of another pack plan: "
            f"{'; '.join(differing) or 'plan_hash differs'}; restore the old values, or start the data from its "
            "beginning"
        )
    try:
        taken = tuple((int(seq_len), int(packs)) for seq_len, packs in saved["taken"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"not a loader state: taken is {saved['taken']!r}") from error
    cursor = Cursor(_integer(saved, "epoch"), _integer(saved, "window"), taken)
    plan.check(cursor)
    return cursor


def _integer(state: dict[str, Any], name: str) -> int:
    if not isinstance(state[name], int) or isinstance(state[name], bool):
        raise CheckpointError(f"not a loader state: {name} is {state[name]!r}")
    return state[name]

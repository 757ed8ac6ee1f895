"""Callbacks: what looks at a training run, or adds to it, without an edit of the loop.

The loop calls *hooks* at fixed places. Each callback is called in the order of its ``order``, those of equal order as
the configuration lists them:

    order  callback          what
     0     Watchdog          ends a job that hangs
    10     Profiler          torch's profiler over a few steps
    20     StateNorms        adds ``state_norms`` to a step's record
    30     Validation        evaluates, adds ``eval``
    40     Throughput        adds tokens, seconds, memory, MFU
    50     a user's          of the setting ``callbacks``
    60     RunFiles          config.yaml and status.json
    65     FleetPhases       seconds of all ranks, adds ``ranks`` and ``stragglers``
    70     MetricsFile       metrics.jsonl
    80     Console, Wandb    show the record

**All ranks call every hook at the same place**, so a hook may use collective operations of ``run.engine``, on all ranks
alike. A callback of ours that fails is an error of the program. After a hook of a user's callback the ranks agree on
whether it failed on any of them. If so, all of them end the run with one line that names the callback; its changes are
not saved, and the newest checkpoint stays.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from statex_dist.errors import ConfigError, StateXError, one_line, reason, shown
from statex_dist.registry import Registry

if TYPE_CHECKING:  # `statex report` reads records without torch
    from statex_dist.batch import PackedBatch
    from statex_dist.engine.base import TrainEngine

logger = logging.getLogger(__name__)

CALLBACKS = Registry("callbacks", {"tensorboard": "statex_dist.train.tensorboard:TensorBoard"})
"""Callbacks that ``callbacks`` may name; each is a class derived from :class:`Callback`."""

HOOKS = ("on_phase", "on_start", "pre_step", "post_step", "on_evaluate", "on_save", "on_end")

OWN_FIGURES = frozenset(
    {"eval", "state_norms", "tokens", "seconds", "tokens_per_s", "memory_bytes", "mfu", "ranks", "stragglers"}
)
"""Figures that our callbacks add to some records; the files, the log line and wandb rely on their form."""

_FAILURES = (Exception, SystemExit)
"""Errors that the code of a user may raise. A rank that exits alone would leave the others waiting, and the run
``running``."""


class CallbackError(StateXError):
    """A user's callback failed; the run ends on all ranks, and its newest checkpoint stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a run ends.

    Attributes:
        state: ``complete`` (all steps done), ``preempted`` (told to stop, and saved) or ``failed``.
        step: Optimizer steps done.
        epochs: Passes over each source of the data, by name.
        error: Why it failed.
    """

    state: Literal["complete", "preempted", "failed"]
    step: int
    epochs: Mapping[str, float] = field(default_factory=dict)
    error: BaseException | None = None


@dataclass(kw_only=True, slots=True)
class RunContext:
    """The parts of a run that its callbacks can use.

    Attributes:
        run_dir: The run's directory.
        engine: Model, optimizer and collective operations (``sum``, ``gather``, ``broadcast``, ``barrier``).
        num_steps: Optimizer steps of the whole run.
        start_step: Steps done before this start.
        settings: The resolved configuration, without secrets.
        epochs: Passes over each source of the data so far.
        callbacks: All callbacks of the run.
        observe_states: Whether the engine is to measure the layers' states in the step that begins; ``pre_step`` may
            set it, the loop resets it.
        wanted: ``save`` or ``best`` where a checkpoint is to follow this step; see :meth:`request_save`.
        lost_best: Steps whose checkpoints were to be the best and could not be saved.
    """

    run_dir: Path
    engine: TrainEngine
    num_steps: int
    start_step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: Mapping[str, float] = field(default_factory=dict)
    callbacks: Callbacks
    observe_states: bool = False
    wanted: Literal["", "save", "best"] = ""
    lost_best: set[int] = field(default_factory=set)

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.engine.rank

    def request_save(self, *, best: bool = False) -> None:
        """Have a checkpoint written after this step; all ranks must ask alike.

        Args:
            best: Whether it is to be kept as the run's best, in place of the one before.
        """
        self.wanted = "best" if best else self.wanted or "save"


class Callback:
    """Base of all callbacks: override the hooks that are needed.

    Attributes:
        run: The run; set before ``on_start``.
        order: Place among the callbacks; the module's docstring has those of our own.
        rank_0_only: Whether it is called on rank 0 alone; it then uses no collective operations.
        name: What messages and checkpoints call it.
    """

    run: RunContext
    order: ClassVar[int] = 50
    rank_0_only: ClassVar[bool] = False
    name: str = ""

    def on_start(self) -> None:
        """Begin: checkpoint, data and states are restored; no step has been made in this start."""

    def pre_step(self, step: int, batch: Sequence[PackedBatch]) -> None:
        """Look at a step before it is made, with this rank's packs; steps count from 1."""

    def post_step(self, record: dict[str, Any]) -> None:
        """Read a step's record, or add figures to it, by new names: numbers, texts, lists and mappings of these."""

    def on_evaluate(self, step: int, results: Mapping[str, Any]) -> None:
        """Read what the validation after ``step`` gave: its mean ``loss``, ``losses`` by data set, ``targets``."""

    def on_save(self, step: int) -> None:
        """Prepare for a checkpoint of ``step``, which is about to be written."""

    def on_end(self, ending: Ending) -> None:
        """End; also called where the run failed. Then no collective operation may be used: other ranks may be gone."""

    def on_phase(self, phase: str, step: int) -> None:
        """Hear that a phase of ``step`` begins, many times a step; for callbacks of our own."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold of it: plain values and tensors, the same on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, before ``on_start``."""


class Callbacks:
    """The callbacks of a run, in their order.

    Args:
        callbacks: Those of this rank, the same on all ranks.
        rank: This process.
    """

    def __init__(self, callbacks: Sequence[Callback], *, rank: int):
        # A user's is known on all ranks, which agree on whether it failed.
        here = [c for c in callbacks if rank == 0 or not c.rank_0_only or not _is_ours(c)]
        self.all = sorted(here, key=lambda callback: callback.order)
        for callback in self.all:
            callback.name = callback.name or f"{type(callback).__module__}:{type(callback).__qualname__}"
        self._listeners = {
            hook: [c for c in self.all if getattr(type(c), hook) is not getattr(Callback, hook)] for hook in HOOKS
        }
        self._run: RunContext | None = None
        self._seconds = 0.0

    def attach(self, run: RunContext) -> None:
        """Tell every callback of its run."""
        self._run = run
        for callback in self.all:
            callback.run = run

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks, on all ranks.

        Raises:
            CallbackError: A user's callback failed, on this rank or another.
        """
        for callback in self._listeners[hook]:
            if _is_ours(callback):
                getattr(callback, hook)(*arguments)
            elif hook != "on_phase":
                self._agree(callback, hook, self._timed_problem(callback, hook, arguments))

    def take_seconds(self) -> float:
        """Return what users' hooks took on this rank since the last call, without their waits for other ranks."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed_problem(self, callback: Callback, hook: str, arguments: Sequence[Any]) -> str | None:
        assert self._run is not None
        engine = self._run.engine
        start, waited = time.perf_counter(), engine.waited
        problem = _problem(callback, hook, arguments)
        self._seconds += max(0.0, time.perf_counter() - start - (engine.waited - waited))
        return problem

    def end(self, ending: Ending) -> None:
        """Call ``on_end`` of all callbacks, whatever fails; those after one that failed are told that the run did.

        Raises:
            CallbackError: A user's callback failed, and the run had not.
        """
        failure: CallbackError | None = None
        for callback in self._listeners["on_end"]:
            if _is_ours(callback):
                callback.on_end(ending)
                continue
            problem = _problem(callback, "on_end", (ending,))
            if ending.state == "failed":  # the first reason is what the run reports
                if problem:
                    logger.error("%s", problem)
                continue
            try:
                self._agree(callback, "on_end", problem)
            except CallbackError as error:
                failure, ending = error, Ending(state="failed", step=ending.step, epochs=ending.epochs, error=error)
        if failure is not None:
            raise failure

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the states of the callbacks that have one, by name.

        Raises:
            CallbackError: A user's callback failed, or its state cannot be read again from a checkpoint.
        """
        states = {}
        for callback in self.all:
            problem, state = None, {}
            try:
                state = callback.state_dict() if _is_here(callback) else {}
                if type(state) is not dict:
                    raise TypeError(f"a state is a dictionary, not {shown(state, 80)}")
                _check_plain(state)
            except _FAILURES as error:
                if _is_ours(callback):
                    raise
                problem, state = _text(callback, "state_dict", error), {}
            if not _is_ours(callback) and type(callback).state_dict is not Callback.state_dict:
                self._agree(callback, "state_dict", problem)
            if state:
                states[callback.name] = state
        return states

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore :meth:`state_dict`; a state without its callback is named and left out.

        Raises:
            CallbackError: A user's callback refuses its state.
        """
        known = {callback.name: callback for callback in self.all}
        for name, state in states.items():
            if name not in known:
                logger.warning("the checkpoint has a state of the callback %s, which this run does not have", name)
            elif _is_ours(known[name]):
                known[name].load_state_dict(state)
            else:
                self._agree(known[name], "load_state_dict", _problem(known[name], "load_state_dict", (state,)))

    def _agree(self, callback: Callback, hook: str, problem: str | None) -> None:
        """Raise on all ranks if the hook failed on any."""
        assert self._run is not None
        engine = self._run.engine
        if engine.any_rank(problem is not None)[0]:
            first = next(text for text in engine.gather(problem) if text)
            raise CallbackError(first).on_all_ranks(engine.rank)


def parse_entry(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options of an entry of ``callbacks``: a name, or a mapping of one name to its options.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(entry, str):
        entry = {entry: {}}
    if len(entry) != 1:
        raise ConfigError(f"callbacks: an entry is a name, or one name with its options; not {shown(entry)}")
    ((name, options),) = entry.items()
    if not isinstance(name, str):
        raise ConfigError(f"callbacks: a name is a text, not {shown(name)}")
    CALLBACKS.check(name)
    if not isinstance(options or {}, Mapping):
        raise ConfigError(f"callbacks: the options of {shown(name)} are a mapping, not {shown(options)}")
    return name, dict(options or {})


def build_callbacks(entries: Sequence[str | Mapping[str, Any]]) -> list[Callback]:
    """Make the callbacks that the setting ``callbacks`` lists.

    Raises:
        ConfigError: One cannot be imported, is not a callback, is listed twice, or does not take its options.
    """
    made: dict[str, Callback] = {}
    for name, options in map(parse_entry, entries):
        cls = CALLBACKS.get(name)
        if not (isinstance(cls, type) and issubclass(cls, Callback)):
            raise ConfigError(f"callbacks: {name} is not a callback, a class derived from {__name__}.Callback")
        if name in made:
            raise ConfigError(f"callbacks: {name} is listed twice; derive a class of another name")
        try:
            made[name] = cls(**options)
            made[name].name = name
        except StateXError:
            raise
        except _FAILURES as error:
            raise ConfigError(f"callbacks: {name} cannot be made with its options: {reason(error)}") from None
        if not isinstance(made[name].order, int | float):
            raise ConfigError(f"callbacks: the order of {name} is a number, not {shown(made[name].order)}")
    return list(made.values())


def _is_ours(callback: Callback) -> bool:
    return type(callback).__module__.startswith("statex_dist.")


def _is_here(callback: Callback) -> bool:
    return not callback.rank_0_only or callback.run.rank == 0


def _problem(callback: Callback, hook: str, arguments: Sequence[Any]) -> str | None:
    """Call a hook of a user's callback and return why it failed, or None."""
    if not _is_here(callback):
        return None
    before = dict(arguments[0]) if hook == "post_step" else {}
    try:
        getattr(callback, hook)(*arguments)
        if hook == "post_step":
            _check_record(before, arguments[0])
    except _FAILURES as error:
        return _text(callback, hook, error)
    return None


def _check_record(before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raise unless a record can be shown and written, which rank 0 does alone, after the ranks have agreed.

    Raises:
        ValueError: Figures of ours are gone, or others in their place.
        TypeError: JSON cannot hold a value.
    """
    changed = [key for key, value in before.items() if key not in record or record[key] is not value]
    if changed := changed or sorted(OWN_FIGURES & record.keys() - before.keys()):
        raise ValueError(f"it changed the figure {changed[0]} of the record; add others by names of your own")
    json.dumps(record)


def _text(callback: Callback, hook: str, error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    logger.debug("the traceback of %s:", callback.name, exc_info=error)
    text = one_line(error) if isinstance(error, StateXError) else reason(error)
    return f"callback {callback.name} failed in {hook}: {text} ({Path(last.filename).name}, line {last.lineno})"


def _check_plain(value: Any) -> None:
    """Raise unless a checkpoint gives a value back: resuming reads no classes.

    Raises:
        TypeError: It does not.
    """
    if isinstance(value, Mapping) and type(value) is dict:
        for key, item in value.items():
            _check_plain(key)
            _check_plain(item)
    elif type(value) in (list, tuple):
        for item in value:
            _check_plain(item)
    elif not (value is None or type(value) in (bool, int, float, str) or type(value).__module__ == "torch"):
        raise TypeError(f"a state holds plain values and tensors, not {shown(value, 80)}")

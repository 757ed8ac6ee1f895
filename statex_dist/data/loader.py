"""Packed batches for one rank, in an order that does not depend on the number of ranks or workers.

Global step ``i`` consists of ``global_packs`` consecutive packs of the stream; rank ``r`` of ``W`` builds the ``r``-th
run of ``global_packs / W`` of them. The state that travels with each batch is the place in the stream after its
*global* step, so it is the same on every rank and valid for any number of ranks.

Plans are made ahead in a thread, packs are read and laid out in another one. With worker processes, those are handed
what to read, some packs at a time, and answer in order: how many there are changes nothing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

from statex_dist.batch import MAX_ORIGINS, Origin, PackedBatch
from statex_dist.data.collate import PackParts, PackReader, PackSpec, PieceSpec, lay_out
from statex_dist.data.epochs import Repeats, forecast
from statex_dist.data.mixture import Mixture, Place, PlannedPack, Stage
from statex_dist.data.plan import PackPlan, PackReport
from statex_dist.data.prefetch import prefetch
from statex_dist.data.store import ShardStore
from statex_dist.errors import ConfigError, DataError, StateXError

log = logging.getLogger(__name__)

ONLY_SOURCE = "data"
_PLANNED_STEPS = 8
_ORDERS_AHEAD_OF_WORKER = 2
_TOKENS_AT_ONCE = 1 << 16
_MOST_WORKERS = 64
_GRACE_SECONDS = 30


class PackedLoader:
    """Iterates the packs of one or several stores; each item is the list of this rank's batches of one global step.

    Iterating goes on from the current state: a fresh iterator continues where the last one stopped. All ranks get the
    same number of items. A global step that is incomplete at the end of an epoch is filled from the next epoch, also
    at the end of the last one, so every document is seen in every epoch.

    Args:
        store: The documents, or those of each source by name.
        seq_len: Tokens of a pack; not needed with ``stages``.
        stages: The curriculum; default: one stage of ``seq_len`` and equal weights.
        global_packs: Packs of one optimizer step over all ranks; a multiple of ``world_size``.
        pad_id: Id in the positions after a pack's last document.
        rank: This rank.
        world_size: Number of ranks that share the steps (data-parallel ranks).
        seed: Seed of the shuffles.
        packing: See :class:`~statex_dist.data.plan.PackPlan`.
        tail: See :class:`~statex_dist.data.plan.PackPlan`.
        window_tokens: See :class:`~statex_dist.data.plan.PackPlan`.
        long_documents: See :class:`~statex_dist.data.plan.PackPlan`.
        epochs: Passes over the data; ``None`` for no end. Only with one source.
        prefetch_steps: Global steps built ahead in a thread; 0 builds in the caller. Not used with workers.
        num_workers: Processes that read packs; 0 for none.
        vocab_size: Ids from here on are an error; ``None`` for no check.
        skip_corrupt: Put padding in the place of a damaged shard's tokens and count them, instead of raising.

    Attributes:
        lost_tokens: Tokens of damaged shards in the batches handed out so far.

    Raises:
        ConfigError: A value is out of its range, or ``global_packs`` is not a multiple of ``world_size``.
    """

    def __init__(
        self,
        store: ShardStore | Mapping[str, ShardStore],
        *,
        global_packs: int,
        pad_id: int,
        seq_len: int | None = None,
        stages: Sequence[Stage] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        packing: str = "best_fit",
        tail: str = "pad",
        window_tokens: int = 1 << 26,
        long_documents: str = "restart",
        epochs: int | None = None,
        prefetch_steps: int = 1,
        num_workers: int = 0,
        vocab_size: int | None = None,
        skip_corrupt: bool = False,
    ):
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of world size {world_size}; rank must be in 0..world_size - 1")
        if global_packs < 1 or global_packs % world_size:
            raise ConfigError(
                f"global_packs is {global_packs} for {world_size} ranks; it must be a positive multiple of the number "
                f"of ranks, for example {max(1, round(global_packs / world_size)) * world_size}"
            )
        for name, value in (("prefetch_steps", prefetch_steps), ("num_workers", num_workers)):
            if value < 0:
                raise ConfigError(f"{name} is {value}; it must be at least 0")
        if num_workers > (most := max(_MOST_WORKERS, os.cpu_count() or 1)):
            raise ConfigError(f"num_workers is {num_workers}, for each rank; more than {most} cannot help here")
        self.stores = dict(store) if isinstance(store, Mapping) else {ONLY_SOURCE: store}
        if epochs is not None and epochs < 1:
            raise ConfigError(f"epochs is {epochs}; it must be at least 1, or null for no end")
        if epochs is not None and len(self.stores) > 1:
            raise ConfigError("epochs is for one source; a mixture has no end")
        if stages is None:
            if seq_len is None:
                raise ConfigError("give seq_len or stages")
            stages = [Stage(seq_len=seq_len)]
        plans = {
            name: PackPlan(
                store,
                seed=seed,
                packing=packing,
                tail=tail,
                window_tokens=window_tokens,
                long_documents=long_documents,
                lanes=global_packs,
            )
            for name, store in self.stores.items()
        }
        self.mixture = Mixture(plans, stages)
        self.epochs = epochs
        self.lost_tokens = 0
        self._pad_id = pad_id
        self._reader = PackReader(self.stores, pad_id=pad_id, vocab_size=vocab_size, skip_corrupt=skip_corrupt)
        self._global_packs = global_packs
        self._mine = slice(rank * (global_packs // world_size), (rank + 1) * (global_packs // world_size))
        self._prefetch_steps = prefetch_steps
        self._num_workers = num_workers
        self._place = self.mixture.begin()
        self._loads = 0

    def __iter__(self) -> Generator[list[PackedBatch], None, None]:
        while True:
            loads = self._loads
            steps = self._with_workers() if self._num_workers else self._with_thread()
            try:
                for place, batches in steps:
                    self._place = place
                    self.lost_tokens += sum(batch.lost_tokens for batch in batches)
                    yield batches
                    if self._loads != loads:
                        break  # a state was loaded under a running iterator: what is prefetched is of the old place
                else:
                    return
            finally:
                steps.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last step that was yielded (JSON-able)."""
        return self.mixture.state(self._place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which any rank of any world size may have saved; running iterators follow.

        Raises:
            CheckpointError: It is not a loader state.
            ConfigError: It belongs to other data, another seed or packing.
        """
        self._place = self.mixture.place(state)
        self._loads += 1
        stage = self.mixture.stage(self._place.step)
        lengths = {cursor.taken[-1][0] for cursor in self._place.cursors.values() if cursor.taken} - {stage.seq_len}
        if lengths:
            log.info(
                "the sequence length changes from %s to %d: the rest of the window is packed again",
                " and ".join(map(str, sorted(lengths))),
                stage.seq_len,
            )

    def report(self, max_windows: int | None = None) -> dict[str, PackReport]:
        """Return what packing costs each source in the first epoch (or its first ``max_windows`` windows)."""
        seq_len = self.mixture.stage(self._place.step).seq_len
        plans = self.mixture.plans
        return {name: plan.report(seq_len, max_windows=max_windows) for name, plan in plans.items()}

    def passes(self) -> dict[str, float]:
        """Return how often each source has been seen, at the place of :meth:`state_dict`."""
        return self.mixture.passes(self._place)

    def forecast(self, num_steps: int, *, above: float) -> list[Repeats]:
        """Return the sources that will have been seen more than ``above`` times after ``num_steps`` global steps."""
        return forecast(self.mixture, self._place, num_steps=num_steps, packs_per_step=self._global_packs, above=above)

    def _planned(self) -> Iterator[tuple[Place, list[PackSpec]]]:
        """This rank's packs of every step, and the place after it."""
        place = self._place
        fetched: dict[str, tuple[int, int]] = {}
        only = next(iter(self.stores))
        while self.epochs is None or place.cursors[only].epoch < self.epochs:
            self._fetch_ahead(place, fetched)
            packs, place = self.mixture.take(place, self._global_packs)
            state = self.mixture.state(place)
            yield place, [self._spec(pack, state) for pack in packs[self._mine]]

    def _spec(self, planned: PlannedPack, state: dict[str, Any]) -> PackSpec:
        window, pack = planned.window, planned.pack
        following = pack + self._global_packs
        pieces, name = window.pieces(pack), self.stores[planned.source].name
        return PackSpec(
            source=planned.source,
            pieces=pieces,
            origins=tuple(
                Origin(source=planned.source, shard=name(shard), document=document, start=start, stop=stop)
                for shard, document, start, stop, _ in pieces[:MAX_ORIGINS]
            ),
            seq_len=window.seq_len,
            carried=bool(window.carried[pack]),
            continues=following < len(window) and bool(window.carried[following]),
            state=state,
        )

    def _fetch_ahead(self, place: Place, fetched: dict[str, tuple[int, int]]) -> None:
        """Have the shards of the window in hand and of the next one fetched, once for each window."""
        weights = self.mixture.stage(place.step).weights
        active = [name for name in self.mixture.plans if weights is None or weights.get(name)]
        for name in active:
            plan, cursor = self.mixture.plans[name], place.cursors[name]
            if fetched.get(name) == (cursor.epoch, cursor.window):
                continue
            fetched[name] = (cursor.epoch, cursor.window)
            windows = plan.windows(cursor.epoch)
            shards = windows[cursor.window].tolist()
            last = cursor.window + 1 == len(windows)
            following = plan.windows(cursor.epoch + 1)[0] if last else windows[cursor.window + 1]
            self.stores[name].prefetch(shards + following.tolist(), share=1 / len(active))

    def _with_thread(self) -> Generator[tuple[Place, list[PackedBatch]], None, None]:
        planned = prefetch(self._planned(), _PLANNED_STEPS if self._prefetch_steps else 0)
        steps = prefetch(((place, self._build(specs)) for place, specs in planned), self._prefetch_steps)
        try:
            yield from steps
        finally:
            steps.close()
            planned.close()

    def _build(self, specs: list[PackSpec]) -> list[PackedBatch]:
        return [
            batch
            for some in _chunks(specs)
            for batch in lay_out(some, [self._reader.read(spec.source, spec.pieces) for spec in some], self._pad_id)
        ]

    def _with_workers(self) -> Generator[tuple[Place, list[PackedBatch]], None, None]:
        planned = prefetch(self._planned(), _PLANNED_STEPS)
        waiting: deque[tuple[Place, list[list[PackSpec]]]] = deque()

        def orders() -> Iterator[_Order]:
            for place, specs in planned:
                chunks = list(_chunks(specs))
                waiting.append((place, chunks))
                for some in chunks:
                    yield [(spec.source, spec.pieces) for spec in some]

        # The workers are forked before the planning thread starts, which the first order does.
        others = set(multiprocessing.active_children())
        with _sigchld_as_it_is():
            answers = iter(
                DataLoader(
                    _Reading(self._reader),
                    sampler=_Once(orders()),
                    batch_size=None,
                    collate_fn=_unchanged,
                    num_workers=self._num_workers,
                    prefetch_factor=_ORDERS_AHEAD_OF_WORKER,
                    multiprocessing_context="fork",
                    worker_init_fn=_outlive_a_preemption,
                )
            )
        workers = set(multiprocessing.active_children()) - others
        try:
            while (answer := _next_answer(answers)) is not None:
                place, chunks = waiting.popleft()
                batches = lay_out(chunks[0], answer, self._pad_id)
                for some in chunks[1:]:
                    more = _next_answer(answers)
                    assert more is not None, "a worker answers every order"
                    batches += lay_out(some, more, self._pad_id)
                yield place, batches
        finally:
            # They only read. One that was killed may have left a queue locked, so the rest cannot be asked to end.
            for worker in workers:
                worker.kill()
            # One may have been looking at the event that tells them to end, and holds its lock for ever; the iterator
            # sets it all the same, and would wait.
            answers._workers_done_event = multiprocessing.get_context("fork").Event()  # type: ignore[attr-defined]
            del answers
            planned.close()


_Order = list[tuple[str, list[PieceSpec]]]


def _chunks(specs: list[PackSpec]) -> Iterator[list[PackSpec]]:
    """Split a step's packs (all of one length) into parts of some ten thousand tokens, which are built at once."""
    count = max(1, _TOKENS_AT_ONCE // specs[0].seq_len)
    return (specs[i : i + count] for i in range(0, len(specs), count))


class _Reading(Dataset[list[PackParts] | StateXError]):
    """Reads packs in a worker process; a user's error is handed over, not wrapped into a traceback."""

    def __init__(self, reader: PackReader):
        self._reader = reader

    def __getitem__(self, order: Any) -> list[PackParts] | StateXError:
        try:
            return [self._reader.read(source, pieces) for source, pieces in order]
        except StateXError as error:
            return error


class _Once:
    """A sampler over a running iterator."""

    def __init__(self, items: Iterator[_Order]):
        self._items = items

    def __iter__(self) -> Iterator[_Order]:
        return self._items


@contextmanager
def _sigchld_as_it_is() -> Iterator[None]:
    """Take back the handler that torch installs: it raises wherever the main thread is when a worker dies.

    The DataLoader looks for dead workers by itself whenever an answer is late.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _outlive_a_preemption(_worker: int) -> None:
    # A pre-emption reaches every process of the job. The trainer still needs batches to end its step and save.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(item: Any) -> Any:
    return item


def _next_answer(answers: Iterator[Any]) -> list[PackParts] | None:
    """The next answer of the workers, in order; ``None`` at the end."""
    try:
        answer = next(answers, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data worker ended by itself ({str(error).splitlines()[0]}); give it more memory, or set fewer workers"
        ) from error
    if isinstance(answer, StateXError):
        raise answer
    return answer

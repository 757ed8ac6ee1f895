"""Packed batches for one rank, in an order that does not depend on the number of ranks or workers.

Global step ``i`` consists of ``global_packs`` consecutive packs of the stream; rank ``r`` of ``W`` builds the ``r``-th
run of ``global_packs / W`` of them, rounded up or down. A rank that has one less than others gets a dummy pack at the
end of its list (:meth:`statex_dist.batch.PackedBatch.as_dummy`). The state that travels with each batch is the place in
the stream after its *global* step, so it is the same on every rank and valid for any number of ranks.

Plans are made ahead in a thread, packs are read and laid out in another one. With worker processes, those are handed
what to read, some packs at a time, and answer in order: how many there are changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from statex_dist.batch import MAX_ORIGINS, Origin, PackedBatch, most_packs, pack_range
from statex_dist.data.collate import PackReader, PackSpec, lay_out
from statex_dist.data.forecast import Repeats, forecast
from statex_dist.data.mixture import Mixture, PlannedPack, Stage, StreamPosition
from statex_dist.data.plan import PackPlan, PackPlanOptions
from statex_dist.data.prefetch import Order, prefetch, read_in_workers
from statex_dist.data.store import ShardStore
from statex_dist.data.window import PackReport
from statex_dist.errors import ConfigError

log = logging.getLogger(__name__)

_PLANNED_STEPS = 8
_TOKENS_AT_ONCE = 1 << 16
_MOST_WORKERS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShare:
    """Which packs of a global step a rank builds.

    Attributes:
        global_packs: Packs of one optimizer step over all ranks; at least ``world_size``.
        rank: This rank.
        world_size: Number of ranks that share the steps (data-parallel ranks).
    """

    global_packs: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        packs, ranks = self.global_packs, self.world_size
        if ranks < 1 or not 0 <= self.rank < ranks:
            raise ConfigError(f"rank {self.rank} of world size {ranks}; rank must be in 0..world_size - 1")
        if packs < ranks:
            raise ConfigError(f"global_packs is {packs} for {ranks} ranks; each rank needs a pack of a step")

    @property
    def mine(self) -> slice:
        """This rank's packs of a step."""
        packs = pack_range(self.global_packs, self.rank, self.world_size)
        return slice(packs.start, packs.stop)

    @property
    def num_dummies(self) -> int:
        """Number of dummy packs behind this rank's own, so that all ranks make the same number of passes: 0 or 1."""
        own = self.mine
        return most_packs(self.global_packs, self.world_size) - (own.stop - own.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderOptions:
    """How packs are read.

    Attributes:
        pad_id: Id in the positions after a pack's last document.
        vocab_size: Ids from here on are an error; ``None`` for no check.
        skip_corrupt: Put padding in the place of a damaged shard's tokens and count them, instead of raising.
        num_workers: Processes that read packs; 0 for none.
        prefetch_steps: Global steps built ahead in a thread; 0 builds in the caller. Not used with workers.
        epochs: Passes over the data; ``None`` for no end. Only with one source.
    """

    pad_id: int
    vocab_size: int | None = None
    skip_corrupt: bool = False
    num_workers: int = 0
    prefetch_steps: int = 1
    epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("prefetch_steps", "num_workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.num_workers > (most := max(_MOST_WORKERS, os.cpu_count() or 1)):
            raise ConfigError(f"num_workers is {self.num_workers}, for each rank; more than {most} cannot help here")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; it must be at least 1, or null for no end")


class PackedLoader:
    """Iterates the packs of one or several stores; each item is the list of this rank's batches of one global step.

    The lists of all ranks are equally long; dummy packs at their ends make them so.

    Iterating continues from the current state: a fresh iterator continues where the last one stopped. All ranks get the
    same number of items. A global step that is incomplete at the end of an epoch is filled from the next epoch, also
    at the end of the last one, so every document is seen in every epoch.

    Attributes:
        lost_tokens: Tokens of damaged shards in the batches yielded so far.

    Raises:
        ConfigError: The stages do not fit the sources, or an end is given for a mixture.
    """

    def __init__(
        self,
        stores: Mapping[str, ShardStore],
        stages: Sequence[Stage],
        share: StepShare,
        options: LoaderOptions,
        plan: PackPlanOptions | None = None,
    ):
        self.stores = dict(stores)
        if options.epochs is not None and len(self.stores) > 1:
            raise ConfigError("epochs is for one source; a mixture has no end")
        plans = {name: PackPlan(store, plan, lanes=share.global_packs) for name, store in self.stores.items()}
        self.mixture = Mixture(plans, stages)
        self.lost_tokens = 0
        self._share = share
        self._options = options
        self._reader = PackReader(
            self.stores, pad_id=options.pad_id, vocab_size=options.vocab_size, skip_corrupt=options.skip_corrupt
        )
        self._place = self.mixture.begin()
        self._loads = 0

    def __iter__(self) -> Generator[list[PackedBatch], None, None]:
        while True:
            loads = self._loads
            steps = self._with_workers() if self._options.num_workers else self._with_thread()
            try:
                for place, batches in steps:
                    self._place = place
                    self.lost_tokens += sum(batch.lost_tokens for batch in batches)
                    yield batches + [batches[-1].as_dummy() for _ in range(self._share.num_dummies)]
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
        """Continue from ``state``, which any rank of any world size may have saved; running iterators follow.

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
        return forecast(
            self.mixture, self._place, num_steps=num_steps, packs_per_step=self._share.global_packs, above=above
        )

    def _planned(self) -> Iterator[tuple[StreamPosition, list[PackSpec]]]:
        """This rank's packs of every step, and the place after it."""
        place = self._place
        fetched: dict[str, tuple[int, int]] = {}
        only = next(iter(self.stores))
        while self._options.epochs is None or place.cursors[only].epoch < self._options.epochs:
            self._fetch_ahead(place, fetched)
            packs, place = self.mixture.take(place, self._share.global_packs)
            state = self.mixture.state(place)
            yield place, [self._spec(pack, state) for pack in packs[self._share.mine]]

    def _spec(self, planned: PlannedPack, state: dict[str, Any]) -> PackSpec:
        window, pack = planned.window, planned.pack
        following = pack + self._share.global_packs
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

    def _fetch_ahead(self, place: StreamPosition, fetched: dict[str, tuple[int, int]]) -> None:
        """Request the shards of the current window and of the next one, once for each window."""
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

    def _with_thread(self) -> Generator[tuple[StreamPosition, list[PackedBatch]], None, None]:
        planned = prefetch(self._planned(), _PLANNED_STEPS if self._options.prefetch_steps else 0)
        steps = prefetch(((place, self._build(specs)) for place, specs in planned), self._options.prefetch_steps)
        try:
            yield from steps
        finally:
            steps.close()
            planned.close()

    def _build(self, specs: list[PackSpec]) -> list[PackedBatch]:
        return [
            batch
            for some in _chunks(specs)
            for batch in lay_out(
                some, [self._reader.read(spec.source, spec.pieces) for spec in some], self._options.pad_id
            )
        ]

    def _with_workers(self) -> Generator[tuple[StreamPosition, list[PackedBatch]], None, None]:
        planned = prefetch(self._planned(), _PLANNED_STEPS)
        waiting: deque[tuple[StreamPosition, list[list[PackSpec]]]] = deque()

        def orders() -> Iterator[Order]:
            for place, specs in planned:
                chunks = list(_chunks(specs))
                waiting.append((place, chunks))
                for some in chunks:
                    yield [(spec.source, spec.pieces) for spec in some]

        # The workers are forked before the planning thread starts, which the first order does.
        found = read_in_workers(self._reader, orders(), self._options.num_workers)
        try:
            for parts in found:
                place, chunks = waiting.popleft()
                batches = lay_out(chunks[0], parts, self._options.pad_id)
                for some in chunks[1:]:
                    batches += lay_out(some, next(found), self._options.pad_id)
                yield place, batches
        finally:
            found.close()
            planned.close()


def _chunks(specs: list[PackSpec]) -> Iterator[list[PackSpec]]:
    """Split a step's packs (all of one length) into parts of some ten thousand tokens, which are built at once."""
    count = max(1, _TOKENS_AT_ONCE // specs[0].seq_len)
    return (specs[i : i + count] for i in range(0, len(specs), count))

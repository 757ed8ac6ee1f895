"""The pack plan: which tokens stand in which pack, as a pure function of a seed and the document lengths.

1. The shards of an epoch are permuted by ``(seed, epoch)``.
2. A *window* is the next shards until they hold ``window_tokens`` tokens.
3. Within a window the documents are permuted by ``(seed, epoch, window)``, laid into packs of ``seq_len`` tokens
   (:mod:`statex_dist.data.packing`), and the packs permuted.
4. The pack stream is the windows' packs one after the other, epoch after epoch, without end.

Every rank computes the same plan without communication, so the place in the stream is a few integers, and the packs
seen so far do not depend on the number of ranks. Where the sequence length changes inside a window, the rest of the
window is laid into packs of the new length. The place then also states how many packs of which length came before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from statex_dist.data.packing.registry import find_packing
from statex_dist.data.store import ShardStore
from statex_dist.data.window import PackReport, WindowPlan, arrange, permutation
from statex_dist.errors import CheckpointError, ConfigError, DataError

PLAN_VERSION = 2
LONG_DOCUMENTS = ("restart", "carry")
_KEPT_WINDOWS = 4


class Cursor(NamedTuple):
    """A place in the pack stream: the next pack to be read.

    Attributes:
        epoch: Epoch.
        window: Window of the epoch.
        taken: What has been taken of the window: ``(seq_len, packs)`` for each length in turn.
    """

    epoch: int = 0
    window: int = 0
    taken: tuple[tuple[int, int], ...] = ()

    def at_length(self, seq_len: int) -> Cursor:
        """Return the same place, ready for packs of ``seq_len``."""
        if self.taken and self.taken[-1][0] == seq_len:
            return self
        return self._replace(taken=(*(run for run in self.taken if run[1]), (seq_len, 0)))


class _Epoch(NamedTuple):
    """The windows of an epoch: the shards of each, in the order of the plan; the tokens before each, and in all."""

    windows: list[np.ndarray]
    tokens_before: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlanOptions:
    """How documents are shuffled and packed.

    Attributes:
        seed: Seed of every permutation.
        packing: A strategy of :mod:`statex_dist.data.packing.registry`.
        tail: ``"pad"``, or ``"split"``: cut a few documents so that nearly nothing is padded.
        window_tokens: Tokens planned (and shuffled) at once.
        long_documents: ``"restart"``: a piece of a cut document is like a document of its own; ``"carry"``: it begins a
            pack that stands ``lanes`` places after the one where the document was cut, so that its state can be
            carried over.
    """

    seed: int = 0
    packing: str = "best_fit"
    tail: str = "pad"
    window_tokens: int = 1 << 26
    long_documents: str = "restart"

    def __post_init__(self) -> None:
        if self.window_tokens < 1:
            raise ConfigError(f"window_tokens is {self.window_tokens}; it must be at least 1")
        find_packing(self.packing, self.tail)
        if self.long_documents not in LONG_DOCUMENTS:
            allowed = ", ".join(LONG_DOCUMENTS)
            raise ConfigError(f"long_documents is {self.long_documents!r}; allowed: {allowed}")


class PackPlan:
    """The pack stream of a store.

    Args:
        store: The documents; only their lengths are used here.
        options: How they are shuffled and packed.
        lanes: Packs of a global step; only used, and then fixed for a run, with ``long_documents="carry"``.
    """

    def __init__(self, store: ShardStore, options: PackPlanOptions | None = None, *, lanes: int = 1):
        options = options or PackPlanOptions()
        self.store = store
        self.carry = options.long_documents == "carry"
        self._seed = options.seed
        self._window_tokens = options.window_tokens
        self._split_tails = options.tail == "split"
        self._lay_out = find_packing(options.packing).lay_out
        self._lanes = lanes if self.carry else 1
        self.settings = {"data": store.fingerprint, **asdict(options), "lanes": self._lanes}
        self.hash = blake2b(repr((PLAN_VERSION, sorted(self.settings.items()))).encode(), digest_size=16).hexdigest()
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[Any, ...], WindowPlan] = OrderedDict()

    def num_windows(self, epoch: int) -> int:
        """Return the number of windows of ``epoch``."""
        return len(self.windows(epoch))

    def window(
        self, epoch: int, window: int, seq_len: int, *, earlier: tuple[tuple[int, int], ...] = (), offset: int = 0
    ) -> WindowPlan:
        """Return the packs of a window (the last few are kept).

        Args:
            epoch: Epoch.
            window: Window of the epoch.
            seq_len: Tokens of a pack.
            earlier: ``(seq_len, packs)`` that were taken from the window before, at other lengths.
            offset: Places of the global step that are taken by what came before; only used to carry states.

        Raises:
            DataError: The window's shards hold no token.
        """
        key = (epoch, window, seq_len, earlier, offset if self.carry else 0)
        # Looked up once: the loader's thread and its owner share these caches, and either may drop an entry.
        plan = self._windows.get(key)
        if plan is None:
            plan = self._windows[key] = self._plan(*key)
            if len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return plan

    def take(self, cursor: Cursor, count: int, seq_len: int) -> tuple[list[tuple[WindowPlan, int]], Cursor]:
        """Return the next ``count`` packs of the stream as ``(window plan, pack)`` and the place after them.

        Args:
            cursor: The place to begin at; with carried states, the begin of a global step.
            count: Packs; with carried states, all of a global step.
            seq_len: Tokens of a pack.

        Raises:
            DataError: ``cursor`` lies outside the stream.
        """
        if seq_len < 1:
            raise ConfigError(f"seq_len is {seq_len}; it must be at least 1")
        taken: list[tuple[WindowPlan, int]] = []
        cursor = cursor.at_length(seq_len)
        offset = self._offset(cursor.taken)
        while len(taken) < count:
            earlier, pack = cursor.taken[:-1], cursor.taken[-1][1]
            plan = self.window(cursor.epoch, cursor.window, seq_len, earlier=earlier, offset=offset)
            if not 0 <= pack <= len(plan):
                raise DataError(f"no pack {pack} in window {cursor.window} of epoch {cursor.epoch} ({len(plan)} packs)")
            step = min(count - len(taken), len(plan) - pack)
            taken.extend((plan, pack + k) for k in range(step))
            pack += step
            cursor = cursor._replace(taken=(*earlier, (seq_len, pack)))
            if pack == len(plan):
                last = cursor.window + 1 == self.num_windows(cursor.epoch)
                cursor = Cursor(cursor.epoch + 1) if last else Cursor(cursor.epoch, cursor.window + 1)
                if len(taken) < count:
                    cursor, offset = cursor.at_length(seq_len), len(taken) % self._lanes
        return taken, cursor

    def check(self, cursor: Cursor) -> None:
        """Check that ``cursor`` lies in the stream.

        Raises:
            CheckpointError: It does not.
        """
        counts = [count for run in cursor.taken for count in run]
        if min(cursor.epoch, cursor.window, *counts, 0) < 0 or cursor.window >= self.num_windows(cursor.epoch):
            raise CheckpointError(f"the saved loader state points outside the data: {cursor}")

    def report(self, seq_len: int, epoch: int = 0, max_windows: int | None = None) -> PackReport:
        """Return what packing costs over the first ``max_windows`` windows of ``epoch`` (default: all of them)."""
        windows = self.num_windows(epoch) if max_windows is None else min(max_windows, self.num_windows(epoch))
        return PackReport.of((self.window(epoch, w, seq_len) for w in range(windows)), seq_len)

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Return the shards of each window of ``epoch``, in the order of the plan."""
        return self._epoch(epoch).windows

    def passes(self, cursor: Cursor) -> float:
        """Return how often the data has been seen at a place, exact to the token (2.5: half of the third epoch)."""
        if cursor == Cursor():
            return 0.0  # an unused source may be empty
        epoch = self._epoch(cursor.epoch)
        seen = epoch.tokens_before[cursor.window]
        for number, (seq_len, packs) in enumerate(cursor.taken):
            if packs:
                earlier, offset = cursor.taken[:number], self._offset(cursor.taken[: number + 1])
                plan = self.window(cursor.epoch, cursor.window, seq_len, earlier=earlier, offset=offset)
                seen += plan.tokens_before(min(packs, len(plan)))
        return cursor.epoch + seen / epoch.tokens_before[-1]

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            order = permutation(self.store.num_shards, self._seed, "shards", epoch)
            ends = np.cumsum([self.store.num_tokens(int(shard)) for shard in order])
            if not len(order) or ends[-1] == 0:
                raise DataError("the dataset holds no tokens; prepare it from non-empty documents")
            windows, before, begin = [], [0], 0
            while begin < len(order):
                done = int(ends[begin - 1]) if begin else 0
                stop = min(int(np.searchsorted(ends, done + self._window_tokens)) + 1, len(order))
                if ends[-1] == ends[stop - 1]:
                    stop = len(order)  # shards without tokens at the end are no window of their own
                windows.append(order[begin:stop])
                before.append(int(ends[stop - 1]))
                begin = stop
            found = self._epochs[epoch] = _Epoch(windows, before)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def _plan(
        self, epoch: int, window: int, seq_len: int, earlier: tuple[tuple[int, int], ...], offset: int
    ) -> WindowPlan:
        purpose = (epoch, window, *(count for run in earlier for count in run))
        spans = self._left_over(epoch, window, earlier) if earlier else self._documents(epoch, window)
        order = permutation(len(spans), self._seed, "documents", *purpose)
        spans = spans[order[spans[order, 3] > spans[order, 2]]]
        if not len(spans):
            # Every pack of the window was taken at the lengths before.
            return WindowPlan(seq_len, np.zeros(1, np.int64), spans, np.zeros(0, bool))
        length = spans[:, 3] - spans[:, 2]
        pieces = self._lay_out(length, seq_len, split_tails=self._split_tails, chained=self.carry)
        used = np.bincount(pieces.pack, weights=pieces.stop - pieces.start)
        if used.sum() != length.sum() or used.max() > seq_len:
            raise ConfigError(f"packing {self.settings['packing']!r} loses tokens or overfills packs; correct it")
        rank = np.empty(len(used), np.int64)
        rank[permutation(len(used), self._seed, "packs", *purpose)] = np.arange(len(used))
        bounds, order, carried = arrange(pieces, rank, lanes=self._lanes if self.carry else None, offset=offset)
        table = spans[pieces.span[order]]
        table[:, 3] = table[:, 2] + pieces.stop[order]
        table[:, 2] += pieces.start[order]
        return WindowPlan(seq_len, bounds, table, carried)

    def _documents(self, epoch: int, window: int) -> np.ndarray:
        """Whole documents as spans ``[n, 5]``: shard, document, first token, one past the last, document length."""
        shards = self.windows(epoch)[window]
        lengths = [self.store.lengths(int(shard)) for shard in shards]
        length = np.concatenate(lengths)
        shard = np.repeat(shards, [len(part) for part in lengths])
        document = np.concatenate([np.arange(len(part)) for part in lengths])
        return np.stack([shard, document, np.zeros_like(length), length, length], 1)

    def _offset(self, taken: tuple[tuple[int, int], ...]) -> int:
        """Return where in its row the last run of ``taken`` began.

        A step begins at place 0, and so does a run at another length. The begin of a window's first run follows from
        the number of packs that this run has had when a step begins.
        """
        return -taken[-1][1] % self._lanes if len(taken) == 1 else 0

    def _left_over(self, epoch: int, window: int, earlier: tuple[tuple[int, int], ...]) -> np.ndarray:
        """Return the spans of the window that the packs taken so far leave; neighbouring pieces are joined again."""
        (seq_len, packs), before = earlier[-1], earlier[:-1]
        return self.window(epoch, window, seq_len, earlier=before, offset=self._offset(earlier)).left_over(packs)

"""The pack plan: which tokens stand in which pack, as a pure function of a seed and the document lengths.

1. The shards of an epoch are permuted by ``(seed, epoch)``.
2. A *window* is the next shards until they hold ``window_tokens`` tokens.
3. Within a window the documents are permuted by ``(seed, epoch, window)``, laid into packs of ``seq_len`` tokens
   (:mod:`statex_dist.data.packing`), and the packs permuted.
4. The pack stream is the windows' packs one after the other, epoch after epoch, without end.

Every rank computes the same plan without communication, so the place in the stream is a few integers, and what has
been seen does not depend on the number of ranks. Where the sequence length changes inside a window, what is left of the
window is laid into packs of the new length: the place then also says how many packs of which length went before.
Permutations sort the raw output of Philox, keyed by a hash of their purpose; unlike ``Generator.permutation``, numpy
promises that stream never to change.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from statex_dist.data.packing import Pieces, arrange, best_fit, concatenate, one_document
from statex_dist.data.store import ShardStore
from statex_dist.errors import CheckpointError, ConfigError, DataError

PLAN_VERSION = 2
PACKINGS = ("best_fit", "concat", "one_document")
TAILS = ("pad", "split")
LONG_DOCUMENTS = ("restart", "carry")
_KEPT_WINDOWS = 4


def permutation(n: int, seed: int, *purpose: str | int) -> np.ndarray:
    """Return a permutation of ``n`` numbers, ``[n]`` int64, that depends on nothing but the arguments."""
    key = blake2b(repr((seed, *purpose)).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    return np.argsort(raw, kind="stable")


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


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The packs of one window; pack ``p`` consists of pieces ``bounds[p]..bounds[p + 1]``.

    Attributes:
        seq_len: Tokens of a pack, padding included.
        bounds: ``[packs + 1]``, the first piece of each pack.
        shard: ``[pieces]``, shard of each piece.
        document: ``[pieces]``, its document in the shard.
        start: ``[pieces]``, its first token in the document.
        stop: ``[pieces]``, one past its last token.
        length: ``[pieces]``, tokens of the whole document.
        carried: ``[packs]`` bool, whether the pack goes on where the one before it in its lane ends.
    """

    seq_len: int
    bounds: np.ndarray
    shard: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    length: np.ndarray
    carried: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, pack: int) -> list[tuple[int, int, int, int, int]]:
        """Return ``(shard, document, start, stop, document length)`` of each piece of ``pack``, in order."""
        part = slice(int(self.bounds[pack]), int(self.bounds[pack + 1]))
        columns = (self.shard, self.document, self.start, self.stop, self.length)
        return list(zip(*(column[part].tolist() for column in columns), strict=True))

    def tokens(self, pack: int) -> int:
        """Return the tokens of ``pack``, padding not counted."""
        part = slice(int(self.bounds[pack]), int(self.bounds[pack + 1]))
        return int((self.stop[part] - self.start[part]).sum())

    def tokens_before(self, pack: int) -> int:
        """Return the tokens of all packs before ``pack``."""
        part = slice(0, int(self.bounds[pack]))
        return int((self.stop[part] - self.start[part]).sum())


class _Epoch(NamedTuple):
    """The windows of an epoch: the shards of each, in the order of the plan; the tokens before each, and in all."""

    windows: list[np.ndarray]
    tokens_before: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What packing costs.

    Attributes:
        seq_len: Tokens of a pack, padding included.
        windows: Windows counted.
        packs: Packs in them.
        pieces: Segments in them, padding not counted.
        documents: Documents in them.
        cut_documents: Documents cut into several pieces.
        tokens: Tokens in them, padding not counted.
    """

    seq_len: int
    windows: int
    packs: int
    pieces: int
    documents: int
    cut_documents: int
    tokens: int

    @property
    def waste(self) -> float:
        """Fraction of all positions that is padding."""
        return 1.0 - self.tokens / (self.packs * self.seq_len)

    @property
    def documents_per_pack(self) -> float:
        """Mean number of whole or cut documents in a pack."""
        return self.pieces / self.packs


class PackPlan:
    """The pack stream of a store.

    Args:
        store: The documents; only their lengths are used here.
        seed: Seed of every permutation.
        packing: ``"best_fit"`` (cut only what is longer than a pack), ``"concat"`` (no padding, cut anywhere) or
            ``"one_document"`` (every piece in a pack of its own).
        tail: ``"pad"``, or ``"split"``: with ``best_fit``, cut a few documents so that nearly nothing is padded.
        window_tokens: Tokens planned (and shuffled) at once.
        long_documents: ``"restart"``: a piece of a cut document is like a document of its own; ``"carry"``: it begins a
            pack that stands ``lanes`` places after the one where the document was cut, so that its state can be
            carried over.
        lanes: Packs of a global step; only used, and then fixed for a run, with ``"carry"``.

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(
        self,
        store: ShardStore,
        *,
        seed: int = 0,
        packing: str = "best_fit",
        tail: str = "pad",
        window_tokens: int = 1 << 26,
        long_documents: str = "restart",
        lanes: int = 1,
    ):
        if window_tokens < 1:
            raise ConfigError(f"window_tokens is {window_tokens}; it must be at least 1")
        for name, value, allowed in (
            ("packing", packing, PACKINGS),
            ("tail", tail, TAILS),
            ("long_documents", long_documents, LONG_DOCUMENTS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if tail == "split" and packing != "best_fit":
            raise ConfigError(f"tail 'split' is for packing 'best_fit', not {packing!r}; leave it at 'pad'")
        self.store = store
        self.seed = seed
        self.packing = packing
        self.tail = tail
        self.window_tokens = window_tokens
        self.carry = long_documents == "carry"
        self._lanes = lanes if self.carry else 1
        self.settings = {
            "data": store.fingerprint,
            "seed": seed,
            "packing": packing,
            "tail": tail,
            "window_tokens": window_tokens,
            "long_documents": long_documents,
            "lanes": self._lanes,
        }
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
        packs = pieces = documents = cut = tokens = 0
        for w in range(windows):
            plan = self.window(epoch, w, seq_len)
            packs += len(plan)
            pieces += len(plan.shard)
            documents += int((plan.start == 0).sum())
            cut += int(((plan.start == 0) & (plan.stop < plan.length)).sum())
            tokens += int((plan.stop - plan.start).sum())
        return PackReport(
            seq_len=seq_len,
            windows=windows,
            packs=packs,
            pieces=pieces,
            documents=documents,
            cut_documents=cut,
            tokens=tokens,
        )

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
            order = permutation(self.store.num_shards, self.seed, "shards", epoch)
            ends = np.cumsum([self.store.num_tokens(int(shard)) for shard in order])
            if not len(order) or ends[-1] == 0:
                raise DataError("the dataset holds no tokens; prepare it from non-empty documents")
            windows, before, begin = [], [0], 0
            while begin < len(order):
                done = int(ends[begin - 1]) if begin else 0
                stop = min(int(np.searchsorted(ends, done + self.window_tokens)) + 1, len(order))
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
        order = permutation(len(spans), self.seed, "documents", *purpose)
        shard, document, begin, end, length = spans[order[spans[order, 3] > spans[order, 2]]].T
        if not len(shard):
            # Every pack of the window was taken at the lengths before.
            nothing = np.zeros(0, np.int64)
            return WindowPlan(seq_len, np.zeros(1, np.int64), *(nothing,) * 5, np.zeros(0, bool))
        pieces = self._lay_out(end - begin, seq_len)
        num_packs = int(pieces.pack.max()) + 1
        rank = np.empty(num_packs, np.int64)
        rank[permutation(num_packs, self.seed, "packs", *purpose)] = np.arange(num_packs)
        bounds, order, carried = arrange(pieces, rank, lanes=self._lanes if self.carry else None, offset=offset)
        span = pieces.span[order]
        return WindowPlan(
            seq_len,
            bounds,
            shard[span],
            document[span],
            begin[span] + pieces.start[order],
            begin[span] + pieces.stop[order],
            length[span],
            carried,
        )

    def _lay_out(self, length: np.ndarray, seq_len: int) -> Pieces:
        if self.packing == "concat":
            return concatenate(length, seq_len)
        if self.packing == "one_document":
            return one_document(length, seq_len)
        return best_fit(length, seq_len, split_tails=self.tail == "split", chained=self.carry)

    def _documents(self, epoch: int, window: int) -> np.ndarray:
        """Whole documents as spans ``[n, 5]``: shard, document, first token, one past the last, document length."""
        shards = self.windows(epoch)[window]
        lengths = [self.store.lengths(int(shard)) for shard in shards]
        length = np.concatenate(lengths)
        shard = np.repeat(shards, [len(part) for part in lengths])
        document = np.concatenate([np.arange(len(part)) for part in lengths])
        return np.stack([shard, document, np.zeros_like(length), length, length], 1)

    def _offset(self, taken: tuple[tuple[int, int], ...]) -> int:
        """Where in its row the last run of ``taken`` began.

        A step begins at place 0, and so does a run at another length; the packs that the first run of a window has had
        by the begin of a step tell where it began itself.
        """
        return -taken[-1][1] % self._lanes if len(taken) == 1 else 0

    def _left_over(self, epoch: int, window: int, earlier: tuple[tuple[int, int], ...]) -> np.ndarray:
        """What the packs taken so far have left of the window, as spans; neighbouring pieces are joined again."""
        (seq_len, packs), before = earlier[-1], earlier[:-1]
        plan = self.window(epoch, window, seq_len, earlier=before, offset=self._offset(earlier))
        part = slice(int(plan.bounds[min(packs, len(plan))]), None)
        columns = (plan.shard, plan.document, plan.start, plan.stop, plan.length)
        pieces = np.stack([column[part] for column in columns], 1)
        pieces = pieces[np.lexsort((pieces[:, 2], pieces[:, 1], pieces[:, 0]))]
        begins = np.ones(len(pieces), bool)
        begins[1:] = (pieces[1:, :2] != pieces[:-1, :2]).any(1) | (pieces[1:, 2] != pieces[:-1, 3])
        spans = pieces[begins]
        if len(spans):
            spans[:, 3] = pieces[np.append(np.flatnonzero(begins)[1:], len(pieces)) - 1, 3]
        return spans

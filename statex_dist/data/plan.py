"""The pack plan: which tokens stand in which pack, as a pure function of a seed and the document lengths.

1. The shards of an epoch are permuted by ``(seed, epoch)``.
2. A *window* is the next shards until they hold ``window_tokens`` tokens.
3. Within a window the documents are permuted by ``(seed, epoch, window)``, cut where longer than ``seq_len``, packed
   into sequences of ``seq_len``, and the packs permuted.
4. The pack stream is the windows' packs one after the other, epoch after epoch, without end.

Every rank computes the same plan without communication, so the place in the stream is three integers (epoch, window,
pack), and what has been seen does not depend on the number of ranks. Permutations sort the raw output of Philox, keyed
by a hash of their purpose; unlike ``Generator.permutation``, numpy promises that stream never to change.

Best-fit packing follows "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): a document is cut only where
it is longer than ``seq_len``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from statex_dist.data.store import ShardStore
from statex_dist.errors import CheckpointError, ConfigError, DataError

PLAN_VERSION = 1
PACKINGS = ("best_fit", "concat", "one_document")


def permutation(n: int, seed: int, *purpose: str | int) -> np.ndarray:
    """Return a permutation of ``n`` numbers, ``[n]`` int64, that depends on nothing but the arguments."""
    key = blake2b(repr((seed, *purpose)).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    return np.argsort(raw, kind="stable")


class Cursor(NamedTuple):
    """A place in the pack stream: the next pack to be read."""

    epoch: int = 0
    window: int = 0
    pack: int = 0


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The packs of one window; pack ``p`` consists of pieces ``bounds[p]..bounds[p + 1]``.

    Attributes:
        bounds: ``[packs + 1]``, the first piece of each pack.
        shard: ``[pieces]``, shard of each piece.
        document: ``[pieces]``, its document in the shard.
        start: ``[pieces]``, its first token in the document.
        stop: ``[pieces]``, one past its last token.
        length: ``[pieces]``, tokens of the whole document.
    """

    bounds: np.ndarray
    shard: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, pack: int) -> list[tuple[int, int, int, int, int]]:
        """Return ``(shard, document, start, stop, document length)`` of each piece of ``pack``, in order."""
        part = slice(int(self.bounds[pack]), int(self.bounds[pack + 1]))
        columns = (self.shard, self.document, self.start, self.stop, self.length)
        return list(zip(*(column[part].tolist() for column in columns), strict=True))


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
        seq_len: Tokens of a pack, ``>= 1``.
        seed: Seed of every permutation.
        packing: ``"best_fit"`` (cut only what is longer than a pack), ``"concat"`` (no padding, cut anywhere) or
            ``"one_document"`` (every piece in a pack of its own).
        window_tokens: Tokens planned (and shuffled) at once.

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(
        self, store: ShardStore, *, seq_len: int, seed: int = 0, packing: str = "best_fit", window_tokens: int = 1 << 26
    ):
        if seq_len < 1:
            raise ConfigError(f"seq_len is {seq_len}; it must be at least 1")
        if window_tokens < 1:
            raise ConfigError(f"window_tokens is {window_tokens}; it must be at least 1")
        if packing not in PACKINGS:
            raise ConfigError(f"packing is {packing!r}; allowed: {', '.join(PACKINGS)}")
        self.store = store
        self.seq_len = seq_len
        self.seed = seed
        self.packing = packing
        self.window_tokens = window_tokens
        self._settings = {
            "data": store.fingerprint,
            "seed": seed,
            "seq_len": seq_len,
            "packing": packing,
            "window_tokens": window_tokens,
        }
        self.hash = blake2b(repr((PLAN_VERSION, sorted(self._settings.items()))).encode(), digest_size=16).hexdigest()
        self._epochs: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], WindowPlan] = OrderedDict()

    def num_windows(self, epoch: int) -> int:
        """Return the number of windows of ``epoch``."""
        return len(self._epoch(epoch))

    def window(self, epoch: int, window: int) -> WindowPlan:
        """Return the packs of a window (the last two are kept).

        Raises:
            DataError: The window's shards hold no token.
        """
        key = (epoch, window)
        # Looked up once: the loader's thread and its owner share these caches, and either may drop an entry.
        plan = self._windows.get(key)
        if plan is None:
            plan = self._windows[key] = self._plan(epoch, window)
            if len(self._windows) > 2:
                self._windows.popitem(last=False)
        return plan

    def take(self, cursor: Cursor, count: int) -> tuple[list[tuple[WindowPlan, int]], Cursor]:
        """Return the next ``count`` packs of the stream as ``(window plan, pack)`` and the place after them.

        Raises:
            DataError: ``cursor`` lies outside the stream.
        """
        taken: list[tuple[WindowPlan, int]] = []
        epoch, window, pack = cursor
        while len(taken) < count:
            plan = self.window(epoch, window)
            if not 0 <= pack < len(plan):
                raise DataError(f"no pack {pack} in window {window} of epoch {epoch} (it has {len(plan)})")
            step = min(count - len(taken), len(plan) - pack)
            taken.extend((plan, pack + k) for k in range(step))
            pack += step
            if pack == len(plan):
                window, pack = window + 1, 0
                if window == self.num_windows(epoch):
                    epoch, window = epoch + 1, 0
        return taken, Cursor(epoch, window, pack)

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """Return ``cursor`` as a JSON-able loader state that says which plan it belongs to."""
        return {"version": PLAN_VERSION, **cursor._asdict(), "plan_hash": self.hash, **self._settings}

    def cursor(self, state: dict[str, Any]) -> Cursor:
        """Return the place that ``state`` (of :meth:`state`) marks.

        Raises:
            CheckpointError: It is not a loader state of this version.
            ConfigError: It belongs to another plan: other data, seed, length or packing.
        """
        wanted = {"version", "plan_hash", *Cursor._fields, *self._settings}
        if not isinstance(state, dict) or not wanted <= set(state):
            missing = ", ".join(sorted(wanted - set(state))) if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(f"not a loader state: it lacks {missing}")
        if state["version"] != PLAN_VERSION:
            raise CheckpointError(f"loader state of version {state['version']}; this release reads {PLAN_VERSION}")
        differing = [
            f"{name} was {state[name]!r}, now {now!r}" for name, now in self._settings.items() if state[name] != now
        ]
        if differing or state["plan_hash"] != self.hash:
            raise ConfigError(
                f"the saved loader state is of another pack plan: {'; '.join(differing) or 'plan_hash differs'}; "
                "restore the old values, or start the data from its beginning"
            )
        cursor = Cursor(*(int(state[name]) for name in Cursor._fields))
        if min(cursor) < 0 or cursor.window >= self.num_windows(cursor.epoch):
            raise CheckpointError(f"the saved loader state points outside the data: {cursor}")
        return cursor

    def report(self, epoch: int = 0, max_windows: int | None = None) -> PackReport:
        """Return what packing costs over the first ``max_windows`` windows of ``epoch`` (default: all of them)."""
        windows = self.num_windows(epoch) if max_windows is None else min(max_windows, self.num_windows(epoch))
        packs = pieces = documents = cut = tokens = 0
        for w in range(windows):
            plan = self.window(epoch, w)
            packs += len(plan)
            pieces += len(plan.shard)
            documents += int((plan.start == 0).sum())
            cut += int(((plan.start == 0) & (plan.stop < plan.length)).sum())
            tokens += int((plan.stop - plan.start).sum())
        return PackReport(
            seq_len=self.seq_len,
            windows=windows,
            packs=packs,
            pieces=pieces,
            documents=documents,
            cut_documents=cut,
            tokens=tokens,
        )

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The shards of each window of ``epoch``."""
        windows = self._epochs.get(epoch)
        if windows is None:
            order = permutation(self.store.num_shards, self.seed, "shards", epoch)
            ends = np.cumsum([self.store.num_tokens(int(shard)) for shard in order])
            if not len(order) or ends[-1] == 0:
                raise DataError("the dataset holds no tokens; prepare it from non-empty documents")
            windows, begin = [], 0
            while begin < len(order):
                done = int(ends[begin - 1]) if begin else 0
                stop = min(int(np.searchsorted(ends, done + self.window_tokens)) + 1, len(order))
                windows.append(order[begin:stop])
                begin = stop
            self._epochs[epoch] = windows
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return windows

    def _plan(self, epoch: int, window: int) -> WindowPlan:
        shards = self._epoch(epoch)[window]
        lengths = [self.store.lengths(int(shard)) for shard in shards]
        length = np.concatenate(lengths)
        shard = np.repeat(shards, [len(part) for part in lengths])
        document = np.concatenate([np.arange(len(part)) for part in lengths])
        order = permutation(len(length), self.seed, "documents", epoch, window)
        order = order[length[order] > 0]
        length, shard, document = length[order], shard[order], document[order]
        if not len(length):
            raise DataError(f"window {window} of epoch {epoch} holds no tokens; raise window_tokens")
        if self.packing == "concat":
            owner, start, stop, pack = _concatenate(length, self.seq_len)
        else:
            owner, start, stop = _cut(length, self.seq_len)
            pack = np.arange(len(owner)) if self.packing == "one_document" else _best_fit(stop - start, self.seq_len)
        num_packs = int(pack.max()) + 1
        rank = np.empty(num_packs, np.int64)
        rank[permutation(num_packs, self.seed, "packs", epoch, window)] = np.arange(num_packs)
        # Stable: inside a pack the pieces keep the order of the document shuffle, not the packer's order by length.
        order = np.argsort(rank[pack], kind="stable")
        owner, start, stop = owner[order], start[order], stop[order]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(pack, minlength=num_packs)[np.argsort(rank)])])
        return WindowPlan(bounds, shard[owner], document[owner], start, stop, length[owner])


def _cut(length: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most ``seq_len``: ``(document, start, stop)``, each ``[pieces]``."""
    count = -(-length // seq_len)
    owner = np.repeat(np.arange(len(length)), count)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)) * seq_len
    return owner, start, np.minimum(start + seq_len, length[owner])


def _concatenate(length: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lay documents end to end and cut every ``seq_len``: ``(document, start, stop, pack)``, each ``[pieces]``."""
    ends = np.cumsum(length)
    begin = ends - length
    at = np.union1d(begin, np.arange(0, ends[-1], seq_len))
    owner = np.searchsorted(begin, at, side="right") - 1
    stop = np.concatenate([at[1:], ends[-1:]]) - begin[owner]
    return owner, at - begin[owner], stop, at // seq_len


def _best_fit(size: np.ndarray, seq_len: int) -> np.ndarray:
    """Assign pieces, longest first, to the fullest pack that still has room: ``[pieces]`` pack numbers.

    Packs with the same room are interchangeable, so the search runs over the distinct rooms only: a sorted list that
    holds at most ``seq_len`` numbers, however many packs are open.
    """
    order = np.argsort(-size, kind="stable")
    pack = np.empty(len(size), np.int64)
    rooms: list[int] = []
    open_packs: dict[int, list[int]] = {}
    num_packs = 0
    assigned = []
    for n in size[order].tolist():
        k = bisect_left(rooms, n)
        if k == len(rooms):
            chosen, room = num_packs, seq_len - n
            num_packs += 1
        else:
            room = rooms[k]
            chosen = open_packs[room].pop()
            if not open_packs[room]:
                del rooms[k], open_packs[room]
            room -= n
        if room:
            if room not in open_packs:
                insort(rooms, room)
                open_packs[room] = []
            open_packs[room].append(chosen)
        assigned.append(chosen)
    pack[order] = assigned
    return pack

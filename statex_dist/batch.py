"""The packed batch: the loader makes it, the engine and the models read it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch

IGNORE_INDEX = -100
"""Label of a position that carries no loss (``torch.nn.functional.cross_entropy``'s default)."""


MAX_ORIGINS = 4
"""Number of pieces of a pack whose origin is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a piece of a pack comes from, for messages.

    Attributes:
        source: Name of the source.
        shard: What to call the shard.
        document: Its document in the shard.
        start: First token of the piece in the document.
        stop: One past its last token.
    """

    source: str
    shard: str
    document: int
    start: int
    stop: int

    def __str__(self) -> str:
        tokens = f"tokens {self.start} to {self.stop - 1}"
        return f"source {self.source}, shard {self.shard}, document {self.document}, {tokens}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One packed sequence of ``T`` tokens made of whole or cut documents.

    Attributes:
        input_ids: ``[1, T]`` int64.
        labels: ``[1, T]`` int64, already shifted: ``labels[0, t]`` is the token after ``input_ids[0, t]`` *in the same
            document*, or :data:`IGNORE_INDEX` at a document's end, in padding and where the loss is masked.
        position_ids: ``[1, T]`` int64, 0 at the first token of each segment.
        cu_seqlens: ``[N + 1]`` int32 segment borders; ``cu_seqlens[0] == 0`` and ``cu_seqlens[-1] == T``. Trailing
            padding is a segment of its own, so that it can never touch a document's state.
        seq_idx: ``[1, T]`` int32, the segment of each token, counted from 0 (mamba_ssm's form of the borders).
        loader_state: The loader's state *after* this batch: saving it resumes with the next one.
        carried: Whether the first segment continues where this lane's batch of the previous step ends, and begins with
            the state there. A lane is a place in the rank's list of batches.
        continues: Whether this lane's batch of the next step begins with the state at the end of this one.
        lost_tokens: Tokens of damaged shards that were skipped; padding stands in their place.
        origins: Where its first pieces come from, at most :data:`MAX_ORIGINS`.
        num_pieces: Pieces of documents in it.
        padding: Tokens at its end that are no text.
        dummy: Whether it stands in for a pack that this rank does not have: see :meth:`as_dummy`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    seq_idx: torch.Tensor
    loader_state: dict[str, Any] = field(default_factory=dict)
    carried: bool = False
    continues: bool = False
    lost_tokens: int = 0
    origins: tuple[Origin, ...] = ()
    num_pieces: int = 0
    padding: int = 0
    dummy: bool = False

    @property
    def num_tokens(self) -> int:
        """Length ``T`` of the packed sequence, padding included."""
        return self.input_ids.shape[1]

    @property
    def num_target_tokens(self) -> int:
        """Number of positions that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source after this batch's global step, by name."""
        return {name: source["passes"] for name, source in self.loader_state.get("sources", {}).items()}

    @property
    def where(self) -> str:
        """The origin of its first piece, and the number of further pieces; for messages."""
        if not self.origins:
            return "a pack of unknown origin"
        more = f" and {self.num_pieces - 1} more piece(s)" if self.num_pieces > 1 else ""
        return f"{self.origins[0]}{more}"

    def as_dummy(self) -> PackedBatch:
        """Return a pack of the same size that nothing is learned from.

        Where the packs of a step do not divide over the ranks, some ranks run one pack less. They run this in its
        place, because ZeRO gathers parameters on all ranks in every forward and backward pass. It has no target, so
        its loss and its gradient are exactly 0. The tokens do not matter; these are known to be in the vocabulary.
        """
        return replace(
            self,
            labels=torch.full_like(self.labels, IGNORE_INDEX),
            position_ids=torch.arange(self.num_tokens)[None],
            cu_seqlens=torch.tensor([0, self.num_tokens], dtype=torch.int32),
            seq_idx=torch.zeros_like(self.seq_idx),
            carried=False,
            continues=False,
            lost_tokens=0,
            origins=(),
            num_pieces=0,
            padding=0,
            dummy=True,
        )

    def slice(self, start: int, stop: int) -> PackedBatch:
        """Return the tokens ``start .. stop`` of this batch; ``carried`` and ``continues`` mark cut segments."""
        marks = self.cu_seqlens
        inside = marks[(marks > start) & (marks < stop)] - start
        ends = [inside.new_zeros(1), inside, inside.new_full((1,), stop - start)]
        places = (slice(None), slice(start, stop))
        return replace(
            self,
            input_ids=self.input_ids[places],
            labels=self.labels[places],
            position_ids=self.position_ids[places],
            cu_seqlens=torch.cat(ends),
            seq_idx=self.seq_idx[places] - self.seq_idx[:, start : start + 1],
            carried=self.carried if start == 0 else not bool((marks == start).any()),
            continues=self.continues if stop == self.num_tokens else not bool((marks == stop).any()),
            padding=min(stop - start, max(0, stop - self.num_tokens + self.padding)),
        )

    def segments(self, num_tokens: int) -> list[PackedBatch]:
        """Return the batch cut into equal pieces of at most ``num_tokens`` tokens; 0 leaves it whole."""
        count = num_segments(self.num_tokens, num_tokens)
        borders = [index * self.num_tokens // count for index in range(count + 1)]
        return [self.slice(start, stop) for start, stop in itertools.pairwise(borders)]

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on ``device``."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "seq_idx")
        }
        return replace(self, **moved)


def pack_range(num_packs: int, rank: int, num_ranks: int) -> range:
    """Return which packs of a global step a rank runs: neighbours, and at most one more than any other rank.

    Args:
        num_packs: Packs of the step.
        rank: The data-parallel rank.
        num_ranks: Number of data-parallel ranks.
    """
    return range(rank * num_packs // num_ranks, (rank + 1) * num_packs // num_ranks)


def most_packs(num_packs: int, num_ranks: int) -> int:
    """Return how many packs of a step the rank with most of them runs: the number of passes of every rank."""
    return -(-num_packs // num_ranks)


def num_segments(total: int, num_tokens: int) -> int:
    """Return how many segments of at most ``num_tokens`` tokens a pack of ``total`` is run in; 0 is one."""
    return -(-total // num_tokens) if num_tokens else 1

"""The length of the longest text that a model reads in training without its state being emptied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from statex_dist.data.mixture import Stage
from statex_dist.data.store import ShardStore


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedLength:
    """Longest text by steps: the longest document of the sources that are read, cut at the length of a pack.

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

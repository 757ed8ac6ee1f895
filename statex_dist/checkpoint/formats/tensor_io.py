"""The one logical layer of all readers: named tensors, each a list of pieces that lie in files.

A source knows shape, dtype and pieces of every tensor before it reads any, a target knows the same of every tensor that
it will get; whatever the two layouts are, the copy is one and the same, and memory is bounded by buffers, never by a
tensor or the model. Layouts are the rows of ``registry``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from statex_dist.checkpoint.dtypes import ITEM_BYTES
from statex_dist.checkpoint.formats.raw_io import FileState, ReadAhead
from statex_dist.checkpoint.layout import CONFIG_NAME

if TYPE_CHECKING:
    from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Name, shape and dtype (a key of :data:`statex_dist.checkpoint.dtypes.ITEM_BYTES`) of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.numel * self.item_bytes


class Piece(NamedTuple):
    """Part of a tensor whose values lie one after the other in a file.

    The tensor is seen as a matrix with rows of ``width`` elements; the piece is its rows ``start .. stop``, of which
    the columns ``first .. last``. Most pieces are runs of the flattened tensor: rows of one element.

    Attributes:
        path: The file.
        offset: Byte at which the values begin.
        start: First row.
        stop: Row after the last.
        width: Elements of a row of the tensor.
        first: First column.
        last: Column after the last.
    """

    path: Path
    offset: int
    start: int
    stop: int
    width: int = 1
    first: int = 0
    last: int = 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return (self.stop - self.start) * (self.last - self.first)


@dataclass(frozen=True, slots=True)
class Held:
    """Part of a tensor whose values are in memory: elements ``start`` and on of the flattened tensor."""

    start: int
    data: bytes


Pieces = Sequence[Piece | Held]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements ``start .. stop`` of a stored tensor, which are shown as a tensor of their own."""

    stored: str
    start: int
    stop: int

    def cut(self, piece: Piece | Held, item_bytes: int) -> Pieces:
        """Return what lies in the stretch of a piece of the stored tensor, as a piece of the shown one.

        Args:
            piece: A part of the stored tensor, whose rows lie in the stretch or outside.
            item_bytes: Bytes of an element.
        """
        if isinstance(piece, Held):
            first, last = max(self.start - piece.start, 0), self.stop - piece.start
            data = piece.data[first * item_bytes : max(last, 0) * item_bytes]
            return [Held(piece.start + first - self.start, data)] if data else []
        assert self.start % piece.width == 0 == self.stop % piece.width, (self, piece)
        begin, end = self.start // piece.width, self.stop // piece.width
        first, last = max(piece.start, begin), min(piece.stop, end)
        if first >= last:
            return []
        offset = piece.offset + (first - piece.start) * (piece.last - piece.first) * item_bytes
        return [piece._replace(offset=offset, start=first - begin, stop=last - begin)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """Facts about a checkpoint besides its tensors.

    Attributes:
        kind: ``hf`` (safetensors), ``torch`` (``pytorch_model*.bin``), ``zero3`` (DeepSpeed), ``plain`` (one process,
            no DeepSpeed), ``tp`` (tensor-parallel shards) or ``megatron`` (torch_dist).
        path: Directory of the weight files.
        model_dir: Directory with ``config.json`` and tokenizer files; None if the checkpoint has none.
        verified: Whether there is a manifest. Every byte that is read is then compared with its digests.
        info: Facts of the writer: step, world size, manifest entries.
        digests: xxh3-128 of tensors by name, from the manifest.
        state_digests: The same of the optimizer's states, by their names.
        notes: Messages for the user: which parts were left out, which of two files is read.
        config: Contents of a ``config.json`` that a run has under another name; None where ``model_dir`` has it.
    """

    kind: str
    path: Path
    model_dir: Path | None
    verified: bool
    info: dict[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    state_digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None

    def with_notes(self, *notes: str | None) -> SourceFacts:
        """Return the facts with further notes; None is none."""
        return replace(self, notes=(*self.notes, *(note for note in notes if note)))

    @classmethod
    def of_directory(cls, kind: str, directory: Path) -> SourceFacts:
        """Return what is known of a model directory without a manifest."""
        model_dir = directory if (directory / CONFIG_NAME).is_file() else None
        return cls(kind=kind, path=directory, model_dir=model_dir, verified=False)


class TensorSource(ABC):
    """A checkpoint, open for reading; it may be read by several threads.

    Attributes:
        facts: What is known about the checkpoint.
        files: The weight files.
        opened: What each of them was when the checkpoint was opened: one that has changed since is refused.
        ahead: Fetches ahead what is read of the files.
        aliases: Tied names, each with the name that owns the values; both are among :meth:`keys`.
        buffers: Names of tensors that are no parameters, as far as the layout knows.
        prefix: What was stripped of the stored names.
        frozen_excluded: Whether it was saved without its frozen parameters, and nothing fills them in.
        has_values: Whether tensors can be read; else it was opened to be described.
        in_parts: Whether tensors may be stored in parts, which the model's family joins.
    """

    frozen_excluded = False
    has_values = True
    in_parts = False

    def __init__(
        self,
        facts: SourceFacts,
        infos: Mapping[str, TensorInfo],
        files: Sequence[Path],
        *,
        aliases: Mapping[str, str] | None = None,
        buffers: Iterable[str] = (),
    ):
        self.facts = facts
        self.files = list(files)
        self.opened = {path: FileState.of(path.stat()) for path in files}
        self.ahead = ReadAhead(len(self.files))
        self.aliases = dict(aliases or {})
        self.buffers = frozenset(buffers)
        self.prefix = ""
        self._infos = dict(infos)
        self._stretches: dict[str, Stretch] = {}
        self._undivided: tuple[dict[str, TensorInfo], dict[str, str], frozenset[str], SourceFacts] | None = None

    @property
    def is_divided(self) -> bool:
        """Whether tensors are shown under other names than those that are stored, or in parts (:meth:`divide`)."""
        return bool(self._stretches)

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the checkpoint's order."""
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def owned(self) -> list[str]:
        """Return the names that do not only point to another tensor."""
        return [name for name in self._infos if name not in self.aliases]

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor without reading it."""
        return self._infos[name]

    def natural_dtype(self, name: str) -> str:
        """Return the dtype in which a tensor is exported where nothing else is asked for."""
        return self.info(name).dtype

    def pieces(self, name: str) -> Pieces:
        """Return where the values of a tensor lie: every element once, in the order of :attr:`Piece.start`."""
        if stretch := self._stretches.get(name):
            pieces = self.stored_pieces(self.prefix + stretch.stored)
            return [cut for piece in pieces for cut in stretch.cut(piece, self.info(name).item_bytes)]
        return self.stored_pieces(self.prefix + name)

    @abstractmethod
    def stored_pieces(self, name: str) -> Pieces:
        """Return the pieces of a tensor by the name that the files have."""

    def replicas(self, name: str) -> Sequence[Piece]:
        """Return further places that must hold the same values as :meth:`pieces` (tensor parallelism repeats some)."""
        if stretch := self._stretches.get(name):
            found = [
                stretch.cut(p, self.info(name).item_bytes) for p in self.stored_replicas(self.prefix + stretch.stored)
            ]
            return [cut for cuts in found for cut in cuts if isinstance(cut, Piece)]
        return self.stored_replicas(self.prefix + name)

    def stored_replicas(self, name: str) -> Sequence[Piece]:
        """Return the replicas of a tensor by the name that the files have."""
        return ()

    def strip(self, prefix: str) -> None:
        """Take a prefix off the names of all tensors, the optimizer's states and the manifest's digests."""
        count = len(prefix)
        assert not self.prefix
        assert all(name.startswith(prefix) for name in self._infos)
        self.prefix = prefix
        self._infos = {name[count:]: replace(info, name=name[count:]) for name, info in self._infos.items()}
        self.aliases = {alias[count:]: owner[count:] for alias, owner in self.aliases.items()}
        self.buffers = frozenset(name[count:] for name in self.buffers)
        digests = {name.removeprefix(prefix): digest for name, digest in self.facts.digests.items()}
        self.facts = replace(self.facts, digests=digests)
        for state in self.states().values():
            state.strip(prefix)

    def divide(self, parts: Mapping[str, Sequence[tuple[str, tuple[int, ...]]]]) -> None:
        """Show tensors as others, which are consecutive stretches of them; the optimizer's states too.

        A tensor of one part is renamed, with its digest. Of a tensor of several, digests are not known.

        Args:
            parts: Names and shapes of the parts of a tensor, in order, by its name; a tensor without an entry stays.
        """
        infos: dict[str, TensorInfo] = {}
        renamed: dict[str, str] = {}
        self._undivided = self._infos, self.aliases, self.buffers, self.facts
        for name, info in self._infos.items():
            position = 0
            for part, shape in parts.get(name, [(name, info.shape)]):
                made = replace(info, name=part, shape=shape)
                infos[part] = made
                if part != name:
                    self._stretches[part] = Stretch(name, position, position + made.numel)
                if made.numel == info.numel:
                    renamed[name] = part
                position += made.numel
            assert position == info.numel, (name, info.shape)
        self._infos = infos
        self.aliases = {renamed[alias]: renamed[owner] for alias, owner in self.aliases.items()}
        self.buffers = frozenset(renamed[name] for name in self.buffers if name in renamed)
        digests = {renamed[name]: digest for name, digest in self.facts.digests.items() if name in renamed}
        self.facts = replace(self.facts, digests=digests)
        for state in self.states().values():
            state.divide({name: of for name, of in parts.items() if name in state})

    def join(self) -> None:
        """Show the tensors as they are stored again, after :meth:`divide`; the optimizer's states too."""
        if self._undivided is not None:
            self._infos, self.aliases, self.buffers, self.facts = self._undivided
            self._stretches, self._undivided = {}, None
        for state in self.states().values():
            state.join()

    def archives(self) -> Iterable[TorchArchive]:
        """Return the ``torch.save`` files among :attr:`files`: they carry checksums of their own."""
        return ()

    def states(self) -> Mapping[str, TensorSource]:
        """Return what the optimizer remembers of the parameters, by its names (``exp_avg``), as further sources."""
        return {}

    def of_state(self, state: str | None) -> TensorSource:
        """Return one of :meth:`states`, or, for None, the weights themselves."""
        return self if state is None else self.states()[state]


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Return the bytes of all tensors together."""
    return sum(info.nbytes for info in infos)

"""Names of a model of transformers in memory, and those in its files.

transformers renames tensors when it loads a model, and joins others: the experts of a layer are one tensor in memory
and one each in the files. ``save_pretrained`` reverts it. Files have the names of the hub; a ZeRO checkpoint has those
of memory. Every joined tensor is its parts one after the other in memory order, so that nothing has to be transposed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from statex_dist.models.layout import Part


@dataclass(frozen=True, slots=True)
class Rename:
    """A pattern of names in memory, and its replacement in the files (both of :func:`re.sub`)."""

    memory: str
    file: str


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors of the files that are one in memory.

    Attributes:
        memory: Pattern of the name in memory, which ends in ``$``.
        parts: Names in the files, as replacements of :func:`re.sub`; ``{e}`` is the index along the first axis, where
            tensors of equal size are stacked.
        stacked: Whether they are stacked along a first axis of their own; else they are joined along it.
    """

    memory: str
    parts: tuple[str, ...]
    stacked: bool = True


@dataclass(frozen=True, slots=True)
class NameMap:
    """The rules of one host, in transformers' own order of its loading."""

    joined: tuple[Joined, ...] = ()
    renames: tuple[Rename, ...] = ()

    def parts(self, name: str, shape: Sequence[int], sizes: Sequence[int] = ()) -> list[Part]:
        """Return the tensors of the files that a tensor of memory consists of, in order.

        Args:
            name: Name in memory.
            shape: Shape in memory.
            sizes: Rows of the parts of a tensor that is joined along its first axis, where they are not equal.
        """
        shape = tuple(shape)
        for rule in self.joined:
            if not re.search(rule.memory, name):
                continue
            names = [re.sub(rule.memory, part, name) for part in rule.parts]
            if rule.stacked:
                one = (shape[1] // len(names), *shape[2:])
                return [
                    Part(self._renamed(part.replace("{e}", str(index))), one)
                    for index in range(shape[0])
                    for part in names
                ]
            rows = sizes or [shape[0] // len(names)] * len(names)
            return [Part(self._renamed(part), (size, *shape[1:])) for part, size in zip(names, rows, strict=True)]
        return [Part(self._renamed(name), shape)]

    def _renamed(self, name: str) -> str:
        for rule in self.renames:
            name = re.sub(rule.memory, rule.file, name)
        return name

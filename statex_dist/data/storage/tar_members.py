"""Where the documents of a tar are: one walk over its headers, which unpacks nothing and trusts nothing.

A sample is a run of members with one key (``KEY.tokens.npy``, ``KEY.loss_mask.npy``), as webdataset groups them: the
key ends at the first dot of the file name. A name is never used as a path, a member that is no regular file is passed
over, and an array's header is parsed without unpickling anything.

:mod:`tarfile` is used for single headers only: its own walk takes a damaged header in the middle of a file for the end
of the archive, which would quietly train on less.
"""

from __future__ import annotations

import logging
import mmap
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from statex_dist.data.columns import SHARD_REMEDY, refused_in_shards
from statex_dist.data.storage.npy import MAX_HEADER, parse_header
from statex_dist.data.storage.shards import TOKEN_DTYPES
from statex_dist.errors import DataError

log = logging.getLogger(__name__)

TOKENS_MEMBERS = ("tokens.npy", "input_ids.npy", "npy")
"""What holds a sample's tokens; the first that a sample has."""
LENGTHS_MEMBER = "lengths.npy"
LOSS_MASK_MEMBER = "loss_mask.npy"
_READ = (LENGTHS_MEMBER, LOSS_MASK_MEMBER)
_NAMED = 8

_BLOCK = tarfile.BLOCKSIZE
_SAMPLE_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
_META_NAME = re.compile(r"__[^/]*__/")
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
# Names and other attributes of a member; nothing that a tar writer makes is longer.
_MAX_EXTENSION = 1 << 20
_EMPTY_TYPES = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
    *(tarfile.DIRTYPE, tarfile.FIFOTYPE),
)
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


@dataclass(frozen=True, slots=True)
class MemberIndex:
    """The documents of one tar.

    Attributes:
        rows: ``[documents, 3]`` int64: byte at which the document's tokens begin, their number, and the byte at which
            its loss mask begins or -1 where it has none.
        dtype: Type of the tokens.
    """

    rows: np.ndarray
    dtype: str


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class _Array:
    dtype: np.dtype
    count: int
    begin: int


def scan_tar(path: Path, shown: Path | None = None) -> MemberIndex:
    """Find the documents of the tar at ``path``.

    Args:
        path: The tar, not compressed.
        shown: What messages call it, if it is the unpacked form of another file.

    Raises:
        DataError: It is no tar, truncated or damaged, or holds something else than one-dimensional token ids.
    """
    if not path.stat().st_size:
        raise DataError(f"{shown or path} is empty, not even an empty tar; restore it or write it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _TarScan(shown or path, content).run()


class _TarScan:
    """One walk over one tar."""

    def __init__(self, path: Path, content: mmap.mmap):
        self._path = path
        self._content = content

    def run(self) -> MemberIndex:
        parts: list[np.ndarray] = []
        dtype: str | None = None
        others: dict[str, str] = {}
        num_others = 0
        unused: set[str] = set()
        for key, members in self._samples():
            suffix = next((name for name in TOKENS_MEMBERS if name in members), None)
            if suffix is None:
                num_others += 1
                others |= dict.fromkeys(members, key)
                continue
            unused |= self._others(members, suffix)
            rows, found = self._documents(members, members[suffix])
            if dtype not in (None, found):
                raise self._wrong(members[suffix], f"holds {found}, the tar's other tokens are {dtype}; use one type")
            dtype = found
            parts.append(rows)
        wanted = ", ".join(TOKENS_MEMBERS)
        if num_others and not parts:
            named = ", ".join(sorted(others)[:_NAMED])
            raise DataError(
                f"{self._path}: no sample has tokens (allowed: {wanted}; there are: {named}); "
                "store token ids as one of them"
            )
        if num_others:
            log.warning("%s: %d samples without any of %s are left out", self._path, num_others, wanted)
        if unused:
            log.info("%s: members that are not used: %s", self._path, ", ".join(sorted(unused)[:_NAMED]))
        return MemberIndex(np.concatenate([*parts, np.zeros((0, 3), np.int64)]), dtype or TOKEN_DTYPES[0])

    def _samples(self) -> Iterator[tuple[str, dict[str, _Member]]]:
        """Runs of members with one key, by the rest of their names."""
        current: str | None = None
        members: dict[str, _Member] = {}
        for member in self._members():
            match = _SAMPLE_NAME.fullmatch(member.name)
            if match is None or _META_NAME.match(member.name):
                continue  # what webdataset passes over as well: no suffix, hidden, or its own metadata
            key, suffix = match[1], match[2].lower()
            if key != current:
                if current is not None:
                    yield current, members
                current, members = key, {}
            if suffix in members:
                raise self._wrong(member, "is there twice in one sample; write every member once")
            members[suffix] = member
        if current is not None:
            yield current, members

    def _members(self) -> Iterator[_Member]:
        """Regular files in stored order."""
        at = 0
        name: str | None = None
        size: int | None = None
        while True:
            block = self._content[at : at + _BLOCK]
            if len(block) < _BLOCK:
                raise self._truncated("it has no end-of-archive mark")
            if block.count(0) == _BLOCK:
                break
            header = self._header(block, at)
            begin = at + _BLOCK
            extends = header.type in (*_PAX_TYPES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
            stored = 0 if header.type in _EMPTY_TYPES else header.size if extends or size is None else size
            member = _Member(header.name if extends or name is None else name, begin, stored)
            if stored < 0:
                raise self._wrong(member, f"has a size of {stored} bytes; write the tar again")
            if begin + stored > len(self._content):
                raise self._truncated(f"member {member.name!r} of {stored} bytes at byte {begin} passes the end")
            at = begin + -(-stored // _BLOCK) * _BLOCK
            if extends:
                if stored > _MAX_EXTENSION:
                    raise self._wrong(member, f"has {stored} bytes of attributes; allowed: {_MAX_EXTENSION}")
                extension = self._content[begin : begin + stored]
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = extension.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
                elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                    attributes = self._pax_attributes(member, extension)
                    name = attributes.get("path", name)
                    size = int(attributes["size"]) if "size" in attributes else size
                continue
            name = size = None
            if header.type == tarfile.GNUTYPE_SPARSE:
                raise self._wrong(member, "is stored sparse; write the tar without --sparse")
            if header.type in tarfile.REGULAR_TYPES:
                yield member
        if np.frombuffer(self._content, np.uint8, offset=at).any():
            raise DataError(
                f"{self._path} goes on behind its end-of-archive mark at byte {at} (tars joined by cat?); "
                "give them as separate files"
            )

    def _header(self, block: bytes, at: int) -> tarfile.TarInfo:
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            what = "is not a tar file" if at == 0 else "is a damaged tar file"
            raise DataError(
                f"{self._path} {what} (no header at byte {at}: {error}); restore it or write it again"
            ) from error

    def _pax_attributes(self, member: _Member, extension: bytes) -> dict[str, str]:
        attributes: dict[str, str] = {}
        at = 0
        while at < len(extension):
            match = _PAX_RECORD.match(extension, at)
            end = at + int(match[1]) if match else 0
            if match is None or end <= match.end() or extension[end - 1 : end] != b"\n":
                raise self._wrong(member, "has unreadable attributes; write the tar again")
            key = match[2].decode("utf-8", "surrogateescape")
            attributes[key] = extension[match.end() : end - 1].decode("utf-8", "surrogateescape")
            at = end
        if any(key.startswith("GNU.sparse.") for key in attributes):
            raise self._wrong(member, "is stored sparse; write the tar without --sparse")
        if not re.fullmatch(r"[0-9]{1,18}", attributes.get("size", "0")):
            raise self._wrong(member, f"has a size of {attributes['size']!r} bytes; write the tar again")
        return attributes

    def _others(self, members: dict[str, _Member], tokens: str) -> set[str]:
        """Return the names of members that are not read; refuse those that could change the training."""
        others = {name: member for name, member in members.items() if name not in (tokens, *_READ)}
        for name, member in others.items():
            # A name with several parts names an array of a sample in any format: labels.npy, labels.pyd.
            if name in TOKENS_MEMBERS[:2] or refused_in_shards(name.split(".")[0]):
                raise self._wrong(member, f"{SHARD_REMEDY}")
            if name.endswith("npy") and self._is_per_token(member, members[tokens]):
                raise self._wrong(member, f"has a number for each token; it {SHARD_REMEDY}")
        return set(others)

    def _is_per_token(self, member: _Member, tokens: _Member) -> bool:
        count = self._array(tokens, TOKEN_DTYPES).count
        try:
            header = parse_header(self._content[member.begin : member.begin + min(member.size, MAX_HEADER)])
        except ValueError:
            return False
        return count > 1 and header.shape[:1] == (count,)

    def _documents(self, members: dict[str, _Member], member: _Member) -> tuple[np.ndarray, str]:
        """Rows of the index for one sample, and the type of its tokens."""
        tokens = self._array(member, TOKEN_DTYPES)
        lengths = np.array([tokens.count], np.int64)
        if LENGTHS_MEMBER in members:
            found = self._array(members[LENGTHS_MEMBER], (*TOKEN_DTYPES, "uint64"))
            stop = found.begin + found.count * found.dtype.itemsize
            lengths = np.frombuffer(self._content[found.begin : stop], found.dtype).astype(np.int64)
            if (lengths < 0).any() or (lengths > tokens.count).any() or lengths.sum() != tokens.count:
                raise self._wrong(
                    members[LENGTHS_MEMBER], f"does not add up to the {tokens.count} tokens of {member.name!r}"
                )
        first = np.cumsum(lengths) - lengths
        masks = np.full(len(lengths), -1, np.int64)
        if LOSS_MASK_MEMBER in members:
            mask = self._array(members[LOSS_MASK_MEMBER], ("uint8", "bool"))
            if mask.count != tokens.count:
                raise self._wrong(
                    members[LOSS_MASK_MEMBER], f"has {mask.count} entries for the {tokens.count} of {member.name!r}"
                )
            masks = mask.begin + first
        return np.stack([tokens.begin + first * tokens.dtype.itemsize, lengths, masks], 1), tokens.dtype.name

    def _array(self, member: _Member, allowed: tuple[str, ...]) -> _Array:
        try:
            header = parse_header(self._content[member.begin : member.begin + min(member.size, MAX_HEADER)])
        except ValueError as error:
            raise self._wrong(member, f"is not a readable npy array ({error}); write it with numpy.save") from error
        dtype, shape = header.dtype, header.shape
        if dtype.name not in allowed or dtype.newbyteorder("<") != dtype or len(shape) != 1:
            raise self._wrong(
                member,
                f"holds {dtype.str} of shape {shape}; allowed: one-dimensional little-endian {', '.join(allowed)}",
            )
        count = shape[0]
        if header.size + count * dtype.itemsize != member.size:
            raise self._wrong(
                member, f"claims {count} values of {dtype.name}, but has {member.size} bytes; write it again"
            )
        return _Array(dtype, count, member.begin + header.size)

    def _wrong(self, member: _Member, what: str) -> DataError:
        return DataError(f"{self._path}: member {member.name!r} {what}")

    def _truncated(self, what: str) -> DataError:
        return DataError(f"{self._path} is truncated ({what}); restore it or write it again")

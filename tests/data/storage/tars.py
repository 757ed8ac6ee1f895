"""Common parts of the tests of tar shards."""

from pathlib import Path

from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents


def read_all(path, cache=None):
    return list(sequential_documents(open_store(path, cache_dir=cache or path.parent / "cache")))


def flip(path: Path, at: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)

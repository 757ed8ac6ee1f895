"""Many shards in one window: what is open stays open, and is not looked at again for each other one."""

import resource
from pathlib import Path

import numpy as np
import pytest

from statex_dist.data.formats import open_store
from statex_dist.data.storage import disk_store
from statex_dist.data.storage.disk_store import max_open_shards
from statex_dist.errors import CorruptShardError, ShardError
from tests.data.synthetic import make_documents, write_mds

NUM_SHARDS = 300


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_mds(tmp_path_factory.mktemp("many") / "ds", make_documents([100] * NUM_SHARDS), shard_bytes=500)


@pytest.fixture
def store(path, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_store, "_STORES", type(disk_store._STORES)())  # those of other tests may live
    return open_store(path, cache_dir=tmp_path)


@pytest.fixture
def _soft_limit(monkeypatch):
    """Descriptors for 40 shards; this process keeps its own limits."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (80, 80))


def read_all(store):
    for shard in range(store.num_shards):
        store.read(shard, 0, 0, 100)


def test_each_shard_is_opened_once(store, monkeypatch):
    assert store.num_shards == NUM_SHARDS
    opened = []
    map_shard = store._open_shard
    monkeypatch.setattr(store, "_open_shard", lambda path, entry: opened.append(path) or map_shard(path, entry))
    for _ in range(3):
        read_all(store)
    assert len(opened) == store.num_shards


@pytest.mark.usefixtures("_soft_limit")
def test_what_is_opened_again_is_not_compared_again_nor_are_others_looked_at(store, monkeypatch):
    looked, compared = [], []
    used, lengths = store.files.used, store.lengths
    monkeypatch.setattr(store.files, "used", lambda shards: looked.append(len(shards)) or used(shards))
    monkeypatch.setattr(store, "lengths", lambda shard: compared.append(shard) or lengths(shard))
    for _ in range(3):
        read_all(store)
    assert len(store._open) == 40
    assert compared == list(range(store.num_shards))
    assert len(looked) < 20, "now and then, not for each shard"


def test_a_file_in_the_place_of_another_is_compared(store, tmp_path, monkeypatch):
    store.read(0, 0, 0, 100)
    monkeypatch.setattr(store, "lengths", lambda _: np.array([101]))
    store._open.clear()
    store.read(0, 0, 0, 100)  # the same file
    monkeypatch.setattr(disk_store, "_identity", lambda _: (0, 0, 0))
    store._open.clear()
    with pytest.raises(CorruptShardError, match="list of lengths"):
        store.read(0, 0, 0, 100)


def test_stores_share_the_descriptors(store, path, tmp_path, monkeypatch):
    limits = [1000, 3000]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(2), new))
    assert max_open_shards(500) == 500
    assert limits == [1000, 3000], "enough as they are"
    other = open_store(path, cache_dir=tmp_path)
    assert max_open_shards(500) == 750
    assert limits == [3000, 3000], "raised as far as is allowed"
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert 10_000 < max_open_shards(1) <= 1 << 15
    del other


def test_descriptors_that_are_used_up_are_no_damage(store, monkeypatch):
    def fail(path: Path, entry):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(store, "_open_shard", fail)
    with pytest.raises(ShardError, match="Too many open files") as caught:
        store.read(0, 0, 0, 1)
    assert not isinstance(caught.value, CorruptShardError)

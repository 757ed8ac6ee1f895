"""The cache that processes share: one download for all, kills, damage, a limit, a full disk, forks."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from statex_dist.data.formats import open_store
from statex_dist.data.mixture import Stage
from statex_dist.data.storage.cache import ShardCache
from statex_dist.errors import ConfigError, ShardError
from tests.data.options import make_loader
from tests.data.storage.loopback import serve, write_manifest
from tests.data.synthetic import all_documents, make_documents, write_mds

ROOT = Path(__file__).parents[3]
DOCUMENTS = make_documents([1900] * 12)  # two of them in each shard of 8 KiB
SHARD = "shard.00001.mds"

READER = """
import hashlib, logging, sys
from statex_dist.data.formats import open_store
from tests.data.options import make_loader
from tests.data.synthetic import all_documents
logging.basicConfig(level="WARNING")
options = dict(cache_dir=sys.argv[2], **eval(sys.argv[3]))
store = open_store(sys.argv[1], **options)
digest = hashlib.sha1()
for _ in range(int(sys.argv[4])):
    for document in all_documents(store):
        digest.update(document.tobytes())
print(digest.hexdigest())
"""


def start(script: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def digest(store) -> str:
    import hashlib

    return hashlib.sha1(b"".join(document.tobytes() for document in all_documents(store))).hexdigest()


def expected(times: int = 1) -> str:
    import hashlib

    content = b"".join(document.astype(np.int64).tobytes() for document in DOCUMENTS)
    return hashlib.sha1(content * times).hexdigest()


def raw_files(cache: Path) -> list[Path]:
    found: list[Path] = []
    for directory in cache.glob("*/*"):
        # Other processes fetch and remove during this loop, and `glob` fails on a directory that is removed.
        with contextlib.suppress(FileNotFoundError):
            found += directory.glob("shard.*")
    return sorted(found, key=lambda path: path.name)


def leftovers(cache: Path) -> list[Path]:
    return [
        path
        for path in cache.rglob("*")
        if path.name.endswith(".partial") or path.name.startswith(".arriving") or path.parent.name == "trash"
    ]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(params=["none", "zstd"])
def dataset(request, tmp_path):
    return write_manifest(write_mds(tmp_path / "ds", DOCUMENTS, compression=request.param, shard_bytes=8192))


@pytest.fixture
def raw(tmp_path):
    return write_manifest(write_mds(tmp_path / "ds", DOCUMENTS, shard_bytes=8192))


def test_processes_that_want_one_shard_download_it_once(tmp_path, dataset, cache):
    with serve(tmp_path) as server:
        readers = [start(READER, f"{server.url}/ds", cache, {}, 1) for _ in range(4)]
        outputs = [reader.communicate(timeout=120) for reader in readers]
        assert [out.strip() for out, _ in outputs] == [expected()] * 4, outputs
        shards = {name: count for name, count in server.requests.items() if name.startswith("shard")}
    assert set(shards.values()) == {1}
    assert len(shards) == len(raw_files(cache)) == 6
    assert {path.suffix for path in raw_files(cache)} == {".mds"}, "the download is removed when it is unpacked"
    assert leftovers(cache) == []


def test_kill_during_a_download(tmp_path, raw, cache, caplog):
    with serve(tmp_path) as server:
        server.faults[SHARD] = ["stall"]
        reader = start(READER, f"{server.url}/ds", cache, {}, 1)
        assert server.stalled.wait(60)
        deadline = time.monotonic() + 10
        while not list(cache.rglob(f"*.partial/**/{SHARD}")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        waiting = start(READER, f"{server.url}/ds", cache, {}, 1)  # for the lock of the one that is killed
        time.sleep(1)
        os.kill(reader.pid, signal.SIGKILL)
        reader.wait()
        assert digest(open_store(f"{server.url}/ds", cache_dir=cache)) == expected()
        out, errors = waiting.communicate(timeout=60)
        assert out.strip() == expected(), errors
        assert server.requests[SHARD] == 2
    assert len(raw_files(cache)) == 6
    assert leftovers(cache) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, raw, cache, caplog):
    with serve(tmp_path) as server:
        server.faults[SHARD] = ["stall"]
        reader = start(READER, f"{server.url}/ds", cache, {}, 1)
        assert server.stalled.wait(60)
        os.kill(reader.pid, signal.SIGKILL)
        reader.wait()
        assert len(leftovers(cache)) > 0
        store = open_store(f"{server.url}/ds", cache_dir=cache)
        store.read(3, 0, 0, 1)  # another shard
    assert "left by a process" in caplog.text
    assert leftovers(cache) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip, lambda path: os.truncate(path, 100), Path.unlink])
def test_a_damaged_cached_shard_is_fetched_again(tmp_path, dataset, cache, caplog, harm):
    with serve(tmp_path) as server:
        url = f"{server.url}/ds"
        assert digest(open_store(url, cache_dir=cache)) == expected()
        harm(raw_files(cache)[2])
        before = server.requests.copy()
        assert digest(open_store(url, cache_dir=cache)) == expected()
        again = [name for name in (server.requests - before) if name.startswith("shard")]
        assert [name.removesuffix(".zstd") for name in again] == ["shard.00002.mds"]
        assert f"again from {url}" in caplog.text
        # ... and when the origin has no good copy either, that is said.
        harm(raw_files(cache)[2])
        server.always[again[0]] = "flip"
        with pytest.raises(ShardError, match=r"shard\.00002\.mds.* damaged"):
            digest(open_store(url, cache_dir=cache))


def test_two_datasets_and_two_versions_of_one_do_not_mix(tmp_path, cache):
    others = make_documents([1900] * 12, seed=1)
    write_mds(tmp_path / "a", DOCUMENTS, shard_bytes=8192)
    write_mds(tmp_path / "b", others, shard_bytes=8192)
    with serve(tmp_path) as server:
        a, b = (open_store(f"{server.url}/{name}", cache_dir=cache) for name in "ab")
        assert digest(a) == expected() != digest(b)
        assert len(raw_files(cache)) == 12
        (tmp_path / "a").rename(tmp_path / "old")
        (tmp_path / "b").rename(tmp_path / "a")
        assert digest(open_store(f"{server.url}/a", cache_dir=cache)) == digest(b)
        assert digest(a) == expected(), "one that is open stays what it was"


def used(cache: Path) -> int:
    """Bytes of the shards, while other processes may remove them."""
    total = 0
    for folder, _, names in os.walk(cache):
        with contextlib.suppress(FileNotFoundError):
            if ".partial" not in folder and "trash" not in folder:
                total += sum((Path(folder) / name).stat().st_size for name in names if name.startswith("shard."))
    return total


def test_a_limit_removes_what_was_used_longest_ago(tmp_path, raw, cache):
    size = max(path.stat().st_size for path in raw.glob("shard*"))
    with serve(tmp_path) as server:
        url = f"{server.url}/ds"
        store = open_store(url, cache_dir=cache, cache_limit=3 * size)
        first = store.read(0, 0, 0, 1900).tokens
        for _ in range(2):
            for shard in (0, 1, 2, 0, 3, 0, 4, 5):
                store.read(shard, 0, 0, 1)
                assert used(cache) <= 3 * size
            assert [path.name[6:11] for path in raw_files(cache)] == ["00000", "00004", "00005"]
        assert server.requests["shard.00000.mds"] == 1, "always in use"
        assert server.requests["shard.00001.mds"] == 2
        for shard in (1, 2, 3):
            store.read(shard, 0, 0, 1)
        assert "shard.00000.mds" not in [path.name for path in raw_files(cache)]
        np.testing.assert_array_equal(first, DOCUMENTS[0])  # still mapped
        for _ in range(2):
            assert digest(store) == expected()
        open_maps = Path("/proc/self/maps").read_text()
        removed = re.findall(rf"{cache}/.*/(shard\.\d+\.mds) \(deleted\)", open_maps)
        assert set(removed) <= {"shard.00000.mds"}, "only what the caller holds keeps disk space"


def test_processes_under_one_limit(tmp_path, dataset, cache):
    entry = json.loads((dataset / "index.json").read_text())["shards"][0]
    limit = 2 * (entry["raw_data"]["bytes"] + (entry["zip_data"] or {"bytes": 0})["bytes"]) + 4000
    most = 0
    with serve(tmp_path) as server:
        readers = [start(READER, f"{server.url}/ds", cache, {"cache_limit": limit}, 3) for _ in range(3)]
        while any(reader.poll() is None for reader in readers):
            most = max(most, used(cache))
            time.sleep(0.01)
        outputs = [reader.communicate(timeout=120) for reader in readers]
    assert [out.strip() for out, _ in outputs] == [expected(3)] * 3, outputs
    assert 0 < most <= limit
    assert leftovers(cache) == []


def test_what_another_process_uses_is_used_lately(tmp_path, raw, cache):
    size = max(path.stat().st_size for path in raw.glob("shard*"))
    with serve(tmp_path) as server:
        one, other = (open_store(f"{server.url}/ds", cache_dir=cache, cache_limit=3 * size) for _ in range(2))
        for shard in (0, 1, 2):
            one.read(shard, 0, 0, 1)
        other.read(0, 0, 0, 1)
        other.read(3, 0, 0, 1)
        assert [path.name[6:11] for path in raw_files(cache)] == ["00000", "00002", "00003"]


def test_a_shard_removed_before_it_is_mapped_is_fetched_again(tmp_path, raw, cache):
    with serve(tmp_path) as server:
        store = open_store(f"{server.url}/ds", cache_dir=cache)
        gone = []
        map_shard = store._open_shard

        def removed_by_another(path, entry):
            if not gone:
                gone.append(path)
                shutil.rmtree(path.parent)
            return map_shard(path, entry)

        store._open_shard = removed_by_another
        np.testing.assert_array_equal(store.read(0, 0, 0, 1900).tokens, DOCUMENTS[0])
        assert gone
        assert server.requests["shard.00000.mds"] == 2


def test_a_shard_removed_as_soon_as_it_is_in_place_is_fetched_again(tmp_path, raw, cache, monkeypatch):
    rename, gone = Path.rename, []

    def removed_by_another(self, target):
        moved = rename(self, target)
        if self.name == "whole" and not gone:
            gone.append(target)
            shutil.rmtree(target)
        return moved

    monkeypatch.setattr(Path, "rename", removed_by_another)
    with serve(tmp_path) as server:
        store = open_store(f"{server.url}/ds", cache_dir=cache)
        np.testing.assert_array_equal(store.read(0, 0, 0, 1900).tokens, DOCUMENTS[0])
        assert gone
        assert server.requests["shard.00000.mds"] == 2


def test_a_limit_too_small(tmp_path, dataset, cache):
    with serve(tmp_path) as server:
        with pytest.raises(ConfigError, match="cache_limit 9000 bytes") as caught:
            open_store(f"{server.url}/ds", cache_dir=cache, cache_limit=9000)
        enough = int(re.search(r"set it to (\d+) or more", str(caught.value))[1])
        assert not any(name.startswith("shard") for name in server.requests)
        assert digest(open_store(f"{server.url}/ds", cache_dir=cache, cache_limit=enough)) == expected()


def test_the_limit_holds_for_shards_unpacked_from_a_directory(tmp_path, cache):
    path = write_mds(tmp_path / "ds", DOCUMENTS, compression="zstd", shard_bytes=8192)
    with pytest.raises(ConfigError, match="cache_limit"):
        open_store(path, cache_dir=cache, cache_limit=9000)
    store = open_store(path, cache_dir=cache, cache_limit=33000)
    for _ in range(2):
        assert digest(store) == expected()
        assert used(cache) <= 33000
    assert digest(open_store(write_mds(tmp_path / "raw", DOCUMENTS), cache_dir=cache, cache_limit=1)) == expected()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 KiB: four shards."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", place], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("remote", [True, False])
def test_a_full_disk(tmp_path, small_disk, caplog, remote):
    """Everything that can be removed is, once; the rest is a clear message."""
    path = write_mds(tmp_path / "ds", DOCUMENTS, compression="none" if remote else "zstd", shard_bytes=8192)
    write_manifest(path)
    with serve(tmp_path) as server:
        store = open_store(f"{server.url}/ds" if remote else path, cache_dir=small_disk)
        for shard in range(4):
            store.read(shard, 0, 0, 1)
        store._open.clear()  # unmapped, as in a process that came later
        assert digest(open_store(f"{server.url}/ds" if remote else path, cache_dir=small_disk)) == expected()
        (path / "manifest.json").unlink()
        assert digest(open_store(f"{server.url}/ds" if remote else path, cache_dir=small_disk)) == expected()
        assert f"{small_disk} is full" in caplog.text
        for shard in raw_files(small_disk):
            shutil.rmtree(shard.parent)
        (small_disk / "something").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
        message = rf"{small_disk} .*\d+ bytes .*\d+ are free"
        with pytest.raises(ShardError, match=message):
            digest(open_store(f"{server.url}/ds" if remote else path, cache_dir=small_disk))
    assert leftovers(small_disk) == []


def test_a_quota_on_files(tmp_path, raw, cache):
    import resource

    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n" + READER
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000
    with serve(tmp_path) as server:
        reader = start(script, f"{server.url}/ds", cache, {}, 1)
        _, errors = reader.communicate(timeout=60)
    assert re.search(r"CacheFullError: shard\.00000\.mds: no room in the cache .* \(File too large\): \d+ ", errors)
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path, raw):
    (tmp_path / "file").touch()
    with serve(tmp_path) as server, pytest.raises(Exception, match="cache_dir"):
        open_store(f"{server.url}/ds", cache_dir=tmp_path / "file" / "cache")


def test_prefetch_keeps_its_order_and_the_limit(tmp_path, raw, cache):
    size = max(path.stat().st_size for path in raw.glob("shard*"))
    with serve(tmp_path) as server:
        store = open_store(f"{server.url}/ds", cache_dir=cache, cache_limit=4 * size)
        store.prefetch([4, 2, 0, 5, 1])
        deadline = time.monotonic() + 10
        while len(raw_files(cache)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert [path.name[6:11] for path in raw_files(cache)] == ["00000", "00002", "00004"]
        store.read(4, 0, 0, 1)
        assert sum(server.requests[path.name] for path in raw_files(cache)) == 3


def test_sources_do_not_remove_what_others_prefetched(tmp_path, cache):
    """Four sources that are read and one that rests share a cache which holds their windows, but not all data."""
    for name in "abcde":
        write_manifest(write_mds(tmp_path / name, make_documents([200] * 100, seed=ord(name))))
    with serve(tmp_path) as server:
        stores = {
            name: open_store(f"{server.url}/{name}", cache_dir=cache, cache_limit=24 * 4096, download_retries=0)
            for name in "abcde"
        }
        paths = []
        server._content, content = lambda m, t, path, h: paths.append(path) or content(m, t, path, h), server._content
        loader = make_loader(
            stores,
            stages=[Stage(seq_len=512, weights=dict.fromkeys("abcd", 1.0))],
            global_packs=4,
            pad_id=257,
            window_tokens=6000,
            prefetch_steps=1,
        )
        tokens, steps = 0, iter(loader)
        while tokens < 4 * 18000:
            tokens += sum(batch.num_tokens for batch in next(steps))
        steps.close()
    shards = [path for path in paths if "/shard." in path]
    assert not [path for path in shards if path.startswith("/e/")], "it rests"
    assert len(shards) < 1.3 * len(set(shards)), "each about once"


def test_what_is_just_finished_was_not_left_behind(cache, monkeypatch, caplog):
    """Between the look and the lock its process ends the fetch."""
    partial = cache / "dataset" / "shard.partial"
    partial.parent.mkdir(parents=True)
    monkeypatch.setattr(Path, "glob", lambda *_: [partial])
    assert ShardCache(cache)._reserved_by_others(cache / "dataset" / "other") == 0
    assert caplog.text == ""


def test_prefetch_fails_in_silence_and_reading_does_not(tmp_path, raw, cache):
    with serve(tmp_path) as server:
        server.always[SHARD] = 404
        store = open_store(f"{server.url}/ds", cache_dir=cache)
        store.prefetch(range(6))
        with pytest.raises(ShardError, match=rf"{SHARD} does not exist"):
            store.read(1, 0, 0, 1)
        del server.always[SHARD]
        assert digest(store) == expected()


def test_prefetch_does_not_keep_a_process_alive(tmp_path, raw, cache):
    script = """
    import sys
    from statex_dist.data.formats import open_store
    store = open_store(sys.argv[1], cache_dir=sys.argv[2])
    store.prefetch(range(6))
    store.read(0, 0, 0, 1)
    sys.stdin.readline()
    """
    with serve(tmp_path) as server:
        server.always[SHARD] = "stall"
        reader = start(script, f"{server.url}/ds", cache, stdin=subprocess.PIPE)
        assert server.stalled.wait(60)
        begin = time.monotonic()
        reader.communicate("\n", timeout=30)
        assert time.monotonic() - begin < 5
        assert reader.returncode == 0


def read_in_child(store, results) -> None:
    store.prefetch(range(6))
    # One waits for the shard that the parent's thread is stuck with.
    results.put([thread.name for thread in threading.enumerate() if thread.name == "statex-fetch"] != [])
    results.put(digest(store))


def test_forked_children_fetch_for_themselves(tmp_path, raw, cache):
    """As DataLoader's workers: the parent's threads are in the middle of downloads, with their locks held."""
    with serve(tmp_path) as server:
        server.faults[SHARD] = ["stall"]
        store = open_store(f"{server.url}/ds", cache_dir=cache)
        store.prefetch(range(6))
        assert server.stalled.wait(30)
        fork = multiprocessing.get_context("fork")
        results = fork.SimpleQueue()
        children = [fork.Process(target=read_in_child, args=(store, results)) for _ in range(2)]
        for child in children:
            child.start()
        assert [results.get() for _ in children] == [True, True], "threads of their own"
        server.let_go()  # cut in half, so that the parent downloads it again
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0]
        assert [results.get() for _ in children] == [expected()] * 2
        assert digest(store) == expected()
        assert server.requests[SHARD] == 2

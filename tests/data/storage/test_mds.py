import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from statex_dist.data.formats import open_store
from statex_dist.data.storage.mds import has_streaming, load_streaming
from statex_dist.data.store import sequential_documents
from statex_dist.errors import ConfigError, CorruptShardError, DataError
from tests.data.synthetic import all_documents, assert_same, make_documents, write_mds
from tests.raising import raises

LENGTHS = [2, 255, 256, 257, 1000, 1, 70000, 3, 12]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_round_trip(tmp_path, dtype, compression):
    documents = make_documents(LENGTHS)
    path = write_mds(tmp_path / "ds", documents, dtype=dtype, compression=compression)
    store = open_store(path, cache_dir=tmp_path / "cache")
    assert store.num_shards > 1
    assert not store.has_loss_mask
    assert_same(all_documents(store), documents)
    assert_same([piece.tokens for piece in sequential_documents(store)], documents)
    assert store.read(0, 1, 10, 20).tokens.tolist() == documents[1][10:20].tolist()
    assert sum(store.num_tokens(s) for s in range(store.num_shards)) == sum(LENGTHS)
    other = open_store(write_mds(tmp_path / "other", make_documents(LENGTHS, seed=1), dtype=dtype))
    assert other.fingerprint != store.fingerprint


def test_streaming_reads_ours(tmp_path):
    documents = make_documents(LENGTHS)
    base = load_streaming()
    path = write_mds(tmp_path / "raw", documents)
    assert_same([sample["tokens"] for sample in base.LocalDataset(str(path))], documents)
    path = write_mds(tmp_path / "zstd", documents, compression="zstd")
    dataset = base.StreamingDataset(
        remote=str(path), local=str(tmp_path / "local"), shuffle=False, batch_size=1, validate_hash="xxh64"
    )
    assert_same([sample["tokens"] for sample in dataset], documents)


@pytest.mark.parametrize("encoding", ["ndarray:uint16", "ndarray:uint32", "ndarray:int32", "ndarray:int64"])
@pytest.mark.parametrize("compression", [None, "zstd:7", "gz"])
def test_we_read_streamings(tmp_path, encoding, compression):
    documents = make_documents(LENGTHS)
    columns = {"tokens": encoding, "source": "str", "index": "int", "loss_mask": "ndarray:uint8"}
    options = {"compression": compression, "hashes": ["sha1", "xxh3_64"], "size_limit": 4096}
    with load_streaming().MDSWriter(out=str(tmp_path / "ds"), columns=columns, **options) as writer:
        for i, document in enumerate(documents):
            tokens = document.astype(encoding.partition(":")[2])
            mask = (tokens % 2).astype(np.uint8)
            writer.write({"tokens": tokens, "source": "wiki" * i, "index": i, "loss_mask": mask})
    store = open_store(tmp_path / "ds", cache_dir=tmp_path / "cache")
    assert store.has_loss_mask
    pieces = list(sequential_documents(store))
    assert_same([piece.tokens for piece in pieces], documents)
    assert_same([piece.loss_mask for piece in pieces], [d % 2 for d in documents])


def test_streaming_is_imported_without_its_init_and_gets_the_launchers_variable():
    assert has_streaming()
    code = (
        "import os, sys\n"
        "from statex_dist.data.storage.mds import load_streaming\n"
        "base = load_streaming()\n"
        "assert base is load_streaming() and base.MDSWriter and base.storage.download.CloudDownloader\n"
        "print(os.environ['LOCAL_WORLD_SIZE'])\n"
        "print([name for name in ('streaming', 'streaming.vision', 'torchvision') if name in sys.modules])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.split("\n")[:2], done.returncode) == (["2", "[]"], 0), done.stderr


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_mds(tmp_path / "ds", make_documents([1000] * 8), shard_bytes=8192)


def read_all(path):
    return list(sequential_documents(open_store(path)))


def test_missing_shard_names_the_file(dataset):
    (dataset / "shard.00001.mds").unlink()
    with pytest.raises(DataError, match=r"shard shard\.00001\.mds is missing"):
        read_all(dataset)


def test_truncated_shard_names_the_file(dataset):
    shard = dataset / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"shard\.00001\.mds .* \d+ bytes, .* \d+\b"):
        read_all(dataset)


@pytest.mark.parametrize("at", [2, 40, 3000])
def test_flipped_bit_names_the_file(dataset, at):
    shard = dataset / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[at] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard\.00000\.mds .*xxh64"):
        read_all(dataset)


def test_flipped_header_without_hashes_is_still_noticed(dataset):
    index = json.loads((dataset / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["hashes"] = {}
    (dataset / "index.json").write_text(json.dumps(index))
    content = bytearray((dataset / "shard.00000.mds").read_bytes())
    content[5] ^= 64  # the first sample's offset
    (dataset / "shard.00000.mds").write_bytes(content)
    with raises(CorruptShardError, "shard.00000.mds", "MDS shard"):
        read_all(dataset)


def test_damaged_compressed_shard_and_damaged_cache(tmp_path):
    documents = make_documents([1000] * 4)
    path = write_mds(tmp_path / "ds", documents, compression="zstd", shard_bytes=8192)
    cache = tmp_path / "cache"
    assert len(list(sequential_documents(open_store(path, cache_dir=cache)))) == 4
    (unpacked,) = cache.rglob("shard.00000.mds")
    unpacked.write_bytes(b"\0" * unpacked.stat().st_size)
    assert_same(all_documents(open_store(path, cache_dir=cache)), documents)  # unpacked again
    shard = path / "shard.00000.mds.zstd"
    content = bytearray(shard.read_bytes())
    content[30] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard\.00000\.mds\.zstd is damaged"):
        list(sequential_documents(open_store(path, cache_dir=tmp_path / "other")))


def test_open_store_messages(tmp_path, dataset):
    with pytest.raises(DataError, match="does not exist"):
        open_store(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        open_store(tmp_path / "empty")
    (tmp_path / "empty" / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"has no index\.json"):
        open_store(tmp_path / "empty")
    with pytest.raises(DataError, match="is a file"):
        open_store(tmp_path / "empty" / "x.txt")
    index = json.loads((dataset / "index.json").read_text())
    for damage, message in (
        ("{", "not a readable MDS index"),
        (json.dumps({"version": 2, "shards": []}), "with 0 shards"),
        (json.dumps(index | {"version": 3}), "MDS version 3"),
        (json.dumps(index).replace("shard.00000.mds", "../shard"), "file name"),
        (json.dumps(index).replace('"tokens"', '"text"'), r"column 'tokens'.*: text"),
        (json.dumps(index).replace("ndarray:uint16", "str"), "column 'tokens'.*one-dimensional ndarray"),
        (json.dumps(index).replace("ndarray:uint16", "ndarray:uint16:4"), "column 'tokens' must"),
        ("[" * 200_000, "MDS index .ValueError"),
        ("[]", "MDS index .TypeError"),
        (json.dumps(index | {"shards": "ab"}), "shards.*'ab'"),
        (json.dumps(index | {"shards": [None]}), r"index\.json: shard 0.*MDS entry"),
    ):
        (dataset / "index.json").write_text(damage)
        with pytest.raises(DataError, match=message):
            open_store(dataset)


def test_bad_shard_size_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="shard size 0 bytes"):
        write_mds(tmp_path / "ds", [], shard_bytes=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": ["mds"]}, r"its format is \['mds'\]; allowed: mds"),
        ({"column_names": "tokens"}, "column_names is 'tokens'; allowed: a list with one entry for each column"),
        ({"column_names": [5]}, r"column_names is \[5\]; allowed: a list of text"),
        (
            {"column_names": ["tokens", "x"]},
            r"column_encodings is \['ndarray:uint16'\]; allowed: a list with one entry",
        ),
        ({"column_encodings": [None]}, r"column_encodings is \[None\]; allowed: a list of text"),
        ({"column_sizes": None}, "column_sizes is None; allowed: a list with one entry for each column"),
        ({"column_sizes": [-1]}, "the size of a column is -1; allowed: an integer of 0"),
        ({"column_sizes": [10**30]}, "the size of a column is 10+; allowed"),
        (
            {"column_names": ["tokens"] * 2, "column_encodings": ["ndarray:uint16"] * 2, "column_sizes": [None] * 2},
            "two columns have one name: tokens, tokens",
        ),
        ({"samples": True}, r"number of documents of shard\.00000\.mds is True; allowed: an integer of 0"),
        ({"samples": 1.0}, r"number of documents of shard\.00000\.mds is 1\.0; allowed"),
        ({"compression": []}, r"compression of shard\.00000\.mds is \[\]; allowed: a name"),
        ({"raw_data": None}, "is not a readable MDS entry .*AttributeError"),
        ({"raw_data": {"basename": "a/b", "bytes": 1}}, "'a/b' is not a plain file name"),
        ({"raw_data": {"basename": "a", "bytes": "1"}}, "size of a is '1'; allowed: an integer of 0"),
        ({"raw_data": {"basename": "a", "bytes": 1, "hashes": ["sha1"]}}, r"hashes of a are \['sha1'\]; allowed"),
        ({"raw_data": {"basename": "a", "bytes": 1, "hashes": {"_": "0"}}}, "hash '_' of a is not known; allowed"),
        ({"zip_data": {}}, "is not a readable MDS entry .*'basename'"),
        ({"zip_data": False}, "is not a readable MDS entry .*AttributeError"),
    ],
)
def test_a_hostile_entry_is_refused(dataset, change, message):
    index = json.loads((dataset / "index.json").read_text())
    index["shards"][1] = json.loads((dataset / "index.json").read_text())["shards"][0] | change
    (dataset / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=rf"ds/index\.json: shard 1:? .*{message}") as found:
        open_store(dataset)
    assert str(found.value).isprintable()


def test_an_entry_may_lack_its_hashes_and_its_packed_form(dataset):
    index = json.loads((dataset / "index.json").read_text())
    for shard in index["shards"]:
        del shard["raw_data"]["hashes"], shard["zip_data"], shard["compression"]
    (dataset / "index.json").write_text(json.dumps(index))
    assert len(read_all(dataset)) == 8


@pytest.mark.parametrize("size", [0, 50, 130])
def test_kept_lengths_that_are_damaged_are_gathered_again(tmp_path, dataset, size):
    cache = tmp_path / "cache"
    fingerprint = open_store(dataset, cache_dir=cache).fingerprint
    (kept,) = cache.glob("lengths-*.npy")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:size])
    assert open_store(dataset, cache_dir=cache).fingerprint == fingerprint
    assert kept.read_bytes() == whole


def test_kept_lengths_are_not_those_of_a_rewritten_dataset_without_hashes(tmp_path):
    documents = make_documents(range(10, 60))
    for order in (documents, documents[::-1]):
        shutil.rmtree(tmp_path / "ds", ignore_errors=True)
        with load_streaming().MDSWriter(out=str(tmp_path / "ds"), columns={"tokens": "ndarray:uint16"}) as writer:
            for document in order:
                writer.write({"tokens": document})
        for _ in range(2):
            store = open_store(tmp_path / "ds", cache_dir=tmp_path / "cache")
            assert store.num_shards == 1
            assert_same(all_documents(store), order)
    assert len(list((tmp_path / "cache").glob("lengths-*.npy"))) == 2

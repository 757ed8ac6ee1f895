import bz2
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.formats import open_store
from statex_dist.data.storage import tar as tar_writer
from statex_dist.data.storage.files import decompress
from statex_dist.data.storage.shards import FileEntry, ShardEntry
from statex_dist.data.storage.tar import WdsShardWriter
from statex_dist.data.storage.tar_members import scan_tar
from statex_dist.data.store import sequential_documents
from statex_dist.errors import ConfigError, DataError, ShardError
from tests.data.storage.tars import flip, read_all
from tests.data.synthetic import all_documents, assert_same, make_documents, write_tar
from tests.raising import raises

LENGTHS = [2, 255, 256, 257, 1000, 1, 70000, 3, 12]


def webdatasets_documents(path: Path, name: str = "tokens.npy") -> list[np.ndarray]:
    """What webdataset's own reader finds in our shards."""
    shards = sorted(str(file) for file in path.iterdir() if file.suffix in (".tar", ".gz"))
    samples = wds.WebDataset(shards, shardshuffle=False).decode()
    return [part for sample in samples for part in np.split(sample[name], np.cumsum(sample["lengths.npy"])[:-1])]


# Ours.


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("compression", ["none", "gz", "zstd"])
def test_round_trip(tmp_path, dtype, compression):
    documents = make_documents(LENGTHS)
    path = write_tar(tmp_path / "ds", documents, dtype=dtype, compression=compression)
    store = open_store(path, cache_dir=tmp_path / "cache")
    assert store.num_shards > 1
    assert not store.has_loss_mask
    assert_same(all_documents(store), documents)
    pieces = list(sequential_documents(store))
    assert {piece.tokens.dtype.name for piece in pieces} == {dtype}
    assert_same([piece.tokens for piece in pieces], documents)
    assert store.read(0, 1, 10, 20).tokens.tolist() == documents[1][10:20].tolist()
    assert sum(store.num_tokens(s) for s in range(store.num_shards)) == sum(LENGTHS)
    other = open_store(write_tar(tmp_path / "other", make_documents(LENGTHS, seed=1), dtype=dtype))
    assert other.fingerprint != store.fingerprint
    suffix = {"none": ".tar", "gz": ".tar.gz", "zstd": ".tar.zst"}[compression]
    files = {f"shard-{i:05d}.tar" for i in range(store.num_shards)}
    assert {p.name for p in path.iterdir()} == {
        "shards.json",
        *(name.removesuffix(".tar") + suffix for name in files),
        *(f"{name}.index.npy" for name in files),
    }


@pytest.mark.parametrize("compression", ["none", "gz"])
def test_webdataset_reads_ours(tmp_path, compression):
    documents = make_documents([*LENGTHS, *[5] * 600])
    path = tmp_path / "ds"
    path.mkdir()
    writer = WdsShardWriter(path, dtype="uint16", loss_mask=True, compression=compression, shard_bytes=300_000)
    for document in documents:
        writer.write(document, document % 2)
    writer.finish()
    assert sum(writer.shard_documents) == len(documents)
    assert_same(webdatasets_documents(path), documents)
    assert_same(webdatasets_documents(path, "loss_mask.npy"), [d % 2 for d in documents])
    store = open_store(path, cache_dir=tmp_path / "cache")
    assert store.has_loss_mask
    pieces = list(sequential_documents(store))
    assert_same([piece.tokens for piece in pieces], documents)
    assert_same([piece.loss_mask for piece in pieces], [d % 2 for d in documents])
    assert {piece.loss_mask.dtype.name for piece in pieces} == {"uint8"}


def test_a_mask_that_is_not_given_is_all_ones_and_one_that_is_not_wanted_is_left_out(tmp_path):
    document = make_documents([10])[0]
    for name, loss_mask, given_mask in (("ones", True, None), ("none", False, np.zeros(10))):
        (tmp_path / name).mkdir()
        writer = WdsShardWriter(
            tmp_path / name, dtype="uint16", loss_mask=loss_mask, compression="none", shard_bytes=1 << 20
        )
        writer.write(document, given_mask)
        writer.finish()
    assert open_store(tmp_path / "ones").read(0, 0, 3, 6).loss_mask.tolist() == [1, 1, 1]
    assert open_store(tmp_path / "none").read(0, 0, 3, 6).loss_mask is None


def test_the_written_index_is_what_a_walk_finds(tmp_path):
    """The writer computes every place; the walk reads it from the tar."""
    documents = make_documents([*LENGTHS, *[7] * 300])
    (tmp_path / "ds").mkdir()
    writer = WdsShardWriter(tmp_path / "ds", dtype="uint32", loss_mask=True, compression="none", shard_bytes=100_000)
    for document in documents:
        writer.write(document)
    writer.finish()
    tars = sorted((tmp_path / "ds").glob("*.tar"))
    assert len(tars) > 2
    for tar in tars:
        found = scan_tar(tar)
        assert found.dtype == "uint32"
        np.testing.assert_array_equal(np.load(tar.with_name(tar.name + ".index.npy")), found.rows)
        assert not (found.rows[:, 0] % 4).any(), "aligned"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 63, 64, 65, 500]), min_size=1, max_size=60),
    shard_bytes=st.sampled_from([1, 10240, 20480, 30720, 1 << 20]),
    borders=st.sampled_from([(1, 1 << 20), (4, 1 << 20), (256, 128), (256, 1 << 20)]),
    dtype=st.sampled_from(["uint16", "uint32"]),
    loss_mask=st.booleans(),
)
def test_any_lengths_come_back(tmp_path_factory, lengths, shard_bytes, borders, dtype, loss_mask):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60000, n).astype(dtype) for n in lengths]
    path = tmp_path_factory.mktemp("ds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_writer, "_CHUNK_DOCUMENTS", borders[0])
        patch.setattr(tar_writer, "_CHUNK_BYTES", borders[1])
        writer = WdsShardWriter(path, dtype=dtype, loss_mask=loss_mask, compression="none", shard_bytes=shard_bytes)
        for document in documents:
            writer.write(document, document % 2 if loss_mask else None)
        writer.finish()
    store = open_store(path, cache_dir=tmp_path_factory.mktemp("cache"))
    assert [len(store.lengths(shard)) for shard in range(store.num_shards)] == writer.shard_documents
    pieces = list(sequential_documents(store))
    assert_same([piece.tokens for piece in pieces], documents)
    if loss_mask:
        assert_same([piece.loss_mask for piece in pieces], [d % 2 for d in documents])
    for shard, documents_in_it in enumerate(writer.shard_documents):
        assert (path / f"shard-{shard:05d}.tar").stat().st_size <= shard_bytes or documents_in_it == 1
    # Random access, in an order of its own.
    where = [(shard, i) for shard, count in enumerate(writer.shard_documents) for i in range(count)]
    for at in rng.permutation(len(where)).tolist():
        start, stop = sorted(rng.integers(0, lengths[at] + 1, 2).tolist())
        np.testing.assert_array_equal(store.read(*where[at], start, stop).tokens, documents[at][start:stop])


@pytest.mark.parametrize("compression", ["none", "gz", "zstd"])
def test_same_documents_same_bytes(tmp_path, compression, monkeypatch):
    documents = make_documents(LENGTHS)
    first = write_tar(tmp_path / "a", documents, compression=compression)
    monkeypatch.setattr("time.time", lambda: 1e9)
    second = write_tar(tmp_path / "b", documents, compression=compression)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_many_documents_share_a_sample(tmp_path):
    """With a sample of its own for each, 1000 documents of 100 tokens would take over 1.5 KB each."""
    path = write_tar(tmp_path / "ds", make_documents([100] * 1000), shard_bytes=1 << 20)
    assert (path / "shard-00000.tar").stat().st_size < 1000 * 200 * 1.05 + 10240
    samples = wds.WebDataset(str(path / "shard-00000.tar"), shardshuffle=False).decode()
    assert [len(sample["lengths.npy"]) for sample in samples] == [256, 256, 256, 232]


def test_the_callers_buffer_may_change(tmp_path):
    path = tmp_path / "ds"
    path.mkdir()
    writer = WdsShardWriter(path, dtype="uint16", loss_mask=True, compression="none", shard_bytes=1 << 20)
    tokens, mask = np.arange(10, dtype=np.uint16), np.ones(10, np.uint8)
    writer.write(tokens, mask)
    tokens[:], mask[:] = 7, 0
    writer.finish()
    piece = open_store(path).read(0, 0, 0, 10)
    assert (piece.tokens.tolist(), piece.loss_mask.tolist()) == (list(range(10)), [1] * 10)


def test_abort_closes_the_file_and_leaves_no_index(tmp_path):
    writer = WdsShardWriter(tmp_path, dtype="uint16", loss_mask=False, compression="none", shard_bytes=1)
    for document in make_documents([1000] * 3):
        writer.write(document)
    writer.abort()
    writer.abort()
    assert not (tmp_path / "shards.json").exists()


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"size 0 .* 1\.\."):
        write_tar(tmp_path / "a", [], shard_bytes=0)
    with raises(ConfigError, "bz2", "none", "gz", "zstd"):
        write_tar(tmp_path / "b", [], compression="bz2")


# Ours, damaged or hostile.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("file", 5), "5 is not a plain file name"),
        (("file", ""), "'' is not a plain file name"),
        (("file", ".."), r"'\.\.' is not a plain file name"),
        (("file", "a\0b"), r"'a\\x00b' is not a plain file name"),
        (("file", "x" * 256), r"is not a plain file name \(text without '/', of 1 to 255 bytes\)"),
        (("file", "\ud800"), "is not a plain file name"),
        (
            ("file", "shard-00000.tar.gz"),
            r"files of one shard have one name: shard-00000\.tar\.gz, shard-00000\.tar\.gz",
        ),
        (("bytes", -1), r"size of shard-00000\.tar is -1; allowed: an integer of 0 to"),
        (("bytes", True), r"size of shard-00000\.tar is True; allowed"),
        (("bytes", 1e9), r"size of shard-00000\.tar is 1000000000\.0; allowed"),
        (("bytes", 10**30), r"size of shard-00000\.tar is 10+; allowed"),
        (("bytes", float("nan")), r"size of shard-00000\.tar is nan; allowed"),
        (("documents", "8"), r"number of documents of shard-00000\.tar is '8'; allowed: an integer"),
        (("documents", -8), r"number of documents of shard-00000\.tar is -8; allowed"),
        (("hashes", None), r"hashes of shard-00000\.tar are None; allowed: digests by algorithm"),
        (("hashes", {"xxh64": 5}), r"xxh64 of shard-00000\.tar is 5; allowed: hex digits as text"),
        (("hashes", {"crc": "0"}), r"hash 'crc' of shard-00000\.tar is not known; allowed: .* hashlib, and xxhash's"),
        (("hashes", {"shake_128": "0"}), "hash 'shake_128' of .* is not known; allowed: those of fixed length"),
        (("dtype", ["uint16"]), r"dtype is \['uint16'\]; allowed: uint8, uint16"),
        (("loss_mask", 0), "loss_mask is 0; allowed: true, false"),
        (("compression", 3), r"compression of shard-00000\.tar is 3; allowed: a name"),
        (("packed", {}), "is not a readable tar index entry .*'file'"),
        (("packed", 0), "is not a readable tar index entry .*TypeError"),
        (("packed.bytes", None), r"size of shard-00000\.tar\.gz is None; allowed"),
        (("companion", None), "is not a readable tar index entry .*TypeError"),
        (("companion.hashes", []), r"hashes of shard-00000\.tar\.index\.npy are \[\]; allowed"),
    ],
)
def test_a_hostile_entry_is_refused(tmp_path, change, message):
    path = write_tar(tmp_path / "ds", make_documents([4000] * 4), compression="gz")
    index = json.loads((path / "shards.json").read_text())
    (*outer, name), value = change[0].split("."), change[1]
    place = index["shards"][0]
    for key in outer:
        place = place[key]
    place[name] = value
    (path / "shards.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=rf"ds/shards\.json: shard 0:? .*{message}") as found:
        open_store(path, cache_dir=tmp_path / "cache")
    assert str(found.value).isprintable()


@pytest.mark.parametrize(("codec", "module"), [("zstd", zstd), ("gz", gzip), ("bz2", bz2)])
def test_a_shard_that_unpacks_to_more_than_the_index_says_is_refused(tmp_path, codec, module):
    bomb = tmp_path / "bomb"
    bomb.write_bytes(module.compress(bytes(64 << 20)))
    shard = ShardEntry(raw=FileEntry("raw", 5000), packed=FileEntry("bomb", 1), compression=codec, documents=1)
    with pytest.raises(ShardError, match=r"bomb .* 5000 bytes"):
        decompress(shard, bomb, tmp_path / "raw")
    assert (tmp_path / "raw").stat().st_size <= 5000
    bomb.write_bytes(module.compress(bytes(5000)))
    decompress(shard, bomb, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == bytes(5000)
    # A full disk is not the shard's fault: the cache makes room and tries again.
    with pytest.raises(OSError, match="No space"):
        decompress(shard, bomb, Path("/dev/full"))
    for damage in (b"text" * 100, bomb.read_bytes()[:-5]):
        bomb.write_bytes(damage)
        with pytest.raises(ShardError, match=r"bomb .*unpacked \("):
            decompress(shard, bomb, tmp_path / "raw")


def test_an_unknown_compression_is_refused(tmp_path):
    path = write_tar(tmp_path / "ds", make_documents([4000] * 4), compression="gz")
    edit_index(path, lambda shard: shard.update(compression="lzma"))
    with raises(ShardError, "tar.gz", "lzma", "none", "zstd", "gz", "bz2"):
        read_all(path)


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_tar(tmp_path / "ds", make_documents([4000] * 8), shard_bytes=20480)


def test_missing_shard_names_the_file(dataset):
    (dataset / "shard-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard shard-00001\.tar is missing"):
        read_all(dataset)


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.tar.index.npy"])
def test_truncated_shard_names_the_file(dataset, name):
    (dataset / name).write_bytes((dataset / name).read_bytes()[:-10])
    with pytest.raises(ShardError, match=rf"{re.escape(name)} .* \d+ bytes, .* \d+\b"):
        read_all(dataset)


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.tar.index.npy"])
@pytest.mark.parametrize("at", [2, 130, -1])
def test_flipped_bit_names_the_file(dataset, name, at):
    flip(dataset / name, at)
    with pytest.raises(ShardError, match=rf"{re.escape(name)} .*xxh64"):
        read_all(dataset)


@pytest.mark.parametrize("compression", ["gz", "zstd"])
def test_damaged_compressed_shard_and_damaged_cache(tmp_path, compression):
    documents = make_documents([1000] * 4)
    path = write_tar(tmp_path / "ds", documents, compression=compression, shard_bytes=10240)
    cache = tmp_path / "cache"
    assert len(read_all(path, cache)) == 4
    (unpacked,) = cache.rglob("shard-00000.tar")
    unpacked.write_bytes(b"\0" * unpacked.stat().st_size)
    assert_same(all_documents(open_store(path, cache_dir=cache)), documents)  # unpacked again
    (shard,) = path.glob("shard-00000.tar.*z*")
    flip(shard, 30)
    with pytest.raises(ShardError, match=rf"{re.escape(shard.name)} is damaged"):
        read_all(path, tmp_path / "other")


def edit_index(path: Path, edit) -> None:
    index = json.loads((path / "shards.json").read_text())
    for shard in index["shards"]:
        edit(shard)
    (path / "shards.json").write_text(json.dumps(index))


def no_hashes(shard):
    shard["hashes"], shard["companion"]["hashes"] = {}, {}


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [(1, 0, 1 << 40), (0, 0, -8), (1, 1, 1 << 62), (0, 1, -1), (1, 2, 1 << 40), (0, 2, -2), (1, 2, 20470)],
)
def test_a_member_index_that_does_not_fit_its_tar_is_refused(dataset, row, column, value):
    edit_index(dataset, no_hashes)
    path = dataset / "shard-00001.tar.index.npy"
    rows = np.load(path)
    rows[row, column] = value
    np.save(path, rows)
    message = rf"shard-00001\.tar\.index\.npy .*shard-00001\.tar: document {row} .*20480"
    with pytest.raises(ShardError, match=message):
        read_shard(dataset, 1)


def read_shard(path, shard):
    store = open_store(path, cache_dir=path.parent / f"cache-{shard}")
    return store.read(shard, 0, 0, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3, 3), np.int64), r"it holds int64 of shape \(3, 3\), not int64 of \(2, 3\)"),
        (np.zeros((2, 3), np.float64), r"it holds float64 of shape \(2, 3\), not int64 of \(2, 3\)"),
        (np.zeros((2, 3), object), r"it holds object of shape \(2, 3\), not int64"),
        (None, "the magic string is not correct|EOF: reading magic string"),
    ],
)
def test_a_member_index_of_another_kind_is_refused(dataset, rows, message):
    path = dataset / "shard-00001.tar.index.npy"
    np.save(path, rows, allow_pickle=True) if rows is not None else path.write_bytes(b"rows")
    sizes = {file.name: file.stat().st_size for file in dataset.glob("*.index.npy")}
    edit_index(
        dataset, lambda shard: (no_hashes(shard), shard["companion"].update(bytes=sizes[shard["companion"]["file"]]))
    )
    with pytest.raises(DataError, match=rf"shard-00001\.tar\.index\.npy .*({message})"):
        read_shard(dataset, 1)


def test_a_damaged_index_is_refused(dataset):
    index = json.loads((dataset / "shards.json").read_text())
    text = json.dumps(index)
    for damage, message in (
        ("{", r"shards\.json.*tar index"),
        ("[]", "tar index"),
        (json.dumps(index | {"shards": [{}]}), "tar index"),
        (json.dumps(index | {"shards": []}), "'wds', version 1, 0 shards"),
        (json.dumps(index | {"version": 2}), "version 2, 4 shards"),
        (json.dumps(index | {"format": "mds"}), "format 'mds'"),
        (text.replace("shard-00000.tar", "../shard"), r"'\.\./shard'"),
        (text.replace("uint16", "object"), "dtype.*'object'.*uint8, uint16"),
        ("[" * 200_000, "tar index .ValueError"),
        (json.dumps(index | {"shards": 5}), "shards are 5"),
        (json.dumps(index | {"shards": [None]}), "shard 0.*index entry"),
    ):
        (dataset / "shards.json").write_text(damage)
        with pytest.raises(DataError, match=message):
            open_store(dataset)

import errno
import gzip
import io
import json
import logging
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data import tar as tar_writer
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.data.tar import WdsShardWriter
from statex_dist.data.tar_members import scan_tar
from statex_dist.errors import ConfigError, DataError, ShardError

from .synthetic import all_documents, make_documents, write_tar

LENGTHS = [2, 255, 256, 257, 1000, 1, 70000, 3, 12]


def assert_same(read, written):
    assert len(read) == len(written)
    for a, b in zip(read, written, strict=True):
        np.testing.assert_array_equal(a, b)


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
    with pytest.raises(ConfigError, match="shard size 0 bytes is not in 1"):
        write_tar(tmp_path / "a", [], shard_bytes=0)
    with pytest.raises(ConfigError, match="compression of tar shards is 'bz2'; allowed: none, gz, zstd"):
        write_tar(tmp_path / "b", [], compression="bz2")


# Ours, damaged.


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_tar(tmp_path / "ds", make_documents([4000] * 8), shard_bytes=20480)


def read_all(path, cache=None):
    return list(sequential_documents(open_store(path, cache_dir=cache or path.parent / "cache")))


def test_missing_shard_names_the_file(dataset):
    (dataset / "shard-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard shard-00001\.tar is missing"):
        read_all(dataset)


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.tar.index.npy"])
def test_truncated_shard_names_the_file(dataset, name):
    (dataset / name).write_bytes((dataset / name).read_bytes()[:-10])
    with pytest.raises(ShardError, match=rf"{re.escape(name)} has \d+ bytes, the index says \d+; restore it"):
        read_all(dataset)


@pytest.mark.parametrize("name", ["shard-00001.tar", "shard-00001.tar.index.npy"])
@pytest.mark.parametrize("at", [2, 130, -1])
def test_flipped_bit_names_the_file(dataset, name, at):
    flip(dataset / name, at)
    with pytest.raises(ShardError, match=rf"{re.escape(name)} is damaged \(xxh64 differs from the index\)"):
        read_all(dataset)


def flip(path: Path, at: int, bit: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


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
    message = rf"shard-00001\.tar\.index\.npy does not fit .*shard-00001\.tar: document {row} lies outside of its 20480"
    with pytest.raises(ShardError, match=message):
        read_shard(dataset, 1)


def read_shard(path, shard):
    store = open_store(path, cache_dir=path.parent / f"cache-{shard}")
    return store.read(shard, 0, 0, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3, 3), np.int64), r"holds int64 of shape \(3, 3\), not int64 of \(2, 3\)"),
        (np.zeros((2, 3), np.float64), r"holds float64 of shape \(2, 3\), not int64"),
        (np.zeros((2, 3), object), "is not a readable member index"),
        (None, "is not a readable member index"),
    ],
)
def test_a_member_index_of_another_kind_is_refused(dataset, rows, message):
    path = dataset / "shard-00001.tar.index.npy"
    np.save(path, rows, allow_pickle=True) if rows is not None else path.write_bytes(b"rows")
    size = path.stat().st_size
    edit_index(dataset, lambda shard: (no_hashes(shard), shard["companion"].update(bytes=size)))
    for name in ("shard-00000", "shard-00002", "shard-00003"):
        other = dataset / f"{name}.tar.index.npy"
        other.write_bytes(other.read_bytes().ljust(size)[:size])
    with pytest.raises(DataError, match=rf"shard-0000[01]\.tar\.index\.npy {message}"):
        read_shard(dataset, 1)


def test_a_damaged_index_is_refused(dataset):
    index = json.loads((dataset / "shards.json").read_text())
    text = json.dumps(index)
    for damage, message in (
        ("{", r"shards\.json is not a readable tar index"),
        ("[]", "is not a readable tar index"),
        (json.dumps(index | {"shards": [{}]}), "is not a readable tar index"),
        (json.dumps(index | {"shards": []}), "format 'wds', version 1, 0 shards; needed: 'wds', 1 and at least one"),
        (json.dumps(index | {"version": 2}), "version 2, 4 shards"),
        (json.dumps(index | {"format": "mds"}), "format 'mds'"),
        (text.replace("shard-00000.tar", "../shard"), r"'\.\./shard' is not a plain file name"),
        (text.replace("uint16", "object"), "dtype is 'object'; allowed: uint8, uint16"),
    ):
        (dataset / "shards.json").write_text(damage)
        with pytest.raises(DataError, match=message):
            open_store(dataset)


# Tars of others.


def write_foreign(directory: Path, samples, suffix: str = ".tar", per_shard: int = 3, **options) -> Path:
    """Write with webdataset's own ShardWriter."""
    directory.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(
        str(directory / f"part-%03d{suffix}"), maxcount=per_shard, verbose=0, mtime=0, **options
    ) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"sample{i:04d}", **sample})
    return directory


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("name", ["tokens.npy", "input_ids.npy", "npy"])
def test_we_read_webdatasets(tmp_path, dtype, suffix, name):
    documents = [d.astype(dtype) for d in make_documents(LENGTHS)]
    samples = [
        {name: d, "loss_mask.npy": (d % 2).astype(np.uint8), "json": {"source": "wiki"}, "txt": "x" * i}
        for i, d in enumerate(documents)
    ]
    path = write_foreign(tmp_path / "ds", samples, suffix)
    cache = tmp_path / "cache"
    store = open_store(path, cache_dir=cache)
    assert (store.num_shards, store.has_loss_mask, store.manifest) == (3, True, None)
    pieces = list(sequential_documents(store))
    assert_same([piece.tokens for piece in pieces], documents)
    assert {piece.tokens.dtype.name for piece in pieces} == {dtype}
    assert_same([piece.loss_mask for piece in pieces], [d % 2 for d in documents])
    assert store.read(0, 2, 5, 9).tokens.tolist() == documents[2][5:9].tolist()
    assert sorted(p.name for p in path.iterdir()) == [f"part-{i:03d}{suffix}" for i in range(3)], "nothing added"


def test_samples_of_many_documents_with_and_without_masks(tmp_path):
    parts = [make_documents(lengths, seed) for seed, lengths in enumerate([[3, 1, 9], [1], [0 + 1, 2]])]
    samples = []
    for i, part in enumerate(parts):
        tokens = np.concatenate([*part, part[0][:0]])
        lengths = np.array([0, *map(len, part), 0], [np.uint32, np.int64, np.int32][i])
        samples.append({"tokens.npy": tokens, "lengths.npy": lengths})
    samples[1]["loss_mask.npy"] = np.array([False])
    store = open_store(write_foreign(tmp_path / "ds", samples), cache_dir=tmp_path / "cache")
    assert store.has_loss_mask
    empty = np.zeros(0, np.uint16)
    pieces = list(sequential_documents(store))
    assert_same([p.tokens for p in pieces], [d for part in parts for d in (empty, *part, empty)])
    assert [None if p.loss_mask is None else p.loss_mask.tolist() for p in pieces] == [
        *[None] * 5,
        *([], [0], []),
        *[None] * 4,
    ]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, tar_format):
    """Names over 100 bytes take another member in each format."""
    documents = make_documents([5, 6, 7])
    keys = ["d" * 90 + "/" + "k" * 60, "a.b/c", "kurz"] if tar_format == tarfile.USTAR_FORMAT else ["ä" * 300, "b", "c"]
    make_tar(
        tmp_path / "ds" / "x.tar",
        [(f"{key}.tokens.npy", npy(d)) for key, d in zip(keys, documents, strict=True)],
        tar_format,
    )
    store = open_store(tmp_path / "ds", cache_dir=tmp_path / "cache")
    assert_same(all_documents(store), documents)
    if tar_format == tarfile.PAX_FORMAT:
        tar = tmp_path / "ds" / "x.tar"
        tar.write_bytes(tar.read_bytes().replace(b" path=", b" path+"))
        with pytest.raises(DataError, match=r"x\.tar: member '.*' has unreadable attributes; write the tar again"):
            open_store(tmp_path / "ds", cache_dir=tmp_path / "cache")


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def make_tar(path: Path, members, tar_format=tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, content) and of ready-made TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def test_the_walk_is_done_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)])
    cache = tmp_path / "cache"
    first = open_store(path, cache_dir=cache)
    assert [r.getMessage() for r in caplog.records] == [f"indexing {path}/part-{i:03d}.tar" for i in range(3)]
    caplog.clear()
    second = open_store(path, cache_dir=cache)
    assert (caplog.records, second.fingerprint) == ([], first.fingerprint)
    # A changed tar is walked again, and so is one whose kept index is damaged.
    documents = make_documents(LENGTHS[::-1])
    write_foreign(path, [{"npy": d} for d in documents])
    assert_same(all_documents(open_store(path, cache_dir=cache)), documents)
    assert len(caplog.records) == 3
    caplog.clear()
    for kept in (*cache.rglob("*.index.npy"), *cache.rglob("*.json")):
        kept.write_bytes(kept.read_bytes()[:20])
    assert_same(all_documents(open_store(path, cache_dir=cache)), documents)
    assert len(caplog.records) == 3
    assert re.search(r"\.json is damaged \(.*\); indexing .*part-000\.tar again", caplog.records[0].getMessage())


def test_progress_is_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("statex_dist.data.tar_foreign._REPORT_SECONDS", 0)
    caplog.set_level(logging.INFO)
    open_store(write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)]), cache_dir=tmp_path / "c")
    assert f"{tmp_path / 'ds'}: 2 of 3 tars indexed" in caplog.text


def test_samples_and_tars_without_tokens_are_left_out_loudly(tmp_path, caplog):
    documents = make_documents([3, 4])
    make_tar(tmp_path / "ds" / "a.tar", [("readme.txt", b"hello"), ("a.npy", npy(documents[0])), ("b.json", b"{}")])
    make_tar(tmp_path / "ds" / "b.tar", [])
    make_tar(tmp_path / "ds" / "c.tar", [("._c.npy", b"macOS"), ("nosuffix", b"?"), ("c.npy", npy(documents[1]))])
    assert_same(all_documents(open_store(tmp_path / "ds", cache_dir=tmp_path / "c")), documents)
    assert "a.tar: 2 samples without any of tokens.npy, input_ids.npy, npy are left out" in caplog.text
    assert "b.tar holds no documents" in caplog.text
    assert "c.tar:" not in caplog.text


def first_tar(tmp_path, members, **options) -> Path:
    make_tar(tmp_path / "ds" / "bad.tar", members, **options)
    return tmp_path / "ds"


GOOD = ("good.tokens.npy", npy(np.arange(5, dtype=np.uint16)))
NPY = GOOD[1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"x")], r"no sample has tokens \(allowed: tokens\.npy, input_ids\.npy, npy; there are: txt\)"),
        ([], "its 1 tars hold no documents; give tars of token ids"),
        ([("a.npy", npy(np.zeros(3)))], r"member 'a\.npy' holds <f8 of shape \(3,\); allowed: one-dim.* uint8, uint16"),
        ([("a.npy", npy(np.zeros((3, 1), np.uint16)))], r"member 'a\.npy' holds <u2 of shape \(3, 1\)"),
        ([("a.npy", npy(np.uint16(3)))], r"member 'a\.npy' holds <u2 of shape \(\)"),
        ([("a.npy", npy(np.zeros(3, ">u2")))], r"member 'a\.npy' holds >u2 of shape \(3,\); allowed: .* little-endian"),
        ([("a.npy", npy(np.zeros(3, bool)))], r"member 'a\.npy' holds \|b1"),
        ([("a.npy", npy(np.zeros(3, [("a", "<u2")])))], r"member 'a\.npy' holds \|V2"),
        ([("a.npy", b"")], r"member 'a\.npy' is not a readable npy array .*; write it with numpy\.save"),
        ([("a.npy", b"text")], r"member 'a\.npy' is not a readable npy array"),
        ([("a.npy", NPY[:60])], r"member 'a\.npy' is not a readable npy array"),
        ([("a.npy", NPY[:6] + b"\3" + NPY[7:])], r"member 'a\.npy' is not a readable npy array"),
        ([("a.npy", NPY[:6] + b"\x63" + NPY[7:])], r"member 'a\.npy' is not a readable npy array"),
        ([("a.npy", NPY[:8] + b"\xff\xff" + NPY[10:] + b" " * 70000)], r"member 'a\.npy' is not a readable npy array"),
        ([("a.npy", NPY.replace(b"'descr'", b"((((((("))], r"member 'a\.npy' is not a readable npy array"),
        ([("a.npy", NPY.replace(b"(5,)", b"(6,)"))], r"'a\.npy' claims 6 values of uint16, but has 138 bytes"),
        ([("a.npy", NPY.replace(b"(5,)", b"(-1,)").replace(b"  \n", b" \n"))], r"'a\.npy' claims -1 values"),
        ([("a.npy", NPY[:-1])], r"member 'a\.npy' claims 5 values of uint16, but has 137 bytes; write it again"),
        (
            [GOOD, ("b.npy", npy(np.zeros(3, np.int64)))],
            r"member 'b\.npy' holds int64, the tar's other tokens are",
        ),
        ([GOOD, GOOD], r"member 'good\.tokens\.npy' is there twice in one sample"),
        (
            [GOOD, ("good.loss_mask.npy", npy(np.ones(4, np.uint8)))],
            r"loss_mask\.npy' has 4 entries for the 5",
        ),
        ([GOOD, ("good.loss_mask.npy", npy(np.ones(5, np.int64)))], r"loss_mask\.npy' holds <i8 .*: .* uint8, bool"),
        (
            [GOOD, ("good.lengths.npy", npy(np.array([2, 2])))],
            r"'good\.lengths\.npy' does not add up to the 5 tokens of 'good",
        ),
        ([GOOD, ("good.lengths.npy", npy(np.array([6, -1])))], r"'good\.lengths\.npy' does not add up to the 5 tokens"),
        ([GOOD, ("good.lengths.npy", npy(np.array([1 << 63, 1 << 63, 5], np.uint64)))], "does not add up to the 5"),
    ],
)
def test_foreign_members_that_are_no_tokens_are_refused(tmp_path, members, message):
    with pytest.raises(DataError, match=message) as caught:
        open_store(first_tar(tmp_path, members), cache_dir=tmp_path / "cache")
    assert str(tmp_path / "ds") in str(caught.value)
    if members:
        assert "bad.tar" in str(caught.value)


class Exploit:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def test_a_pickle_in_an_array_is_refused_and_not_run(tmp_path):
    target = tmp_path / "made-by-a-pickle"
    array = np.empty(3, object)
    array[0] = Exploit(target)
    header = npy(np.zeros(3, np.uint64))[:128].replace(b"'<u8'", b"'|O' ")
    for content in (npy(array), header + pickle.dumps(Exploit(target)), pickle.dumps(Exploit(target))):
        for name in ("a.npy", "a.tokens.npy"):
            with pytest.raises(DataError, match=rf"member '{re.escape(name)}' (holds \|O|is not a readable npy)"):
                open_store(first_tar(tmp_path, [GOOD, (name, content)]), cache_dir=tmp_path / "cache")
    for name in ("lengths.npy", "loss_mask.npy"):
        with pytest.raises(DataError, match=rf"member 'good\.{re.escape(name)}' holds \|O"):
            open_store(first_tar(tmp_path, [GOOD, (f"good.{name}", npy(array))]), cache_dir=tmp_path / "cache")
    assert not target.exists()
    with pytest.raises((ValueError, TypeError, AttributeError)):
        np.load(io.BytesIO(npy(array)), allow_pickle=True).sum()
    assert target.exists(), "the pickle does what it should have done"


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    info.size = 5000  # which some writers note for a link; no content follows
    return info


def test_hostile_members_leave_nothing_on_disk(tmp_path):
    documents = make_documents([3, 4, 5, 6])
    outside = tmp_path / "outside.npy"
    outside.write_bytes(npy(np.arange(9, dtype=np.uint16)))
    members = [
        special("../../etc/passwd.tokens.npy", tarfile.SYMTYPE, "/etc/passwd"),
        special("a.tokens.npy", tarfile.SYMTYPE, str(outside)),
        special("b.tokens.npy", tarfile.LNKTYPE, "../outside.npy"),
        special("c.tokens.npy", tarfile.CHRTYPE),
        special("d.tokens.npy", tarfile.BLKTYPE),
        special("e.tokens.npy", tarfile.FIFOTYPE),
        special("f.tokens.npy", tarfile.DIRTYPE),
        special("link", tarfile.SYMTYPE, ".."),
        ("link/through.tokens.npy", npy(documents[0])),
        (f"{tmp_path}/absolute.tokens.npy", npy(documents[1])),
        ("../up.tokens.npy", npy(documents[2])),
        ("../../../../../../tmp/up\n\x1b[31m.tokens.npy", npy(documents[3])),
    ]
    path = first_tar(tmp_path, members)
    cache = tmp_path / "cache"
    before = {p for p in tmp_path.rglob("*") if cache not in (p, *p.parents)}
    store = open_store(path, cache_dir=cache)
    assert_same(all_documents(store), documents)
    assert {p for p in tmp_path.rglob("*") if cache not in (p, *p.parents)} == before
    assert not [p for p in cache.rglob("*") if p.is_symlink()]
    assert {p.parent.name for p in cache.rglob("*") if p.is_file()} == {"tar-index"}
    bad = first_tar(tmp_path / "names", [GOOD, ("../\n\x1b[31m.tokens.npy", b"")])
    with pytest.raises(DataError, match=r"member '\.\./\\n\\x1b\[31m\.tokens\.npy' is not") as caught:
        open_store(bad, cache_dir=cache)
    assert str(caught.value).isprintable()


def test_damaged_foreign_tars_are_refused(tmp_path):
    path = tmp_path / "ds" / "x.tar"
    make_tar(path, [(f"{i}.npy", npy(d)) for i, d in enumerate(make_documents([300] * 3))])
    whole = path.read_bytes()
    member = 512 + 1024

    def changed(at: int, new: bytes) -> bytes:
        return whole[:at] + new + whole[at + len(new) :]

    def sized(at: int, size: bytes) -> bytes:
        """The header at ``at`` with another size and a checksum that fits."""
        header = bytearray(whole[at : at + 512])
        header[124:136] = size.ljust(12, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return changed(at, bytes(header))

    second = whole[member : member + 512]
    sparse = bytearray(second)
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    for damage, message in (
        (b"", r"x\.tar is empty, not even an empty tar"),
        (b"no tar" * 1000, r"x\.tar is not a tar file \(no header at byte 0: .*\); restore it or write it again"),
        (gzip.compress(whole), r"x\.tar is not a tar file"),
        (whole[:1000], r"x\.tar is truncated \(member '0\.npy' of 728 bytes at byte 512 passes the end\); restore"),
        (whole[:member], r"x\.tar is truncated \(it has no end-of-archive mark\)"),
        (whole[: member + 100], r"x\.tar is truncated \(it has no end-of-archive mark\)"),
        # tarfile, and webdataset with it, takes this one for the end and reads one document of three.
        (changed(member, b"x"), rf"x\.tar is a damaged tar file \(no header at byte {member}: bad checksum\)"),
        (changed(512 + 30, b"\0"), r"x\.tar: member '0\.npy' is not a readable npy array"),
        (whole + whole, r"x\.tar goes on behind its end-of-archive mark at byte \d+ \(tars joined by cat\?\)"),
        (sized(member, b"\x80" + b"\xff" * 11), r"truncated \(member '1\.npy' of \d+ bytes .* passes the end\)"),
        (sized(member, b"\xff" * 12), r"x\.tar: member '1\.npy' has a size of -1 bytes; write the tar again"),
        (changed(member, bytes(sparse)), r"member '1\.npy' is stored sparse; write the tar without --sparse"),
    ):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=message):
            open_store(tmp_path / "ds", cache_dir=tmp_path / "cache")
    path.write_bytes(changed(member, b"x"))
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1, "what makes a walk of our own necessary"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"GNU.sparse.major": "1"}, "is stored sparse; write the tar without --sparse"),
        ({"size": "-5"}, "has a size of '-5' bytes; write the tar again"),
        ({"size": "1" * 18}, rf"truncated \(member '{'n' * 3}.npy' of {'1' * 18} bytes"),
        ({"comment": "x" * (1 << 20)}, r"bytes of attributes; allowed: 1048576"),
    ],
)
def test_hostile_attributes_are_refused(tmp_path, attributes, message):
    info = tarfile.TarInfo("nnn.npy")
    info.pax_headers = attributes
    path = first_tar(tmp_path, [info], tar_format=tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match=message):
        open_store(path, cache_dir=tmp_path / "cache")


def test_damaged_gz_and_a_tar_in_both_forms(tmp_path):
    path = write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)], ".tar.gz")
    whole = (path / "part-001.tar.gz").read_bytes()
    middle = len(whole) // 2
    for damage in (whole[:-20], b"text", whole[:middle] + b"\xff" * 50 + whole[middle + 50 :]):
        (path / "part-001.tar.gz").write_bytes(damage)
        with pytest.raises(DataError, match=r"part-001\.tar\.gz cannot be unpacked \(.*\); restore it"):
            open_store(path, cache_dir=tmp_path / "cache")
    (path / "part-001.tar.gz").write_bytes(whole)
    store = open_store(path, cache_dir=tmp_path / "cache")
    (path / "part-001.tar.gz").write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=r"part-001\.tar\.gz has \d+ bytes, the index says \d+"):
        store.read(1, 0, 0, 1)
    (path / "part-001.tar.gz").write_bytes(gzip.compress(b"not a tar"))
    with pytest.raises(DataError, match=r"part-001\.tar\.gz is not a tar file|part-001\.tar\.gz is truncated"):
        open_store(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.unpacked"))
    (path / "part-000.tar").write_bytes(gzip.decompress((path / "part-000.tar.gz").read_bytes()))
    with pytest.raises(DataError, match=r"ds holds part-000\.tar and part-000\.tar\.gz; remove one of them"):
        open_store(path, cache_dir=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_not_the_tars_fault(tmp_path, monkeypatch):
    path = write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)], ".tar.gz")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"part-000\.tar\.gz cannot be indexed \(.*Not a directory.*; make .* cache_dir"
    ):
        open_store(path, cache_dir=tmp_path / "file" / "cache")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(DataError, match=r"part-000\.tar\.gz cannot be indexed \(.*No space left.*set cache_dir"):
        open_store(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.unpacked"))


def test_a_foreign_tar_that_shrinks_under_us_is_refused(tmp_path):
    path = write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)])
    store = open_store(path, cache_dir=tmp_path / "cache")
    shard = path / "part-001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"part-001\.tar has \d+ bytes, the index says \d+"):
        store.read(1, 0, 0, 1)
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard part-001\.tar is missing"):
        store.read(1, 0, 0, 1)


def test_what_is_no_dataset_says_what_is_allowed(tmp_path):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"ds has no index\.json \(MDS\), no shards\.json \(tar\) and no \*\.tar"):
        open_store(tmp_path / "ds", cache_dir=tmp_path / "cache")

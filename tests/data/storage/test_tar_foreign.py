"""Tars that others wrote: read where they are, and never trusted."""

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

from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.errors import DataError, ShardError
from tests.data.synthetic import all_documents, assert_same, make_documents
from tests.raising import raises

LENGTHS = [2, 255, 256, 257, 1000, 1, 70000, 3, 12]


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
        with pytest.raises(DataError, match=r"x\.tar: member '.*' .*attributes"):
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
    for change, reason in (
        ({"dtype": "object"}, "dtype is 'object'; allowed: uint8"),
        ({"loss_mask": None}, "loss_mask is None; allowed: true, false"),
        ({"documents": True}, r".* \(it holds int64 of shape \(\d, 3\), not int64 of \(True, 3\)\)"),
        ({"bytes": "5"}, r"size of part-000\.tar is '5'; allowed: an integer"),
        ({"hashes": {"shake_128": ""}}, "hash 'shake_128' of .* is not known"),
    ):
        caplog.clear()
        kept = max((cache / "tar-index").glob("part-000.tar-*.json"), key=lambda file: file.stat().st_mtime_ns)
        kept.write_text(json.dumps(json.loads(kept.read_text()) | change))
        assert_same(all_documents(open_store(path, cache_dir=cache)), documents)
        (record,) = caplog.records
        assert re.search(rf"\.json is damaged \({reason}.*\); indexing .*part-000\.tar again", record.getMessage())


def test_progress_is_logged(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("statex_dist.data.storage.tar_format._REPORT_SECONDS", 0)
    caplog.set_level(logging.INFO)
    open_store(write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)]), cache_dir=tmp_path / "c")
    assert f"{tmp_path / 'ds'}: 2 of 3 tars indexed" in caplog.text


def test_samples_and_tars_without_tokens_are_left_out_loudly(tmp_path, caplog):
    documents = make_documents([3, 4])
    make_tar(tmp_path / "ds" / "a.tar", [("readme.txt", b"hello"), ("a.npy", npy(documents[0])), ("b.json", b"{}")])
    make_tar(tmp_path / "ds" / "b.tar", [])
    make_tar(tmp_path / "ds" / "c.tar", [("._c.npy", b"macOS"), ("nosuffix", b"?"), ("c.npy", npy(documents[1]))])
    assert_same(all_documents(open_store(tmp_path / "ds", cache_dir=tmp_path / "c")), documents)
    assert "a.tar: 2 samples without any of tokens.npy, input_ids.npy, npy" in caplog.text
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
        ([("a.txt", b"x")], r"tokens\.npy, input_ids\.npy, npy.* txt"),
        ([], "1 tars.*no documents"),
        ([("a.npy", npy(np.zeros(3)))], r"'a\.npy'.*<f8.*\(3,\).*uint8, uint16"),
        ([("a.npy", npy(np.zeros((3, 1), np.uint16)))], r"'a\.npy'.*<u2.*\(3, 1\)"),
        ([("a.npy", npy(np.uint16(3)))], r"'a\.npy'.*<u2.*\(\)"),
        ([("a.npy", npy(np.zeros(3, ">u2")))], r"'a\.npy'.*>u2.*\(3,\).*little-endian"),
        ([("a.npy", npy(np.zeros(3, bool)))], r"member 'a\.npy' holds \|b1"),
        ([("a.npy", npy(np.zeros(3, [("a", "<u2")])))], r"member 'a\.npy' holds \|V2"),
        ([("a.npy", b"")], r"'a\.npy'.*npy array.*numpy\.save"),
        ([("a.npy", b"text")], r"'a\.npy'.*npy array"),
        ([("a.npy", NPY[:60])], r"'a\.npy'.*npy array"),
        ([("a.npy", NPY[:6] + b"\3" + NPY[7:])], r"'a\.npy'.*npy array"),
        ([("a.npy", NPY[:6] + b"\x63" + NPY[7:])], r"'a\.npy'.*npy array"),
        ([("a.npy", NPY[:8] + b"\xff\xff" + NPY[10:] + b" " * 70000)], r"'a\.npy'.*npy array"),
        ([("a.npy", NPY.replace(b"'descr'", b"((((((("))], r"'a\.npy'.*npy array"),
        ([("a.npy", NPY.replace(b"(5,)", b"(6,)"))], r"'a\.npy'.* 6 .*uint16.* 138 bytes"),
        ([("a.npy", NPY.replace(b"(5,)", b"(-1,)").replace(b"  \n", b" \n"))], r"'a\.npy' claims -1 values"),
        ([("a.npy", NPY[:-1])], r"'a\.npy'.* 5 .*uint16.* 137 bytes"),
        (
            [GOOD, ("b.npy", npy(np.zeros(3, np.int64)))],
            r"'b\.npy'.*int64",
        ),
        ([GOOD, GOOD], r"'good\.tokens\.npy'.*twice"),
        (
            [GOOD, ("good.loss_mask.npy", npy(np.ones(4, np.uint8)))],
            r"loss_mask\.npy'.*4 entries.* 5",
        ),
        ([GOOD, ("good.loss_mask.npy", npy(np.ones(5, np.int64)))], r"loss_mask\.npy' holds <i8 .*: .* uint8, bool"),
        (
            [GOOD, ("good.lengths.npy", npy(np.array([2, 2])))],
            r"'good\.lengths\.npy'.*5 tokens.*'good",
        ),
        ([GOOD, ("good.lengths.npy", npy(np.array([6, -1])))], r"'good\.lengths\.npy'.*5 tokens"),
        ([GOOD, ("good.lengths.npy", npy(np.array([1 << 63, 1 << 63, 5], np.uint64)))], "add up.* 5"),
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
            with pytest.raises(DataError, match=rf"'{re.escape(name)}' .*(\|O|readable npy)"):
                open_store(first_tar(tmp_path, [GOOD, (name, content)]), cache_dir=tmp_path / "cache")
    for name in ("lengths.npy", "loss_mask.npy"):
        with raises(DataError, f"good.{name}", "|O"):
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
    with raises(DataError, r"../\n\x1b[31m.tokens.npy") as caught:
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
        (b"", r"x\.tar is empty"),
        (b"no tar" * 1000, r"x\.tar.*byte 0:"),
        (gzip.compress(whole), r"x\.tar.*tar file"),
        (whole[:1000], r"x\.tar.*truncated.*'0\.npy'.*728 bytes.*byte 512"),
        (whole[:member], r"x\.tar.*truncated.*end-of-archive"),
        (whole[: member + 100], r"x\.tar.*truncated.*end-of-archive"),
        # tarfile, and webdataset with it, takes this one for the end and reads one document of three.
        (changed(member, b"x"), rf"x\.tar.*byte {member}: bad checksum"),
        (changed(512 + 30, b"\0"), r"x\.tar: member '0\.npy'"),
        (whole + whole, r"x\.tar.*end-of-archive.*byte \d+ .*cat\?"),
        (sized(member, b"\x80" + b"\xff" * 11), r"truncated \(member '1\.npy'"),
        (sized(member, b"\xff" * 12), r"x\.tar: member '1\.npy'.*-1 bytes"),
        (changed(member, bytes(sparse)), r"'1\.npy'.*--sparse"),
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
        ({"GNU.sparse.major": "1"}, "--sparse"),
        ({"size": "-5"}, "size of '-5'"),
        ({"size": "1" * 18}, rf"truncated \(member '{'n' * 3}.npy' of {'1' * 18}"),
        ({"comment": "x" * (1 << 20)}, r"attributes.* 1048576"),
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
        with pytest.raises(DataError, match=r"part-001\.tar\.gz .*unpacked \("):
            open_store(path, cache_dir=tmp_path / "cache")
    (path / "part-001.tar.gz").write_bytes(whole)
    store = open_store(path, cache_dir=tmp_path / "cache")
    (path / "part-001.tar.gz").write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=r"part-001\.tar\.gz .* \d+ bytes, .* \d+\b"):
        store.read(1, 0, 0, 1)
    (path / "part-001.tar.gz").write_bytes(gzip.compress(b"not a tar"))
    with pytest.raises(DataError, match=r"part-001\.tar\.gz .*(tar file|truncated)"):
        open_store(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.unpacked"))
    (path / "part-000.tar").write_bytes(gzip.decompress((path / "part-000.tar.gz").read_bytes()))
    with pytest.raises(DataError, match=r"part-000\.tar and part-000\.tar\.gz"):
        open_store(path, cache_dir=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_not_the_tars_fault(tmp_path, monkeypatch):
    path = write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)], ".tar.gz")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"part-000\.tar\.gz .*Not a directory.* cache_dir"):
        open_store(path, cache_dir=tmp_path / "file" / "cache")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(DataError, match=r"part-000\.tar\.gz .*No space left.* cache_dir"):
        open_store(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.unpacked"))


def test_a_foreign_tar_that_shrinks_under_us_is_refused(tmp_path):
    path = write_foreign(tmp_path / "ds", [{"npy": d} for d in make_documents(LENGTHS)])
    store = open_store(path, cache_dir=tmp_path / "cache")
    shard = path / "part-001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"part-001\.tar .* \d+ bytes, .* \d+\b"):
        store.read(1, 0, 0, 1)
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard part-001\.tar is missing"):
        store.read(1, 0, 0, 1)


def test_what_is_no_dataset_says_what_is_allowed(tmp_path):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"ds .*index\.json .*shards\.json .*\*\.tar"):
        open_store(tmp_path / "ds", cache_dir=tmp_path / "cache")

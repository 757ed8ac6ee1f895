"""The manifest and the lengths beside it, whole, damaged and hostile."""

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from statex_dist.data.formats import open_store
from statex_dist.data.manifest import hash_lengths, pack_lengths, parse_manifest, read_lengths
from statex_dist.errors import DataError
from tests.data.storage.loopback import write_manifest
from tests.data.synthetic import make_documents, write_mds

LENGTHS = np.array([5, 1, 7000, 3])


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_manifest(write_mds(tmp_path / "ds", make_documents(LENGTHS)))


def test_round_trip(dataset):
    content = (dataset / "manifest.json").read_bytes()
    manifest = parse_manifest(content, "here")
    assert (manifest.documents, manifest.tokens, manifest.loss_mask) == (4, 7009, False)
    found = read_lengths(dataset / "lengths.npy", 4, manifest.lengths_hash)
    assert (found.tolist(), found.dtype) == (LENGTHS.tolist(), np.uint32)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 4, r"version 4 is not supported \(2 and 3 are\)"),
        ("version", 3.0, r"version 3\.0 is not supported"),
        ("version", [2], r"version \[2\] is not supported"),
        ("version", {"a": "x" * 10_000}, r"version \{'a': 'x+ \[\.\.\.\] x+'\} is not supported"),
        ("eos_token_id", "2", r"eos_token_id is '2', not of type int \| None"),
        ("documents", "4", "documents is '4', not of type int"),
        ("documents", True, "documents is True, not of type int"),
        ("tokens", float("inf"), "tokens is inf, not of type int"),
        ("seed", None, "seed is None, not of type int"),
        ("tokenizer", 5, "tokenizer is 5, not of type str"),
        ("lengths_hash", {"a": 1}, r"lengths_hash is \{'a': 1\}, not of type str"),
        ("loss_mask", 0, "loss_mask is 0, not of type bool"),
        ("shard_documents", 4, r"shard_documents is 4, not of type list\[int\]"),
        ("shard_tokens", ["a"], r"shard_tokens is \['a'\], not of type list\[int\]"),
        ("length_histogram", [1.0], r"length_histogram is \[1\.0\], not of type list\[int\]"),
        ("left_out", [], r"left_out is \[\], not of type dict\[str, int\]"),
        ("left_out", {"short": None}, r"left_out is \{'short': None\}, not of type dict\[str, int\]"),
        ("tokenizer_hash", ["x" * 10_000], r"tokenizer_hash is \['x+ \[\.\.\.\] x+'\], not of type str"),
        ("extra", 1, "missing or unknown keys: extra"),
    ],
)
def test_a_manifest_of_other_types_is_refused(dataset, field, value, message):
    path = dataset / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(DataError, match=rf"ds/manifest\.json: {message}"):
        open_store(dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is unreadable: Expecting value"),
        (b"\xff\xfe\xfa", "is unreadable: "),
        (b"[" * 200_000, "is unreadable: it is nested too deeply"),
        (b'{"version": ' + b"9" * 5000 + b"}", "is unreadable: Exceeds the limit"),
        (b"[]", r"holds no JSON object \(list\)"),
        (b"null", r"holds no JSON object \(NoneType\)"),
    ],
)
def test_what_is_no_manifest_is_refused(dataset, content, message):
    (dataset / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"ds/manifest\.json:? {message}"):
        open_store(dataset)


def test_a_file_too_large_is_not_read(dataset):
    for name in ("manifest.json", "index.json"):
        kept = (dataset / name).read_bytes()
        with (dataset / name).open("wb") as file:
            file.truncate(1 << 40)  # sparse
        with pytest.raises(DataError, match=rf"ds/{name} .*ValueError: .*\d+ bytes"):
            open_store(dataset)
        (dataset / name).write_bytes(kept)


def test_a_manifest_of_the_version_before_is_read(dataset):
    path = dataset / "manifest.json"
    content = json.loads(path.read_text())
    for name in ("bos", "bos_token_id", "special_tokens", "special_token_documents"):
        del content[name]
    path.write_text(json.dumps(content | {"version": 2}))
    manifest = open_store(dataset).manifest
    assert (manifest.version, manifest.bos, manifest.special_tokens) == (2, "none", "keep")
    assert manifest.special_token_documents is None
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="bos, bos_token_id, special_token_documents, spec"):
        open_store(dataset)


def with_header(header: str) -> bytes:
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + LENGTHS.astype("<u4").tobytes()


def as_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", pack_lengths(LENGTHS))
    return out.getvalue()


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


WHOLE = pack_lengths(LENGTHS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOF: reading magic string"),
        (as_zip(), "the magic string is not correct"),
        (b"PK\3\4garbage" * 10, "the magic string is not correct"),
        (WHOLE[:9], "EOF: reading array header length"),
        (WHOLE[:60], "EOF: reading array header"),
        (WHOLE[:-1], "it claims 4 values of uint32, but has 143 bytes"),
        (WHOLE + b"\0", "it claims 4 values of uint32, but has 145 bytes"),
        (WHOLE[:6] + b"\3" + WHOLE[7:], r"npy version 3\.0; allowed: 1\.0, 2\.0"),
        (WHOLE[:6] + b"\x63" + WHOLE[7:], r"npy version 99\.0; allowed|we only support format version"),
        (WHOLE.replace(b"'descr'", b"((((((("), "Cannot parse header|EOF in multi-line|was never closed"),
        (with_header("{'descr': '<u4', 'fortran_order': False, 'shape': (1000000000000,)}"), r"shape \(10+,\), not"),
        (
            with_header("{'descr': '<u4', 'fortran_order': False, 'shape': (-1,)}"),
            r"uint32 of shape \(-1,\), not uint32",
        ),
        (with_header("{'descr': '<u4', 'fortran_order': False, 'shape': 4}"), "shape is not valid"),
        (with_header("{'descr': '>u4', 'fortran_order': False, 'shape': (4,)}"), r">u4 of shape \(4,\), not uint32"),
        (saved(LENGTHS), r"it holds int64 of shape \(4,\), not uint32 of \(4,\)"),
        (saved(np.zeros((2, 2), np.uint32)), r"it holds uint32 of shape \(2, 2\), not uint32 of \(4,\)"),
        (saved(np.array([1, "a", None, 2], object)), r"it holds object of shape \(4,\)"),
    ],
)
def test_lengths_that_are_no_array_of_them_are_refused(tmp_path, content, message):
    path = tmp_path / "lengths.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"lengths\.npy .*({message})") as found:
        read_lengths(path, 4, hash_lengths(LENGTHS))
    assert "\n" not in str(found.value)


@pytest.mark.filterwarnings("ignore")  # numpy's, of a header that Python 2 would have written
def test_every_changed_byte_of_the_header_is_refused_or_harmless(tmp_path):
    path = tmp_path / "lengths.npy"
    rng = np.random.default_rng(0)
    for at in range(len(WHOLE)):
        for value in rng.integers(0, 256, 6).tolist():
            path.write_bytes(WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :])
            with contextlib.suppress(DataError):
                assert read_lengths(path, 4, hash_lengths(LENGTHS)).tolist() == LENGTHS.tolist()


def test_lengths_of_other_documents_or_missing_ones_are_refused(dataset):
    path = dataset / "lengths.npy"
    path.write_bytes(pack_lengths(LENGTHS + 1))
    with pytest.raises(DataError, match=r"lengths\.npy .*manifest"):
        open_store(dataset)
    path.unlink()
    with pytest.raises(DataError, match=r"ds has no lengths\.npy"):
        open_store(dataset)

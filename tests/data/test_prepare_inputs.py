"""Compressed inputs, filters, EOS rules and both formats of ``statex prepare``."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import zstd

from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.documents import WorkUnit, file_facts, find_files, read_unit, split_units
from statex_dist.data.corpus.records import BadRecordError
from statex_dist.data.corpus.tokenize_units import TokenizeTask, UnitJob, UnitTokenizer
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.errors import ConfigError, DataError
from tests.data.options import prepare
from tests.data.prepared import EOS, files_of, json_lines, put, texts_of
from tests.raising import raises

PACK = {".gz": gzip.compress, ".zst": zstd.compress}


@pytest.fixture(params=PACK)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def noise(size: int) -> bytes:
    """Bytes that no compression makes smaller, so that a cut or a flipped bit hits the data."""
    return random.Random(0).randbytes(size).hex().encode()


def test_compressed_json_lines_with_several_members(tmp_path, suffix):
    texts = [f"line {i} ∑" for i in range(3000)]
    whole = json_lines(*({"text": text} for text in texts))
    cut = len(whole) // 2  # inside a line
    packed = PACK[suffix](whole[:cut]) + PACK[suffix](whole[cut:])
    for name in ("a.jsonl", "b.ndjson", "C.JSONL"):
        path = put(tmp_path / f"{name}{suffix}", packed)
        units, size = split_units([path], unit_bytes=100)
        assert (len(units), size) == (1, len(packed))
        assert [record.text for record in read_unit(units[0], 258)] == texts


def test_compressed_text_is_one_document_and_found_in_directories(tmp_path, suffix):
    put(tmp_path / f"a.txt{suffix}", PACK[suffix](b"first\nsecond"))
    put(tmp_path / f"b.py{suffix}", PACK[suffix](b"pass"))
    put(tmp_path / f"c.png{suffix}", PACK[suffix](b"no text"))
    assert [file.name for file in find_files([tmp_path])] == [f"a.txt{suffix}", f"b.py{suffix}"]
    prepare([tmp_path], tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == ["first\nsecond", "pass"]


def test_packed_or_not_gives_the_same_dataset(tmp_path, suffix):
    content = json_lines(*({"text": f"t{i}" * (i % 9)} for i in range(500)))
    prepare([put(tmp_path / "a.jsonl", content)], tmp_path / "plain")
    prepare([put(tmp_path / f"a.jsonl{suffix}", PACK[suffix](content))], tmp_path / "packed", workers=2)
    plain, packed = files_of(tmp_path / "plain"), files_of(tmp_path / "packed")
    packed["manifest.json"] = packed["manifest.json"].replace(f"a.jsonl{suffix}".encode(), b"a.jsonl")
    assert plain == packed


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_compressed_files(tmp_path, suffix, workers):
    lines = json_lines(*({"text": noise(2000).decode()} for _ in range(300)))
    packed = PACK[suffix](lines)
    bad = (packed[:-7], packed[: len(packed) // 2], packed + b"rubbish behind", b"no compressed file at all")
    for content in bad:
        path = put(tmp_path / f"a.jsonl{suffix}", content)
        with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} .* line \d+: \w+") as refused:
            prepare([path], tmp_path / "out", workers=workers)
        assert "\n" not in str(refused.value)
    path = put(tmp_path / f"a.txt{suffix}", PACK[suffix](noise(9000))[:-3])
    with pytest.raises(DataError, match=rf"a\.txt\{suffix} .*damaged"):
        prepare([path], tmp_path / "out")
    with raises(DataError, f"a.txt{suffix}", "no byte"):
        prepare([put(path, b"")], tmp_path / "out")
    path = put(tmp_path / f"a.parquet{suffix}", PACK[suffix](b"PAR1"))
    with pytest.raises(DataError, match=rf"parquet inside \{suffix}"):
        prepare([path], tmp_path / "out")


def test_bad_lines_of_compressed_files_are_named(tmp_path, suffix):
    path = put(tmp_path / f"a.jsonl{suffix}", PACK[suffix](b'{"text": "x"}\n\n{"body": 1}\n'))
    with raises(BadRecordError, f"a.jsonl{suffix}:3", "text"):
        prepare([path], tmp_path / "out")
    path = put(tmp_path / f"a.txt{suffix}", PACK[suffix](b"caf\xe9"))
    with pytest.raises(DataError, match=r"UTF-8.* byte 3"):
        prepare([path], tmp_path / "out")


def test_memory_is_bounded(tmp_path):
    """A compressed file of 60 MB is read in much less, and one document of 20 MB in a few times its size."""
    text = "some words that are repeated " * 7000
    many = put(tmp_path / "many.jsonl.gz", gzip.compress(json_lines(*[{"text": text}] * 300), 1))
    one = put(tmp_path / "one.jsonl", json_lines({"text": "x" * 20_000_000}))
    for path, bound in ((many, 30e6), (one, 5 * 20e6)):
        worker = UnitTokenizer(TokenizeTask("bytes", "uint16", DocumentRules()))
        job = UnitJob(split_units([path])[0][0], (file_facts(path),), str(tmp_path / "unit"))
        tracemalloc.start()
        worker.run(job)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < bound, (path, peak)


RECORDS = (
    {"text": "aa", "language": "en", "score": 0.9, "meta": {"n": 1, "deep": {"ok": True}}},
    {"text": "bb", "language": "de", "score": 1, "meta": {"n": 2, "deep": {"ok": False}}},
    {"text": "cc", "language": "en", "score": 0.1, "meta": {"n": 10, "deep": {"ok": True}}},
    {"text": "dd", "language": None, "score": 0.5, "meta": {"n": 3, "deep": None}},
    {"text": "ee", "language": "fr", "score": None, "meta": None},
)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["language=en"], "ac"),
        (["language!=en"], "be"),  # a record without the field is left out, whatever the operator
        (["score>=0.5"], "abd"),
        (["score<0.5"], "c"),
        (["score>0.5", "language = en"], "a"),
        (["score=1"], "b"),
        (["meta.n>2"], "cd"),  # as numbers: 10 > 2
        (["meta.n<=2"], "ab"),
        (["meta.deep.ok=true"], "ac"),
        (["language<=en"], "abc"),
        (["nothing=1"], ""),
        (["language.en=1"], ""),
    ],
)
def test_filters(tmp_path, kind, where, kept):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        put(path, json_lines(*RECORDS))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(list(RECORDS)), path)
    if not kept:
        with raises(DataError, "0 shorter than 2 tokens", "5", "--where"):
            prepare([path], tmp_path / "out", where=where)
        return
    summary = prepare([path], tmp_path / "out", where=where)
    assert sorted(texts_of(tmp_path / "out")) == [letter * 2 for letter in kept]
    assert summary.filtered_documents == 5 - len(kept)
    assert open_store(tmp_path / "out").manifest.left_out == {
        "short": 0,
        "long": 0,
        "filtered": 5 - len(kept),
        "undecodable": 0,
        "bad": 0,
    }


def test_a_field_with_a_dot_in_its_name_comes_before_a_nested_one(tmp_path):
    path = put(tmp_path / "a.jsonl", json_lines({"text": "aa", "a.b": 1, "a": {"b": 2}}, {"text": "bb", "a": {"b": 1}}))
    prepare([path], tmp_path / "out", where=["a.b=1"])
    assert sorted(texts_of(tmp_path / "out")) == ["aa", "bb"]


@pytest.mark.parametrize("expression", ["language", "=en", "score=", "score==1", "score=>1", "score<>1", "", "!=x"])
def test_bad_expressions(tmp_path, expression):
    path = put(tmp_path / "a.jsonl", json_lines(*RECORDS))
    with raises(ConfigError, "FIELD OP VALUE", "= != < <= > >="):
        prepare([path], tmp_path / "out", where=[expression])


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("score>=good", r"a\.jsonl:1.*'score'.*--where.*'good'"),
        ("meta=1", r"a\.jsonl:1: field 'meta'.* dict.*--where"),
        ("meta.deep.ok=1", r"a\.jsonl:1.*'meta.deep.ok'.*--where.*'1'"),
    ],
)
def test_fields_that_cannot_be_compared(tmp_path, expression, message):
    path = put(tmp_path / "a.jsonl", json_lines(*RECORDS))
    with pytest.raises(DataError, match=message):
        prepare([path], tmp_path / "out", where=[expression])


def test_text_has_no_fields_to_filter_by(tmp_path):
    path = put(tmp_path / "a.txt", b"text")
    with pytest.raises(ConfigError, match=r"--where .*a\.txt"):
        prepare([path], tmp_path / "out", where=["language=en"])


def test_parquet_reads_only_the_columns_needed(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": ["aa", "bb"], "huge": ["x", "y"], "meta": [{"n": 1, "m": 2}, {"n": 3, "m": 4}]})
    parquet.write_table(table, tmp_path / "a.parquet")
    asked = []
    real = parquet.ParquetFile.iter_batches

    def spied(self, *args, columns, **options):
        asked.append(columns)
        return real(self, *args, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", spied)
    unit = WorkUnit("parquet", (str(tmp_path / "a.parquet"),), 0, 1)
    assert [r.text for r in read_unit(unit, 258, DocumentRules(where=("meta.n=3",)))] == ["bb"]
    assert asked == [["text", "meta.n"]]


def test_long_documents_are_left_out(tmp_path):
    path = put(tmp_path / "a.jsonl", json_lines(*({"text": "x" * n} for n in (0, 1, 3, 4, 5, 90))))
    summary = prepare([path], tmp_path / "out", max_tokens=5)
    assert sorted(texts_of(tmp_path / "out")) == ["x", "xxx", "xxxx"]
    assert (summary.short_documents, summary.long_documents) == (1, 2)
    assert open_store(tmp_path / "out").manifest.left_out["long"] == 2
    for bad in (1, 0):
        with pytest.raises(ConfigError, match=rf"max_tokens is {bad}\b.*min_tokens \(2\)"):
            prepare([path], tmp_path / "x", max_tokens=bad)
    with raises(DataError, "5 shorter than 8", "1 longer than 90"):
        prepare([path], tmp_path / "x", min_tokens=8, max_tokens=90)


def test_without_eos_documents_are_taken_as_they_are(tmp_path):
    put(tmp_path / "a.jsonl", json_lines({"text": "ab"}, {"text": "c"}))
    put(tmp_path / "b.jsonl", json_lines({"input_ids": [7, 8], "loss_mask": [0, 1]}, {"input_ids": [9, EOS]}))
    path = str(tmp_path / "*.jsonl")
    summary = prepare([path], tmp_path / "out", eos="none")
    store = open_store(tmp_path / "out")
    found = sorted(piece.tokens.tolist() for piece in sequential_documents(store))
    assert found == [[7, 8], [9, EOS], [97, 98]]
    assert summary.short_documents == 1
    assert (store.manifest.eos, store.manifest.eos_token_id) == ("none", EOS)
    with raises(ConfigError, "eos", "prepend", "append", "none"):
        prepare([path], tmp_path / "x", eos="prepend")


@pytest.mark.parametrize("format", ["mds", "wds"])
@pytest.mark.parametrize("compression", ["none", "zstd", "gz"])
def test_formats_and_compressions(tmp_path, format, compression):
    if format == "wds":
        pytest.importorskip("webdataset")
    put(tmp_path / "a.jsonl", json_lines(*({"text": f"document {i}"} for i in range(60))))
    put(tmp_path / "b.jsonl", json_lines({"input_ids": [5, 6], "loss_mask": [0, 1]}))
    path = str(tmp_path / "*.jsonl")
    options = {"format": format, "compression": compression, "shard_bytes": 2048}
    summary = prepare([path], tmp_path / "out", **options)
    store = open_store(tmp_path / "out", cache_dir=tmp_path / "cache")
    pieces = [(piece.tokens.tolist(), piece.loss_mask.tolist()) for piece in sequential_documents(store)]
    prepare([path], tmp_path / "mds")
    expected = [(p.tokens.tolist(), p.loss_mask.tolist()) for p in sequential_documents(open_store(tmp_path / "mds"))]
    assert pieces == expected
    assert ([5, 6, EOS], [0, 1, 0]) in pieces
    assert store.manifest.format == format
    assert summary.shards == store.num_shards > 1
    assert sum(store.manifest.shard_documents) == 61


def test_every_figure_of_what_was_left_out_is_shown(tmp_path: Path, capsys):
    from launch.cli import main

    put(tmp_path / "a.jsonl", json_lines(*RECORDS, {"text": "", "score": 1}, {"text": "x" * 50, "score": 1}))
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*command, "--where", "score>=0.5", "--max-tokens", "9"]) == 0
    assert "3 documents, 1 short and 1 long and 2 filtered ones left out" in capsys.readouterr().out
    assert main([*command, "--overwrite", "--json", "--where", "score>=0.5", "--where", "language=en"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["documents"], figures["filtered_documents"]) == (1, 6)

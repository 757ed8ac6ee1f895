"""Corpora with defects: bad records, other encodings, huge documents, what is no regular file."""

import codecs
import gzip
import json
import os
import socket
import threading
import tracemalloc

import pytest

from launch.cli import main
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.documents import find_files, read_unit, split_units
from statex_dist.data.corpus.json_lines import _object
from statex_dist.data.corpus.parquet_rows import dictionary_bytes
from statex_dist.data.corpus.records import BadRecordError, ReadReport
from statex_dist.data.corpus.work import WorkPart
from statex_dist.data.formats import open_store
from statex_dist.data.prepare import BAD_RECORDS_NAME
from statex_dist.errors import DataError
from tests.data.options import prepare, prepare_part
from tests.data.prepared import files_of, json_lines, put, split_small, texts_of
from tests.raising import raises

BAD_LINES = [
    (json_lines({"text": None}), "field 'text' is null"),
    (json_lines({"text": "\ud800"}), "field 'text' has a lone surrogate at character 0"),
    (b'{"text": "\xff"}\n', "not UTF-8 (byte 10 of the line)"),
    (b'{"text": "\xed\xa0\x80"}\n', "not UTF-8 (byte 10 of the line)"),
    (b'{"text": \n', "not valid JSON (Expecting value: line 2 column 1 (char 10))"),
    (b'["text"]\n', "a JSON object is needed, not list"),
    (b'{"text": ["a"]}\n', "field 'text' is list, a string is needed"),
    (b'{"body": "x"}\n', "no field 'text' or 'input_ids' (there are: body)"),
    (b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n", "not valid JSON (Exceeds the limit (4300 digits)"),
    (
        b'{"text": "x", "n": ' + b"[" * 150 + b"]" * 150 + b"}\n",
        "it is nested too deeply: at most 100 levels are read)",
    ),
    (b'{"text": "x", "n": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}\n", "nested too deeply"),
    (b'{"n": ' + b"[" * 100000 + b"}\n", "nested too deeply"),
    (json_lines({"text": "x" * 900}), "the line has more than 600 bytes; allow more with --max-document-bytes"),
]
GOOD = json_lines({"text": "good"})


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_the_first_bad_record_ends_the_run(tmp_path, line, reason):
    path = put(tmp_path / "a.jsonl", GOOD + b"\n" + line + GOOD)
    most = 600 if "600" in reason else 1 << 20
    with pytest.raises(DataError) as refused:
        prepare([path], tmp_path / "out", max_document_bytes=most)
    text = str(refused.value)
    assert text.startswith(f"{path}:3: ")
    assert reason in text
    assert "--skip-bad-records" in text


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("unit_bytes", [100, 1 << 20])
@pytest.mark.parametrize("compressed", [False, True])
def test_bad_records_are_left_out_counted_and_listed(tmp_path, monkeypatch, workers, unit_bytes, compressed):
    split_small(monkeypatch, unit_bytes)
    lines = [line for line, reason in BAD_LINES if len(line) < 1000]
    content = b"".join(GOOD + line for line in lines) + json_lines({"text": "x" * 8000}) + GOOD
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    put(path, gzip.compress(content) if compressed else content)
    summary = prepare([path], tmp_path / "out", workers=workers, skip_bad_records=True, max_document_bytes=7000)
    assert sorted(texts_of(tmp_path / "out")) == ["good"] * (len(lines) + 1) + ["x" * 900]
    assert summary.bad_records == len(summary.bad_records_listed) == len(lines)
    places = [line.removeprefix(f"{path}:").partition(":")[0] for line in summary.bad_records_listed]
    expected = [2 * k + 2 for k, line in enumerate(lines) if b"x" * 900 not in line] + [2 * len(lines) + 1]
    assert [int(place) for place in places] == expected
    assert (tmp_path / "out" / BAD_RECORDS_NAME).read_text().splitlines() == summary.bad_records_listed
    assert open_store(tmp_path / "out").manifest.left_out["bad"] == summary.bad_records


def corpus_of(tmp_path):
    """300 bad records in three files, with good ones between them, and a bad text file."""
    root = tmp_path / "corpus"
    root.mkdir()
    for name in "abc":
        put(root / f"{name}.jsonl", b"".join(json_lines({"text": f"{name}{i}"}, {"text": None}) for i in range(100)))
    put(root / "d.txt", b"latin \xe9")
    return root


def test_the_list_is_bounded_and_the_same_for_parts_and_one_run(tmp_path, monkeypatch, caplog):
    split_small(monkeypatch, 500)
    corpus = corpus_of(tmp_path)
    whole = prepare([corpus], tmp_path / "whole", workers=1, skip_bad_records=True)
    assert (whole.documents, whole.bad_records, len(whole.bad_records_listed)) == (300, 301, 100)
    assert sum("left out: " in record.getMessage() for record in caplog.records) == 100
    rules = DocumentRules(skip_bad_records=True)
    parts = [prepare_part([corpus], tmp_path / "out", "bytes", WorkPart(i, 2), rules) for i in (1, 2)]
    assert sum(part.bad_records for part in parts) == 301
    merged = prepare([corpus], tmp_path / "out", merge=True, skip_bad_records=True)
    assert merged.bad_records_listed == whole.bad_records_listed
    assert merged.bad_records == 301
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_counts_survive_a_run_that_was_cut_off(tmp_path, monkeypatch):
    split_small(monkeypatch, 500)
    corpus = corpus_of(tmp_path)
    whole = prepare([corpus], tmp_path / "whole", skip_bad_records=True)
    from statex_dist.data.corpus.tokenize_units import UnitTokenizer

    real, calls = UnitTokenizer.run, []

    def cut(self, job):
        calls.append(job)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, job)

    monkeypatch.setattr(UnitTokenizer, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "out", workers=1, skip_bad_records=True)
    again = prepare([corpus], tmp_path / "out", workers=1, skip_bad_records=True)
    assert (again.bad_records, again.bad_records_listed) == (whole.bad_records, whole.bad_records_listed)
    assert len(calls) > 7
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_command_line_prints_what_was_left_out(tmp_path, capsys):
    corpus = corpus_of(tmp_path)
    command = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--skip-bad-records"]
    assert main(command) == 0
    assert "300 documents, 301 bad ones left out" in capsys.readouterr().out
    assert main([*command, "--json", "--overwrite"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["bad_records"], len(figures["bad_records_listed"])) == (301, 100)
    assert figures["bad_records_listed"][0] == f"{corpus}/a.jsonl:2: field 'text' is null"


def test_bad_rows_of_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    raw = pa.array([b"good", b"\xff\xfe", None, b"x" * 900, b"also"], pa.binary())
    for name, column in (("binary", raw), ("string", raw.view(pa.string())), ("nested", pa.array([]))):
        if name == "nested":
            column = pa.StructArray.from_arrays([raw.view(pa.string())], ["text"])
        parquet.write_table(pa.table({"meta" if name == "nested" else "text": column}), tmp_path / f"{name}.parquet")
        field = "meta.text" if name == "nested" else "text"
        options = {"text_field": field, "skip_bad_records": True, "max_document_bytes": 700}
        summary = prepare([tmp_path / f"{name}.parquet"], tmp_path / name, **options)
        assert sorted(texts_of(tmp_path / name)) == ["also", "good"]
        assert [line.partition(": ")[2].partition(": ")[0] for line in summary.bad_records_listed] == [
            *("row 1", "row 2", "row 3")
        ]
        assert "more than 700 bytes" in summary.bad_records_listed[2]


def test_byte_order_marks(tmp_path):
    put(tmp_path / "a.txt", codecs.BOM_UTF8 + b"a text")
    put(tmp_path / "b.txt.gz", gzip.compress(codecs.BOM_UTF8 + b"b text"))
    put(tmp_path / "c.jsonl", codecs.BOM_UTF8 + json_lines({"text": "c text"}) + codecs.BOM_UTF8 + GOOD)
    put(tmp_path / "d.jsonl.gz", gzip.compress(codecs.BOM_UTF8 + json_lines({"text": "d \ufeff text"})))
    prepare([tmp_path], tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == ["a text", "b text", "c text", "d \ufeff text", "good"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused_by_name(tmp_path, encoding, name):
    content = '{"text": "x"}\n' if name == "a.jsonl" else "text"
    path = put(
        tmp_path / name,
        ("" if encoding in ("utf-16", "utf-32") else "\ufeff").encode(encoding) + content.encode(encoding),
    )
    family = encoding[:6].upper()
    with raises(BadRecordError, f"iconv -f {family} -t UTF-8"):
        prepare([path], tmp_path / "out")
    put(tmp_path / "b.txt", b"text")
    summary = prepare([tmp_path], tmp_path / "out", skip_bad_records=True)
    assert summary.documents == 1
    assert f"is {family}, not UTF-8" in summary.bad_records_listed[0]


def test_huge_lines_and_files_cost_a_bounded_amount_of_memory(tmp_path):
    """A line of 200 MB in a small file, with a limit of 1 MB."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD)
    with gzip.open(tmp_path / "b.txt.gz", "wb", 1) as file:
        for _ in range(200):
            file.write(b"x" * (1 << 20))
    rules = DocumentRules(skip_bad_records=True, max_document_bytes=1 << 20)
    tracemalloc.start()
    report = ReadReport()
    texts = [r.text for unit in split_units(find_files([tmp_path]))[0] for r in read_unit(unit, 258, rules, report)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["good", "good"]
    assert report.bad == 2
    assert peak < 20e6, peak


def test_huge_rows_of_parquet_are_refused_before_they_are_read(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["small", "x" * 40_000_000]}), path, compression="zstd")
    parquet_file = parquet.ParquetFile
    monkeypatch.setattr(parquet_file, "iter_batches", lambda *_, **__: pytest.fail("it was read"))
    for skip in (False, True):
        rules = DocumentRules(max_document_bytes=1 << 20, skip_bad_records=skip)
        report = ReadReport()
        if not skip:
            with pytest.raises(BadRecordError, match=r"row 0: .* 40\d* .*1048576"):
                list(read_unit(split_units([path])[0][0], 258, rules, report))
        else:
            assert list(read_unit(split_units([path])[0][0], 258, rules, report)) == []
            assert (report.bad, len(report.listed)) == (2, 1)


def test_a_dictionary_of_few_large_values_is_not_unfolded_at_once(tmp_path):
    """A row group of 1 GB in which one value stands 1000 times takes 5 kB of disk."""
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["y" * 1_000_000]))
    parquet.write_table(pa.table({"text": values}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 10_000
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert 1_000_000 <= dictionary_bytes(str(path), chunk) < 1_000_100
    before = pa.total_allocated_bytes()
    peak = 0
    count = 0
    for record in read_unit(split_units([path])[0][0], 258):
        peak = max(peak, pa.total_allocated_bytes() - before)
        count += len(record.text)
    assert count == 1_000_000_000
    assert peak < 300e6, peak


@pytest.fixture
def special(tmp_path):
    """A directory with one text file, a pipe, a link to it, a link to a device and a socket."""
    root = tmp_path / "special"
    root.mkdir()
    put(root / "a.txt", b"text")
    os.mkfifo(root / "b.txt")
    (root / "c.txt").symlink_to(root / "b.txt")
    (root / "d.jsonl").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "e.parquet"))
        yield root


def test_only_regular_files_are_read(tmp_path, special, caplog):
    done = threading.Timer(60, os._exit, (1,))  # reading a pipe would block
    done.start()
    try:
        assert prepare([special], tmp_path / "out").documents == 1
        said = next(r.getMessage() for r in caplog.records if "not a regular file" in r.getMessage())
        assert "4 left out" in said
        assert "b.txt (a pipe)" in said
        for name, what in (
            ("b.txt", "a pipe"),
            ("c.txt", "a pipe"),
            ("d.jsonl", "a device"),
            ("e.parquet", "a socket"),
        ):
            for given in (special / name, f"{special}/*{name[1:]}"):
                with pytest.raises(DataError, match=f"{what}|a pipe"):
                    prepare([given], tmp_path / "x")
    finally:
        done.cancel()


def test_linked_directories_are_named(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    put(tmp_path / "in" / "a.txt", b"text")
    put(tmp_path / "other" / "b.txt", b"text")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "other")
    assert prepare([tmp_path / "in"], tmp_path / "out").documents == 1
    assert "1 left out, links" in caplog.text


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_first_records_are_checked_before_anything_is_made(tmp_path, monkeypatch, name):
    rows = [{"text": "x" * 100}] * 20000
    if name == "a.parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        content = json_lines(*rows)
        put(tmp_path / name, gzip.compress(content, 1) if name.endswith("gz") else content)
    monkeypatch.setattr("statex_dist.data.corpus.source.tokenize_units", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(DataError, match=r"'body' or 'input_ids'"):
        prepare([tmp_path / name], tmp_path / "out", text_field="body", workers=2)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_wrong_field_leaves_the_finished_units_of_another_run(tmp_path):
    path = put(tmp_path / "a.jsonl", GOOD)
    prepare_part([path], tmp_path / "out", "bytes", WorkPart(1, 1), DocumentRules())
    before = files_of(tmp_path / ".out.work" / "units")
    with pytest.raises(DataError, match="no field 'body'"):
        prepare([path], tmp_path / "out", text_field="body")
    assert files_of(tmp_path / ".out.work" / "units") == before


def test_records_that_are_all_bad_at_first_are_said_at_once(tmp_path, caplog):
    path = put(tmp_path / "a.jsonl", json_lines(*[{"body": 1}] * 20))
    with pytest.raises(
        DataError,
        match=r"20 bad .*:1: .*--text-field and --rows$",
    ):
        prepare([path], tmp_path / "out", skip_bad_records=True)
    assert "records are bad: " in caplog.text


def test_json_at_the_limit_of_its_depth():
    deepest = b'{"a": ' * 99 + b"[1]" + b"}" * 99
    assert "a" in _object(deepest)
    with pytest.raises(BadRecordError, match="nested too deeply"):
        _object(b'{"a": ' + deepest + b"}")
    assert len(_object(json.dumps({"n": [[0]] * 300}).encode())["n"]) == 300


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_other_encodings_without_a_mark(tmp_path, encoding):
    put(tmp_path / "a.txt", "plain English".encode(encoding))
    put(tmp_path / "b.jsonl", '{"text": "plain English"}\n'.encode(encoding))
    with pytest.raises(DataError, match=r"a\.txt .*UTF-16.* \d+ of its \d+ bytes"):
        prepare([tmp_path / "a.txt"], tmp_path / "out")
    with pytest.raises(DataError, match=r"b\.jsonl:1: not valid JSON"):
        prepare([tmp_path / "b.jsonl"], tmp_path / "out")
    put(tmp_path / "c.txt", b"one \0 in text")
    assert prepare([tmp_path / "c.txt"], tmp_path / "out").documents == 1


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_named_on_the_command_line_is_of_lines(tmp_path, name):
    def pack(content):
        return gzip.compress(content) if name.endswith("gz") else content

    path = put(tmp_path / name, pack(GOOD * 2))
    prepare([path], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["good", "good"]
    put(path, pack(json.dumps([{"text": "x"}], indent=1).encode()))
    with pytest.raises(DataError, match=r":1: not valid JSON"):
        prepare([path], tmp_path / "x")


def test_a_corpus_with_every_defect_at_once(tmp_path, monkeypatch):
    """Good documents of every form come out once each; every bad record is counted, for any workers and units."""
    import pyarrow as pa
    from pyarrow import parquet

    web = tmp_path / "web"
    web.mkdir()
    lines = [line for line, reason in BAD_LINES if "600" not in reason]
    good = [f"good {i} ∑" for i in range(3 * len(lines))]
    mixed = [json_lines({"text": text}) + line for text, line in zip(good, lines * 3, strict=True)]
    third = len(lines)
    put(web / "a.jsonl", codecs.BOM_UTF8 + b"".join(mixed[:third]))
    put(web / "b.jsonl.gz", gzip.compress(b"\n\n".join(mixed[third : 2 * third])))
    put(web / "c.ndjson", b"".join(mixed[2 * third :]).removesuffix(b"\n"))
    put(web / "utf16.jsonl", '{"text": "x"}\n{"text": "y"}\n'.encode("utf-16"))
    put(web / "latin.txt", b"caf\xe9")
    put(web / "large.txt", b"x" * 300_000)
    put(web / "mark.txt", codecs.BOM_UTF8 + b"good mark")
    rows = pa.array([b"good row", b"\xff", None, b"y" * 300_000], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": rows, "label": [1, 2, 3, 4]}), web / "d.parquet")
    put(
        web / "ids.jsonl",
        json_lines({"input_ids": list(b"good ids"), "labels": list(b"good ids")}, {"input_ids": [1.5]}),
    )
    os.mkfifo(web / "pipe.txt")
    expected = sorted([*good, "good mark", "good row", "good ids"])
    results = []
    for workers, unit_bytes in ((1, 200), (2, 1 << 20)):
        split_small(monkeypatch, unit_bytes)
        out = tmp_path / f"out{workers}"
        summary = prepare([web], out, workers=workers, skip_bad_records=True, max_document_bytes=250_000)
        assert sorted(texts_of(out)) == expected
        results.append((summary.bad_records, summary.bad_records_listed))
    # Lines of UTF-16: two, and what stands behind the last line feed.
    assert results[0] == results[1]
    assert results[0][0] == 3 * third + 3 + 2 + 3 + 1

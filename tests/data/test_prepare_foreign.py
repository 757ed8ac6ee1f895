"""Files and rows of other people's tools that a reader could take for something else."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.documents import find_files, read_unit, split_units
from statex_dist.data.corpus.json_lines import _object
from statex_dist.data.corpus.parquet_rows import row_group_sizes
from statex_dist.data.corpus.records import BadRecordError, ReadReport
from statex_dist.data.corpus.work import WorkPart
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.errors import DataError
from tests.data.options import prepare, prepare_part
from tests.data.prepared import EOS, json_lines, put, split_small, texts_of

TEXT = b"plain text " * 100


def documents(path):
    found = sequential_documents(open_store(path))
    return sorted((p.tokens.tolist(), None if p.loss_mask is None else p.loss_mask.tolist()) for p in found)


def zipped():
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", TEXT)
        return file.getvalue()


def tarred():
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 20 * len(TEXT)
            archive.addfile(entry, io.BytesIO(20 * TEXT))
        return file.getvalue()


def numpy_file():
    with io.BytesIO() as file:
        np.save(file, np.zeros(3, np.uint16))
        return file.getvalue()


def arrow_file():
    import pyarrow as pa
    from pyarrow import feather

    with io.BytesIO() as file:
        feather.write_feather(pa.table({"text": ["a"]}), file)
        return file.getvalue()


FILES = {
    "a.csv": b"text,id\nhello,1\n",
    "a.tsv": b"text\tid\nhello\t1\n",
    "a.csv.gz": gzip.compress(b"text,id\nhello,1\n"),
    "a.zip": zipped(),
    "a.tar": tarred(),
    "a.tar.gz": gzip.compress(tarred()),
    "a.txt.bz2": bz2.compress(TEXT),
    "a.jsonl.xz": lzma.compress(TEXT),
    "a.pdf": b"%PDF-1.4\n1 0 obj\n",
    "a.npy": numpy_file(),
}
CONTENTS = {
    "gzip data": gzip.compress(TEXT),
    "a zip file": zipped(),
    "a tar file": tarred(),
    "xz data": lzma.compress(TEXT),
    "bzip2 data": bz2.compress(TEXT),
    "a numpy file": numpy_file(),
    "a PDF file": b"%PDF-1.4\n1 0 obj\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_formats_are_no_document(tmp_path, name):
    put(tmp_path / name, FILES[name])
    with pytest.raises(DataError, match=r"name it \.txt"):
        prepare([tmp_path / name], tmp_path / "out")


@pytest.mark.parametrize("what", CONTENTS)
def test_other_formats_under_the_name_of_text(tmp_path, what):
    put(tmp_path / "a.txt", CONTENTS[what])
    put(tmp_path / "b.jsonl", CONTENTS[what])
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(DataError, match=f"is {what}, not text"):
            prepare([tmp_path / name], tmp_path / "out")


def test_arrow_and_parquet_under_the_name_of_text(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.txt")
    put(tmp_path / "b.txt", arrow_file())
    for name, what in (("a.txt", "a parquet file"), ("b.txt", "an Arrow file")):
        with pytest.raises(DataError, match=f"is {what}, not text"):
            prepare([tmp_path / name], tmp_path / "out")


def test_names_that_only_look_foreign_are_text(tmp_path):
    files = [put(tmp_path / name, b"text") for name in ("README", "a.LICENSE", "notes.v2", "csv", "b.TXT")]
    assert prepare(files, tmp_path / "out").documents == len(files)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "chat template"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "chat template"),
        ({"prompt": "x", "completion": "y"}, "chat template"),
        ({"token_ids": [1, 2]}, "token_ids .*input_ids"),
    ],
)
@pytest.mark.parametrize("rows", ["auto", "text", "tokens"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_of_conversations_get_advice(tmp_path, row, advice, rows, form):
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        put(path, json_lines(row))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(DataError, match=advice):
        prepare([path], tmp_path / "out", rows=rows)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a", "text": "b"}',
        b'{"text" : "a", "text" : "b"}',
        b'{"text": "a", "meta": {"x": 1}, "text": "b"}',
        b'{"input_ids": [1, 2], "labels": [1, 2], "labels": [-100, 2]}',
    ],
)
def test_a_key_twice_in_an_object_is_no_choice_of_ours(tmp_path, line):
    path = put(tmp_path / "a.jsonl", line + b"\n")
    with pytest.raises(BadRecordError, match="more than once"):
        prepare([path], tmp_path / "out")
    put(path, line + b"\n" + json_lines({"text": "good"}))
    assert prepare([path], tmp_path / "out", skip_bad_records=True).bad_records == 1
    assert texts_of(tmp_path / "out") == ["good"]


KEYS = st.sampled_from(["text", "a", "b", "x:y"])
VALUES = st.sampled_from(["v", 'the "text": of "a"', "a:b", {"text": "in", "a": {"b": "x"}}, ["text", {"a": 1}], 1])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(KEYS, VALUES), max_size=4), st.sampled_from([": ", ":", " : "]))
def test_only_repeated_keys_are_refused(pairs, colon):
    line = "{" + ", ".join(json.dumps(key) + colon + json.dumps(value) for key, value in pairs) + "}"
    if len(dict(pairs)) < len(pairs):
        with pytest.raises(BadRecordError, match="more than once"):
            _object(line.encode())
    else:
        assert _object(line.encode()) == dict(pairs)


def test_arrays_and_indented_json_are_told_how_to_become_lines(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    for content in (json.dumps(rows), json.dumps(rows, indent=2), json.dumps(rows[0], indent=2)):
        path = put(tmp_path / "a.json", content.encode())
        with pytest.raises(DataError, match=r"jq -c '\.\[\]'"):
            prepare([path], tmp_path / "out")


def test_a_mark_without_a_line_is_blank(tmp_path):
    mark = b"\xef\xbb\xbf"
    path = put(tmp_path / "a.jsonl", mark + b"\r\n" + mark + json_lines({"text": "good"}) + mark)
    assert prepare([path], tmp_path / "out").documents == 1


def test_columns_of_one_name(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    def write(names, *columns):
        table = pa.Table.from_arrays([pa.array([column]) for column in columns], names=names)
        parquet.write_table(table, tmp_path / "a.parquet")

    write(["text", "text"], "a", "b")
    with pytest.raises(DataError, match="2 columns 'text'"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out")
    write(["input_ids", "loss_mask", "loss_mask"], [1, 2], [1, 1], [0, 1])
    with pytest.raises(DataError, match="has 2 columns 'loss_mask'"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out")
    write(["text", "x", "x"], "ab", "b", "c")
    prepare([tmp_path / "a.parquet"], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["ab"]


def test_a_parquet_file_without_rows(tmp_path):
    """pyarrow writes a row group of no rows."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert row_group_sizes(str(tmp_path / "a.parquet"))
    parquet.write_table(pa.table({"text": ["good"]}), tmp_path / "b.parquet")
    prepare([tmp_path], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["good"]


@pytest.mark.parametrize("kind", ["struct", "decimal", "null first", "list"])
def test_unknown_values_for_each_token_are_refused_whatever_their_type(tmp_path, kind):
    import pyarrow as pa
    from pyarrow import parquet

    column = {
        "struct": pa.array([[{"a": 1}, {"a": 2}]]),
        "decimal": pa.array([[1, 2]], pa.list_(pa.decimal128(5, 2))),
        "null first": pa.array([[None, 0.5]]),
        "list": pa.array([[[1], [2]]]),
    }[kind]
    parquet.write_table(pa.table({"input_ids": [[1, 2]], "extra": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'extra'"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out")
    prepare([tmp_path / "a.parquet"], tmp_path / "out", ignore_fields=["extra"])
    assert documents(tmp_path / "out") == [([1, 2, EOS], None)]


def test_one_token_of_padding_behind_a_packed_row(tmp_path):
    row = {"input_ids": [1, 2, 3, 4, 0], "position_ids": [0, 1, 0, 1, 0], "labels": [1, 2, -100, 4, -100]}
    prepare([put(tmp_path / "a.jsonl", json_lines(row))], tmp_path / "out")
    assert documents(tmp_path / "out") == [([1, 2, EOS], [1, 1, 0]), ([3, 4, EOS], [0, 1, 0])]


def bad_lines(tmp_path, count):
    """A file with a bad record in every line but the last, and blank lines between."""
    content = b"".join(b'{"text": null}\n\n' for _ in range(count)) + json_lines({"text": "good"})
    return put(tmp_path / "a.jsonl", content)


def test_naming_bad_records_reads_no_file_again(tmp_path, monkeypatch):
    path = bad_lines(tmp_path, 60)
    monkeypatch.setattr(
        "statex_dist.data.corpus.json_lines._lines_before", lambda *_: pytest.fail("the file was read from its begin")
    )
    split_small(monkeypatch, 50)
    summary = prepare([path], tmp_path / "out", workers=1, skip_bad_records=True)
    assert summary.bad_records_listed == [f"{path}:{2 * i + 1}: field 'text' is null" for i in range(60)]


def test_lines_are_counted_from_the_unit_where_others_are_of_another_part(tmp_path, monkeypatch, caplog):
    path = bad_lines(tmp_path, 60)
    split_small(monkeypatch, 50)
    rules = DocumentRules(skip_bad_records=True)
    prepare_part([path], tmp_path / "out", "bytes", WorkPart(2, 2), rules, workers=1)
    content = path.read_bytes()
    found = [record.getMessage().removeprefix(f"left out: {path}:") for record in caplog.records]
    found = [message for message in found if message[0].isdigit()]
    assert len(found) > 20
    for message in found:
        line, _, rest = message.partition(" behind byte ")
        begin = int(rest.partition(":")[0])
        start = content.rindex(b"\n", 0, begin) + 1 if content[begin - 1 : begin] == b"\n" else begin
        start = begin if content[begin - 1 : begin] == b"\n" else content.index(b"\n", begin) + 1
        assert content[start:].split(b"\n")[int(line) - 1] == b'{"text": null}'
    prepare_part([path], tmp_path / "out", "bytes", WorkPart(1, 2), rules, workers=1)
    merged = prepare([path], tmp_path / "out", merge=True, skip_bad_records=True)
    assert merged.bad_records_listed == [f"{path}:{2 * i + 1}: field 'text' is null" for i in range(60)]


def test_report_of_a_reader_survives_its_form_on_disk(tmp_path):
    path = bad_lines(tmp_path, 3)
    report = ReadReport()
    unit = split_units(find_files([path]))[0][0]
    assert [record.text for record in read_unit(unit, 258, DocumentRules(skip_bad_records=True), report)] == ["good"]
    assert report.lines == 7
    again = ReadReport(**json.loads(json.dumps(report.as_dict())))
    assert (
        [tuple(entry) for entry in again.listed]
        == report.listed
        == [(str(path), n, "field 'text' is null") for n in (1, 3, 5)]
    )


def test_lines_added_between_the_split_and_the_work_are_not_lost(tmp_path, monkeypatch):
    path = put(tmp_path / "a.jsonl", json_lines({"text": "first"}))

    def split(files):
        units = split_units(files)
        with path.open("ab") as file:
            file.write(json_lines({"text": "second"}))
        return units

    with monkeypatch.context() as patch:
        patch.setattr("statex_dist.data.corpus.source.split_units", split)
        with pytest.raises(DataError, match="changed"):
            prepare([path], tmp_path / "out")
    assert prepare([path], tmp_path / "out").documents == 2


def test_a_frame_with_a_window_that_is_too_large_is_told_from_damage(tmp_path):
    """A frame header that asks for 2 GiB, as ``zstd --long=31`` writes it for large inputs."""
    path = put(tmp_path / "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\x00" + b"\xa8" + b"\x01\x00\x00")
    with pytest.raises(DataError, match=r"128 MiB.*zstd --long=27"):
        prepare([path], tmp_path / "out")

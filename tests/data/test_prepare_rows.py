"""Which rows ``statex prepare`` reads: text or token ids, one kind a file, from JSON lines and parquet."""

import gzip
import json

import pytest
import zstd

from statex_dist.data.corpus.records import BadRecordError
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.errors import ConfigError, DataError
from tests.data.options import prepare
from tests.data.prepared import EOS, json_lines, put, split_small, texts_of
from tests.raising import raises

IDS = [1, 2, 3, 4, 5, 6]
PACKED = {
    "input_ids": [1, 2, 3, 4, 5, 0],
    "attention_mask": [1, 1, 2, 2, 2, 0],
    "position_ids": [0, 1, 0, 1, 2, 0],
    "labels": [-100, 2, -100, 4, 5, -100],
}
PADDED = {"input_ids": [0, 7, 8], "attention_mask": [0, 1, 1], "position_ids": [1, 0, 1], "labels": [-100, -100, 8]}
EXPECTED = [([1, 2, EOS], [0, 1, 0]), ([3, 4, 5, EOS], [0, 1, 1, 0]), ([7, 8, EOS], [0, 1, 0])]


def documents(path):
    found = sequential_documents(open_store(path))
    return sorted((p.tokens.tolist(), None if p.loss_mask is None else p.loss_mask.tolist()) for p in found)


def write(path, rows):
    """Write rows as the path's suffix says, with the library that users write them with."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        pack = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, lambda content: content)
        path.write_bytes(pack(json_lines(*rows)))
    return path


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_masks_and_borders_are_honoured(tmp_path, name):
    prepare([write(tmp_path / name, [PACKED, PADDED])], tmp_path / "out")
    assert documents(tmp_path / "out") == EXPECTED
    rows = open_store(tmp_path / "out").manifest.rows
    columns = ["attention_mask", "labels", "position_ids"]
    assert rows == {"tokens": {"files": 1, "names": [str(tmp_path / name)], "columns": columns}}


def test_rows_of_several_documents_without_borders_are_reported(tmp_path, caplog):
    joined = {"input_ids": [1, 2, EOS, 3, 4, EOS]}
    alone = {"input_ids": [EOS, 1, 2, EOS]}  # some tokenizers have one token for BOS and EOS
    borders = {**joined, "position_ids": [0, 1, 2, 0, 1, 2]}
    path = write(tmp_path / "a.jsonl", [joined, alone, borders, joined])
    prepare([path], tmp_path / "out")
    assert "2 rows of token ids with EOS" in caplog.text
    assert sorted(len(tokens) for tokens, _ in documents(tmp_path / "out")) == [3, 3, 4, 6, 6]
    caplog.clear()
    prepare([write(tmp_path / "b.jsonl", [alone, borders])], tmp_path / "other")
    assert "before the end" not in caplog.text


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_what_datasets_writes(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([PACKED, PADDED])
    path = tmp_path / ("a.parquet" if form == "parquet" else "a.jsonl")
    getattr(table, f"to_{form}")(path)
    prepare([path], tmp_path / "out")
    assert documents(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize("name", KINDS)
def test_rows_with_text_and_ids_need_a_choice(tmp_path, name):
    path = write(tmp_path / name, [{"text": "ab", "input_ids": IDS, "labels": IDS}] * 2)
    with raises(DataError, "input_ids", "text", "--rows text", "--rows tokens"):
        prepare([path], tmp_path / "out", skip_bad_records=True)
    prepare([path], tmp_path / "text", rows="text")
    assert texts_of(tmp_path / "text") == ["ab", "ab"]
    prepare([path], tmp_path / "tokens", rows="tokens")
    assert documents(tmp_path / "tokens") == [([*IDS, EOS], [1] * 6 + [0])] * 2
    assert [set(open_store(tmp_path / out).manifest.rows) for out in ("text", "tokens")] == [{"text"}, {"tokens"}]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "ab", "input_ids": None}, {"text": None, "input_ids": IDS}],
        [{"text": None, "input_ids": IDS}, {"text": "ab", "input_ids": None}],
    ],
)
def test_a_file_with_rows_of_both_kinds_is_refused(tmp_path, name, rows):
    path = write(tmp_path / name, rows)
    with pytest.raises(DataError, match=r"(:2|row 1): .*one kind"):
        prepare([path], tmp_path / "out", skip_bad_records=True)
    assert prepare([path], tmp_path / "out", rows="text", skip_bad_records=True).bad_records == 1
    assert texts_of(tmp_path / "out") == ["ab"]
    with raises(BadRecordError, name, "input_ids", "is null"):
        prepare([path], tmp_path / "x", rows="tokens")


@pytest.mark.parametrize("workers", [1, 2])
def test_kinds_are_compared_across_the_units_of_a_file(tmp_path, monkeypatch, workers):
    split_small(monkeypatch, 60)
    rows = [{"text": "x" * 40}] * 30 + [{"input_ids": IDS}]
    path = put(tmp_path / "a.jsonl", json_lines(*rows))
    with pytest.raises(DataError, match=r"a\.jsonl: .*input_ids.*text"):
        prepare([path], tmp_path / "out", workers=workers)
    other = put(tmp_path / "b.jsonl", json_lines(*rows[:-1]))
    third = put(tmp_path / "c.jsonl", json_lines(rows[-1]))
    prepare([other, third], tmp_path / "out", workers=workers)
    rows = open_store(tmp_path / "out").manifest.rows
    assert {kind: found["names"] for kind, found in rows.items()} == {"text": [str(other)], "tokens": [str(third)]}


def test_the_manifest_names_a_bounded_number_of_files(tmp_path):
    for i in range(130):
        put(tmp_path / f"{i:03}.txt", b"text")
    prepare([tmp_path], tmp_path / "out")
    found = open_store(tmp_path / "out").manifest.rows["text"]
    assert (found["files"], len(found["names"])) == (130, 100)


def test_manifests_of_before_have_no_rows(tmp_path):
    prepare([put(tmp_path / "a.txt", b"text")], tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    del content["rows"]
    path.write_text(json.dumps(content))
    assert open_store(tmp_path / "out").manifest.rows == {}


def test_a_null_mask_is_not_a_missing_one(tmp_path):
    for name in ("a.jsonl", "a.parquet"):
        path = write(tmp_path / name, [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": None}])
        with pytest.raises(DataError, match=r"(:2|row 1): .*'labels'.*null"):
            prepare([path], tmp_path / "out")


@pytest.mark.parametrize("name", KINDS)
def test_a_refused_column_is_named_and_can_be_ignored(tmp_path, name, caplog):
    path = write(tmp_path / name, [{"input_ids": IDS, "importance": [0.5] * 6}])
    with pytest.raises(DataError, match="'importance'"):
        prepare([path], tmp_path / "out", skip_bad_records=True)
    prepare([path], tmp_path / "out", ignore_fields=["importance"])
    assert documents(tmp_path / "out") == [([*IDS, EOS], None)]


@pytest.mark.parametrize("name", KINDS)
def test_fields_beside_text_are_named_once(tmp_path, caplog, name):
    path = write(tmp_path / name, [{"text": "ab", "labels": [1], "id": 1}] * 300)
    prepare([path], tmp_path / "out")
    assert [r.getMessage() for r in caplog.records if "not used" in r.getMessage()] == [
        "fields that are not used, in rows of text: labels"
    ]


@pytest.mark.parametrize("name", KINDS)
def test_nested_text_fields(tmp_path, name):
    path = write(tmp_path / name, [{"meta": {"text": "nested", "n": 1}}, {"meta": {"text": "other", "n": 2}}])
    prepare([path], tmp_path / "out", text_field="meta.text", where=["meta.n=1"])
    assert texts_of(tmp_path / "out") == ["nested"]
    path = write(tmp_path / f"exact-{name}", [{"meta.text": "exact", "meta": {"text": "nested"}}])
    prepare([path], tmp_path / "exact", text_field="meta.text")
    assert texts_of(tmp_path / "exact") == ["exact"]
    with pytest.raises(DataError, match=r"'meta\.body' or 'input_ids'"):
        prepare([path], tmp_path / "x", text_field="meta.body")


@pytest.mark.parametrize(
    "kind", ["binary", "large_binary", "large_string", "string_view", "binary_view", "dictionary", "fixed"]
)
def test_types_of_parquet_text(tmp_path, kind):
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.array(["one ∑", "two ∑", "one ∑"])
    if kind == "dictionary":
        column = texts.dictionary_encode()
    elif kind == "fixed":
        column = pa.array([text.encode() for text in texts.to_pylist()], pa.binary(7))
    else:
        column = texts.cast(getattr(pa, kind)())
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    prepare([tmp_path / "a.parquet"], tmp_path / "out")
    assert sorted(texts_of(tmp_path / "out")) == ["one ∑", "one ∑", "two ∑"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "ids"}, "rows.*'ids'.*auto, text, tokens"),
        ({"text_field": "input_ids"}, "text_field.*'input_ids'"),
        ({"ignore_fields": ["input_ids"]}, "ignore_fields has 'input_ids'"),
        ({"max_document_bytes": 0}, "max_document_bytes is 0.*1073741824"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare([put(tmp_path / "a.txt", b"text")], tmp_path / "out", **options)

"""``statex prepare`` with real tokenizers: markers of special tokens, BOS and EOS."""

import json
import logging

import pytest
from transformers import AutoTokenizer

from launch.cli import main
from statex_dist.data.corpus.document_rules import DocumentRules
from statex_dist.data.corpus.work import WorkPart
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.data.tokenizer import load_tokenizer
from statex_dist.errors import ConfigError, DataError
from tests.data.fast_tokenizers import KINDS, TEXTS, backend, save, with_bos_template
from tests.data.options import prepare, prepare_part
from tests.data.prepared import files_of, json_lines, put, split_small
from tests.raising import raises

BOS, EOS = 1, 2


@pytest.fixture
def corpus(tmp_path):
    texts = ["plain text", "about <|endoftext|> and <s>", TEXTS[0], "end</s>", "[MASK]", TEXTS[1]]
    return put(tmp_path / "corpus.jsonl", json_lines(*({"text": text} for text in texts)))


def documents_of(path):
    """The documents of a dataset by their first ids, and masks."""
    pieces = sequential_documents(open_store(path))
    return sorted(
        (piece.tokens.tolist(), None if piece.loss_mask is None else piece.loss_mask.tolist()) for piece in pieces
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_only_control_tokens_are_those_appended(tmp_path, corpus, kind):
    directory = save(backend(kind), tmp_path / "tokenizer")
    summary = prepare([corpus], tmp_path / "out", directory, bos="prepend")
    tokenizer = load_tokenizer(directory)
    unknown = tokenizer.special_id("<unk>")
    for ids, _ in documents_of(tmp_path / "out"):
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert not any(tokenizer.is_special(token) for token in ids[1:-1] if token != unknown)
    assert summary.special_token_documents == 3
    manifest = open_store(tmp_path / "out").manifest
    assert (manifest.bos, manifest.bos_token_id) == ("prepend", tokenizer.bos_token_id)
    assert (manifest.special_tokens, manifest.special_token_documents) == ("split", 3)


def test_the_ids_are_those_of_transformers(tmp_path, corpus):
    directory = save(backend("gpt2"), tmp_path / "tokenizer")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for rule, split in (("split", True), ("keep", False)):
        theirs = AutoTokenizer.from_pretrained(str(directory), split_special_tokens=split)
        expected = sorted((theirs(text, add_special_tokens=False)["input_ids"] + [EOS], None) for text in texts)
        prepare([corpus], tmp_path / rule, directory, special_tokens=rule)
        assert documents_of(tmp_path / rule) == expected
    assert open_store(tmp_path / "keep").manifest.special_token_documents == 3


def test_a_marker_is_refused_by_place(tmp_path, corpus, capsys):
    directory = save(backend("gpt2"), tmp_path / "tokenizer")
    arguments = ["--out", str(tmp_path / "out"), "--tokenizer", str(directory), "--special-tokens", "refuse"]
    assert main(["prepare", str(corpus), *arguments]) == 2
    said = capsys.readouterr().err
    assert f"{corpus}:2:" in said
    assert "'<|endoftext|>'" in said
    text = put(tmp_path / "a.txt", b"a <pad> b")
    with raises(DataError, "a.txt", "<pad>"):
        prepare([text], tmp_path / "out", directory, special_tokens="refuse")
    parquet = tmp_path / "rows.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["fine", "fine", "not </s>"]}), parquet)
    with raises(DataError, "rows.parquet: row 2", "</s>"):
        prepare([parquet], tmp_path / "out", directory, special_tokens="refuse")
    assert not (tmp_path / "out").exists()


def test_the_first_marker_is_named_once_and_the_count_survives(tmp_path, corpus, caplog, monkeypatch):
    """Through parts, a merge, a run that was cut off, and a bound on the number of documents."""
    split_small(monkeypatch, 60)
    directory = save(backend("gpt2"), tmp_path / "tokenizer")
    undisturbed = prepare([corpus], tmp_path / "undisturbed", directory)
    assert undisturbed.special_token_documents == 3
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [f"{corpus}:2: the text holds" in warnings[0].getMessage(), len(warnings)] == [True, 1]
    counts = []
    for index in (1, 2):
        part = prepare_part([corpus], tmp_path / "parts", directory, WorkPart(index, 2), DocumentRules())
        counts.append(part.special_token_documents)
    assert sum(counts) == 3
    with pytest.raises(ConfigError, match="special_tokens was 'split', now 'keep'"):
        prepare([corpus], tmp_path / "parts", directory, merge=True, special_tokens="keep")
    assert prepare([corpus], tmp_path / "parts", directory, merge=True).special_token_documents == 3
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "undisturbed")
    with pytest.raises(ConfigError, match="shard"):
        prepare([corpus], tmp_path / "out", directory, shard_bytes=1 << 40)
    assert prepare([corpus], tmp_path / "out", directory).special_token_documents == 3
    first = prepare([corpus], tmp_path / "first", directory, max_documents=3)
    assert (first.documents, first.special_token_documents) == (3, 1)


def test_bos_is_added_where_it_is_missing(tmp_path):
    rows = [
        {"input_ids": [BOS, 9, 10]},
        {"input_ids": [9, 10, EOS], "loss_mask": [0, 1, 1]},
        {"input_ids": [BOS, 11, EOS], "loss_mask": [1, 1, 1]},
    ]
    path = put(tmp_path / "rows.jsonl", json_lines(*rows))
    directory = save(backend("gpt2"), tmp_path / "tokenizer")
    prepare([path], tmp_path / "out", directory, bos="prepend")
    assert documents_of(tmp_path / "out") == [
        ([BOS, 9, 10, EOS], [0, 0, 1, 1]),
        ([BOS, 9, 10, EOS], [1, 1, 1, 1]),
        ([BOS, 11, EOS], [1, 1, 1]),
    ]
    prepare([path], tmp_path / "none", directory)
    assert sorted(ids for ids, _ in documents_of(tmp_path / "none")) == [[1, 9, 10, 2], [1, 11, 2], [9, 10, 2]]
    long = prepare([path], tmp_path / "long", directory, bos="prepend", max_tokens=3)
    assert (long.documents, long.long_documents) == (1, 2)


def test_one_token_that_is_both_begins_and_ends_documents(tmp_path):
    """GPT-2's tokenizer has one token for both."""
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    directory = save(backend("gpt2"), tmp_path / "tokenizer", **names)
    ids = put(tmp_path / "ids.jsonl", json_lines({"input_ids": [3, 9]}, {"input_ids": [9, 3]}))
    texts = put(tmp_path / "texts.jsonl", json_lines({"text": "the"}))
    prepare([ids, texts], tmp_path / "out", directory, bos="prepend")
    assert all(ids[0] == ids[-1] == 3 for ids, _ in documents_of(tmp_path / "out"))
    assert [3, 9, 3] in [ids for ids, _ in documents_of(tmp_path / "out")]


def test_what_the_template_adds_is_said(tmp_path, corpus, caplog):
    caplog.set_level(logging.INFO)
    with_template = save(with_bos_template(backend("llama")), tmp_path / "template")
    prepare([corpus], tmp_path / "none", with_template)
    lines = [record.getMessage() for record in caplog.records if "in front of a text" in record.getMessage()]
    assert len(lines) == 1
    assert "(id 1)" in lines[0]
    assert lines[0].endswith("--bos none leaves it out; --bos prepend begins documents with it")
    caplog.clear()
    prepare([corpus], tmp_path / "prepend", with_template, bos="prepend")
    theirs = AutoTokenizer.from_pretrained(str(with_template), split_special_tokens=True)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert documents_of(tmp_path / "prepend") == sorted((theirs(text)["input_ids"] + [EOS], None) for text in texts)
    prepare([corpus], tmp_path / "plain", save(backend("gpt2"), tmp_path / "gpt2"))
    assert not any("in front of a text" in record.getMessage() for record in caplog.records)


def test_a_tokenizer_without_the_token_is_refused_with_both_remedies(tmp_path, corpus):
    directory = save(backend("gpt2"), tmp_path / "tokenizer", eos_token=None, bos_token=None)
    with pytest.raises(ConfigError, match=r"EOS .*--eos none.* eos_token .*tokenizer_config"):
        prepare([corpus], tmp_path / "out", directory)
    with pytest.raises(ConfigError, match=r"BOS .*--bos none.* bos_token .*tokenizer_config"):
        prepare([corpus], tmp_path / "out", directory, eos="none", bos="prepend")
    with pytest.raises(ConfigError, match=r"bytes .*BOS .*--bos none$"):
        prepare([corpus], tmp_path / "out", "bytes", bos="prepend")
    prepare([corpus], tmp_path / "out", directory, eos="none")
    manifest = open_store(tmp_path / "out").manifest
    assert (manifest.eos_token_id, manifest.bos_token_id, manifest.eos) == (None, None, "none")
    assert not any({BOS, EOS} & set(ids) for ids, _ in documents_of(tmp_path / "out"))


def test_control_tokens_that_a_normalizer_makes_are_counted(tmp_path, caplog):
    """NFKC makes ``<|endoftext|>`` of full-width letters; ``keep`` leaves the control token in the text."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizers.NFKC()
    end = AddedToken("<|endoftext|>", special=True, normalized=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end).save_pretrained(tmp_path / "tokenizer")
    lines = ['{"text": "plain"}', '{"text": "\uff1c|endoftext|\uff1e here"}', '{"text": "plain too"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    counts = {}
    for rule in ("split", "keep"):
        summary = prepare([tmp_path / "a.jsonl"], tmp_path / rule, tmp_path / "tokenizer", special_tokens=rule)
        counts[rule] = summary.special_token_documents
    assert counts == {"split": 0, "keep": 1}
    assert "special token's marker" in caplog.text
    ends = {
        rule: [int((p.tokens == 256).sum()) for p in sequential_documents(open_store(tmp_path / rule))]
        for rule in counts
    }
    assert sorted(ends["split"]) == [1, 1, 1]
    assert sorted(ends["keep"]) == [1, 1, 2]

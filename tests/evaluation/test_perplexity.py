import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from statex_dist.data.store import DocumentSlice
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError, ConfigError, DataError
from statex_dist.evaluation import perplexity
from statex_dist.evaluation.documents import read_documents
from statex_dist.evaluation.journal import work
from statex_dist.evaluation.perplexity import (
    PerplexitySettings,
    perplexity_units,
    run_perplexity,
    summarise_perplexity,
    write_perplexity,
)
from tests.evaluation.stand_ins import overflowing_model, tiny_model

TOKENIZER = BytesTokenizer()
LENGTHS = (150, 1, 2, 333, 64, 65, 17, 520, 3)


def pieces(lengths=LENGTHS, *, seed=0):
    rng = np.random.default_rng(seed)
    return [DocumentSlice(np.append(rng.integers(0, 256, n - 1), 256).astype(np.uint16)) for n in lengths]


def direct_losses(model, piece):
    """Cross entropy of every target of one document read at once: ``[n - 1]``."""
    tokens = torch.as_tensor(piece.tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits[0], tokens[0, 1:], reduction="none")


@pytest.mark.parametrize("family", ["gla", "mamba2"])
@pytest.mark.parametrize(("segment_length", "batch_size"), [(11, 3), (64, 1), (64, 4), (100, 20), (5000, 2)])
def test_equals_whole_documents_whatever_the_segments_and_the_batch(family, segment_length, batch_size):
    model, documents = tiny_model(family, seed=1).double(), pieces()
    settings = PerplexitySettings(segment_length=segment_length, batch_size=batch_size)
    result = run_perplexity(model, iter(documents), settings, tokenizer=TOKENIZER)
    wanted = [direct_losses(model, piece) for piece in documents if len(piece.tokens) > 1]
    assert [n for n, _ in result.documents] == [len(losses) for losses in wanted]
    assert [loss for _, loss in result.documents] == pytest.approx([float(x.sum()) for x in wanted], rel=1e-9)
    every = torch.cat(wanted)
    assert result.tokens == len(every)
    assert result.loss.mean == pytest.approx(float(every.mean()), rel=1e-9)
    assert result.perplexity == pytest.approx(math.exp(float(every.mean())), rel=1e-9)
    num_bytes = len(every) - len(wanted)  # every document's EOS is a target, but no byte
    assert result.bits_per_byte == pytest.approx(float(every.sum()) / math.log(2) / num_bytes, rel=1e-9)


def test_fp32_agrees_to_rounding():
    model, documents = tiny_model(seed=1), pieces()
    a, b = (run_perplexity(model, iter(documents), PerplexitySettings(segment_length=n)) for n in (33, 1024))
    assert a.loss.mean == pytest.approx(b.loss.mean, abs=1e-6)
    assert a.bits_per_byte is None  # no tokenizer was named


def test_buckets_are_the_positions_and_sum_to_the_total():
    model, documents = tiny_model().double(), pieces()
    result = run_perplexity(model, iter(documents), PerplexitySettings(segment_length=50))
    assert [(b.start, b.end) for b in result.buckets] == [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    assert sum(b.tokens for b in result.buckets) == result.tokens
    assert sum(b.loss_sum for b in result.buckets) == pytest.approx(result.loss_sum, rel=1e-12)
    for bucket in result.buckets:
        # targets sit at positions 1 .. n - 1, so target index i is position i + 1
        parts = [direct_losses(model, p)[bucket.start - 1 : bucket.end - 1] for p in documents]
        assert bucket.tokens == sum(len(part) for part in parts)
        assert bucket.loss_sum == pytest.approx(float(sum(part.sum() for part in parts)), rel=1e-9)


@pytest.mark.parametrize("length", [2, 37, 64, 5000])
def test_packed_sequences_are_the_documents_joined_and_cut(length):
    model, documents = tiny_model().double(), pieces((50, 1, 2, 64, 17))
    result = run_perplexity(model, iter(documents), PerplexitySettings(packed_length=length, batch_size=256))
    joined = np.concatenate([piece.tokens for piece in documents])
    begins = np.cumsum([0, *(len(piece.tokens) for piece in documents)])
    wanted, kept = [], 0
    for start in range(0, len(joined), length):
        losses = direct_losses(model, DocumentSlice(joined[start : start + length]))
        targets = [i for i in range(len(losses)) if start + i + 1 not in begins]
        kept += len(targets)
        if targets:
            wanted.append(float(losses[targets].sum()))
    assert result.tokens == kept
    assert [loss for _, loss in result.documents] == pytest.approx(wanted, rel=1e-9)
    assert result.buckets[-1].start < length


def test_units_are_some_documents_each_and_change_with_their_tokens(monkeypatch):
    model, documents, settings = tiny_model(), pieces(), PerplexitySettings()
    whole = work(perplexity_units(model, documents, settings))
    monkeypatch.setattr(perplexity, "_UNIT_TOKENS", 300)
    keys = [unit.key.split(",")[0] for unit in perplexity_units(model, documents, settings)]
    assert keys == ["documents 0..2", "documents 3..6", "documents 7..7"]
    cut = work(perplexity_units(model, documents, settings))
    assert [(r["document"], r["tokens"]) for r in cut] == [(r["document"], r["tokens"]) for r in whole]
    before = [unit.key for unit in perplexity_units(model, documents, settings)]
    changed = documents[5].tokens.copy()
    changed[5] ^= 1
    documents[5] = DocumentSlice(changed)
    after = [unit.key for unit in perplexity_units(model, documents, settings)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_masked_targets_are_left_out():
    model, (document,) = tiny_model().double(), pieces((40,))
    mask = np.zeros(40, np.uint8)
    mask[[0, 5, 39]] = 1  # the first token is never a target
    result = run_perplexity(model, [DocumentSlice(document.tokens, mask)], PerplexitySettings(segment_length=16))
    losses = direct_losses(model, document)
    assert result.tokens == 2
    assert result.loss_sum == pytest.approx(float(losses[4] + losses[38]), rel=1e-9)


@pytest.mark.parametrize(
    ("max_tokens", "tokens"), [(100, [99]), (150, [149]), (152, [149]), (153, [149, 1]), (10**6, None)]
)
def test_max_tokens_cuts_the_last_document(max_tokens, tokens):
    result = run_perplexity(tiny_model(), iter(pieces()), PerplexitySettings(max_tokens=max_tokens))
    assert [n for n, _ in result.documents] == (tokens or [n - 1 for n in LENGTHS if n > 1])


def test_text_files_and_prepared_shards_give_the_same(tmp_path):
    from tests.data.options import prepare

    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(3):
        (texts / f"{i}.txt").write_text(f"document {i} " * (20 + i))
    (texts / "more.jsonl").write_text(json.dumps({"text": "é one line"}) + "\n")
    prepare([str(texts)], str(tmp_path / "shards"), "bytes", workers=1)
    model = tiny_model().double()
    of_text, of_shards = (
        run_perplexity(model, read_documents(tmp_path / name, TOKENIZER), PerplexitySettings())
        for name in ("texts", "shards")
    )
    assert of_text.tokens == of_shards.tokens == sum(len(f"document {i} ") * (20 + i) for i in range(3)) + 11
    assert of_text.loss.mean == pytest.approx(of_shards.loss.mean, rel=1e-12)


def test_files_are_written(tmp_path):
    settings = PerplexitySettings()
    records = work(perplexity_units(tiny_model(), pieces(), settings))
    result = summarise_perplexity(records, settings)
    files = write_perplexity(result, tmp_path, records=records, model={"directory": "m"}, data="d")
    summary = json.loads((tmp_path / "perplexity.json").read_text())
    assert [file.name for file in files] == ["perplexity.json", "perplexity.jsonl", "perplexity.png"]
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    rows = [json.loads(line) for line in (tmp_path / "perplexity.jsonl").read_text().splitlines()]
    assert sum(row["tokens"] for row in rows) == summary["tokens"] == result.tokens
    assert sum(nats for row in rows for _, _, nats in row["by_position"]) == pytest.approx(result.loss_sum, rel=1e-12)
    for bucket in summary["by_position"]:
        if bucket["samples"] == 1:
            assert bucket["low"] is bucket["high"] is None
        else:
            assert bucket["low"] <= bucket["loss"] <= bucket["high"]
        assert bucket["samples"] == sum(
            bucket["start"] in (start for start, _, _ in row["by_position"]) for row in rows
        )
    assert summary["loss_low"] <= summary["loss"] <= summary["loss_high"]
    assert summary["settings"]["segment_length"] == 1024


def test_bad_data_is_refused(tmp_path):
    def read(path):
        return run_perplexity(tiny_model(), read_documents(path, TOKENIZER), PerplexitySettings())

    with pytest.raises(DataError, match="exist"):
        read(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"directory"):
        read(tmp_path / "empty")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="target"):
        read(tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"0.*255.*99"):
        run_perplexity(tiny_model(vocab_size=100), [DocumentSlice(np.array([1, 2, 255]))], PerplexitySettings())
    documents = [DocumentSlice(np.arange(8, 90)), DocumentSlice(np.arange(20)), DocumentSlice(np.arange(8, 120))]
    with pytest.raises(CheckpointError, match=r"NaN.*layer 0.*position 7"):
        run_perplexity(overflowing_model(0, 7), documents, PerplexitySettings(segment_length=4, batch_size=2))


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    from tests.data.options import prepare

    class Other(BytesTokenizer):
        spec, hash = "other", "0" * 32

    (tmp_path / "a.txt").write_text("some text")
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "shards"), "bytes", workers=1)
    with pytest.raises(DataError, match=r"'bytes'.*\('other'\)"):
        list(read_documents(tmp_path / "shards", Other()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 0}, "segment length.*not 0"),
        ({"packed_length": 1}, "packed_length.*not 1"),
        ({"max_tokens": 1}, "max_tokens.*not 1"),
        ({"batch_size": 0}, "batch_size.*not 0"),
        ({"seed": -1}, "seed.*not -1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PerplexitySettings(**changes)

"""Recall documents in text: what is drawn, and that no text is in two corpora."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.recall_text import RecallText, choose_words, digest, divide, read_texts, train_tokenizer
from benchmarks.text_experiment import TextExperiment, TextLab
from statex_dist.config import parse_config
from statex_dist.data.tokenizer import Tokenizer, load_tokenizer
from statex_dist.errors import ConfigError, DataError

CONFIG = Path(__file__).parents[2] / "configs" / "experiments" / "text_gla.yaml"
LETTERS = "abcdefghijklmnop"
# 256 words of five letters, each of which becomes a token, in 60 texts of different order.
WORDS = [f"{a}{b}{a}{b}{a}" for a in LETTERS for b in LETTERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(60):
        (found / f"{i}.txt").write_text(f"Text {i}.\n" + " ".join(rng.permutation(WORDS)) + "\n")
    (found / "again.md").write_text((found / "0.txt").read_text().replace("\n", "  "))
    (found / "packed.rst.gz").write_bytes(gzip.compress(b"packed text " * 100))
    (found / "short.txt").write_text("short")
    (found / "foreign.txt").write_text("д" * 2000)
    (found / "data.csv").write_text("1,2\n" * 1000)
    return found


@pytest.fixture(scope="module")
def tokenizer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    target = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(read_texts(folder), 1400, target)
    return load_tokenizer(str(target))


def test_a_folder_gives_each_english_text_once_whatever_its_files_are_called(folder: Path, tmp_path: Path):
    texts = read_texts(folder)
    assert len(texts) == 61
    assert any(text.startswith("packed text") for text in texts)
    for i, text in enumerate(reversed(texts)):
        (tmp_path / f"{i}.txt").write_text(text)
    assert digest(read_texts(tmp_path)) == digest(texts)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no English text"):
        read_texts(empty)


def test_no_text_and_no_piece_is_in_two_corpora():
    texts = [letter * 1500 + "same" * 375 for letter in LETTERS]
    found = divide(texts, {"a": 3, "b": 4}, 1500)
    assert [len(pieces) for pieces in found.values()] == [3, 4]
    assert len({piece for pieces in found.values() for piece in pieces}) == 7
    # The second piece of every text is the same, so that it is there once.
    assert found["a"] == [texts[0][:1500], "same" * 375, texts[1][:1500]]
    with pytest.raises(ConfigError, match="a, which needs 99"):
        divide(texts, {"a": 99}, 1500)


@pytest.mark.parametrize("words_between", [(0, 0), (2, 6)])
def test_every_value_is_told_once_and_asked_once(folder: Path, tokenizer: Tokenizer, words_between):
    texts = read_texts(folder)
    words = choose_words(tokenizer, texts)
    assert len(set(words)) == 128
    source = RecallText(tokenizer, words, texts[:2], words_between, seed=0)
    tokens, mask = source.draw(16)
    answers = [i for i, asked in enumerate(mask) if asked]
    assert len(tokens) == len(mask)
    assert len(answers) == 16
    # The true answer is what stood behind the same words the first time, and they stood there once.
    width = 1 + len(source.before_value)
    starts = [tokens[i - width : i] for i in range(width, answers[0])]
    for i in answers:
        [told] = [at + width for at, start in enumerate(starts) if start == tokens[i - width : i]]
        assert tokens[told] == tokens[i]
        assert tokens[i] in source.values
        assert tokens[told + 1] == tokens[i + 1] == source.after[0]
    text = tokenizer.decode(tokens)
    assert tokenizer.encode(text).tolist() == tokens, "a reader of the plain text meets the same tokens"
    assert text.count(" means ") == 32
    again = RecallText(tokenizer, words, texts[:2], words_between, seed=0)
    assert again.draw(16) == (tokens, mask)


def test_the_corpora_have_rows_of_both_kinds_and_what_they_are_made_of(folder: Path, tmp_path: Path):
    values = yaml.safe_load(CONFIG.read_text())
    values["model"]["vocab_size"] = 1400
    for corpus in values["corpora"].values():
        corpus |= {"text_pieces": 3, "recall_pieces": 2, "recall_tokens": min(corpus.get("recall_tokens", 0), 400)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    arguments = ["--config", str(config), "--text", str(folder), "--out", str(tmp_path / "out")]
    experiment = parse_config(TextExperiment, arguments, prog="text_experiment")
    lab = TextLab(experiment, lambda model, arm: {})
    rows = lab.rows("statements")
    assert len(rows["text"]) == 3
    assert all(sum(row["loss_mask"]) in (4, 8, 16) for row in rows["recall"])
    assert "loss_mask" not in lab.rows("long")["recall"][0]
    assert experiment.text_facts["documents"] == 61
    assert experiment.data_recipe("long")["text"] == experiment.text_facts["hash"]
    assert json.loads(json.dumps(experiment.data_recipe("long"))) == experiment.data_recipe("long")

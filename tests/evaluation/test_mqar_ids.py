"""Keys and values of mqar from the vocabulary of real tokenizers, or ranges."""

import json
import random
import string

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from launch.cli import main
from statex_dist.data.hf_tokenizer import HFTokenizer
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.mqar_ids import choose_words
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import tiny_model

_rng = random.Random(0)
WORDS = ["".join(_rng.choices(string.ascii_lowercase, k=_rng.randint(2, 7))) for _ in range(400)]
CORPUS = " ".join(_rng.choices(WORDS, weights=range(400, 0, -1), k=4000)) + " naïve 東京 12 345 , . !"
SPECIAL = ["<unk>", "<eos>", "<|im_start|>", "<|im_end|>"]


def trained(model, trainer, *, pre_tokenizer, decoder, size=700, normalizer=None, **options):
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **options)
    backend.train_from_iterator([CORPUS.title(), CORPUS] * 3, trainer)
    backend.add_special_tokens([AddedToken("the", special=True)])
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "trained")


def byte_level(**options):
    return trained(
        models.BPE(),
        trainers.BpeTrainer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **options,
    )


def metaspace():
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer,
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
        unk_token="<unk>",
    )


def word_piece():
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=False),
    )


@pytest.mark.parametrize(("make", "mark"), [(byte_level, "Ġ"), (metaspace, "\u2581"), (word_piece, "")])
def test_keys_and_values_are_distinct_words_and_no_special_tokens(make, mark):
    tokenizer = make()
    keys, values = choose_words(tokenizer, 64)
    assert (len(keys), len(values)) == (64, 64)
    chosen = keys | values
    assert len(chosen) == 128
    fast = tokenizer._tokenizer
    special = {i for i, token in fast.added_tokens_decoder.items() if token.special}
    assert not special & chosen.keys()
    alone = [fast.decode([token], skip_special_tokens=True).strip().casefold() for token in chosen]
    assert len(set(alone)) == 128
    assert all(text and "\ufffd" not in text for text in alone)
    assert [text.strip().casefold() for text in chosen.values()] == alone
    words = {token[len(mark) :].casefold() for token in fast.get_vocab() if token.startswith(mark)} - {"the"}
    words = {word for word in words if word.isascii() and word.isalpha() and len(word) > 1}
    found = {text.strip().casefold() for text in chosen.values() if text.startswith(" ")}
    assert len(words & found) == min(len(words), 128)
    assert choose_words(tokenizer, 64) == (keys, values)
    more, same = choose_words(tokenizer, 70)
    assert (len(more), len(same)) == (70, 64)


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match=r"64.*64.*\d+.*--key-ids"):
        choose_words(byte_level(size=262), 8)


MQAR = ["--num-pairs", "4,8", "--num-samples", "3", "--threads", "1"]


def evaluate(model, out, *arguments):
    return main(["eval", "mqar", "--model", str(model), "--out", str(out), *MQAR, *map(str, arguments)])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    tokenizer = byte_level()
    directory = tmp_path_factory.mktemp("model")
    save_pretrained(tiny_model(vocab_size=tokenizer.vocab_size), directory)
    tokenizer.save(directory)
    return directory


def test_the_result_says_which_vocabulary_was_used(model_dir, tmp_path, capsys):
    assert evaluate(model_dir, tmp_path / "out") == 0
    assert "model's tokenizer" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "out" / "mqar.json").read_text())
    keys, values = choose_words(byte_level(), 8)
    assert summary["settings"]["keys"] == list(keys)
    assert summary["settings"]["values"] == list(values)
    assert summary["vocabulary"] == {
        "source": "words",
        "key_texts": list(keys.values()),
        "value_texts": list(values.values()),
    }
    assert summary["model"]["tokenizer"]["name"] == str(model_dir)
    assert summary["by_num_pairs"]["4"]["guessing"] == 1 / 4 + 3 / 4 / 64


def test_models_of_bytes_keep_their_ids(tmp_path, capsys):
    save_pretrained(tiny_model(), tmp_path / "model")
    BytesTokenizer().save(tmp_path / "model")
    assert evaluate(tmp_path / "model", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "mqar.json").read_text())
    assert summary["settings"]["keys"] == [128, 192]
    assert summary["settings"]["values"] == [192, 256]
    assert summary["vocabulary"] == {"source": "bytes"}
    # Ids of the model's vocabulary that are given are taken as they are.
    assert evaluate(tmp_path / "model", tmp_path / "given", "--key-ids", "128:192", "--value-ids", "192:256") == 0
    given = json.loads((tmp_path / "given" / "mqar.json").read_text())
    assert given["by_num_pairs"] == summary["by_num_pairs"]
    assert given["vocabulary"] == {"source": "given"}


def test_ids_that_are_no_text_are_refused(model_dir, tmp_path, capsys):
    def refused(*arguments, model=model_dir):
        assert evaluate(model, tmp_path / "out", *arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    both = ["--value-ids", "100:110", "--key-ids"]
    assert "keys 0:64: id 0 is special token '<unk>'; set --key-ids" in refused(*both, "0:64")
    assert "model's vocabulary" in refused(*both, "600:9999")
    assert "--key-ids and --value-ids go together" in refused("--key-ids", "100:200")
    save_pretrained(tiny_model(), tmp_path / "bare")
    assert "give --tokenizer" in refused(model=tmp_path / "bare")
    assert evaluate(tmp_path / "bare", tmp_path / "bare-out", *both, "10:20") == 0

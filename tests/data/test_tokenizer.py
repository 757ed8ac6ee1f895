import json
import shutil

import numpy as np
import pytest

from statex_dist.data.tokenizer import BytesTokenizer, load_tokenizer, write_tokenizer
from statex_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def fast_directory(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<eos>": 256}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(4)
    directory = tmp_path_factory.mktemp("fast")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("text", ["", "plain", "naïve ∑ 漢字 🙂", "a\r\n\0b"])
def test_bytes_round_trip(text):
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_token_id, tokenizer.pad_token_id]) == text


def test_bytes_decode_never_raises():
    assert BytesTokenizer().decode([0xE6, 65, 256]) == "�A"


def test_marker_makes_a_model_directory_bytes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_tokenizer(load_tokenizer("bytes"), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "BytesTokenizer"
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, BytesTokenizer)
    assert loaded.hash == load_tokenizer("bytes").hash


def test_hugging_face_directory(fast_directory, tmp_path):
    tokenizer = load_tokenizer(fast_directory)
    text = "longer than the saved truncation ∑"
    assert tokenizer.vocab_size == 257
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    batch = tokenizer.encode_batch([text, "x"])
    np.testing.assert_array_equal(batch[0], tokenizer.encode(text))
    write_tokenizer(tokenizer, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").hash == tokenizer.hash


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPTNeoXTokenizerFast", None])
@pytest.mark.parametrize("model_type", [None, "llama", "gla"])
def test_the_ids_are_those_of_the_file_whatever_class_is_named(tmp_path, name, model_type):
    """transformers 5's LlamaTokenizer drops the normalizer and the pre-tokenizer of the file."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog 0123456789"] * 3, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "</s>"} | ({} if name is None else {"tokenizer_class": name})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "The Quick  fox ① ⅷ 42"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text).tolist() == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token_id == 2


def test_a_class_may_name_the_end_of_text(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTNeoXTokenizerFast"}')
    assert load_tokenizer(tmp_path).eos_token_id == 1
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).eos_token_id is None


def test_no_code_of_a_directory_runs_and_nobody_is_asked(tmp_path, fast_directory, monkeypatch):
    shutil.copytree(fast_directory, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "model/own.py").write_text("raise SystemExit('the code ran')\n")
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(prompt))
    assert load_tokenizer(tmp_path / "model").hash == load_tokenizer(fast_directory).hash
    (tmp_path / "model/tokenizer.json").unlink()
    (tmp_path / "model/tokenizer.model").write_text("no tokenizer")
    with pytest.raises(DataError):
        load_tokenizer(tmp_path / "model")


def test_missing_and_damaged(tmp_path):
    with pytest.raises(ConfigError, match="'bytes'"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no tokenizer.json in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_tokenizer(tmp_path)

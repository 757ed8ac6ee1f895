import json

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


def test_missing_and_damaged(tmp_path):
    with pytest.raises(ConfigError, match=r"no such directory; allowed: 'bytes'"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no tokenizer.json in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_tokenizer(tmp_path)

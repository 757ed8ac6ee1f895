"""Pieces of text as tokens come against the text of all tokens at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from statex_dist.data.tokenizer import BytesTokenizer, HFTokenizer
from statex_dist.inference.text import TextStream, cut, end_ids

TEXT = "the quick brown fox — naïve café, 東京 is big, 🙂🙃 and \n\n so on " * 4


def byte_level_bpe():
    """As GPT-2 and Llama 3: a character may be torn apart."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"])
    backend.train_from_iterator([TEXT], trainer)
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "bpe")


def sentencepiece_like():
    """As Llama 2 and Mistral: spaces are marks, the first is dropped, unknown characters fall back to bytes."""
    vocab = [("<unk>", 0.0), ("<eos>", 0.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    vocab += [("\u2581the", -1.0), ("\u2581", -2.0), ("\u2581qu", -2.0), *((c, -3.0) for c in "abcdeikquo,.")]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), "sentencepiece")


TOKENIZERS = {"bytes": BytesTokenizer(), "bpe": byte_level_bpe(), "sentencepiece": sentencepiece_like()}
UNTIL = st.lists(st.sampled_from(["e", "the", " qu", "🙂", "\n\n", "abab", "\ufffd"]), max_size=3)


def streamed(tokenizer, tokens, until=()):
    stream, pieces = TextStream(tokenizer, until), []
    for count, token in enumerate(tokens, start=1):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, tokens[:count]
    return [*pieces, stream.finish()], tokens


# A run of bytes that are no text turns all of what sentencepiece's byte fallback decoded before it.
@pytest.mark.parametrize("name", ["bytes", "bpe"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), until=UNTIL)
def test_pieces_of_any_tokens_make_up_their_text(name, data, until):
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    pieces, used = streamed(tokenizer, tokens, until)
    assert "".join(pieces) == cut(tokenizer.decode(used), until)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="the quick é東🙂\n", max_size=80), until=UNTIL)
@example(text="the " * 30, until=[])
def test_pieces_of_real_text_are_whole_characters(name, text, until):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text).tolist()
    pieces, used = streamed(tokenizer, tokens, [stop for stop in until if stop != "\ufffd"])
    joined = "".join(pieces)
    assert "\ufffd" not in joined
    assert joined == cut(tokenizer.decode(used), [stop for stop in until if stop != "\ufffd"])


def test_text_is_handed_out_as_soon_as_it_is_certain():
    pieces, _ = streamed(BytesTokenizer(), list("aé🙂".encode()))
    assert pieces == ["a", "", "é", "", "", "", "🙂", ""]
    pieces, _ = streamed(BytesTokenizer(), list(b"abSTOx"), ["STOP"])
    assert pieces == ["a", "b", "", "", "", "STOx", ""]
    pieces, used = streamed(BytesTokenizer(), list(b"abSTOPx"), ["STOP"])
    assert pieces == ["a", "b", "", "", "", ""]
    assert len(used) == 6


def test_tokens_that_end_a_text():
    tokenizer = BytesTokenizer()
    assert end_ids((), tokenizer) == {256}
    assert end_ids(("a", "bc"), tokenizer) == {256}
    assert end_ids(("a",), tokenizer, ignore_eos=True) == set()
    bpe = TOKENIZERS["bpe"]
    assert end_ids(("<eos>", "the"), bpe, ignore_eos=True) == {bpe.eos_token_id}
    # What no token of its own says is <unk> as well, and must not end a text at every unknown word.
    assert end_ids(("<unk>", "§"), TOKENIZERS["sentencepiece"]) == {1}


def test_spaces_stay_as_the_tokens_have_them():
    """GPT-NeoX's tokenizer, that of the public Mamba2 models, asks for spaces to be cleaned away."""
    backend = byte_level_bpe()._backend
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=True)
    tokenizer = HFTokenizer(fast, "cleaning")
    text = "Yes , it 's done . f( 'mode' ) do n't ?"
    assert "".join(streamed(tokenizer, tokenizer.encode(text).tolist())[0]) == text


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_what_is_no_text_costs_no_more_the_longer_it_gets(name, monkeypatch):
    tokenizer, decoded = TOKENIZERS[name], []
    (token,) = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i, i]) == "\ufffd\ufffd"][:1]
    decode = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids: decoded.append(len(list(ids))) or decode(self, ids)
    )
    pieces, _ = streamed(tokenizer, [token] * 300)
    assert max(decoded) < 40
    assert "".join(pieces) == "\ufffd" * 300

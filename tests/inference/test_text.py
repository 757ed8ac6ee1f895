"""Pieces of text as tokens come against the text that transformers makes of all tokens at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from statex_dist.data.hf_tokenizer import HFTokenizer
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.inference.text import TextStream, continuation_text, cut, end_ids, text_window
from tests.inference.text_kinds import BYTES, KINDS, MARK, byte_level_bpe
from tests.inference.text_kinds import llama as make_llama

ALL = {"bytes": BytesTokenizer(), **KINDS}
UNTIL = st.lists(st.sampled_from(["e", "the", " the", " qu", "🙂", "\n", "abab", "é a", "\ufffd"]), max_size=3)


def whole_text(tokenizer, tokens):
    """Return what transformers makes of tokens."""
    if isinstance(tokenizer, BytesTokenizer):
        return tokenizer.decode(tokens)
    return tokenizer._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_behind(tokenizer, context, tokens):
    """Return the text of all, less that of the context; the oracle of a continuation's text."""
    whole, before = whole_text(tokenizer, [*context, *tokens]), whole_text(tokenizer, context)
    while not whole.startswith(before):  # a character, or a run of bytes, began in the context
        before = before[:-1]
    return whole.removeprefix(before)


def streamed(tokenizer, tokens, until=(), context=()):
    stream, pieces = TextStream(tokenizer, until, context=context), []
    for count, token in enumerate(tokens, start=1):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, tokens[:count]
    return [*pieces, stream.finish()], tokens


def any_tokens(tokenizer, **sizes):
    """Draw ids, some beyond the vocabulary; runs of bytes and special tokens are frequent."""
    size = tokenizer.vocab_size
    special = sorted(i for i in range(size) if tokenizer.is_special(i))
    return st.lists(st.one_of(st.integers(0, size + 2), st.sampled_from(special), st.integers(0, size - 1)), **sizes)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), until=UNTIL)
def test_pieces_behind_any_context_make_up_what_transformers_decodes(name, data, until):
    tokenizer = ALL[name]
    context = data.draw(any_tokens(tokenizer, max_size=40))
    tokens = data.draw(any_tokens(tokenizer, max_size=80))
    pieces, used = streamed(tokenizer, tokens, until, context)
    assert "".join(pieces) == cut(text_behind(tokenizer, context, used), until)
    assert continuation_text(tokenizer, context, used) == text_behind(tokenizer, context, used)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_prompt_and_completion_are_the_whole(name, data):
    """As ``echo`` shows them: what of the prompt's text still changed is replaced."""
    tokenizer = ALL[name]
    context, tokens = (data.draw(any_tokens(tokenizer, max_size=30)) for _ in range(2))
    stream = TextStream(tokenizer, context=context)
    said = "".join([*map(stream.push, tokens), stream.finish()])
    before = tokenizer.decode(context)
    assert before[: len(before) - stream.overlap] + said == whole_text(tokenizer, [*context, *tokens])


@pytest.mark.parametrize("name", ["bytes", "byte-level", "unigram-first", "llama", "gemma"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="the quick é東🙂\n", min_size=1, max_size=80), split=st.integers(0, 80))
@example(text="the " * 30, split=4)
def test_a_text_that_is_split_at_any_token_is_whole_again(name, text, split):
    tokenizer = ALL[name]
    tokens = tokenizer.encode(text).tolist()
    context, tokens = tokens[:split], tokens[split:]
    pieces, _ = streamed(tokenizer, tokens, context=context)
    assert "".join(pieces) == text_behind(tokenizer, context, tokens)
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("name", ["llama", "unigram-first", "unigram-always", "bpe-first"])
def test_the_space_behind_a_prompt_is_there_and_stop_strings_see_it(name):
    tokenizer = ALL[name]
    context, tokens = tokenizer.encode("the").tolist(), tokenizer.encode(" is the").tolist()
    # The tokenizer puts a mark in front of a text that begins with none.
    tokens = tokens if tokenizer.decode([*context, *tokens]) == "the is the" else tokens[1:]
    assert "".join(streamed(tokenizer, tokens, context=context)[0]) == " is the"
    assert "".join(streamed(tokenizer, tokens, [" the"], context)[0]) == " is"
    assert "".join(streamed(tokenizer, tokens, [" is"], context)[0]) == ""


def test_text_is_handed_out_as_soon_as_it_is_certain():
    pieces, _ = streamed(BytesTokenizer(), list("aé🙂".encode()))
    assert pieces == ["a", "", "é", "", "", "", "🙂", ""]
    pieces, _ = streamed(BytesTokenizer(), list(b"abSTOx"), ["STOP"])
    assert pieces == ["a", "b", "", "", "", "STOx", ""]
    pieces, used = streamed(BytesTokenizer(), list(b"abSTOPx"), ["STOP"])
    assert pieces == ["a", "b", "", "", "", ""]
    assert len(used) == 6
    pieces, _ = streamed(BytesTokenizer(), list(b"a\xf0\x9f\xffb"))
    assert pieces == ["a", "", "", "\ufffd", "\ufffdb", ""]


def test_a_stop_string_of_byte_tokens_does_not_wait_for_the_next_word():
    """Llama's line end is a byte token; one more byte could still turn it into something else."""
    tokenizer = ALL["llama"]
    ids = tokenizer._tokenizer.convert_tokens_to_ids
    tokens = ids([MARK + "the", "<0x0A>", "<0x0A>", MARK + "is"])
    assert streamed(tokenizer, tokens)[0] == ["the", "", "", "\n\n is", ""]
    assert streamed(tokenizer, tokens, ["\n\n"]) == (["the", "", ""], tokens[:3])
    assert streamed(tokenizer, tokens, ["\n"]) == (["the", ""], tokens[:2])
    euro = ids([f"<0x{byte:02X}>" for byte in "€".encode()])
    assert streamed(tokenizer, [*euro, *tokens], ["€"])[1] == euro


@pytest.mark.parametrize("offset", range(4))
def test_a_stop_string_far_into_a_run_of_bytes_is_found(offset):
    tokenizer = ALL["llama"]
    text = "a" * offset + "é東🙂 " * 60
    tokens = tokenizer._tokenizer.convert_tokens_to_ids([BYTES[byte] for byte in f"{text}STOP".encode()])
    pieces, used = streamed(tokenizer, [*tokens, *tokens], ["STOP"])
    assert ("".join(pieces), used) == (text, tokens)
    # One wrong byte before it, and there is no text in the run.
    broken = [tokens[10], *tokens[12:], *tokens]
    pieces, used = streamed(tokenizer, broken, ["STOP"])
    assert "".join(pieces) == "\ufffd" * len(broken) == text_behind(tokenizer, [], broken)


def test_tokens_that_end_a_text():
    tokenizer = BytesTokenizer()
    assert end_ids((), tokenizer) == {256}
    assert end_ids(("a", "bc"), tokenizer) == {256}
    assert end_ids(("a",), tokenizer, ignore_eos=True) == set()
    llama = ALL["llama"]
    assert end_ids(("<eos>", "the"), llama, ignore_eos=True) == {llama.eos_token_id}
    # Marked as special in tokenizer.json and named nowhere else.
    assert end_ids(("<|im_end|>",), llama) == {1, 2}
    assert end_ids(("<|im_end|>",), llama, ignore_eos=True) == {2}
    # What no token of its own says is <unk> as well, and must not end a text at every unknown word.
    assert end_ids(("§",), llama) == {1}
    other = make_llama()
    other.end_tokens = {1: ("tokenizer",), 7: ("config.json",)}
    assert end_ids(("<|im_end|>",), other) == {1, 2, 7}


def test_spaces_stay_as_the_tokens_have_them():
    """GPT-NeoX's tokenizer, that of the public Mamba2 models, asks for spaces to be cleaned away."""
    backend = byte_level_bpe()._backend
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=True)
    tokenizer = HFTokenizer(fast, "cleaning")
    text = "Yes , it 's done . f( 'mode' ) do n't ?"
    assert "".join(streamed(tokenizer, tokenizer.encode(text).tolist())[0]) == text


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("ctc", "joins-then-replaces")])
def test_a_long_text_costs_no_more_the_longer_it_gets(name, monkeypatch):
    tokenizer, decoded = ALL[name], []
    alone = [i for i in range(tokenizer.vocab_size) if tokenizer.stands_alone(i)]
    decode = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids: decoded.append(len(list(ids))) or decode(self, ids)
    )
    for tokens in [[token] * 300 for token in alone[:: len(alone) // 8]] + [(alone * 300)[:300]]:
        pieces, _ = streamed(tokenizer, tokens, context=alone * 5)
        assert "".join(pieces) == text_behind(tokenizer, alone * 5, tokens)
    assert sorted(decoded)[-len(decoded) // 2] < 40
    assert max(count for count in decoded if count < 300) < 40


def test_a_window_begins_where_no_run_of_bytes_is_cut():
    tokenizer = ALL["llama"]
    ids = tokenizer._tokenizer.convert_tokens_to_ids
    word, run = ids(["the"]), ids(BYTES[128:140])
    assert text_window(tokenizer, word * 20) == word * 8
    assert text_window(tokenizer, [*word * 3, *run]) == [*word * 3, *run]
    assert text_window(tokenizer, [*word * 9, *run]) == [*word * 8, *run]
    assert text_window(tokenizer, [*run, *word * 8]) == word * 8
    assert text_window(tokenizer, run * 10) == run * 10

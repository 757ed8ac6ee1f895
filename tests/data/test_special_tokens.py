"""Markers of special tokens in text, against tokenizers of every kind and transformers' own splitting."""

import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from statex_dist.data.special_tokens import MarkerSearch
from statex_dist.data.tokenizer import BytesTokenizer, load_tokenizer
from statex_dist.errors import ConfigError, DataError
from tests.data.fast_tokenizers import KINDS, NAMES, TEXTS, backend, save
from tests.raising import raises

LOSSLESS = ("gpt2", "llama", "llama3")
PIECES = [*NAMES, "<tool>", "<", ">", "s", "/", "|", " ", "  ", "the", "fox", "[", "MASK", "]", "im_start", "\n", "pad"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save(backend(kind), root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(directories):
    return {kind: load_tokenizer(directory) for kind, directory in directories.items()}


@pytest.fixture(scope="module")
def split(loaded):
    return {kind: tokenizer.for_corpus("split") for kind, tokenizer in loaded.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_no_control_token_comes_out_of_text(loaded, split, kind, text):
    tokenizer = loaded[kind]
    unknown = tokenizer.special_id("<unk>")
    ids = split[kind].encode_batch([text])[0].tolist()
    if kind in LOSSLESS:
        assert not any(map(tokenizer.is_special, ids))
        # Llama's tokenizer puts a space in front of all that stands between added tokens, and takes the first one off.
        if kind != "llama" or "<tool>" not in text:
            assert tokenizer.decode(ids) == text
    else:
        assert not any(tokenizer.is_special(token) and token != unknown for token in ids)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_transformers_splits_in_the_same_way(directories, split, kind, text):
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directories[kind]), split_special_tokens=True)
    assert split[kind].encode_batch([text])[0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["unigram", "t5", "wordpiece", "words", "llama3"])
def test_what_the_library_alone_does_not_split(directories, split, kind):
    """If this fails, the copy of the model is not needed any more."""
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directories[kind]), split_special_tokens=True)
    control = set(theirs.all_special_ids) - {theirs.unk_token_id}
    texts = [f"{before}{name}{behind}" for name in NAMES for before in ("", "the ") for behind in ("", " fox")]
    assert any(control & set(theirs(text, add_special_tokens=False)["input_ids"]) for text in texts)
    for ids in split[kind].encode_batch(texts):
        assert not control & set(ids.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_markers_is_encoded_as_before(loaded, split, kind):
    rng = random.Random(0)
    words = " ".join(TEXTS[:2]).split()
    texts = [" ".join(rng.choices([*words, "<tool>", "ﬁ", "漢"], k=rng.randrange(30))) for _ in range(200)]
    for theirs, ours in zip(loaded[kind].encode_batch(texts), split[kind].encode_batch(texts), strict=True):
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_added_token_stays_a_token(loaded, split, kind):
    ids = split[kind].encode_batch(["x <tool> <s> y"])[0].tolist()
    tool = loaded[kind].encode("<tool>")[-1]
    assert ids.count(tool) == 1
    assert not loaded[kind].is_special(int(tool))


def test_keep_is_what_the_tokenizer_does(loaded, directories, tmp_path, caplog):
    text = "a <s> b</s>"
    kept = loaded["gpt2"].for_corpus("keep")
    np.testing.assert_array_equal(kept.encode_batch([text])[0], loaded["gpt2"].encode(text))
    assert {1, 2} <= set(kept.encode_batch([text])[0].tolist())
    splitting = load_tokenizer(save(backend("gpt2"), tmp_path / "t", split_special_tokens=True))
    assert not {1, 2} & set(splitting.for_corpus("keep").encode_batch([text])[0].tolist())
    with raises(ConfigError, "special_tokens", "drop", "split", "keep", "refuse"):
        loaded["gpt2"].for_corpus("drop")


def test_prompts_are_encoded_as_before_while_a_corpus_is_split(loaded, split):
    before = loaded["gpt2"].encode("<s>").tolist()
    split["gpt2"].encode_batch(["<s>"])
    assert loaded["gpt2"].encode("<s>").tolist() == before == [1]


def test_a_special_token_that_merges_make_is_split(tmp_path):
    """Files made of SentencePiece models have a merge for every piece that two others make."""
    state = json.loads(backend("gpt2").to_str())
    vocab = state["model"]["vocab"]
    if "<s" not in vocab:
        vocab["<s"] = len(vocab) + 1
        state["model"]["merges"].insert(0, ["<", "s"])
    state["model"]["merges"].insert(1, ["<s", ">"])
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<tool>"]
    tokenizer = load_tokenizer(save(Tokenizer.from_str(json.dumps(state)), tmp_path / "t"))
    ids = tokenizer.for_corpus("split").encode_batch(["a<s>b"])[0].tolist()
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a<s>b"


def test_a_character_that_is_a_special_token_too_stays_in_text(tmp_path):
    """CLIP's tokenizers pad with an exclamation mark."""
    tokenizer = load_tokenizer(save(backend("gpt2"), tmp_path / "t", pad_token="!"))
    corpus = tokenizer.for_corpus("split")
    ids = corpus.encode_batch(["wow! <s>"])[0].tolist()
    assert tokenizer.pad_token_id in ids
    assert 1 not in ids
    assert corpus.marker_in("wow!") is None


def test_a_text_that_cannot_be_split_is_refused(loaded, split):
    with pytest.raises(DataError, match=r"'<s>' \(id 1\)") as refused:
        split["unigram"].encode_batch(["fine", "\U0010ffff<s>\U0010ffff"])
    assert len(str(refused.value)) <= 400


def test_bytes_have_no_markers():
    corpus = BytesTokenizer().for_corpus("refuse")
    assert corpus.marker_in("<|endoftext|>") is None
    assert corpus.encode_batch(["<s>"])[0].tolist() == [60, 115, 62]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab<|", min_size=0, max_size=9), max_size=12),
    st.text("ab<|", max_size=30),
)
def test_the_first_and_longest_marker_is_found(markers, text):
    places = [(text.index(marker), -len(marker), marker) for marker in markers if marker and marker in text]
    assert MarkerSearch(markers).find(text) == (min(places)[2] if places else None)


def test_many_long_markers_are_searched_for_in_bounded_depth():
    markers = ["<" + "x" * i + ">" for i in range(3000)]
    assert MarkerSearch(markers).find("a" + markers[2999] + markers[1]) == markers[2999]

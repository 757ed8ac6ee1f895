import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.needle import (
    INSTRUCTION,
    NEEDLE,
    QUESTION,
    answer_prompts,
    build_prompts,
    depth_values,
    file_haystack,
    min_length,
)
from statex_dist.evaluation.scoring import decode_greedily
from statex_dist.inference.prefill import evaluating
from tests.evaluation.stand_ins import MergingTokenizer, PasskeyReader, tiny_model

TOKENIZER = BytesTokenizer()


@given(length=st.integers(190, 3000), depth=st.floats(0, 1), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_prompts_have_the_exact_length_and_the_needle_at_its_depth(length, depth, seed):
    prompts = build_prompts(length, depth, 3, seed=seed, tokenizer=TOKENIZER)
    assert prompts.tokens.shape == (3, length)
    room = length - min_length(TOKENIZER)
    for row, key, position in zip(prompts.tokens, prompts.keys, prompts.positions, strict=True):
        text = TOKENIZER.decode(row)
        needle = NEEDLE.format(key=key)
        assert text.startswith(INSTRUCTION)
        assert text.endswith(QUESTION)
        assert text[position : position + len(needle)] == needle
        assert position - len(INSTRUCTION) == int(depth * room)
        hay = text.replace(needle, "", 1)
        assert not any(character.isdigit() for character in hay)


def test_seed_length_depth_and_number_fix_a_prompt():
    def tokens(length=256, depth=0.5, seed=0, **changes):
        return build_prompts(length, depth, 2, seed=seed, tokenizer=TOKENIZER, **changes).tokens

    assert np.array_equal(tokens(first_sample=1)[0], tokens()[1])
    assert not np.array_equal(tokens()[0], tokens()[1])

    assert np.array_equal(tokens(), tokens())
    assert not np.array_equal(tokens(), tokens(seed=1))
    assert not np.array_equal(tokens(), tokens(depth=0.3))


def test_depths_are_the_middles_of_equal_parts():
    assert depth_values(5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_a_reader_that_remembers_is_right_and_streaming_bounds_the_segment():
    prompts = build_prompts(700, 0.1, 5, seed=0, tokenizer=TOKENIZER)
    model = PasskeyReader()
    answers = answer_prompts(model, prompts, tokenizer=TOKENIZER, batch_size=2, segment_length=100)
    assert answers == list(prompts.keys)
    assert model.longest_call == 100


def test_a_reader_that_forgets_is_wrong_at_the_start_and_right_at_the_end():
    for depth, right in ((0.1, False), (0.9, True)):
        prompts = build_prompts(1000, depth, 4, seed=0, tokenizer=TOKENIZER)
        answers = answer_prompts(PasskeyReader(memory=300), prompts, tokenizer=TOKENIZER)
        assert [answer == key for answer, key in zip(answers, prompts.keys, strict=True)] == [right] * 4


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_recurrent_decoding_equals_reading_the_whole_text_again(family):
    model = tiny_model(family).double()
    ids = torch.randint(0, 256, (3, 50), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        produced = decode_greedily(model, ids, 6, segment_length=17)
        text = ids
        for _ in range(6):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(produced, text[:, 50:])


def test_haystack_from_a_file_wraps_and_varies(tmp_path):
    path = tmp_path / "hay.txt"
    path.write_text("abcdefghij")
    draw = file_haystack(path, TOKENIZER)
    pieces = {TOKENIZER.decode(draw(np.random.default_rng(i), 25)) for i in range(40)}
    assert len(pieces) == 10
    assert all(piece in "abcdefghij" * 4 for piece in pieces)


def test_bad_haystacks_and_lengths_are_refused(tmp_path):
    with pytest.raises(DataError, match="exist"):
        file_haystack(tmp_path / "none.txt", TOKENIZER)
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"ab\xff\xfe")
    with pytest.raises(DataError, match="empty"):
        file_haystack(empty, TOKENIZER)
    with pytest.raises(DataError, match=r"UTF-8.*2"):
        file_haystack(binary, TOKENIZER)
    shortest = min_length(TOKENIZER)
    with pytest.raises(ConfigError, match=rf"{shortest}.*{shortest}"):
        build_prompts(shortest, 0.5, 1, seed=0, tokenizer=TOKENIZER)


def test_no_key_takes_more_than_said_under_a_tokenizer_that_joins_some_digits():
    tokenizer = MergingTokenizer()
    assert len(tokenizer.encode("99999")) < len(tokenizer.encode("12345"))
    assert build_prompts(min_length(tokenizer) + 1, 0.5, 100, seed=0, tokenizer=tokenizer).tokens.shape[0] == 100

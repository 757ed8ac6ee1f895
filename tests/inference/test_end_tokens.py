"""End tokens of a model's files and its tokenizer, taken together."""

import json
import logging

import pytest

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError
from statex_dist.inference.vocabulary import log_end_tokens, use_end_tokens
from tests.evaluation.stand_ins import tiny_config
from tests.inference.text_kinds import llama


def end_tokens(directory, tokenizer, generation=None, **config):
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (directory / "generation_config.json").write_text(text)
    use_end_tokens(tokenizer, tiny_config(**config), directory)
    return set(tokenizer.end_tokens)


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        (None, None, {1}),
        ({}, None, {1}),
        ({"eos_token_id": 2}, None, {1, 2}),
        ({"eos_token_id": [2, 1]}, None, {1, 2}),
        ({"eos_token_id": None}, [0, 2], {0, 1, 2}),
        ({"eos_token_id": [2]}, 0, {0, 1, 2}),
        ({"eos_token_id": []}, [], {1}),
        (None, (2,), {1, 2}),
    ],
)
def test_the_end_tokens_are_those_of_all_files(tmp_path, generation, config, wanted):
    assert end_tokens(tmp_path, llama(), generation, vocab_size=400, eos_token_id=config) == wanted


def test_it_is_said_which_file_names_which_token(tmp_path, caplog):
    tokenizer = llama()
    end_tokens(tmp_path, tokenizer, {"eos_token_id": [1, 2]}, eos_token_id=2)
    with caplog.at_level(logging.INFO):
        log_end_tokens(tokenizer, 400)
    [record] = caplog.records
    places = "1 '<eos>' (tokenizer and generation_config.json); 2 '<|im_end|>' (generation_config.json and config.json)"
    assert record.getMessage() == f"end tokens: {places}"


def test_tokens_that_are_not_special_or_not_there_are_said(tmp_path, caplog):
    """flash-linear-attention writes ``eos_token_id: 2`` whatever the tokenizer is."""
    tokenizer = BytesTokenizer()
    assert end_tokens(tmp_path, tokenizer, {"eos_token_id": [258, -1]}, eos_token_id=2) == {-1, 2, 256, 258}
    assert BytesTokenizer().end_tokens == {256: ("tokenizer",)}
    log_end_tokens(tokenizer, 258)
    lines = sorted(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert lines[0].startswith("config.json: end token 2 byte 0x02 is not a special token")
    assert lines[1].startswith("generation_config.json: end token -1 is outside the model's vocabulary of 258")
    assert lines[2].startswith("generation_config.json: end token 258 is outside")
    other = llama()
    end_tokens(tmp_path, other, {"eos_token_id": [2**70, -1]})
    log_end_tokens(other, 258)


@pytest.mark.parametrize("generation", ["{", "[]", {"eos_token_id": "x" * 1000}, {"eos_token_id": [True]}, b"\xff"])
def test_damaged_files_are_refused_in_a_line(tmp_path, generation):
    if isinstance(generation, bytes):
        (tmp_path / "generation_config.json").write_bytes(generation)
        generation = None
    with pytest.raises(CheckpointError) as caught:
        end_tokens(tmp_path, BytesTokenizer(), generation)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 200
    assert "\n" not in str(caught.value)

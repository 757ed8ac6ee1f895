"""Bodies that are accepted as requests, and the message for each mistake."""

import json

import pytest

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError
from statex_dist.inference.serving.limits import CHARACTERS_PER_TOKEN, Limits
from statex_dist.inference.serving.protocol import CompletionRequest, RequestError, parse_request, shown


def parse(**fields):
    return parse_request(json.dumps({"model": "m", "prompt": "text", **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_is_text_or_tokens_one_or_many(prompt, prompts):
    assert parse(prompt=prompt).prompts == prompts


def test_null_stands_for_the_default():
    empty = {name: None for name in CompletionRequest.model_fields if name not in ("model", "prompt")}
    assert parse(**empty) == parse()


def test_what_changes_nothing_is_taken():
    neutral = {"best_of": 2, "n": 2, "logit_bias": {}, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0.0}
    assert parse(**neutral, user="somebody", stream=True, stream_options={"include_usage": True}).includes_usage


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": 5}, "prompt", "prompt must be a string, a list of strings, a list of token ids or a list"),
        ({"prompt": []}, "prompt", "not []"),
        ({"prompt": [1, "a"]}, "prompt", "not [1, 'a']"),
        ({"prompt": [True]}, "prompt", "not [True]"),
        ({"prompt": [[1], ["a"]]}, "prompt", "not [[1], ['a']]"),
        ({"prompt": [1.0]}, "prompt", "not [1.0]"),
        ({"prompt": None}, "prompt", "not None"),
        ({"model": 1}, "model", "valid string, not 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, not 0"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer, not '5'"),
        ({"max_tokens": True}, "max_tokens", "valid integer, not True"),
        ({"temperature": -0.5}, "temperature", "greater than or equal to 0, not -0.5"),
        ({"temperature": float("nan")}, "temperature", "finite number, not nan"),
        ({"top_p": 0}, "top_p", "greater than 0, not 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1, not 1.5"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0, not -1"),
        ({"top_k": 1 << 40}, "top_k", "less than"),
        ({"n": 0}, "n", "greater than or equal to 1, not 0"),
        ({"seed": 1 << 64}, "seed", "less than"),
        ({"seed": 10**4000}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"stop": ["a", 5]}, "stop", "not ['a', 5]"),
        ({"stop": "a" * 257}, "stop", "1 to 256 characters"),
        ({"stream": "yes"}, "stream", "valid boolean, not 'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "go with stream: true only"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "not padded"),
        ({"stream_options": {"colour": 1}}, "stream_options.colour", "known are include_usage"),
        ({"logprobs": 0}, "logprobs", "logprobs is not supported: log probabilities are not given; leave it out"),
        ({"best_of": 2}, "best_of", "best_of is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
        ({"suffix": "end"}, "suffix", "reads from the left only"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty is not supported"),
        ({"frequency_penalty": -1}, "frequency_penalty", "frequency_penalty is not supported"),
        ({"logit_bias": {str(i): "x" for i in range(1000)}}, "logit_bias", "logit_bias is not supported"),
        ({"stream_options": 5}, "stream_options", "not 5"),
        ({"a" * 1000: 1}, "a" * 60 + "...", "unknown field 'aaa"),
        ({"messages": []}, "messages", "unknown field 'messages'; known are model, prompt, max_tokens"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(fields, param, words):
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    error = caught.value
    assert words in str(error)
    assert len(str(error)) < 400
    assert (error.status, error.param, error.outcome) == (400, param, "invalid")
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON: EOF"),
        (b'{"model": "m", ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"model": "m", "prompt": "\\ud800"}', "not valid JSON.*lone surrogate"),
        (b'{"model": "m", "prompt": "\\udc00 "}', "not valid JSON.*lone surrogate"),
        (b"[" * 100_000, "recursion limit"),
        (b"[]", "body is []"),
        (b"{}", "model is missing"),
        (b'{"model": "m"}', "prompt is missing"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body, words):
    with pytest.raises(RequestError, match=words.replace("[", r"\[")) as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_a_body_full_of_mistakes_gets_one_short_line():
    with pytest.raises(RequestError) as caught:
        parse(prompt=[None] * 100_000, stop=[None] * 100_000)
    assert len(str(caught.value)) < 300


def test_no_more_than_the_first_unknown_field_is_looked_at(monkeypatch):
    monkeypatch.setattr(CompletionRequest, "model_validate", None)  # which would explain each of them
    with pytest.raises(RequestError, match="'k0'"):
        parse(**{f"k{i}": 1 for i in range(1000)})


@pytest.mark.parametrize("make", [lambda spy: [spy] * 1000, lambda spy: dict.fromkeys(range(1000), spy)])
def test_only_the_beginning_of_a_value_is_written_out(make):
    calls = []

    class Spy:
        def __repr__(self):
            calls.append(1)
            return "x"

    assert len(shown(make(Spy()))) < 70
    assert 0 < len(calls) < 10


def test_a_text_that_must_have_too_many_tokens_is_not_tokenized():
    most = CHARACTERS_PER_TOKEN * 10
    limits = Limits(max_prompt_tokens=10)
    with pytest.raises(RequestError, match=rf"{most + 1}.*{most}.*16") as e:
        limits.encode(["a" * (most + 1)], tokenizer=None, vocab_size=5)
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match=rf"{most}.*10"):
        limits.encode(["a" * most], BytesTokenizer(), vocab_size=258)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_batch_size", 0, "--max-batch-size.*not 0"),
        ("max_queue", -1, "--max-queue.*not -1"),
        ("max_tokens", 0, "--max-tokens.*not 0"),
        ("request_timeout", 0.0, "--request-timeout.*not 0"),
        ("request_timeout", float("nan"), "--request-timeout.*not nan"),
    ],
)
def test_limits_that_would_take_nothing_are_refused(name, value, words):
    with pytest.raises(ConfigError, match=words):
        Limits(**{name: value})

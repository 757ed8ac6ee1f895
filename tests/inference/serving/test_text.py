"""Texts of the server, streamed and whole, with and without ``echo``, against transformers'."""

import json
import random

import pytest

from tests.evaluation.stand_ins import Says
from tests.inference.serving.running import serving
from tests.inference.test_text import text_behind, whole_text
from tests.inference.text_kinds import BYTES, KINDS, MARK


def completions(server, **fields):
    """Return the text of a completion, and that of its stream, with the reasons for their ends."""
    fields = {"temperature": 0, **fields}
    whole = server.post(**fields).json()["choices"][0]
    pieces, reason = [], None
    with server.stream(**fields) as answer:
        for line in filter(None, answer.iter_lines()):
            if line != b"data: [DONE]":
                [choice] = json.loads(line.removeprefix(b"data: "))["choices"]
                pieces.append(choice["text"])
                reason = choice["finish_reason"] or reason
    return (whole["text"], whole["finish_reason"]), ("".join(pieces), reason)


@pytest.mark.parametrize("name", ["byte-level", "unigram-first", "unigram-always", "llama", "gemma", "word-piece"])
def test_texts_are_those_of_transformers_behind_the_prompt(name):
    tokenizer, rng = KINDS[name], random.Random(0)
    size = tokenizer.vocab_size
    for number, prompt in enumerate(["the quick", [rng.randrange(size) for _ in range(20)], [size - 1]]):
        ids = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
        script = [rng.randrange(3, size) for _ in range(50)]
        with serving(Says(script, behind=len(ids), vocab_size=size), tokenizer=tokenizer) as server:
            wanted = (text_behind(tokenizer, ids, script), "length")
            found = completions(server, prompt=prompt, max_tokens=50, ignore_eos=True)
            assert found == (wanted, wanted), number
            # A prompt that is text comes back as it was given.
            whole = prompt + wanted[0] if isinstance(prompt, str) else whole_text(tokenizer, [*ids, *script])
            wanted = (whole, "length")
            found = completions(server, prompt=prompt, max_tokens=50, ignore_eos=True, echo=True)
            assert found == (wanted, wanted), number


def test_stop_strings_and_special_tokens_end_completions():
    tokenizer = KINDS["llama"]
    ids = tokenizer._tokenizer.convert_tokens_to_ids
    script = ids([MARK + "the", MARK + "is", "<0x0A>", "a", "<|im_end|>", MARK + "b", "<eos>", "e"])
    prompt = tokenizer.encode("the").tolist()
    with serving(Says(script, behind=len(prompt), vocab_size=tokenizer.vocab_size), tokenizer=tokenizer) as server:
        for stop, text in (
            (None, " the is\na b"),
            (" is", " the"),
            ("\n", " the is"),
            ("<|im_end|>", " the is\na"),
            (["zzz", "the"], " "),
        ):
            found = completions(server, prompt="the", stop=stop, max_tokens=20)
            assert found == ((text, "stop"), (text, "stop")), stop
            found = completions(server, prompt="the", stop=stop, max_tokens=20, echo=True)
            assert found == (("the" + text, "stop"), ("the" + text, "stop")), stop
        refused = server.post(prompt="the", stop=["a", "<|im_end|>\n"])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop")


def test_an_echoed_character_that_the_completion_makes_whole_is_there_once():
    tokenizer = KINDS["llama"]
    euro = tokenizer._tokenizer.convert_tokens_to_ids([BYTES[byte] for byte in "x€".encode()])
    for split in range(1, 4):
        with serving(Says(euro[split:], behind=split, vocab_size=tokenizer.vocab_size), tokenizer=tokenizer) as server:
            found = completions(server, prompt=euro[:split], max_tokens=4 - split, echo=True)
            assert found == (("x€", "length"), ("x€", "length"))

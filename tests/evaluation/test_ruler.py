import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation import ruler
from statex_dist.evaluation.needle import (
    depth_values,
    fresh_sentences,
    made_up_sentences,
    running_text,
    split_sentences,
)
from statex_dist.evaluation.ruler import NOISE, RULER_TASKS, build_ruler_prompt, min_length, score_answer
from tests.evaluation.stand_ins import MergingTokenizer

TOKENIZER = BytesTokenizer()
ESSAY = fresh_sentences(made_up_sentences, TOKENIZER)
DEPTHS = depth_values(5)
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
FORMS = {"words": "[a-z]+-[a-z]+", "numbers": r"[1-9]\d{6}", "uuids": UUID}


def build(name, length=2000, depth=1, *, seed=0, sample=0):
    return build_ruler_prompt(
        name, length, depth, depths=DEPTHS, seed=seed, sample=sample, tokenizer=TOKENIZER, essay=ESSAY
    )


@pytest.mark.parametrize("name", RULER_TASKS)
@given(length=st.integers(1000, 4000), depth=st.integers(0, 4), seed=st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_prompts_hold_what_ruler_says(name, length, depth, seed):
    task, prompt = RULER_TASKS[name], build(name, length, depth, seed=seed)
    assert prompt.tokens.shape == (length,)
    text = TOKENIZER.decode(prompt.tokens)
    several = task.num_queries * task.num_values > 1
    kind = task.value if several else task.value.removesuffix("s")
    start, end = ("Some special magic", "are") if several else ("A special magic", "is")
    assert text.startswith(f"{start} {kind} {end} hidden within the following text. Make sure to memorize it. ")
    asked = f"{end} all the" if several else f"{end} the"
    assert text.endswith(
        f"\nWhat {asked} special magic {kind} for {prompt.query} mentioned in the provided text? "
        f"The special magic {kind} for {prompt.query} mentioned in the provided text {end}"
    )
    needles = re.findall(
        rf"One of the special magic {task.value} for ({FORMS[task.key]}) is: ({FORMS[task.value]})\.", text
    )
    keys = re.split(", and |, ", prompt.query)
    assert len(keys) == task.num_queries
    assert len(prompt.answers) == task.num_queries * task.num_values
    # the whole truth about the asked keys: their needles stand in the text once, and nothing else is said of them
    assert sorted(value for key, value in needles if key in keys) == sorted(prompt.answers)
    for i, (answer, position) in enumerate(zip(prompt.answers, prompt.positions, strict=True)):
        at_needle = text[position:].lstrip()
        key = keys[i // task.num_values]
        assert at_needle.startswith(f"One of the special magic {task.value} for {key} is: {answer}.")
    assert prompt.depths[0] == DEPTHS[depth]
    assert set(prompt.depths) <= set(DEPTHS)
    if task.haystack != "needles":
        assert len(needles) == task.num_keys * task.num_values


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_the_needle_stands_at_its_depth_between_sentences(name):
    for depth, share in enumerate(DEPTHS):
        prompt = build(name, 8000, depth)
        text, (position,) = TOKENIZER.decode(prompt.tokens), prompt.positions
        assert position / 8000 == pytest.approx(share, abs=0.035)
        before = text[:position].rstrip()
        assert before.endswith((".", "afterwards.")), before[-40:]


def test_needles_of_the_haystack_never_have_the_asked_key(monkeypatch):
    monkeypatch.setitem(ruler._DRAW, "words", lambda rng: ("red-fox", "old-oak", "wise-owl")[rng.integers(3)])
    prompt = build("niah_multikey_2")
    text = TOKENIZER.decode(prompt.tokens)
    said = re.findall(rf"for {prompt.query} is: (\d+)\.", text)
    assert said == list(prompt.answers)
    assert len(re.findall(r"for (?:red-fox|old-oak|wise-owl) is", text)) > 10


def test_noise_is_the_noise_of_ruler():
    text = TOKENIZER.decode(build("niah_single_1", 1500).tokens)
    lines = text.split("\n")[1:-1]
    assert {line for line in lines if "magic" not in line} - {lines[-1]} == {NOISE}
    assert NOISE.startswith(lines[-1])  # cut where the length is reached


def test_samples_differ_and_come_again():
    first, again, other = build("niah_multivalue"), build("niah_multivalue"), build("niah_multivalue", sample=1)
    assert np.array_equal(first.tokens, again.tokens)
    assert first.answers == again.answers != other.answers
    assert build("niah_single_2").answers != build("niah_single_1").answers


def test_scoring_is_containment_whatever_the_case():
    assert score_answer("The numbers: ABC-d and 17.", ["abc-D", "17", "18"]) == [True, True, False]


@pytest.mark.parametrize("name", RULER_TASKS)
def test_a_length_below_the_prompt_is_refused(name):
    longest = min_length(name, TOKENIZER)
    build(name, longest + 1)
    with pytest.raises(ConfigError, match=rf"{name}.*150.*\d+.*--lengths"):
        build(name, 150)


@given(num_tokens=st.integers(1, 400), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_sources_give_whole_sentences_up_to_the_cut(num_tokens, seed):
    text = "One two.  Three four five!\nSix? Seven eight nine ten."
    sentences = split_sentences(text)
    assert sentences == [" One two.", " Three four five!", " Six?", " Seven eight nine ten."]
    for source in (running_text(sentences, TOKENIZER), ESSAY):
        tokens, borders = source(np.random.default_rng(seed), num_tokens)
        assert len(tokens) == num_tokens
        assert borders[0] == 0
        assert (np.diff(borders) > 0).all()
        pieces = [TOKENIZER.decode(part) for part in np.split(tokens, borders[1:])]
        assert all(re.fullmatch(r" [A-Z][^.!?]*[.!?]", piece) for piece in pieces[:-1])
    running = TOKENIZER.decode(running_text(sentences, TOKENIZER)(np.random.default_rng(seed), num_tokens)[0])
    assert running in "".join(sentences) * (num_tokens // 40 + 3)


@pytest.mark.parametrize("name", RULER_TASKS)
def test_no_prompt_takes_more_than_said_under_a_tokenizer_that_joins_some_digits(name):
    tokenizer = MergingTokenizer()
    assert len(tokenizer.encode("9999999")) < len(tokenizer.encode("1234567"))
    essay = fresh_sentences(made_up_sentences, tokenizer)
    length = min_length(name, tokenizer) + 1
    for sample in range(25):
        prompt = build_ruler_prompt(
            name, length, 0, depths=[0.5], seed=0, sample=sample, tokenizer=tokenizer, essay=essay
        )
        assert prompt.tokens.shape == (length,)


def test_numbers_are_counted_digit_by_digit(monkeypatch):
    monkeypatch.setattr(ruler, "_ADJECTIVES", ("calm",))
    monkeypatch.setattr(ruler, "_NOUNS", ("bell",))
    tokenizer = MergingTokenizer()
    # Within the sentence "9999999" is four tokens, and a number without two equal neighbours is seven.
    frame = "".join(ruler.SINGULAR).format(kind="number", query="calm-bell")
    whole = frame + "\n" + ruler.NEEDLE.format(kind="numbers", key="calm-bell", value="1234567")
    assert min_length("niah_single_1", tokenizer) == len(tokenizer.encode(whole))

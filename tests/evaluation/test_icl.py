import json
import math

import numpy as np
import pytest
import torch

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError, ConfigError, DataError
from statex_dist.evaluation.icl import EXAMPLE, QUERY, encode_choices, icl_units, summarise_icl, write_icl
from statex_dist.evaluation.icl_tasks import (
    MADE_UP_LABELS,
    Example,
    IclSettings,
    draw_trial,
    made_up_examples,
    read_examples,
)
from statex_dist.evaluation.journal import work
from statex_dist.inference.prefill import evaluating
from tests.evaluation.stand_ins import LastSyllable, MergingTokenizer, StandIn, overflowing_model, tiny_model

TOKENIZER = BytesTokenizer()
SMALL = {"shots": (0, 1, 4, 8), "num_trials": 3, "num_queries": 4}


def encode(text):
    return TOKENIZER.encode(text).astype(np.int64)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_choice_is_tokenised_as_the_label_that_is_shown():
    tokenizer = MergingTokenizer()
    shown = tokenizer.encode(EXAMPLE.format(text="word", label="gold")).tolist()
    asked = tokenizer.encode(QUERY.format(text="word")).tolist()
    alone = tokenizer.encode(" gold\n").tolist()
    assert shown[len(asked) :][-1] != alone[-1]  # the empty line is one token of its own
    (context, choice), (other_context, other) = encode_choices(tokenizer, "word", ["gold", "blue"])
    assert context == other_context == asked
    assert context + choice == shown
    assert other_context + other == tokenizer.encode(EXAMPLE.format(text="word", label="blue")).tolist()


def test_a_choice_begins_where_the_labels_part_if_that_is_before_the_query_ends():
    class Shifting(BytesTokenizer):
        def encode(self, text):  # the token before a label's first letter depends on it
            ids = super().encode(text).tolist()
            starts = [i for i in range(2, len(ids)) if ids[i - 2 : i] == [58, 32]]
            return np.array([200 + ids[i + 2] % 8 if i + 2 in starts[1:] else x for i, x in enumerate(ids)])

    tokenizer = Shifting()
    pairs = encode_choices(tokenizer, "w", ["gold", "blue"])
    assert pairs[0][0] == pairs[1][0] == tokenizer.encode("Input: w\nLabel: gold\n\n").tolist()[:14]
    assert [pair[1][0] for pair in pairs] == [200 + ord(label) % 8 for label in "gb"]


class Nothing(StandIn):
    def next_tokens(self, history):
        return torch.zeros_like(history)


def test_examples_and_queries_are_read_in_segments():
    model = Nothing()
    examples = [Example("w" * 300 + str(i), "ab"[i % 2]) for i in range(8)]
    work(icl_units(model, IclSettings(shots=(2,), num_trials=1, num_queries=2, segment_length=64), TOKENIZER, examples))
    assert model.longest_call == 64


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_a_label_is_likely_as_in_the_whole_text_read_at_once(family):
    model, settings = tiny_model(family).double(), IclSettings(shots=(3,), num_trials=1, num_queries=2, num_labels=3)
    records = work(icl_units(model, settings, TOKENIZER))
    trial = draw_trial(made_up_examples(settings, trial=0, count=(3 + 2) // 3 + 2), 0, settings)
    before = "".join(EXAMPLE.format(text=e.text, label=e.label) for e in trial.shots)
    for record, query in zip(records, trial.queries, strict=True):
        logprobs = []
        for label in trial.labels:
            ids = torch.as_tensor(encode(before + EXAMPLE.format(text=query.text, label=label)))[None]
            with evaluating(model):
                logs = model(ids[:, :-1]).logits.log_softmax(-1)[0]
            n = len(f" {label}\n\n")
            logprobs.append(float(logs[-n:].gather(1, ids[0, -n:, None]).sum()))
        shares = np.exp(np.array(logprobs) - max(logprobs))
        assert record["probability"] == pytest.approx(shares[trial.labels.index(query.label)] / shares.sum(), rel=1e-9)


@pytest.mark.parametrize("permute", [False, True])
def test_a_model_that_learns_in_context_rises_from_chance_to_perfect(permute):
    settings = IclSettings(permute_labels=permute, **SMALL)
    records = work(icl_units(LastSyllable(), settings, TOKENIZER))
    result = summarise_icl(records, settings)
    assert result[0].mean == 0.25  # it says gold, and queries are even
    assert result[0].mean <= result[1].mean < 1
    assert result[4].mean == result[8].mean == 1  # four shots show each of four labels once
    assert result[8].samples == 3
    likely = [record["probability"] for record in records if record["shots"] == 8]
    assert min(likely) > 0.25


def test_shots_are_nested_even_and_apart_from_the_queries():
    settings = IclSettings(shots=(8, 32), num_queries=8)
    trial = draw_trial(made_up_examples(settings, trial=0, count=12), 0, settings)
    assert trial == draw_trial(made_up_examples(settings, trial=0, count=12), 0, settings)
    assert trial != draw_trial(made_up_examples(settings, trial=1, count=12), 1, settings)
    for start in range(0, 32, 4):
        assert {example.label for example in trial.shots[start : start + 4]} == set(trial.labels)
    texts = [example.text for example in trial.shots + trial.queries]
    assert len(set(texts)) == len(texts) == 40
    rule = {example.text[-2:]: example.label for example in trial.shots}
    assert len(rule) == 4
    assert all(rule[query.text[-2:]] == query.label for query in trial.queries)


def test_permuted_labels_change_from_trial_to_trial_and_never_keep_their_own():
    settings = IclSettings(shots=(8,), num_queries=4, permute_labels=True, num_labels=3)
    examples = made_up_examples(settings, trial=0, count=9)
    own = {example.text: example.label for example in examples}
    rules = set()
    for number in range(12):
        trial = draw_trial(examples, number, settings)
        renamed = {own[example.text]: example.label for example in trial.shots + trial.queries}
        assert all(old != new for old, new in renamed.items())
        assert sorted(renamed.values()) == sorted(renamed)
        rules.add(tuple(sorted(renamed.items())))
    assert len(rules) == 2  # of three labels


def test_examples_of_a_file_and_figures_of_the_samples(tmp_path):
    lines = [{"text": f"item {i}", "label": i % 3, "id": i} for i in range(20)]
    examples = read_examples(write_lines(tmp_path / "examples.jsonl", lines))
    assert examples[4] == Example("item 4", "1")
    settings = IclSettings(shots=(1, 6), num_trials=2, num_queries=5)
    model = tiny_model()
    records = work(icl_units(model, settings, TOKENIZER, examples))
    again = IclSettings(shots=(6, 1), num_trials=2, num_queries=5, batch_size=3, segment_length=9)
    for a, b in zip(records, work(icl_units(model, again, TOKENIZER, examples)), strict=True):
        assert a["probability"] == pytest.approx(b["probability"], rel=1e-4)
        assert {**a, "probability": None} == {**b, "probability": None}
    files = write_icl(records, tmp_path, settings, labels=["0", "1", "2"], data="d", model={})
    assert [file.name for file in files] == ["icl.json", "icl.jsonl", "icl.png"]
    summary = json.loads(files[0].read_text())
    assert summary["chance"] == 1 / 3
    for shots, row in summary["by_shots"].items():
        of_shots = [record for record in records if record["shots"] == int(shots)]
        assert row["accuracy"] == pytest.approx(sum(r["right"] for r in of_shots) / 10)
        assert row["accuracy_norm"] == pytest.approx(sum(r["right_norm"] for r in of_shots) / 10)
        assert row["low_norm"] <= row["accuracy_norm"] <= row["high_norm"]
        assert row["queries"] == 10
        assert math.isclose(row["probability"], sum(r["probability"] for r in of_shots) / 10)


def test_a_long_label_loses_by_its_length_and_not_by_its_tokens():
    """With all tokens alike likely, the shortest label is the answer; per token, all are alike."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = [Example(f"{i}", ("short", "very long label")[i % 2]) for i in range(12)]
    settings = IclSettings(shots=(2,), num_trials=2, num_queries=4)
    records = work(icl_units(model, settings, TOKENIZER, examples))
    assert {record["answer"] for record in records} == {"short"}
    assert all(record["right"] == (record["label"] == "short") for record in records)
    assert {record["probability"] > 0.99 for record in records} == {True, False}


def test_nan_is_named():
    with pytest.raises(CheckpointError, match=r"layer 1.*position 0"):
        work(icl_units(overflowing_model(1, ord("I")), IclSettings(**SMALL), TOKENIZER))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "a"}], r"line 1: KeyError: .label"),
        ([["a", "b"]], "line 1: TypeError"),
        ([{"text": "a", "label": "x"}, {"text": 3, "label": "x"}], "line 2: text"),
        ([{"text": "a", "label": " "}], "line 1: text.*label"),
        ([{"text": "a", "label": "x"}] * 3, "3 examples.*labels"),
    ],
)
def test_bad_examples_are_refused(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_examples(write_lines(tmp_path / "bad.jsonl", lines))


def test_missing_examples_and_too_few_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"No such file"):
        read_examples(tmp_path / "none.jsonl")
    examples = [Example(f"{i}", "ab"[i % 2]) for i in range(79)]
    wanted = "40 .*2 labels.*64 shots.*16 .* 39 of 'b'.*--shots"
    with pytest.raises(ConfigError, match=wanted):
        icl_units(tiny_model(), IclSettings(), TOKENIZER, examples)
    # Many examples, few of one label: its queries would run out, and with them the chance of 1 / labels.
    examples = [Example(f"{i}", "ab"[i < 5]) for i in range(500)]
    with pytest.raises(ConfigError, match=r"40.*2.*5.*'b'"):
        icl_units(tiny_model(), IclSettings(), TOKENIZER, examples)
    with pytest.raises(ConfigError, match=r"500.*--shots"):
        draw_trial(examples, 0, IclSettings(shots=(500,)))
    with pytest.raises(ConfigError, match=r"8200.*2.*5625"):
        icl_units(tiny_model(), IclSettings(shots=(16384,), num_labels=2), TOKENIZER)


def test_half_a_surrogate_pair_is_named_with_its_line_and_a_line_separator_is_text(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"text": "a\u2028b", "label": 1}\n{"text": "c", "label": 2}\n', encoding="utf-8")
    assert read_examples(path) == [Example("a\u2028b", "1"), Example("c", "2")]
    path.write_text('{"text": "a", "label": 1}\n{"text": "t \\ud83d", "label": 2}\n')
    with pytest.raises(DataError, match=r"2.*'\\ud83d'"):
        read_examples(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": ()}, r"shots.*\[\]"),
        ({"shots": (1, -1)}, "shots must"),
        ({"num_labels": 1}, f"num_labels.* {len(MADE_UP_LABELS)}, not 1"),
        ({"num_trials": 0}, "num_trials.*not 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        IclSettings(**changes)

import json
import math

import numpy as np
import pytest
import torch

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError, ConfigError, DataError
from statex_dist.evaluation.icl import icl_units, score_choices, summarise_icl, write_icl
from statex_dist.evaluation.icl_tasks import (
    MADE_UP_LABELS,
    Example,
    IclSettings,
    draw_trial,
    made_up_examples,
    read_examples,
)
from statex_dist.evaluation.journal import work
from statex_dist.evaluation.streaming import evaluating, prefill
from tests.evaluation.stand_ins import LastSyllable, overflowing_model, tiny_model

TOKENIZER = BytesTokenizer()
SMALL = {"shots": (0, 1, 4, 8), "num_trials": 3, "num_queries": 4}


def encode(text):
    return TOKENIZER.encode(text).astype(np.int64)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_a_choice_scores_as_the_whole_text_read_at_once(family):
    model = tiny_model(family).double()
    before, queries, choices = encode("some shots\n"), ["Input: a", "Input: longer"], [" yes\n", " no\n", " n\n"]
    with evaluating(model):
        _, states = prefill(model, torch.as_tensor(before[None]))
        found = score_choices(model, states, [encode(q) for q in queries], [encode(c) for c in choices], batch_size=4)
        for i, query in enumerate(queries):
            for j, choice in enumerate(choices):
                ids = torch.as_tensor(np.concatenate([before, encode(query), encode(choice)]))[None]
                logs = model(ids[:, :-1]).logits.log_softmax(-1)[0]
                of_choice = logs[-len(choice) :].gather(1, ids[0, -len(choice) :, None])
                assert found[i, j] == pytest.approx(float(of_choice.sum()), rel=1e-9)
        # the shared state is left as it was
        assert score_choices(model, states, [encode(queries[0])], [encode(choices[0])])[0, 0] == pytest.approx(
            found[0, 0], rel=1e-9
        )


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
        assert a.pop("probability") == pytest.approx(b.pop("probability"), rel=1e-4)
        assert a == b
    records = work(icl_units(model, settings, TOKENIZER, examples))
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
    with pytest.raises(CheckpointError, match=r"first in layer 1 at position 0;"):
        work(icl_units(overflowing_model(1, ord("I")), IclSettings(**SMALL), TOKENIZER))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "a"}], r'line 1: KeyError\(.label.\); each line must be {"text": ..., "label": ...}'),
        ([["a", "b"]], "line 1: TypeError"),
        ([{"text": "a", "label": "x"}, {"text": 3, "label": "x"}], "line 2: text must be a string"),
        ([{"text": "a", "label": " "}], "line 1: text must be a string, label a string or whole number"),
        ([{"text": "a", "label": "x"}] * 3, "3 examples with fewer than two labels"),
    ],
)
def test_bad_examples_are_refused(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_examples(write_lines(tmp_path / "bad.jsonl", lines))


def test_missing_examples_and_too_few_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read: .*No such file"):
        read_examples(tmp_path / "none.jsonl")
    examples = [Example(f"{i}", "ab"[i % 2]) for i in range(79)]
    with pytest.raises(ConfigError, match="icl needs 80 examples for 64 shots and 16 queries, the file has 79"):
        icl_units(tiny_model(), IclSettings(), TOKENIZER, examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": ()}, r"shots must be different numbers of 0 or more, not \[\]"),
        ({"shots": (1, -1)}, "shots must be different numbers of 0 or more"),
        ({"num_labels": 1}, f"num_labels must be 2 to {len(MADE_UP_LABELS)}, not 1"),
        ({"num_trials": 0}, "num_trials must be 1 or more, not 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        IclSettings(**changes)

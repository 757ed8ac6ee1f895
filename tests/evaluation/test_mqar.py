import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.evaluation.journal import work
from statex_dist.evaluation.mqar import (
    MqarSettings,
    eliminating_accuracy,
    generate_mqar,
    guessing_accuracy,
    mqar_units,
    pairs_recalled,
    score_mqar,
    write_mqar,
)
from tests.evaluation.stand_ins import Guessing, Perfect, overflowing_model, tiny_model


@given(
    num_pairs=st.integers(1, 64),
    num_samples=st.integers(1, 20),
    seed=st.integers(0, 2**63),
    keys=st.sampled_from([range(128, 192), range(0, 300, 3), list(range(64))]),
    values=st.sampled_from([range(192, 256), range(7, 8)]),
)
@settings(max_examples=60, deadline=None)
def test_documents_are_pairs_then_every_key_with_its_value(num_pairs, num_samples, seed, keys, values):
    tokens, mask = generate_mqar(num_pairs, num_samples, seed=seed, keys=keys, values=values)
    assert tokens.shape == mask.shape == (num_samples, 4 * num_pairs)
    assert tokens.dtype == np.int64
    assert mask.dtype == np.uint8
    for row, marks in zip(tokens.tolist(), mask.tolist(), strict=True):
        pairs = dict(zip(row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2], strict=True))
        assert len(pairs) == num_pairs
        assert set(pairs) <= set(keys)
        assert set(pairs.values()) <= set(values)
        asked, answers = row[2 * num_pairs :: 2], row[2 * num_pairs + 1 :: 2]
        assert sorted(asked) == sorted(pairs)
        assert [pairs[key] for key in asked] == answers
        assert [i for i, mark in enumerate(marks) if mark] == list(range(2 * num_pairs + 1, 4 * num_pairs, 2))


def test_seed_and_number_of_pairs_fix_the_documents():
    first, again = generate_mqar(8, 5, seed=3)[0], generate_mqar(8, 5, seed=3)[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, generate_mqar(8, 5, seed=4)[0])
    assert not np.array_equal(first[:, :4], generate_mqar(9, 5, seed=3)[0][:, :4])


def test_keys_values_and_query_orders_are_spread_evenly():
    tokens, _ = generate_mqar(4, 8000, seed=0)
    for column, low in ((0, 128), (1, 192), (6, 128), (8, 128), (15, 192)):
        counts = np.bincount(tokens[:, column] - low, minlength=64)
        assert len(counts) == 64
        assert abs(counts - 125).max() < 60  # 5.4 standard deviations
    place_of_first_query = (tokens[:, 8:9] == tokens[:, 0:8:2]).argmax(axis=1)
    assert abs(np.bincount(place_of_first_query) - 2000).max() < 200


def test_a_perfect_model_scores_one_and_a_guessing_one_scores_chance():
    tokens, mask = generate_mqar(16, 64, seed=0)
    assert (score_mqar(Perfect(), tokens, mask, batch_size=7) == 1).all()
    assert (score_mqar(Perfect(), tokens, mask, segment_length=9) == 1).all()
    guessed = score_mqar(Guessing(), tokens, mask)
    assert guessed.shape == (64,)
    assert abs(guessed.mean() - 1 / 64) < 0.02


def test_answers_are_teacher_forced_and_scored_one_by_one():
    tokens, mask = generate_mqar(8, 3, seed=1)
    tokens[1, -1] += 1 if tokens[1, -1] < 255 else -1  # one answer that contradicts its pair
    assert score_mqar(Perfect(), tokens, mask).tolist() == [1, 7 / 8, 1]


@pytest.mark.parametrize("family", ["gla", "mamba2"])
def test_score_of_a_real_model_does_not_depend_on_the_batch(family):
    model = tiny_model(family).train()
    tokens, mask = generate_mqar(8, 12, seed=0)
    whole = score_mqar(model, tokens, mask, batch_size=12)
    assert np.array_equal(whole, score_mqar(model, tokens, mask, batch_size=5))
    assert model.training  # put back into its mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pairs": 65}, "65 .*keys.* 64"),
        ({"num_pairs": 0}, "num_pairs.*not 0"),
        ({"num_samples": 0}, "num_samples.*not 0"),
        ({"seed": -1}, "seed.*not -1"),
        ({"keys": [1, 1, 2, 3]}, "distinct keys"),
        ({"values": []}, "at least one value"),
    ],
)
def test_impossible_documents_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate_mqar(**{"num_pairs": 4, "num_samples": 2, "seed": 0, **arguments})


def test_nan_is_an_error_not_a_zero():
    tokens, mask = generate_mqar(4, 3, seed=0)
    tokens[1, 5] = 7
    with pytest.raises(CheckpointError, match=r"NaN.*layer 1.*position 5"):
        score_mqar(overflowing_model(1, 7), tokens, mask, segment_length=4)


SMALL = {"num_pairs": (4, 8), "num_samples": 7}


def test_a_perfect_model_holds_all_pairs(tmp_path):
    settings = MqarSettings(**SMALL)
    files = write_mqar(work(mqar_units(Perfect(), settings)), tmp_path, settings, model={})
    assert [file.name for file in files] == ["mqar.json", "mqar.jsonl", "mqar.png", "mqar_capacity.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in files[2:])
    summary = json.loads(files[0].read_text())
    assert summary["capacity"] == {"threshold": 0.95, "num_pairs": 8}
    for n, row in summary["by_num_pairs"].items():
        assert row["accuracy"] == row["low"] == row["high"] == 1
        assert row["pairs_recalled"] == row["pairs_recalled_low"] == int(n)


def test_figures_are_those_of_the_documents_whatever_the_batch(tmp_path):
    settings, model = MqarSettings(**SMALL), tiny_model()
    records = work(mqar_units(model, settings))
    assert records == work(mqar_units(model, MqarSettings(batch_size=3, segment_length=5, **SMALL)))
    assert [(r["num_pairs"], r["sample"]) for r in records] == [(n, i) for n in (4, 8) for i in range(7)]
    summary = json.loads(write_mqar(records, tmp_path, settings, model={})[0].read_text())
    for n, row in summary["by_num_pairs"].items():
        shares = [record["accuracy"] for record in records if record["num_pairs"] == int(n)]
        assert row["accuracy"] == pytest.approx(sum(shares) / 7)
        assert row["samples"] == 7
    assert summary["by_num_pairs"]["4"]["guessing"] == 1 / 4 + 3 / 4 / 64
    assert summary["capacity"]["num_pairs"] is None


def test_what_is_guessed_is_not_recalled():
    settings = MqarSettings()
    guessing = guessing_accuracy(16, settings)
    assert pairs_recalled(guessing, 16, settings) == 0
    assert pairs_recalled(guessing / 2, 16, settings) == 0
    assert pairs_recalled((1 + guessing) / 2, 16, settings) == pytest.approx(8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pairs": (8, 0)}, r"num_pairs.*\[8, 0\]"),
        ({"num_pairs": (8, 100)}, r"100 .*keys.*128:192.*--num-pairs.* 64"),
        ({"num_samples": 0}, "num_samples.*not 0"),
        ({"keys": (9, 9)}, "keys.*FIRST:END.* 9:9"),
        ({"seed": -1}, "seed.*not -1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        MqarSettings(**changes)


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (200, r"values 192:256.* 200.*--value-ids"),
        (
            100,
            r"keys 128:192.* 100.*--key-ids.* 100",
        ),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(vocab_size, message):
    with pytest.raises(ConfigError, match=message):
        mqar_units(tiny_model(vocab_size=vocab_size), MqarSettings())


def test_a_model_that_crosses_off_values_is_right_as_often_as_said():
    """Without the keys: it names the commonest value of the context that is not answered yet."""
    few = {"num_samples": 400, "keys": (0, 64), "values": (64, 128)}
    for n, values in ((4, (64, 128)), (16, (64, 128)), (3, (64, 65)), (2, (64, 66))):
        wanted = MqarSettings(num_pairs=(n,), **{**few, "values": values})
        tokens, _ = generate_mqar(n, 400, seed=0, keys=range(*wanted.keys), values=range(*wanted.values))
        right = 0
        for row in tokens.tolist():
            left = row[1 : 2 * n : 2]
            for answer in row[2 * n + 1 :: 2]:
                right += max(left, key=left.count) == answer
                left.remove(answer)
        level = eliminating_accuracy(n, wanted)
        assert right / (400 * n) == pytest.approx(level, abs=0.05)
        assert level > guessing_accuracy(n, wanted) or values == (64, 65)
    assert eliminating_accuracy(3, MqarSettings(num_pairs=(3,), values=(64, 65))) == 1
    # of two pairs with two values: alike half of the time, else right half of the time at first, and always at last
    assert eliminating_accuracy(2, MqarSettings(num_pairs=(2,), values=(64, 66), num_samples=4000)) == pytest.approx(
        (1 + 0.75) / 2, abs=0.01
    )

import json

import pytest

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.recall import RecallSettings, run_recall, write_recall
from tests.evaluation.stand_ins import PasskeyReader, Perfect, tiny_model

SMALL = {"num_pairs": (4, 8), "mqar_samples": 6, "lengths": (256, 400), "depths": 2, "needle_samples": 3}


def test_a_perfect_model_gets_everything():
    pairs = run_recall(Perfect(), RecallSettings(tasks=("mqar",), **SMALL))
    assert {n: (e.mean, e.low, e.high) for n, e in pairs.mqar.items()} == {4: (1, 1, 1), 8: (1, 1, 1)}
    assert pairs.needle == {}
    keys = run_recall(PasskeyReader(), RecallSettings(tasks=("needle",), **SMALL), tokenizer=BytesTokenizer())
    assert {place: e.mean for place, e in keys.needle.items()} == dict.fromkeys(
        [(256, 0.25), (256, 0.75), (400, 0.25), (400, 0.75)], 1.0
    )
    assert keys.needle_by_length[400].samples == 6


def test_figures_are_those_of_the_samples_and_come_again(tmp_path):
    settings, tokenizer = RecallSettings(**SMALL), BytesTokenizer()
    first, again = (run_recall(tiny_model(), settings, tokenizer=tokenizer) for _ in range(2))
    assert (first.mqar, first.needle, first.samples) == (again.mqar, again.needle, again.samples)
    files = write_recall(first, tmp_path, model={"directory": "m"})
    assert [f.name for f in files] == ["recall.json", "recall.jsonl", "recall_mqar.png", "recall_needle.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in files[2:])
    summary = json.loads(files[0].read_text())
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(rows) == 2 * 6 + 2 * 2 * 3
    for n, figure in summary["tasks"]["mqar"]["by_num_pairs"].items():
        of_n = [row["accuracy"] for row in rows if row["task"] == "mqar" and row["num_pairs"] == int(n)]
        assert figure["accuracy"] == pytest.approx(sum(of_n) / len(of_n))
        assert figure["samples"] == len(of_n) == 6
    assert [(c["length"], c["depth"]) for c in summary["tasks"]["needle"]["cells"]] == list(first.needle)
    assert summary["settings"]["seed"] == 0
    assert summary["tasks"]["mqar"]["by_num_pairs"]["4"]["guessing"] == 1 / 4 + 3 / 4 / 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("mqar", "poem")}, "task 'poem' is unknown; tasks of recall: mqar, needle"),
        ({"tasks": ()}, "no task given; tasks of recall: mqar, needle"),
        ({"tasks": ("mqar", "mqar")}, "name one twice"),
        ({"num_pairs": (8, 0)}, r"num_pairs must be different numbers of 1 or more, not \[8, 0\]"),
        ({"lengths": ()}, r"lengths must be different numbers of 1 or more, not \[\]"),
        ({"depths": 0}, "depths must be 1 or more, not 0"),
        ({"keys": (9, 9)}, "keys must be FIRST:END with 0 <= FIRST < END, not 9:9"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        RecallSettings(**changes)


@pytest.mark.parametrize(
    ("vocab_size", "changes", "message"),
    [
        (
            200,
            {"tasks": ("mqar",)},
            r"mqar values 192:256 do not fit the model's vocabulary of 200; set --value-ids FIRST:END",
        ),
        (100, {"tasks": ("mqar",)}, r"mqar keys 128:192 do not fit the model's vocabulary of 100; set --key-ids"),
        (258, {"num_pairs": (8, 100)}, r"cannot draw 100 distinct keys from 128:192; set --num-pairs to at most 64"),
        (256, {"tasks": ("needle",)}, r"tokenizer 'bytes' has 258 ids, the model a vocabulary of 256"),
        (258, {"lengths": (256, 100)}, r"length 100 leaves no room for a haystack; .* set --lengths above"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_it_runs(vocab_size, changes, message):
    model = tiny_model(vocab_size=vocab_size)
    model.forward = None  # running it would raise a TypeError
    with pytest.raises(ConfigError, match=message):
        run_recall(model, RecallSettings(**changes), tokenizer=BytesTokenizer())


def test_needle_needs_a_tokenizer_and_a_haystack_that_exists():
    with pytest.raises(ConfigError, match="needle task needs the model's tokenizer; set --tokenizer"):
        run_recall(tiny_model(), RecallSettings())
    with pytest.raises(DataError, match=r"haystack none.txt cannot be read"):
        run_recall(tiny_model(), RecallSettings(haystack="none.txt"), tokenizer=BytesTokenizer())

import json
import re

import pytest
import torch

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.journal import work
from statex_dist.evaluation.recall import TASKS, RecallSettings, recall_units, summarise_recall, write_recall
from tests.evaluation.stand_ins import NeedleReader, PasskeyReader, tiny_model

TOKENIZER = BytesTokenizer()
RULER = tuple(task for task in TASKS if task != "passkey")
SMALL = {"lengths": (700, 1000), "depths": 2, "num_samples": 3}


def records_of(model, settings):
    return work(recall_units(model, settings, TOKENIZER))


def test_a_reader_that_remembers_gets_everything():
    keys = RecallSettings(tasks=("passkey",), **SMALL)
    result = summarise_recall(records_of(PasskeyReader(), keys), keys)["passkey"]
    assert {place: e.mean for place, e in result.cells.items()} == dict.fromkeys(
        [(700, 0.25), (700, 0.75), (1000, 0.25), (1000, 0.75)], 1.0
    )
    assert result.by_length[1000].samples == 6
    assert (result.overall.mean, result.overall.low, result.overall.samples) == (1, 1, 12)


def test_ruler_tasks_are_read_in_segments_and_decoding_ends_with_the_last_answer():
    model = NeedleReader()
    settings = RecallSettings(tasks=RULER, lengths=(1000,), depths=2, num_samples=2, segment_length=400)
    records = records_of(model, settings)
    assert model.longest_call == 400
    assert [record["score"] for record in records] == [1.0] * (len(RULER) * 4)
    for record in records:
        assert record["said"].lower().rstrip().endswith(tuple(record["answers"]))
        assert len(record["said"]) <= 3 + sum(len(answer) + 5 for answer in record["answers"])


def test_several_answers_count_in_shares_and_each_at_its_depth():
    settings = RecallSettings(tasks=("niah_multiquery",), lengths=(1500,), depths=3, num_samples=4)
    records = records_of(NeedleReader(most=2), settings)
    assert {record["score"] for record in records} == {0.5}
    result = summarise_recall(records, settings)["niah_multiquery"]
    assert result.overall.mean == 0.5
    needles = [needle for record in records for needle in record["needles"]]
    assert len(needles) == 4 * 12
    for (_, depth), estimate in result.cells.items():
        right = [needle["right"] for needle in needles if needle["depth"] == depth]
        assert estimate.mean == pytest.approx(sum(right) / len(right))


def test_answers_that_are_never_said_end_at_the_limit():
    settings = RecallSettings(tasks=("niah_single_1",), lengths=(600,), depths=1, num_samples=2, max_new_tokens=9)
    records = records_of(NeedleReader(most=0), settings)
    assert [record["score"] for record in records] == [0, 0]
    assert all(len(record["said"]) <= 9 for record in records)


def test_figures_are_those_of_the_samples_and_do_not_depend_on_the_batch(tmp_path):
    few = {"lengths": (700,), "depths": 2, "num_samples": 3, "max_new_tokens": 3}
    settings = RecallSettings(tasks=("passkey", "niah_multikey_1"), **few)
    model = tiny_model()
    records = records_of(model, settings)
    assert records == records_of(model, RecallSettings(tasks=settings.tasks, batch_size=2, segment_length=300, **few))
    files = write_recall(records, tmp_path, settings, model={"directory": "m"}, timing={"seconds": 1.0})
    names = ["recall.json", "recall.jsonl", "recall_passkey.png", "recall_niah_multikey_1.png"]
    assert [file.name for file in files] == names
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in files[2:])
    summary = json.loads(files[0].read_text())
    assert [json.loads(line) for line in files[1].read_text().splitlines()] == records
    for task, figures in summary["tasks"].items():
        scores = [record["score"] for record in records if record["task"] == task]
        assert figures["overall"]["accuracy"] == figures["by_length"]["700"]["accuracy"] == sum(scores) / len(scores)
        assert [(cell["length"], cell["depth"]) for cell in figures["cells"]] == [(700, 0.25), (700, 0.75)]
    assert summary["settings"]["seed"] == 0


def test_another_haystack_is_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("Whales sing at night. Nobody knows why! " * 4)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Stars do not answer."}) + "\n")
    for place, expected in ((tmp_path / "a.txt", {"Whales", "Nobody"}), (tmp_path, {"Whales", "Nobody", "Stars"})):
        model = NeedleReader()
        settings = RecallSettings(
            tasks=("niah_single_2", "passkey"), lengths=(900,), depths=1, num_samples=1, haystack=str(place)
        )
        records_of(model, settings)
        text = "".join(model.texts)
        assert {word for word in ("Whales", "Nobody", "Stars", "river") if word in text} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("passkey", "poem")}, "task 'poem'.*passkey, niah_single_1, "),
        ({"tasks": ("mqar",)}, "statex eval mqar"),
        ({"tasks": ()}, "no task.*passkey, "),
        ({"tasks": ("passkey", "passkey")}, "name one twice"),
        ({"lengths": ()}, r"lengths.*\[\]"),
        ({"lengths": (8, 8)}, r"lengths.*\[8, 8\]"),
        ({"depths": 0}, "depths.*not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens.*not 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        RecallSettings(**changes)


@pytest.mark.parametrize(
    ("vocab_size", "changes", "message"),
    [
        (256, {}, r"tokenizer 'bytes'.* 257.* 255.*--tokenizer"),
        (258, {"lengths": (256, 100)}, r"passkey: length 100 .*--lengths"),
        (258, {"tasks": ("niah_multiquery",), "lengths": (500,)}, r"niah_multiquery: length 500"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_it_runs(vocab_size, changes, message):
    with pytest.raises(ConfigError, match=message):
        recall_units(tiny_model(vocab_size=vocab_size), RecallSettings(**changes), TOKENIZER)


def test_a_haystack_must_exist():
    with pytest.raises(DataError, match=r"none.txt"):
        recall_units(tiny_model(), RecallSettings(haystack="none.txt"), TOKENIZER)


class Dawdling(NeedleReader):
    """Produces a number of dots that depends on the value, then the value, then x without end."""

    def next_tokens(self, history):
        prompt, question, said = bytes(history.tolist()).decode().rpartition(" mentioned in the provided text ")
        token = 0
        if question:
            value = re.findall(f"for {prompt.rpartition(' for ')[2]} is: ([^ .]+)\\.", prompt)[0]
            answer = said[:3].strip() + " " + "." * (int(value) % 20) + value
            token = answer[len(said)].encode()[0] if len(said) < len(answer) else ord("x")
        return torch.full_like(history, token)


def test_what_is_said_ends_with_the_last_answer_whatever_the_others_of_the_batch_say():
    few = {"tasks": ("niah_single_1",), "lengths": (500,), "depths": 1, "num_samples": 3, "max_new_tokens": 40}
    together, alone = (records_of(Dawdling(), RecallSettings(batch_size=size, **few)) for size in (3, 1))
    assert len({len(record["said"]) for record in alone}) > 1
    assert all(record["said"].endswith(record["answers"][0]) for record in together)
    assert together == alone

"""The capacity ladder on readers whose memory is known, and fits over the results of several models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.health.capacity import (
    CapacitySettings,
    capacity_of,
    capacity_units,
    climb,
    exact_interval,
)
from statex_dist.evaluation.health.laws import find_results, fit_laws, forget_points, recall_points
from statex_dist.evaluation.journal import work
from statex_dist.evaluation.suites.capacity import CapacitySuite, describe
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import PasskeyReader, tiny_model

TOKENIZER = BytesTokenizer()


def measured(model, **options):
    chosen = CapacitySettings(**{"lengths": (200, 400, 800), "depths": 2, "num_samples": 3, "batch_size": 2, **options})
    return chosen, work(capacity_units(model, chosen, TOKENIZER))


def test_the_ladder_of_a_reader_with_a_known_memory():
    # At depth 0.25 of 800 bytes the key lies some 570 bytes back, at depth 0.75 some 240; of 400 bytes 270 and 130.
    chosen, records = measured(PasskeyReader(memory=400))
    ladder = climb(records, chosen)
    assert [(rung["length"], rung["accuracy"], rung["passes"]) for rung in ladder] == [
        (200, 1.0, True),
        (400, 1.0, True),
        (800, 0.5, False),
    ]
    assert [row["accuracy"] for row in ladder[-1]["by_depth"]] == [0.0, 1.0]
    capacity = capacity_of(ladder, chosen.threshold)
    assert (capacity["tokens"], capacity["next_failing"], capacity["monotone"]) == (400, 800, True)
    assert capacity["low"] is None, "six right answers do not prove 95 %"
    assert "capacity: 400 tokens (95 % recall; 800 fails); at 95 % confidence the samples prove no length" in describe(
        capacity, ladder, 0.95
    )


def test_a_single_prompt_has_an_exact_interval_only():
    chosen, records = measured(PasskeyReader(), lengths=(200,), depths=1, num_samples=1)
    ladder = climb(records, chosen)
    assert (ladder[0]["low"], ladder[0]["high"]) == (None, None)
    assert (ladder[0]["exact_low"], ladder[0]["exact_high"]) == pytest.approx((0.025, 1.0))
    model = {"model_type": "gla", "parameters": 1, "state_numbers": 1}
    settings = {"threshold": 0.95}
    table = CapacitySuite().table(
        {"model": model, "ladder": ladder, "capacity": capacity_of(ladder, 0.95), "settings": settings}
    )
    assert list(table.columns[2].cells) == ["1 sample"]


def test_prompts_do_not_depend_on_the_batch():
    one, two = (measured(PasskeyReader(), lengths=(300,), batch_size=size)[1] for size in (1, 3))
    assert one == two


def test_what_was_found_with_another_haystack_does_not_count(tmp_path: Path):
    def keys(text):
        (tmp_path / "hay.txt").write_text(text)
        chosen = CapacitySettings(lengths=(200,), depths=1, haystack=str(tmp_path / "hay.txt"))
        return [unit.key for unit in capacity_units(PasskeyReader(), chosen, TOKENIZER)]

    assert keys("Grass is green.") == keys("Grass is green.") != keys("Grass is blue.")


def rung(length, accuracy, low, high):
    return {"length": length, "passes": accuracy >= 0.95, "exact_low": low, "exact_high": high}


def test_a_ladder_need_not_fall():
    ladder = [rung(1, 1.0, 0.96, 1.0), rung(2, 0.9, 0.85, 0.96), rung(4, 0.97, 0.93, 1.0), rung(8, 0.1, 0.0, 0.2)]
    found = capacity_of(ladder, 0.95)
    assert found == {"tokens": 4, "low": 1, "high": 4, "at_least": False, "monotone": False, "next_failing": 8}
    assert "a shorter length fails" in describe(found, ladder, 0.95)
    assert capacity_of(ladder[:1], 0.95)["at_least"]
    assert "1 tokens or more" in describe(capacity_of(ladder[:1], 0.95), ladder[:1], 0.95)
    none = capacity_of(ladder[3:], 0.95)
    assert (none["tokens"], none["monotone"], none["at_least"], none["next_failing"]) == (None, True, False, 8)
    assert "below 8 tokens, the shortest length asked: none reaches 95 % recall" in describe(none, ladder[3:], 0.95)


def test_the_exact_interval_is_clopper_and_pearsons():
    # R: binom.test(x, n)$conf.int
    for right, total, low, high in (
        (20, 20, 0.8315665, 1.0),
        (0, 20, 0.0, 0.1684335),
        (95, 100, 0.8871651, 0.9835681),
        (100, 100, 0.9637833, 1.0),
        (1, 2, 0.0125791, 0.9874209),
    ):
        assert exact_interval(right, total) == pytest.approx((low, high), abs=1e-6)
    assert exact_interval(999, 2000)[0] < 0.5 < exact_interval(999, 2000)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "lengths must"),
        ({"lengths": (4, 4)}, "lengths must"),
        ({"depths": 0}, "depths must"),
        ({"threshold": 95.0}, "threshold.*not 95.0"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_refuses_nonsense(options, message):
    with pytest.raises(ConfigError, match=message):
        CapacitySettings(**options)
    with pytest.raises(ConfigError, match="20"):
        measured(PasskeyReader(), lengths=(20,))


def test_command(tmp_path: Path, capsys):
    save_pretrained(tiny_model(), tmp_path / "model")
    options = ["--lengths", "160,192", "--depths", "1", "--num-samples", "2", "--tokenizer", "bytes"]
    out = tmp_path / "out"
    assert main(["eval", "capacity", "--model", str(tmp_path / "model"), "--out", str(out), *options]) == 0
    assert "capacity: below 160 tokens" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((out / "capacity.json").read_text())
    assert [r["length"] for r in summary["ladder"]] == [160, 192]
    assert summary["capacity"]["tokens"] is None
    assert len((out / "capacity.jsonl").read_text().splitlines()) == 4
    assert (out / "capacity.png").read_bytes()[:4] == b"\x89PNG"


# -- laws over several models -----------------------------------------------------------------------------------------


def collapse_of(
    directory: Path, size: int, train_length: int, collapsed: bool, *, heads=0, mitigation=None, family="gla", **changes
):
    directory.mkdir(parents=True)
    model = {"directory": str(directory), "model_type": family, "state_numbers": size, "mitigation": mitigation}
    chosen = {"train_length": train_length, "length": 8 * train_length, "prompts": ["newlines", "text"]}
    chosen |= {"loss_rise": 0.5, "variance_factor": 4.0, "sustained": 0.9, **changes}
    values = {"version": 2, "suite": "collapse", "model": model, "settings": chosen}
    values["verdict"] = {"collapsed": collapsed, "heads_collapsed": heads, "heads": 8}
    (directory / "collapse.json").write_text(json.dumps(values))


def capacity_result(directory: Path, size: int, tokens: int | None, *, at_least=False, family="gla", threshold=0.95):
    directory.mkdir(parents=True)
    model = {"directory": str(directory), "model_type": family, "state_numbers": size, "mitigation": None}
    values = {"version": 2, "suite": "capacity", "model": model, "capacity": {"tokens": tokens, "at_least": at_least}}
    values["settings"] = {"threshold": threshold, "haystack": None}
    (directory / "capacity.json").write_text(json.dumps(values))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Sizes of 1, 2, 3, 4 M numbers that need 2, 4, 6, 8 K tokens, and two that only bound their threshold."""
    for size in (1, 2, 3, 4):
        for thousands in (1, 2, 4, 6, 8, 10):
            where = tmp_path / "results" / f"{size}-{thousands}"
            collapse_of(where, size * 10**6, thousands * 1024, thousands < 2 * size)
        capacity_result(tmp_path / "results" / f"c{size}", size * 10**6, 1024 * 2**size)
    collapse_of(tmp_path / "results" / "small", 10**5, 1024, False)
    collapse_of(tmp_path / "results" / "large", 10**7, 4096, True)
    collapse_of(tmp_path / "results" / "helped", 10**7, 8192, False, mitigation="forget-more:decay=0.0001,insert=0.75")
    capacity_result(tmp_path / "results" / "open", 5 * 10**6, 4096, at_least=True)
    capacity_result(tmp_path / "results" / "none", 6 * 10**6, None)
    return tmp_path / "results"


def test_both_laws_from_results(results: Path):
    laws = fit_laws(find_results([results]))
    assert laws.forget.parameters == pytest.approx((2.0, 0.0), abs=1e-9)
    a, _, c = laws.recall.parameters
    assert (a, laws.recall.base, c) == pytest.approx((1.0, 2.0, 1.0), rel=1e-4)
    by_size = {point.state_numbers: point for point in laws.forget_points}
    assert (by_size[3 * 10**6].tokens, by_size[3 * 10**6].low) == (6144, 4096)
    assert by_size[10**5].why == "at most 1,024 tokens: no training length collapses"
    assert by_size[10**7].why == "above 4,096 tokens: the longest training length collapses too"
    unused = {point.state_numbers: (point.why, point.low) for point in laws.recall_points if not point.used}
    assert unused == {
        5 * 10**6: ("at least 4,096 tokens: the longest length asked passes", 4096),
        6 * 10**6: ("no length passes", None),
    }


def test_seeds_vote_and_heads_may_judge(tmp_path: Path):
    for seed, (collapsed, heads) in enumerate([(True, 3), (False, 0), (False, 0)]):
        collapse_of(tmp_path / f"short{seed}", 10**6, 1024, collapsed, heads=heads)
        collapse_of(tmp_path / f"long{seed}", 10**6, 2048, False, heads=1)
    found = find_results([tmp_path])
    (point,) = forget_points(found)
    assert (point.used, point.why) == (False, "at most 1,024 tokens: no training length collapses")
    (point,) = forget_points(found, "heads")
    assert point.why == "above 2,048 tokens: the longest training length collapses too"
    assert recall_points(found) == []


def test_command_writes_a_law_that_plan_reads(results: Path, tmp_path: Path, capsys):
    from statex_dist.state.laws import read_forget_law

    out = tmp_path / "laws"
    assert main(["eval", "laws", str(results), "--out", str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "forget: T = (2 +-" in text
    assert "R^2 1.0000" in text
    assert "b = e^(0.693" in text
    assert read_forget_law(out).tokens(5 * 10**6) == pytest.approx(10 * 1024)
    assert read_forget_law(out).model_type == "gla"
    written = json.loads((out / "laws.json").read_text())
    assert written["model_type"] == "gla"
    assert written["criteria"] == {
        "collapse": {
            **{"loss_rise": 0.5, "sustained": 0.9, "prompts": ["newlines", "text"]},
            "length / train_length": 8.0,
        },
        "capacity": {"threshold": 0.95, "haystack": None},
    }
    assert (out / "laws.png").read_bytes()[:4] == b"\x89PNG"
    assert len((out / "laws.jsonl").read_text().splitlines()) == 6 + 6
    assert main(["eval", "laws", str(results), "--out", str(out)]) == 2
    assert "not empty; pass --overwrite" in capsys.readouterr().err


def test_small_models_have_laws_too(tmp_path: Path, capsys):
    """Sizes in the thousands: the base of the exponential law is beyond a float."""
    for number, (size, tokens) in enumerate([(6000, 100), (7000, 110), (8000, 160), (9000, 400), (10000, 1700)]):
        capacity_result(tmp_path / "r" / str(number), size, tokens)
    assert main(["eval", "laws", str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 0
    recall = json.loads((tmp_path / "out" / "laws.json").read_text())["recall"]
    assert recall["b"] is None
    assert recall["r_squared"] > 0.999
    assert f"b = e^({recall['parameters']['rate']:.4g} +-" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "judge", "message"),
    [
        (
            {"family": "mamba2"},
            "model",
            r'model_type: "gla" \(.*a.collapse.json\), "mamba2" \(.*b.collapse.json\); a law',
        ),
        (
            {"loss_rise": 1.0},
            "model",
            r"loss_rise: 0.5 \(.*a.coll.*\), 1.0 \(.*b.coll.*\)",
        ),
        ({"variance_factor": 8.0}, "heads", "variance_factor: 4.0 .* 8.0"),
        ({"length": 4096}, "model", "length / train_length: 8.0 .* 2.0"),
        ({"prompts": ["text"]}, "model", r'prompts: \["newlines", "text"\] .* \["text"\]'),
        ({"variance_factor": 8.0}, "model", None),
        ({"loss_rise": 1.0}, "heads", None),
    ],
)
def test_a_mixture_is_refused(tmp_path: Path, changes, judge, message):
    collapse_of(tmp_path / "a", 10**6, 1024, True)
    collapse_of(tmp_path / "b", 10**6, 2048, False, **changes)
    if message is None:
        fit_laws(find_results([tmp_path]), judge)
        return
    with pytest.raises(ConfigError, match=message):
        fit_laws(find_results([tmp_path]), judge)


def test_recall_of_two_families_or_thresholds_is_refused(tmp_path: Path):
    collapse_of(tmp_path / "a", 10**6, 1024, True)
    capacity_result(tmp_path / "b", 10**6, 1024, family="mamba2")
    with pytest.raises(ConfigError, match="model_type"):
        fit_laws(find_results([tmp_path]))
    capacity_result(tmp_path / "c", 10**6, 1024, threshold=0.9)
    with pytest.raises(ConfigError, match="threshold"):
        fit_laws(find_results([tmp_path]))


@pytest.mark.parametrize(
    ("suite", "name", "value", "message"),
    [
        ("collapse", "verdict", None, "collapse.json.*`statex eval collapse`.*verdict.col"),
        ("collapse", "verdict.heads_collapsed", None, "verdict.heads_collapsed"),
        ("collapse", "settings.train_length", "64", "settings.train_length.*'64'"),
        ("collapse", "settings.train_length", 0, "settings.train_length is below 1"),
        ("collapse", "model.state_numbers", True, "model.state_numbers is True"),
        ("collapse", "model.model_type", None, "it has no model.model_type"),
        ("capacity", "capacity.tokens", None, "it has no capacity.tokens"),
        ("capacity", "capacity.tokens", 3.5, "capacity.tokens is 3.5"),
        ("capacity", "settings", None, "it has no settings.threshold"),
    ],
)
def test_damaged_results_are_named_with_their_key(tmp_path: Path, suite, name, value, message):
    if suite == "collapse":
        collapse_of(tmp_path / "a", 10**6, 1024, True)
    else:
        capacity_result(tmp_path / "a", 10**6, 1024)
    file = tmp_path / "a" / f"{suite}.json"
    values = json.loads(file.read_text())
    *sections, key = name.split(".")
    holder = values[sections[0]] if sections else values
    if value is None:
        del holder[key]
    else:
        holder[key] = value
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        find_results([tmp_path])


def test_too_few_results_are_said(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("statex_dist.evaluation.health.laws.plot_laws", lambda laws: b"")
    collapse_of(tmp_path / "r" / "a", 10**6, 1024, True)
    collapse_of(tmp_path / "r" / "b", 10**6, 2048, False)
    assert main(["eval", "laws", str(tmp_path / "r"), "--out", str(tmp_path / "out")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "forget: not fitted: 1 different state sizes are too few: the linear law has 2 parameters and needs 3" in text
    )
    assert "recall: not fitted: 0 different state sizes are too few" in text
    with pytest.raises(ConfigError, match="directory"):
        find_results([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"collapse.json.*capacity.json"):
        find_results([tmp_path / "empty"])
    (tmp_path / "r" / "a" / "collapse.json").write_text('{"suite": "collapse", "version": 1}')
    with pytest.raises(DataError, match=r"`statex.*collapse`"):
        find_results([tmp_path / "r"])
    assert main(["eval", "laws", str(tmp_path / "r"), "--out", str(tmp_path / "out2"), "--judge", "me"]) == 2
    assert "--judge 'me'" in capsys.readouterr().err

"""The experiments' arithmetic and configurations; a whole tiny one of each kind runs in ``make test-all``."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import collapse_experiment, recall_experiment, text_experiment
from benchmarks.experiment_lab import Experiment, Lab, merged
from benchmarks.experiment_stats import interval
from checkpoints_tools.plan.options import PlanOptions, plan_model
from statex_dist.config import parse_config
from statex_dist.errors import ConfigError
from statex_dist.models.registry import config_from_dict
from statex_dist.run_config import RunConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))


def test_an_interval_covers_documents_and_seeds():
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(1, 400))
    found = interval(np.repeat(documents, 3, axis=0))
    assert found["mean"] == pytest.approx(documents.mean())
    # Three seeds that are alike say nothing new of the documents: the error of a mean of 400, times 1.96 on each side.
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.1)
    apart = interval(np.array([[0.0] * 400, [1.0] * 400]))
    assert (apart["low"], apart["high"]) == (0, 1), "two seeds that differ say that the next may be either"


def test_weights_count():
    found = interval(np.array([[1.0, 3.0]]), np.array([[3.0, 1.0]]))
    assert found["mean"] == 1.5
    assert (found["low"], found["high"]) == (1, 3)


def test_spans_end_with_the_text():
    assert collapse_experiment.spans(256, 1600) == [(128, 256), (256, 512), (512, 1024), (1024, 1600)]


def record(recall: list[float], losses: list[float]) -> dict:
    return {"state_numbers": 8, "parameters": 9, "recall": {"4": recall}, "text": [[10, 10 * x] for x in losses]}


def test_an_arm_is_compared_on_the_same_documents():
    base = [record([0.2, 0.4], [1.0, 3.0]), record([0.3, 0.5], [1.1, 3.1])]
    better = [record([0.5, 0.7], [1.1, 3.1]), record([0.6, 0.8], [1.2, 3.2])]
    found = recall_experiment.summarise(better, base)
    ahead = found["recall"]["4"]["ahead"]
    # Documents and seeds differ widely, but the arms differ by the same everywhere.
    assert all(value == pytest.approx(0.3) for value in ahead.values())
    assert all(value == pytest.approx(np.expm1(0.1)) for value in found["perplexity_change"].values())
    accuracy = found["recall"]["4"]["accuracy"]
    assert accuracy["high"] - accuracy["low"] > 0.1


def test_a_collapse_is_the_loss_and_the_variance_past_the_training_length():
    # Two documents of 8 segments of 64 tokens; trained at 128, so segments 0 and 1 lie within.
    base = {
        "state_numbers": 5,
        "loss": [[1, 1, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3, 4, 4, 4, 4]],
        "variance": [[[1, 2]]] * 8,
    }
    grown = [[[1.0, 2.0]], [[1.0, 4.0]], *[[[1.0, 4.0]]] * 5, [[9.0, 4.0]]]
    better = {"state_numbers": 5, "loss": (np.array(base["loss"]) - 0.5).tolist(), "variance": grown}
    found = collapse_experiment.summarise([better], [base], 128)
    assert {name: value["mean"] for name, value in found["loss"].items()} == {
        "64..128": 1.5,
        "128..256": 1.5,
        "256..512": 2.5,
    }
    assert found["change"] == {"mean": -0.5, "low": -0.5, "high": -0.5}
    assert found["variance_growth"] == [9.0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_make_models_plans_and_runs(path: Path, tmp_path: Path):
    kind = text_experiment.TextExperiment if path.stem.startswith("text") else Experiment
    experiment = parse_config(kind, ["--config", str(path)], prog="experiment")
    model = config_from_dict(experiment.model)
    assert not model.extra
    for arm in experiment.arms.values():
        if arm.expand is not None:
            options = {name: str(value) for name, value in arm.expand.items()}
            assert plan_model(model, PlanOptions(**options)).state_elements > model.state_elements
        if arm.model is not None:
            assert config_from_dict(merged(experiment.model, arm.model)).state_elements > model.state_elements
    for name, run in [(s.corpus, s.run) for s in (*experiment.pretrain, experiment.posttrain)]:
        file = tmp_path / f"{name}.yaml"
        values = {
            "run_dir": "run",
            "model": {"config": experiment.model},
            "engine": {"name": "plain", "precision": "fp32"},
        }
        values |= run
        values["data"] = {"path": "data", **run["data"]}
        file.write_text(yaml.safe_dump(values))
        parse_config(RunConfig, ["--config", str(file)], prog="train.py")


def test_what_an_experiment_lacks_is_named(tmp_path: Path):
    values = yaml.safe_load(CONFIGS[0].read_text())
    for key, value, message in (
        ("posttrain", {"corpus": "none", "run": {}}, "corpus 'none'.*short, middle, long, held_out"),
        ("seeds", [], "pretrain, arms.*seeds"),
        ("arms", {"a": {"mitigation": "magic"}}, "mitigation 'magic'"),
        ("arms", {"a": {"expand": {"layer": 1}}}, "arm a: expand.layer"),
        ("arms", {"a": {"like": "b"}, "b": {}}, "arm a.*'b'"),
        ("arms", {"a": {"model": {"key_size": 8}}}, "arm a: model.key_size"),
        ("arms", {"a": {"model": {"expand_k": 1.0}, "mlp_channels": 8}}, "mlp_channels and model"),
    ):
        file = tmp_path / "bad.yaml"
        file.write_text(yaml.safe_dump({**values, key: value}, sort_keys=False))
        with pytest.raises(ConfigError, match=message):
            parse_config(Experiment, ["--config", str(file)], prog="experiment")


def test_no_text_is_in_two_corpora(tmp_path: Path):
    experiment = parse_config(Experiment, ["--config", str(CONFIGS[0]), "--out", str(tmp_path)], prog="experiment")
    lab = Lab(experiment, lambda model, arm: {})
    pieces = {name: lab._pieces(name) for name in experiment.corpora}
    own = {name: found for name, found in pieces.items() if experiment.corpora[name].same_text_as is None}
    assert {name: len(found) for name, found in own.items()} == {"long": 420, "held_out": 24}
    together = [piece for found in own.values() for piece in found]
    assert len(set(together)) == len(together)
    assert "".join(pieces["short"]) == "".join(pieces["long"]), "the same text, cut"
    assert {len(piece) for piece in pieces["short"]} == {127, 8192 % 127}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "config_name"),
    [(recall_experiment, "recall_mamba2"), (collapse_experiment, "collapse_mamba2"), (text_experiment, "text_gla")],
    ids=["recall", "collapse", "text"],
)
def test_a_whole_experiment_goes_on_where_it_was_and_writes_its_table(tmp_path: Path, script, config_name, capsys):
    name = config_name.partition("_")[0]
    path = next(path for path in CONFIGS if path.stem == config_name)
    values = yaml.safe_load(path.read_text())
    values |= {"out": str(tmp_path / "out"), "seeds": [0, 1]}
    if script is text_experiment:
        values["text"] = str(Path(__file__).parents[2] / "docs")
        values["settings"]["documents"] = 4
        for corpus in values["corpora"].values():
            corpus["recall_pieces"] = 2
    for stage in (*values["pretrain"], values["posttrain"]):
        stage["run"]["train"] = {"num_steps": 2}
        stage["run"]["schedule"] = {"name": "constant"}
        stage["run"]["data"] |= {"seq_len": 256, "packs_per_step": 1}
    values["pretrain"] = values["pretrain"][:1]
    for corpus in values["corpora"].values():
        corpus["recall_tokens"] = min(corpus.get("recall_tokens", 0), 4000)
        corpus["text_pieces"] = min(corpus.get("text_pieces", 0), 6)
    wanted = {
        "recall": ("lpt", "lossless", "from nothing, state of that size"),
        "collapse": ("short", "state passing", "sliding window"),
        "text": ("lpt", "lossless, keys grown"),
    }[name]
    values["arms"] = {key: arm for key, arm in values["arms"].items() if key in wanted}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    assert script.main(["--config", str(config), "--seeds", "[0]"]) == 0
    kept = tmp_path / "out" / "seed0" / wanted[0] / "result.json"
    before = kept.stat().st_mtime_ns
    assert script.main(["--config", str(config)]) == 0
    assert kept.stat().st_mtime_ns == before, "what is finished is not run again"
    values["posttrain"]["run"]["optimizer"] = {"lr": 0.1}
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    assert script.main(["--config", str(config)]) == 2
    assert "another configuration" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["arms"]) == list(wanted)
    picture = "collapse.png" if name == "collapse" else "recall.png"
    assert (tmp_path / "out" / picture).stat().st_size > 10_000

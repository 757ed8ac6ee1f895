"""Model cards: they tell what is known, and nothing else."""

import json

import pytest
import torch
import yaml

from checkpoints_tools.export.card_training import training_facts
from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint.history import Span, history_text
from statex_dist.checkpoint.layout import HISTORY_NAME
from statex_dist.errors import CheckpointError
from statex_dist.models.registry import config_from_dict
from tests.checkpoints_tools.builders import GLA, MAMBA2, load_all, random_tensors, run_expand, write_model
from tests.checkpoints_tools.exports import export
from tests.checkpoints_tools.reshard.test_reshard import write_run


def card(directory):
    text = (directory / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_plan_numbers_and_base_of_an_expanded_model(tmp_path):
    write_model(tmp_path / "gla-base", GLA)
    run_expand(tmp_path / "gla-base", tmp_path / "x", layers="0,2", factor=2, init="lossless")
    reshard(tmp_path / "x", tmp_path / "gla-x")
    header, body = card(tmp_path / "gla-x")
    assert header == {
        **{"library_name": "transformers", "pipeline_tag": "text-generation"},
        "tags": ["statex", "gla", "recurrent", "state-expansion"],
    }
    assert f"Base model: `{tmp_path.name}/gla-base`." in body
    assert "| 2 | mix_heads | x2 | lossless | 128 | 256 |" in body
    config = config_from_dict(json.loads((tmp_path / "gla-x/config.json").read_text()))
    size = sum(config.layer_geometry(layer).state_bytes for layer in range(3))
    assert f"| bytes of state per sequence (fp32, convolutions included) | {size:,} |" in body
    assert "| state elements before | 384 |" in body
    assert "from_pretrained(directory, trust_remote_code=True)" in body
    assert "## Training" not in body
    assert "## Evaluation" not in body
    assert str(tmp_path) not in body


def test_a_model_as_it_is_has_no_plan_and_no_base(tmp_path):
    write_model(tmp_path / "source", MAMBA2)
    reshard(tmp_path / "source", tmp_path / "m")
    header, body = card(tmp_path / "m")
    assert header["tags"] == ["statex", "mamba2", "recurrent"]
    assert "Base model" not in body
    assert "## Expansion" not in body
    assert "AutoModelForCausalLM.from_pretrained(directory)" in body
    assert "transformers' own class opens it" in body


def test_a_model_of_mixed_kind_says_that_it_does_not_open(tmp_path):
    write_model(tmp_path / "source", {**GLA, "attn": {"layers": [1], "num_heads": 4}})
    run_expand(tmp_path / "source", tmp_path / "source-x", layers="0", factor=2)
    for name, who in (("source", "transformers has no class for this gla model"), ("source-x", "no library opens")):
        summary = reshard(tmp_path / name, tmp_path / f"{name}-hf")
        assert summary.notes[0].startswith(who)
        assert "we write no code for mixed models: layers [1] are softmax attention" in summary.notes[0]
        assert not (tmp_path / f"{name}-hf/modeling_statex.py").exists()
        header, body = card(tmp_path / f"{name}-hf")
        assert "library_name" not in header
        assert summary.notes[0][1:] in body
        assert "statex generate" in body
        assert "keys and values per token" in body
        assert "```" not in body
        values = json.loads((tmp_path / f"{name}-hf/config.json").read_text())
        assert values["model_type"] == ("statex_gla" if name == "source-x" else "gla")


@pytest.mark.parametrize("name", ["gla-merged", "gla-mixed", "mamba2-even", "kda-features", "state_spaces-grown"])
def test_figures_are_those_of_the_files(tmp_path, name):
    ours, directory, _ = export(name, tmp_path, dtype=torch.float32)
    reshard(directory, tmp_path / "bf16", dtype="bf16")
    states = ours(torch.zeros(1, 1, dtype=torch.int64), output_states=True).states
    for place, dtype in ((directory, "float32"), (tmp_path / "bf16", "bfloat16")):
        tensors = load_all(place)
        _, body = card(place)
        assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
        assert json.loads((place / "config.json").read_text())["torch_dtype"] == dtype
        assert f"| stored in | {dtype} |" in body
        assert f"| parameters | {sum(tensor.numel() for tensor in tensors.values()):,} |" in body
        assert f"| state elements | {sum(state[0].numel() for state in states):,} |" in body
        told = [line for line in body.splitlines() if line.startswith("Features in layers ")]
        assert [line.split(":")[0][-1] for line in told] == (["0", "1"] if "features" in name else [])
        for line, words in zip(
            told, ("r` = 1, 0 (squares), are", "relu(x)` and rolls `r` = 1, scaled to"), strict=False
        ):
            assert words in line
            assert "`feature_gain`" in line


def test_every_dtype_is_named(tmp_path):
    tensors = random_tensors(GLA)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    write_model(tmp_path / "source", GLA, tensors)
    reshard(tmp_path / "source", tmp_path / "out")
    assert "| stored in | float32, bfloat16 |" in card(tmp_path / "out")[1]


def test_training_is_told_by_the_run(tmp_path):
    write_run(tmp_path / "run", {**GLA, "train_length": 4096}, 2)
    reshard(tmp_path / "run", tmp_path / "bare")
    _, body = card(tmp_path / "bare")
    assert "| longest text in training (tokens) | 4,096 |" in body
    assert "optimizer steps" not in body
    settings = {"model": {"path": "/data/gla-x"}, "optimizer": {"lr": 0.001}, "data": {"seq_len": 65536}, "seed": 3}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
    records = [{"step": step, "tokens": 1000, "loss": 2.0 + step} for step in (1, 2, 3)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4, "to')
    summary = reshard(tmp_path / "run", tmp_path / "told")
    _, body = card(tmp_path / "told")
    assert "Base model: `data/gla-x`." in body
    for row in (
        "| optimizer steps | 1 |",
        "| tokens, padding included | 1,000 |",
        "| training loss of the last step (nats per token) | 3.0000 |",
        "| tokens of a packed sequence | 65,536 |",
        "| peak learning rate (AdamW) | 0.001 |",
        "| seed | 3 |",
    ):
        assert row in body
    assert "weight decay" not in body
    assert summary.kind == "zero3"
    reshard(tmp_path / "told", tmp_path / "again", dtype="bf16")
    _, again = card(tmp_path / "again")
    training = body[body.index("## Training") : body.index("## Use")]
    assert training in again
    assert "Base model: `data/gla-x`." in again
    assert "| stored in | bfloat16 |" in again


@pytest.mark.parametrize(
    ("path", "place"),
    [("/lab/a/checkpoints/global_step3/model", "a/global_step3"), ("./b", "b"), ("../x/model", "x"), ("model", None)],
)
def test_the_base_is_told_by_the_names_that_tell_it_from_others(tmp_path, path, place):
    write_run(tmp_path / "run", GLA, 2)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"model": {"path": path}}))
    reshard(tmp_path / "run", tmp_path / "out")
    _, body = card(tmp_path / "out")
    assert (f"Base model: `{place}`." in body) if place else ("Base model" not in body)


def test_missing_steps_give_no_count_of_tokens(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    told = dict(training_facts(tmp_path, tmp_path, 2))
    assert set(told) == {"seed", "these settings"}
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "tokens": 1000, "loss": null}\n')
    told = dict(training_facts(tmp_path, tmp_path, 2))
    assert set(told) == {"seed", "these settings"}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 20}\n{"step": 2, "tokens": 30, "loss": 1}\n')
    told = dict(training_facts(tmp_path, tmp_path, 2))
    assert told["tokens, padding included"] == "50"
    assert told["training loss of the last step (nats per token)"] == "1.0000"


def test_a_curriculum_is_told_with_its_stages(tmp_path):
    stages = [{"from_step": 20, "seq_len": 256, "weights": None}, {"from_step": 30, "weights": {"a": 3.0}}]
    first = Span(first_step=1, last_step=9, settings={"data": {"seq_len": 128, "curriculum": []}})
    (tmp_path / HISTORY_NAME).write_text(history_text([first]))
    assert dict(training_facts(tmp_path, None, 9)) == {"tokens of a packed sequence": "128"}
    then = Span(first_step=10, last_step=40, settings={"data": {"seq_len": 128, "curriculum": stages}})
    (tmp_path / HISTORY_NAME).write_text(history_text([first, then]))
    assert dict(training_facts(tmp_path, None, 40)) == {
        "tokens of a packed sequence": "128",
        "curriculum": "not set (steps 1 to 9), after step 20: seq_len 256; after step 30: weights {'a': 3.0} "
        "(steps 10 to 40)",
    }


def test_damaged_files_of_a_run_are_named(tmp_path):
    write_run(tmp_path / "run", GLA, 2)
    for content, words in (("a: [", r"config\.yaml cannot be read"), ("- 1\n", "run's configuration")):
        (tmp_path / "run/config.yaml").write_text(content)
        with pytest.raises(CheckpointError, match=words):
            reshard(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run/config.yaml").write_text("seed: 1\n")
    (tmp_path / "run/metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1 is damaged"):
        reshard(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_evaluation_is_told_suite_by_suite(tmp_path):
    write_model(tmp_path / "source", GLA)
    results = tmp_path / "results"
    results.mkdir()
    common = {"version": 2, "model": {"state_numbers": 384}}
    estimate = {"accuracy": 0.5, "low": 0.25, "high": 0.75, "samples": 8}
    summaries = {
        "mqar": {"by_num_pairs": {"4": estimate}},
        "recall": {"tasks": {"passkey": {"overall": {**estimate, "low": None}, "by_length": {"2048": estimate}}}},
        "icl": {"by_shots": {"8": estimate}, "chance": 0.125},
        "perplexity": {
            **{"data": "/somewhere/books", "perplexity": 12.5, "loss": 2.5, "loss_low": 2.0, "loss_high": 3.0},
            **{"bits_per_byte": None, "tokens": 1000},
        },
        "collapse": {"verdict": {"collapsed": True, "position": 9000, "heads_collapsed": 1, "heads": 6}},
        "capacity": {"capacity": {"tokens": 4096, "at_least": True}, "settings": {"threshold": 0.9}},
        "lm-eval": {
            "figures": [
                {"task": "piqa", "metric": "acc", "filter": "none", "value": None, "low": None, "high": None},
                {"task": "gsm8k", "metric": "em", "filter": "strict", "value": 0.25, "low": 0.2, "high": 0.3},
            ]
        },
    }
    for suite, summary in summaries.items():
        (results / f"{suite}.json").write_text(json.dumps(common | summary))
    reshard(tmp_path / "source", tmp_path / "out", evaluations=[str(results)])
    _, body = card(tmp_path / "out")
    for line in (
        "### perplexity on `books`",
        "| perplexity | 12.500 |",
        "| loss (nats per token) | 2.500 (2.000 .. 3.000) |",
        "| target tokens | 1,000 |",
        "| accuracy, 4 pairs | 0.500 (0.250 .. 0.750) |",
        "| passkey: accuracy, all lengths | 0.500 |",
        "| passkey: accuracy, 2,048 tokens | 0.500 (0.250 .. 0.750) |",
        "| accuracy by chance | 0.125 |",
        "| state collapse | at 9,000 tokens |",
        "| heads that collapse | 1 of 6 |",
        "| tokens with 90% recall of a passkey | at least 4,096 |",
        "| piqa: acc | not finite |",
        "| gsm8k: em (strict) | 0.250 (0.200 .. 0.300) |",
    ):
        assert line in body.splitlines()
    assert "bits per byte" not in body


def test_a_card_that_came_with_the_source_keeps_header_and_text(tmp_path):
    write_model(tmp_path / "source", {**GLA, "_name_or_path": "some-lab/gla-tiny"})
    (tmp_path / "source/README.md").write_text("---\nlicense: mit\ntags: [fla]\n---\n# GLA\n\nTrained on\n--- books.\n")
    reshard(tmp_path / "source", tmp_path / "once")
    reshard(tmp_path / "once", tmp_path / "twice")
    for name in ("once", "twice"):
        header, body = card(tmp_path / name)
        assert (header["license"], header["base_model"]) == ("mit", "some-lab/gla-tiny")
        assert sorted(header["tags"]) == ["fla", "gla", "recurrent", "statex"]
        assert body.count("## Original model card\n\n# GLA\n\nTrained on\n--- books.") == 1
    (tmp_path / "source/README.md").write_text("---\na: [\n---\nno header\n")
    reshard(tmp_path / "source", tmp_path / "third")
    assert "## Original model card\n\n---\na: [\n---\nno header" in card(tmp_path / "third")[1]

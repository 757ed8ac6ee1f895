import json

import pytest
from jsonargparse import ArgumentParser

from launch.cmd_eval import add_arguments, run
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import StateXError
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import tiny_model

QUICK = ["--num-pairs", "4,8", "--num-samples", "3", "--lengths", "256", "--depths", "2"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_pretrained(tiny_model(), directory)
    BytesTokenizer().save(directory)
    return str(directory)


def evaluate(*arguments):
    parser = ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def test_recall_prints_a_table_and_writes_its_files(model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate("recall", "--model", model_dir, "--out", out, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "8 pairs" in printed
    assert "256 tokens" in printed
    assert {path.name for path in out.iterdir()} == {
        "recall.json",
        "recall.jsonl",
        "recall_mqar.png",
        "recall_needle.png",
    }
    summary = json.loads((out / "recall.json").read_text())
    assert summary["model"]["directory"] == model_dir
    assert summary["model"]["state_numbers"] == 2 * 2 * 4 * 8
    assert summary["settings"]["mqar_samples"] == summary["settings"]["needle_samples"] == 3


def test_json_goes_to_standard_output_alone_and_results_are_not_replaced_unasked(model_dir, tmp_path, capsys):
    arguments = ["recall", "--model", model_dir, "--out", tmp_path, "--json", "--tasks", "mqar", *QUICK]
    assert evaluate(*arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "recall.json").read_text())
    assert list(printed["tasks"]) == ["mqar"]
    with pytest.raises(StateXError, match="is not empty; pass --overwrite"):
        evaluate(*arguments)
    assert evaluate(*arguments, "--overwrite") == 0


def test_perplexity_of_text_files(model_dir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words " * 50)
    arguments = ["--data", text, "--max-tokens", "300", "--segment-length", "64"]
    assert evaluate("perplexity", "--model", model_dir, "--out", tmp_path / "out", *arguments) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "perplexity.json").read_text())["tokens"] == 299


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poetry"], "suite 'poetry' is unknown; suites: recall, perplexity"),
        (["perplexity"], "perplexity needs text; set --data"),
        (["perplexity", "--data", "nowhere"], "input nowhere does not exist"),
        (["recall", "--tasks", "mqar,poem"], "task 'poem' is unknown"),
        (["recall", "--num-pairs", "8,many"], "--num-pairs '8,many' is not understood"),
        (["recall", "--key-ids", "128"], "--key-ids '128' is not understood; allowed: FIRST:END"),
        (["recall", "--key-ids", "300:400"], "keys 300:400 do not fit the model's vocabulary of 258"),
        (["recall", "--device", "abacus"], "--device 'abacus' is not a device"),
        (["recall", "--device", "cuda:99"], "--device 'cuda:99': this machine has"),
        (["recall", "--threads", "0"], "--threads must be 1 or more, not 0"),
        (["recall", "--tokenizer", "nowhere"], "tokenizer 'nowhere': no such directory"),
    ],
)
def test_wrong_usage_is_one_clear_line(model_dir, tmp_path, arguments, message):
    with pytest.raises(StateXError, match=message) as caught:
        evaluate(*arguments, "--model", model_dir, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "recall.json").exists()


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(StateXError, match=r"holds no config.json"):
        evaluate("recall", "--model", tmp_path, "--out", tmp_path / "out", "--tasks", "mqar")

"""``statex eval`` as its user meets it: files and tables, wrong usage, interrupted and shared evaluations."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time

import pytest

from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.suites.base import parse_numbers
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import tiny_model

MQAR = ["--num-pairs", "4,8", "--num-samples", "3"]
RECALL = ["--tasks", "passkey,niah_single_1", "--lengths", "700", "--depths", "2", "--num-samples", "2"]
RECALL += ["--max-new-tokens", "2", "--batch-size", "1"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_pretrained(tiny_model(), directory)
    BytesTokenizer().save(directory)
    return str(directory)


def evaluate(suite, *arguments):
    return main(["eval", suite, *map(str, arguments)])


@pytest.fixture(scope="module")
def undisturbed(model_dir, tmp_path_factory):
    """Results of recall, done by one process in one go."""
    directory = tmp_path_factory.mktemp("whole")
    assert evaluate("recall", "--model", model_dir, "--out", directory, *RECALL) == 0
    return directory


def refused(capsys, suite, *arguments):
    """Run a command that must be refused as wrong usage and return its one line."""
    assert evaluate(suite, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def results(directory, suite="recall"):
    """Everything that an evaluation wrote, but for how long it took."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    summary = json.loads(files.pop(f"{suite}.json"))
    del summary["timing"]
    return files, summary


def test_json_goes_to_standard_output_alone_and_results_are_not_replaced_unasked(model_dir, tmp_path, capsys):
    arguments = ["--model", model_dir, "--out", tmp_path, "--json", *MQAR]
    assert evaluate("mqar", *arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "mqar.json").read_text())
    assert list(printed["by_num_pairs"]) == ["4", "8"]
    assert "mqar; pass --overwrite" in refused(capsys, "mqar", *arguments)
    assert evaluate("mqar", *arguments, "--overwrite") == 0


def test_perplexity_of_text_files_whole_and_packed(model_dir, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words " * 50)
    arguments = ["--model", model_dir, "--data", text, "--max-tokens", "300", "--segment-length", "64"]
    assert evaluate("perplexity", *arguments, "--out", tmp_path / "whole") == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert "(1 sample over documents)" in printed
    assert "(1 sample, 63 tokens)" in printed
    assert json.loads((tmp_path / "whole" / "perplexity.json").read_text())["tokens"] == 299
    assert evaluate("perplexity", *arguments, "--out", tmp_path / "packed", "--packed-length", "100") == 0
    assert "297 in 3 packed sequences" in capsys.readouterr().out


def test_icl_of_the_made_up_task(model_dir, tmp_path, capsys):
    options = ["--shots", "1,2", "--num-trials", "2", "--num-queries", "2", "--permute-labels"]
    assert evaluate("icl", "--model", model_dir, "--out", tmp_path / "out", *options) == 0
    assert "0.250" in capsys.readouterr().out  # chance
    assert json.loads((tmp_path / "out" / "icl.json").read_text())["by_shots"]["2"]["queries"] == 4


def children(function, count=1, **environment):
    """Start processes that already have everything imported."""
    processes = []
    for rank in range(count):

        def run(rank=rank):
            os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            raise SystemExit(function())

        processes.append(multiprocessing.get_context("fork").Process(target=run, daemon=True))
        processes[-1].start()
    return processes


def test_an_evaluation_that_was_killed_goes_on_with_the_same_command(model_dir, undisturbed, tmp_path, capsys):
    cut, arguments = tmp_path / "cut", ["--model", model_dir, *RECALL]
    (process,) = children(lambda: evaluate("recall", *arguments, "--out", cut))
    part, deadline = cut / "recall.unfinished" / "part-0.jsonl", time.monotonic() + 60
    while not (part.is_file() and part.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    done = part.read_bytes().count(b"\n")
    assert 2 <= done < 8
    assert not (cut / "recall.json").exists()
    capsys.readouterr()
    assert evaluate("recall", *arguments, "--out", cut) == 0
    printed, said = capsys.readouterr()
    assert f"recall: {done} units" in said
    assert "niah_single_1" in printed
    assert f"results: {cut}" in printed
    assert results(cut) == results(undisturbed)
    names = {"recall.json", "recall.jsonl", "recall_passkey.png", "recall_niah_single_1.png"}
    assert {path.name for path in cut.iterdir()} == names
    facts = json.loads((cut / "recall.json").read_text())["model"]
    assert facts["directory"] == model_dir
    assert facts["state_numbers"] == 2 * 2 * 4 * 8


@pytest.mark.distributed
def test_two_ranks_give_what_one_gives(model_dir, undisturbed, tmp_path):
    arguments = ["--model", model_dir, *RECALL]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = children(lambda: evaluate("recall", *arguments, "--out", tmp_path / "two"), 2, **launcher)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert results(tmp_path / "two") == results(undisturbed)
    assert json.loads((tmp_path / "two" / "recall.json").read_text())["timing"]["ranks"] == 2


@pytest.mark.distributed
def test_what_one_rank_cannot_do_ends_all(model_dir, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = ["--model", model_dir, *RECALL, "--out", tmp_path]
    processes = children(lambda: evaluate("recall", *command), 2, **launcher)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [2, 2], "the code of the rank that failed"
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: --out {tmp_path} exists and is not empty; pass --overwrite to replace its results"]


def test_an_unknown_suite_is_one_line_that_names_all(capsys):
    line = refused(capsys, "poetry")
    assert line.startswith("error: argument SUITE: invalid choice: 'poetry' (choose from 'recall', 'mqar', 'icl', ")
    assert "'perplexity'" in line


@pytest.mark.parametrize(
    ("suite", "arguments", "message"),
    [
        ("perplexity", [], "perplexity needs text; set --data"),
        ("perplexity", ["--data", "nowhere"], "input nowhere does not exist"),
        ("recall", ["--tasks", "passkey,poem"], "task 'poem' is unknown; tasks of recall: passkey, niah_single_1"),
        (
            "recall",
            ["--lengths", "4K,many"],
            "--lengths '4K,many' is not understood; allowed: whole numbers with commas",
        ),
        (
            "recall",
            ["--lengths", "128"],
            "length 128 leaves no room for a haystack; the prompt alone takes up to 146 tokens",
        ),
        ("recall", ["--num-pairs", "8"], "unrecognized arguments: --num-pairs 8"),
        ("icl", ["--data", "nowhere"], "examples nowhere cannot be read"),
        ("mqar", ["--key-ids", "128"], "--key-ids '128' is not understood; allowed: FIRST:END"),
        ("mqar", ["--key-ids", "300:400"], "keys 300:400 do not fit the model's vocabulary of 258"),
        ("mqar", ["--device", "abacus"], "--device 'abacus' is not a device"),
        ("mqar", ["--device", "cuda:99"], "--device 'cuda:99': this machine has"),
        ("mqar", ["--threads", "0"], "--threads must be from 1 to "),
        ("mqar", ["--batch-size", "0"], "batch_size must be 1 or more, not 0"),
        ("icl", ["--tokenizer", "nowhere"], "tokenizer 'nowhere': no such directory"),
        (
            "icl",
            ["--mitigation", "state-norm:limit=4,every=64"],
            "ends forward passes wherever a text ends, where state-norm:limit=4.0,every=64 would change the states: "
            "its results would depend on what is read together; allowed: state-norm with every=1, or another remedy",
        ),
    ],
)
def test_wrong_usage_is_one_clear_line(model_dir, tmp_path, capsys, suite, arguments, message):
    assert message in refused(capsys, suite, *arguments, "--model", model_dir, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_whole_or_of_another_tokenizer_are_refused(model_dir, tmp_path, capsys):
    out = ["--out", tmp_path / "out", *MQAR]
    assert "not a checkpoint" in refused(capsys, "mqar", "--model", tmp_path, *out)
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare)
    (bare / "model.safetensors").unlink()
    message = f"error: {bare} is not a checkpoint: looked for model.safetensors"
    assert refused(capsys, "mqar", "--model", bare, *out).startswith(message)
    small = tmp_path / "small"
    save_pretrained(tiny_model(vocab_size=200), small)
    line = refused(capsys, "icl", "--model", small, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert "tokenizer 'bytes' has ids up to 257, the model's embedding ends at 199; set --tokenizer" in line
    assert not (tmp_path / "out").exists()


def test_another_model_does_not_go_on_where_one_was(model_dir, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    other, out = tmp_path / "other", tmp_path / "out"
    save_pretrained(tiny_model(seed=1), other)
    BytesTokenizer().save(other)
    monkeypatch.setattr("statex_dist.evaluation.mqar.score_mqar", interrupted)
    assert evaluate("mqar", "--model", model_dir, "--out", out, *MQAR) == 130
    monkeypatch.undo()
    capsys.readouterr()
    line = refused(capsys, "mqar", "--model", other, "--out", out, *MQAR)
    assert "holds an unfinished evaluation with model.fingerprint" in line
    assert evaluate("mqar", "--model", model_dir, "--out", out, *MQAR) == 0


def test_numbers_with_a_unit():
    assert parse_numbers("512, 4K,256k,1M", "--lengths") == (512, 4096, 262144, 1048576)
    for wrong in ("K", "4KK", "1.5K"):
        with pytest.raises(ConfigError, match=f"--lengths '{wrong}'"):
            parse_numbers(wrong, "--lengths")

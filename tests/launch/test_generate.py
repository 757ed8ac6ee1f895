"""``statex generate`` on model directories, in this process; bad input is one line and exit code 2."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from checkpoints_tools.reshard.reshard import reshard
from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.inference.decoding import Sampling
from statex_dist.inference.generate import generate_continuations
from statex_dist.models.hf import from_pretrained
from tests.runs import GLA, MAMBA2, environment, expanded, save_model

PROMPTS = ["The river rose", "a", "Once upon a time there was"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, values in (("gla", GLA), ("mamba2", MAMBA2)):
        save_model(expanded({**values, "vocab_size": 258}), root / name)
        BytesTokenizer().save(root / name)
    return root


def generate(capsys, model, *arguments):
    code = main(["generate", "--model", str(model), "--threads", "1", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def wanted(model, prompts, sampling, seed=0):
    tokenizer = BytesTokenizer()
    found = generate_continuations(
        from_pretrained(model),
        [tokenizer.encode(prompt).tolist() for prompt in prompts],
        sampling,
        tokenizer=tokenizer,
        batch_size=1,
        seeds=[seed + i for i in range(len(prompts))],
    )
    return [text for _, text in sorted(found)]


@pytest.mark.parametrize("name", ["gla", "mamba2"])
def test_one_prompt_is_continued_on_standard_output(models, capsys, name):
    options = ["--max-new-tokens", 9, "--temperature", 1.5, "--top-k", 200, "--top-p", 0.95, "--seed", 3]
    # More segments than are read between two movements of the bar.
    prompt = PROMPTS[2] * 3
    code, out, _ = generate(capsys, models / name, "--prompt", prompt, "--segment-length", 2, *options)
    sampling = Sampling(max_tokens=9, temperature=1.5, top_k=200, top_p=0.95)
    assert (code, out) == (0, wanted(models / name, [prompt], sampling, seed=3)[0] + "\n")


def test_several_prompts_of_unequal_length_are_continued_together(models, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPTS[2] + "\n")  # the newline of editors is no part of it
    arguments = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--prompt-file", tmp_path / "prompt.txt"]
    texts = wanted(models / "gla", PROMPTS, Sampling(max_tokens=6))
    code, out, _ = generate(capsys, models / "gla", *arguments, "--max-new-tokens", 6)
    assert code == 0
    assert out == "".join(f"==> prompt {i} <==\n{text}\n" for i, text in enumerate(texts))
    code, out, _ = generate(capsys, models / "gla", *arguments, "--max-new-tokens", 6, "--json")
    document = json.loads(out)
    assert [part["text"] for part in document["continuations"]] == texts
    assert [part["prompt_tokens"] for part in document["continuations"]] == [len(prompt) for prompt in PROMPTS]
    assert document["prompt_tokens"] == sum(len(prompt) for prompt in PROMPTS)
    assert document["generated_tokens"] == sum(len(part["tokens"]) for part in document["continuations"])
    assert (document["cached_tokens"], document["read_seconds"]) == (0, None)


def test_every_continuation_of_every_prompt_draws_with_a_seed_of_its_own(models, capsys):
    sampling = Sampling(max_tokens=5, temperature=1.5)
    texts = wanted(models / "gla", [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, sampling, seed=8)
    assert len(set(texts)) == 4
    options = ["--max-new-tokens", 5, "--temperature", 1.5, "--seed", 8, "--n", 2]
    arguments = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--batch-size", 3, "--segment-length", 4]
    _, out, _ = generate(capsys, models / "gla", *arguments, *options, "--json")
    found = json.loads(out)["continuations"]
    assert [(part["prompt"], part["text"]) for part in found] == list(zip([0, 0, 1, 1], texts, strict=True))
    _, out, _ = generate(capsys, models / "gla", "--prompt", PROMPTS[0], *options)
    assert out == "".join(f"==> prompt 0, {i} <==\n{texts[i]}\n" for i in (0, 1))


def test_the_sizes_of_batch_and_segments_are_taken_along(models, capsys, monkeypatch):
    taken = []

    def spy(*arguments, **options):
        taken.append((options["batch_size"], options["segment_length"]))
        return iter(())

    monkeypatch.setattr("statex_dist.inference.generate.stream_continuations", spy)
    options = ["--prompt", "a", "--prompt", "b", "--batch-size", 5, "--segment-length", 6]
    assert generate(capsys, models / "gla", *options)[0] == 0
    assert taken == [(5, 6)]


def test_settings_that_change_nothing_are_said(models, capsys):
    _, _, err = generate(capsys, models / "gla", "--prompt", "a", "--max-new-tokens", 1, "--top-k", 5)
    assert "--temperature is 0" in err
    _, _, err = generate(capsys, models / "gla", "--prompt", "a", "--max-new-tokens", 1)
    assert "--temperature" not in err


def test_text_comes_as_it_is_produced(models, monkeypatch):
    pieces = []
    stream = SimpleNamespace(write=pieces.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stream)
    options = ["--max-new-tokens", "20", "--temperature", "1", "--threads", "1"]
    assert main(["generate", "--model", str(models / "gla"), "--prompt", "x", *options]) == 0
    assert len(pieces) > 5


def test_stop_strings_end_the_text(models, capsys):
    _, whole, _ = generate(capsys, models / "gla", "--prompt", "x", "--max-new-tokens", 30, "--ignore-eos")
    stop = whole.rstrip("\n").strip("\ufffd")[4]
    _, out, _ = generate(
        capsys, models / "gla", "--prompt", "x", "--max-new-tokens", 30, "--ignore-eos", "--stop", stop
    )
    assert out == whole[: whole.index(stop)] + "\n"


def test_kept_states_save_reading_the_prompt_again(models, capsys, tmp_path):
    states = tmp_path / "states.safetensors"
    assert generate(capsys, models / "mamba2", "--prompt", "The river", "--max-new-tokens", 0, "--save-state", states)[
        :2
    ] == (0, "")
    _, whole, _ = generate(capsys, models / "mamba2", "--prompt", "The river rose", "--max-new-tokens", 6)
    _, out, _ = generate(capsys, models / "mamba2", "--load-state", states, "--prompt", " rose", "--max-new-tokens", 6)
    assert out == whole
    _, whole, _ = generate(capsys, models / "mamba2", "--prompt", "The river", "--max-new-tokens", 6)
    _, out, _ = generate(capsys, models / "mamba2", "--load-state", states, "--max-new-tokens", 6)
    assert out == whole
    assert main(["inspect", str(states), "--json"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert (header["model_type"], header["num_tokens"]) == ("mamba2", "9")
    code, _, err = generate(capsys, models / "gla", "--load-state", states, "--max-new-tokens", 6)
    assert code == 2
    assert "model_type differs: mamba2 there, gla here" in err


def test_a_mitigation_is_that_of_the_model(models, capsys):
    options = ["--prompt", PROMPTS[2] * 3, "--max-new-tokens", 12, "--ignore-eos"]
    _, plain, _ = generate(capsys, models / "gla", *options)
    _, out, _ = generate(capsys, models / "gla", *options, "--mitigation", "sliding-window:tokens=100000")
    assert out == plain
    _, out, _ = generate(capsys, models / "gla", *options, "--mitigation", "sliding-window:tokens=2")
    assert out != plain


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no prompt; give --prompt TEXT or --prompt-file FILE"),
        (["--prompt", ""], "--prompt 0 is empty; there is nothing to continue"),
        (["--prompt", "a", "--prompt", "\udcff"], "--prompt 1 is not valid UTF-8"),
        (["--prompt-file", "/nowhere/x"], "--prompt-file /nowhere/x cannot be read: No such file or directory"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, not 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1, top_k 0 and top_p 1 make no sampling"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["--prompt", "a", "--seed", "-1"], "--seed must be 0 or more, not -1"),
        (["--prompt", "a", "--segment-length", "0"], "--segment-length must be 1 or more, not 0"),
        (["--prompt", "a", "--prompt", "b", "--save-state", "s"], "--save-state keeps what one prompt left; 2 were"),
        (["--prompt", "a", "--save-state", "/nowhere/s"], "--save-state /nowhere/s: no such directory"),
        (["--prompt", "a", "--save-state", "/tmp"], "--save-state /tmp is a directory; give a file"),
        (["--prompt", "a", "--load-state", "/tmp"], "--load-state /tmp is a directory; give a file"),
        (["--prompt", "a", "--save-state", "s", "--max-new-tokens", "0", "--top-p", "7"], "top_p 7 make no sampling"),
        (["--prompt", "a", "--n", "0"], "--n must be 1 or more, not 0"),
        (["--prompt", "a", "--threads", "99999"], "--threads must be from 1 to "),
        (["--prompt", "a", "--dtype", "int8"], "--dtype 'int8' is not supported; allowed: auto, fp32, bf16, fp16"),
        (["--prompt", "a", "--device", "tpu"], "--device 'tpu' is not a device"),
        (
            ["--prompt", "a", "--prompt", "bc", "--mitigation", "state-norm:limit=1,every=4"],
            "allowed: state-norm with every=1, or another remedy",
        ),
    ],
)
def test_bad_options_are_one_line(models, capsys, arguments, words):
    code, out, err = generate(capsys, models / "gla", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_prompts_that_are_no_text_and_models_that_are_none(models, capsys, tmp_path, monkeypatch):
    bad = tmp_path / "bad"
    bad.write_bytes(b"ab\xff")
    code, _, err = generate(capsys, models / "gla", "--prompt-file", bad)
    assert code == 2
    assert "byte 0xff at position 2" in err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    code, _, err = generate(capsys, models / "gla", "--prompt-file", "-")
    assert "--prompt-file - is empty" in err
    assert main(["inspect", str(bad)]) == 2
    assert "file of states" in capsys.readouterr().err
    code, _, err = generate(capsys, "fla-hub/gla-1.3B", "--prompt", "a")
    assert "hf download fla-hub/gla-1.3B --local-dir DIR" in err
    code, _, err = generate(capsys, tmp_path, "--prompt", "a")
    assert code == 2
    assert "not a checkpoint" in err
    save_model(expanded(GLA), tmp_path / "bare")
    code, _, err = generate(capsys, tmp_path / "bare", "--prompt", "a")
    assert "give --tokenizer bytes" in err


@pytest.mark.distributed
def test_ranks_that_share_a_model_say_what_one_process_says(models, capsys, tmp_path):
    reshard(models / "gla", tmp_path / "shards", to="tp", tp=2)
    options = [
        "--prompt",
        PROMPTS[0],
        "--prompt",
        PROMPTS[1],
        "--max-new-tokens",
        "6",
        "--temperature",
        "1.5",
        "--json",
    ]
    _, alone, _ = generate(capsys, models / "gla", *options)
    command = [sys.executable, "-m", "launch.cli", "generate", "--model", str(tmp_path / "shards"), *options]
    run = subprocess.run([*command, "--tp", "2"], capture_output=True, text=True, check=False, env=environment())
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["continuations"] == json.loads(alone)["continuations"]


def test_shards_and_whole_models_are_run_in_any_way(models, capsys, tmp_path):
    reshard(models / "gla", tmp_path / "shards", to="tp", tp=2)
    options = ["--prompt", "a", "--max-new-tokens", "5", "--ignore-eos", "--tokenizer", "bytes"]
    whole, alone = (generate(capsys, path, *options) for path in (models / "gla", tmp_path / "shards"))
    assert whole[:2] == alone[:2]
    assert whole[0] == 0
    _, _, err = generate(capsys, models / "gla", "--prompt", "a", "--tp", "0")
    assert "--tp must" in err

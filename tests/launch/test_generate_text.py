"""``statex generate`` with tokenizers of every kind, against transformers' text of the tokens that it produced."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from launch.cli import main
from tests.inference.test_text import text_behind
from tests.inference.text_kinds import KINDS
from tests.runs import GLA, MAMBA2, expanded, save_model

PROMPT = "the quick"
OPTIONS = ["--prompt", PROMPT, "--max-new-tokens", 40, "--temperature", 1.5, "--seed", 3]


def model_with(directory, name, **config):
    """Save a model with a tokenizer of a kind."""
    tokenizer = KINDS[name]
    save_model(expanded({**GLA, "vocab_size": tokenizer.vocab_size + 2, **config}), directory)
    tokenizer.save(directory)
    return directory


def generate(capsys, model, *arguments):
    code = main(["generate", "--model", str(model), "--threads", "1", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out, captured.err


def produced(capsys, model, *arguments):
    return json.loads(generate(capsys, model, *OPTIONS, "--json", *arguments)[0])["continuations"][0]


@pytest.mark.parametrize("name", ["byte-level", "unigram-first", "bpe-always", "llama", "word-piece", "no-decoder"])
def test_the_text_is_what_transformers_decodes_behind_the_prompt(tmp_path, capsys, name):
    model = model_with(tmp_path / "model", name)
    found = produced(capsys, model, "--ignore-eos")
    theirs = PreTrainedTokenizerFast.from_pretrained(model)
    prompt = theirs.encode(PROMPT, add_special_tokens=False)
    assert len(found["tokens"]) == 40
    whole = theirs.decode([*prompt, *found["tokens"]], skip_special_tokens=True)
    assert found["text"] == whole.removeprefix(theirs.decode(prompt, skip_special_tokens=True))
    assert generate(capsys, model, *OPTIONS, "--ignore-eos")[0] == found["text"] + "\n"
    # The tokens that were read are kept with the states.
    states = tmp_path / "states"
    begin = ["--prompt", PROMPT, "--max-new-tokens", 0, "--save-state", states]
    generate(capsys, model, *begin)
    out, _ = generate(capsys, model, "--load-state", states, *OPTIONS[2:], "--ignore-eos", "--json")
    assert json.loads(out)["continuations"][0]["text"] == found["text"]


def test_texts_end_at_the_end_tokens_of_all_files(tmp_path, capsys):
    model = model_with(tmp_path / "model", "llama")
    tokens = produced(capsys, model, "--ignore-eos")["tokens"]
    new = [i for i, token in enumerate(tokens) if i and token not in tokens[:i]]
    first, second = new[2], new[5]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[second]]}))
    found = produced(capsys, model)
    assert (found["tokens"], found["finish_reason"]) == (tokens[:second], "stop")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": [tokens[first], 1]}))
    out, err = generate(capsys, model, *OPTIONS, "--json")
    document = json.loads(out)
    assert document["continuations"][0]["tokens"] == tokens[:first]
    assert document["end_tokens"] == sorted({1, tokens[first], tokens[second]})
    assert "1 '<eos>' (tokenizer and config.json); " in err
    assert produced(capsys, model, "--ignore-eos")["tokens"] == tokens


def test_a_stop_string_may_be_any_token_that_is_marked_as_special(tmp_path, capsys):
    model = model_with(tmp_path / "model", "llama")
    for seed in range(200):
        tokens = produced(capsys, model, "--ignore-eos", "--seed", seed, "--top-p", 1)["tokens"]
        if 2 in tokens[1:]:
            break
    found = produced(capsys, model, "--ignore-eos", "--seed", seed, "--stop", "<|im_end|>")
    assert (found["tokens"], found["finish_reason"]) == (tokens[: tokens.index(2)], "stop")


def test_a_stop_string_that_cannot_come_is_refused(tmp_path, capsys):
    model = model_with(tmp_path / "model", "llama")
    arguments = ["--model", str(model), "--prompt", PROMPT, "--threads", "1", "--stop", "<|im_end|>\n"]
    assert main(["generate", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(r"error: --stop '<|im_end|>\n' is a special token with other text")


def test_stop_strings_see_the_space_behind_the_prompt(tmp_path, capsys):
    model = model_with(tmp_path / "model", "llama")
    whole = produced(capsys, model, "--ignore-eos")
    spaces = [i for i, char in enumerate(whole["text"]) if char == " "]
    stop = whole["text"][spaces[0] : spaces[0] + 3]
    found = produced(capsys, model, "--ignore-eos", "--stop", stop)
    assert found["text"] == whole["text"][: whole["text"].index(stop)]
    ids = KINDS["llama"].encode(PROMPT).tolist()
    assert text_behind(KINDS["llama"], ids, found["tokens"]).startswith(found["text"])


def test_states_of_an_earlier_version_are_read_with_a_warning(tmp_path, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from statex_dist.inference.cache import _digest

    save_model(expanded({**MAMBA2, "vocab_size": 310}), tmp_path / "model")
    KINDS["llama"].save(tmp_path / "model")
    states = tmp_path / "states"
    generate(capsys, tmp_path / "model", "--prompt", PROMPT, "--max-new-tokens", 0, "--save-state", states)
    with safe_open(states, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "last_tokens"}  # noqa: SIM118
    digest = _digest(sorted(tensors.items()))
    save_file(tensors, states, {**header, "version": "1", "digest": digest})
    _, err = generate(capsys, tmp_path / "model", "--load-state", states, "--max-new-tokens", 3)
    assert "version 1" in err

"""Exports as directories: which form they take, what lies in them, and bad input."""

import json
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from checkpoints_tools.export.hf_export import CODE_NAME, export_config, export_notes, form_of
from checkpoints_tools.export.hf_tokenizer import bytes_tokenizer_documents
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone, verify_same
from statex_dist.bare_package import import_from_bare
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.data.tokenizer import BytesTokenizer, load_tokenizer
from statex_dist.errors import CheckpointError, ConfigError, DataError
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.registry import make_plan
from tests.checkpoints_tools.builders import GLA, MAMBA2, run_expand, write_model
from tests.checkpoints_tools.exports import MODELS, PLAIN, export
from tests.models.tiny import HYBRIDS, build, gla_config, skip_where_transformers_norm_is_wrong, tokens
from tests.raising import raises

NOTES = {
    "mamba2": ["n_groups is above 1"],
    "mamba2-even": ["n_groups is above 1"],
    "minimax": ["transformers' MiniMax"],
}


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_transformers_own_class_opens_what_it_knows(tmp_path, name):
    ours, directory, summary = export(name, tmp_path, dtype=torch.float32)
    assert not (directory / CODE_NAME).exists()
    assert all(note.startswith(start) for note, start in zip(summary.notes, NOTES.get(name, []), strict=True))
    config = json.loads((directory / "config.json").read_text())
    assert "auto_map" not in config
    model, ids = AutoModelForCausalLM.from_pretrained(directory).eval(), tokens(2, 70)
    assert type(model).__module__.startswith("transformers.models.")
    assert config["architectures"] == [type(model).__name__]
    skip_where_transformers_norm_is_wrong(ours.config)
    expected = ours(ids).logits
    assert (model(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(from_pretrained(tmp_path / "again")(ids).logits, expected)


def test_the_form_follows_from_family_and_plan():
    forms = {name: form_of(config) for name, config in MODELS.items()}
    assert {name for name, form in forms.items() if form == "plain"} == set(PLAIN)
    assert set(forms.values()) == {"plain", "remote_code"}
    mixed = gla_config(attn={"layers": [1], "num_heads": 4})
    assert form_of(mixed) == "none"
    assert export_notes(mixed) == [
        "transformers has no class for this gla model, and we write no code for mixed models: layers [1] are softmax "
        "attention; the software that it came from opens it"
    ]
    assert export_notes(MODELS["minimax-merged"]) == export_notes(MODELS["gla-merged"]) == []


def test_even_growth_of_a_state_spaces_hybrid_keeps_the_keys_of_mamba_ssm(tmp_path):
    config = make_plan(HYBRIDS["state_spaces"], layers="all", factor=2, init="inherit")
    save_pretrained(build(config, dtype=torch.float32), tmp_path / "grown")
    summary = reshard(tmp_path / "grown", tmp_path / "hf", to="hf")
    assert form_of(config) == "none"
    assert "mamba_ssm" in summary.notes[0]
    values = json.loads((tmp_path / "hf/config.json").read_text())
    theirs = import_from_bare("mamba_ssm.models.config_mamba").MambaConfig(**values)
    assert theirs.ssm_cfg["d_state"] == 2 * HYBRIDS["state_spaces"].state_size
    assert verify_same(tmp_path / "grown", tmp_path / "hf").ok
    uneven = make_plan(HYBRIDS["state_spaces"], layers="0", factor=2, init="inherit")
    assert "statex" in export_config(uneven.to_dict(), uneven)


def test_what_lies_in_an_export(tmp_path):
    _, directory, _ = export("gla-mixed", tmp_path, dtype=torch.float32)
    files = {path.name: path for path in directory.iterdir()}
    assert sorted(files) == [
        *("MANIFEST.json", "README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("modeling_statex.py", "tokenization_statex.py", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o644}
    assert sorted(Manifest.read(directory).files) == sorted(set(files) - {"MANIFEST.json"})
    assert verify_alone(directory).ok
    assert verify_same(tmp_path / "gla-mixed-source", directory).ok
    settings = GenerationConfig.from_pretrained(directory)
    assert (settings.eos_token_id, settings.pad_token_id) == (256, 257)
    assert isinstance(load_tokenizer(directory), BytesTokenizer)
    with (directory / CODE_NAME).open("a") as file:
        file.write("# damaged\n")
    with pytest.raises(CheckpointError, match=r"modeling_statex\.py"):
        Manifest.read(directory).verify(directory)


def test_defaults_that_the_source_left_out_are_written_and_other_keys_stay(tmp_path):
    write_model(tmp_path / "source", {**GLA, "my_key": [1]})
    reshard(tmp_path / "source", tmp_path / "out", dtype="bf16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["my_key"], config["expand_k"], config["torch_dtype"]) == ([1], 0.5, "bfloat16")
    assert config["architectures"] == ["StateXForCausalLM"]
    # Files that came with the source are carried as they are.
    assert (tmp_path / "out/generation_config.json").read_text() == '{"max_new_tokens": 3}'


@pytest.mark.parametrize("ends", [[3], [3, 256], [], None, 3])
def test_end_tokens_may_be_an_id_a_list_or_nothing(tmp_path, ends):
    write_model(tmp_path / "source", {**GLA, "eos_token_id": ends})
    (tmp_path / "source/generation_config.json").unlink()
    run_expand(tmp_path / "source", tmp_path / "more", layers="0", factor=2, op="merge_heads")
    reshard(tmp_path / "more", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == ends
    written = tmp_path / "out/generation_config.json"
    assert (json.loads(written.read_text())["eos_token_id"] if written.exists() else None) == (ends or None)
    model = from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == ends
    save_pretrained(model, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == ends
    theirs = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert theirs.eos_token_id == ends


@pytest.mark.parametrize("ends", ["3", [3, None], [True], 3.0, {"a": 3}])
def test_end_tokens_of_another_kind_are_refused(tmp_path, ends):
    write_model(tmp_path / "source", GLA)
    (tmp_path / "source/config.json").write_text(json.dumps({**GLA, "eos_token_id": ends}))
    with raises(CheckpointError, "eos_token_id", "list[int]"):
        reshard(tmp_path / "source", tmp_path / "out")


def test_a_model_with_code_that_grows_to_a_plain_one_sheds_it(tmp_path):
    write_model(tmp_path / "base", MAMBA2)
    run_expand(tmp_path / "base", tmp_path / "one", layers="0", factor=2)
    reshard(tmp_path / "one", tmp_path / "one-hf")
    assert "auto_map" in json.loads((tmp_path / "one-hf/config.json").read_text())
    run_expand(tmp_path / "one-hf", tmp_path / "all", layers="1,2", factor=2)
    reshard(tmp_path / "all", tmp_path / "all-hf")
    config = json.loads((tmp_path / "all-hf/config.json").read_text())
    assert "auto_map" not in config
    assert (config["architectures"], config["state_size"]) == (["Mamba2ForCausalLM"], 12)


@pytest.fixture(scope="module")
def fast_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    BytesTokenizer().save(directory)
    marker = json.loads((directory / "tokenizer_config.json").read_text())
    for name, content in bytes_tokenizer_documents(marker).items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return PreTrainedTokenizerFast.from_pretrained(directory)


@given(text=st.text() | st.sampled_from(["<|endoftext|>", "a <|pad|>", "\x00\r\n", " é  ", "\ufeff x"]))
def test_the_fast_tokenizer_of_bytes_gives_the_bytes(fast_tokenizer, text):
    ids = BytesTokenizer().encode(text).tolist()
    assert fast_tokenizer(text)["input_ids"] == ids
    assert fast_tokenizer.decode([*ids, 256, 257], skip_special_tokens=True) == text


def test_the_fast_tokenizer_of_bytes_has_the_special_ids(fast_tokenizer):
    assert (fast_tokenizer.eos_token_id, fast_tokenizer.pad_token_id, len(fast_tokenizer)) == (256, 257, 258)
    batch = fast_tokenizer(["a", "abc"], padding=True)
    assert batch["input_ids"][0] == [257, 257, 97]
    assert batch["attention_mask"][0] == [0, 0, 1]


def test_bad_input_leaves_nothing(tmp_path):
    write_model(tmp_path / "source", GLA)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()

    def refused(kind, words, **options):
        with pytest.raises(kind, match=words):
            reshard(tmp_path / "source", tmp_path / "out", **{"evaluations": [str(evaluation)], **options})

    refused(DataError, r"statex eval.*recall\.json, mqar\.json")
    refused(DataError, "--evaluation nowhere", evaluations=["nowhere"])
    refused(ConfigError, "--evaluation.*--to hf, not tp", to="tp", tp=2)
    result = evaluation / "mqar.json"
    for content, words in (
        ("{", r"mqar\.json.*`statex eval`"),
        ("[]", "is not what `statex eval`"),
        ('{"version": 1}', r"mqar\.json.*version 1.*reads 2"),
        ('{"version": 2, "model": {"state_numbers": 5}}', "5 numbers"),
        ('{"version": 2, "model": {"state_numbers": 384}}', r"KeyError: 'by_num_pairs'"),
    ):
        result.write_text(content)
        refused(DataError, words)
    (tmp_path / "source/tokenizer_config.json").write_text("{")
    refused(CheckpointError, r"tokenizer_config\.json cannot be read", evaluations=[])
    (tmp_path / "source/config.json").unlink()
    refused(CheckpointError, "--to hf with --evaluation")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", "source"]


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    write_model(tmp_path / "source", GLA)
    command = [sys.executable, "-m", "launch.cli", "reshard", "--source", str(tmp_path / "source")]
    done = subprocess.run(
        [*command, "--target", str(tmp_path / "out"), "--evaluation", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "`statex eval`" in done.stderr

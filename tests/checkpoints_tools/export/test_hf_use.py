"""Exports from the user's view: the card's own code, the tokenizer, and the export of an export."""

import json
import signal

import pytest
import torch
import transformers.dynamic_module_utils
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedTokenizerFast

from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_expansion
from launch.cli import main
from statex_dist.config import parse_config
from statex_dist.data.tokenizer import BytesTokenizer, load_tokenizer
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import config_from_dict
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.status import StopRequest
from tests.checkpoints_tools.builders import run_expand
from tests.raising import raises
from tests.runs import GLA, MAMBA2, make_shards, save_model, write_run


@pytest.fixture(autouse=True)
def _undone(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def model_without_tokenizer(directory, values=GLA):
    return save_model(config_from_dict({key: v for key, v in values.items() if "token_id" not in key}), directory)


def write_tokenizer(directory, **settings):
    """Write a tokenizer of the tokenizers library: bytes, and 256 for the end."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **settings).save_pretrained(directory)
    return directory


def run_card(directory, monkeypatch, capsys) -> str:
    """Execute the Python code of a card where the card is; return what it prints."""
    code = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(directory)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_an_export_that_was_trained_is_exported_whole_again(tmp_path, monkeypatch, capsys):
    save_model(config_from_dict(GLA), tmp_path / "base")
    BytesTokenizer().save(tmp_path / "base")
    reshard(tmp_path / "base", tmp_path / "first")
    sections = {"model": {"path": str(tmp_path / "first")}, "train": {"num_steps": 2}, "engine": {"name": "plain"}}
    shards = make_shards(tmp_path / "data", num_documents=20)
    file = write_run(tmp_path / "run.yaml", data={"path": str(shards)}, seed=1234, **sections)
    train(parse_config(RunConfig, ["--config", str(file)], prog="train.py"))
    model_dir = tmp_path / "run/checkpoints/global_step2/model"
    AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    (model_dir / "tokenization_statex.py").unlink()  # as earlier releases left it
    manifest = json.loads((model_dir.parent / "MANIFEST.json").read_text())
    del manifest["files"]["model/tokenization_statex.py"]
    (model_dir.parent / "MANIFEST.json").write_text(json.dumps(manifest))
    reshard(tmp_path / "run", tmp_path / "second", to="hf")
    run_expand(tmp_path / "second", tmp_path / "third", layers="0", factor=2)
    reshard(tmp_path / "third", tmp_path / "fourth")
    for name in ("second", "fourth"):
        assert run_card(tmp_path / name, monkeypatch, capsys).startswith("Once upon a time")
    assert "| seed | 1234 |" in (tmp_path / "second/README.md").read_text()


def test_the_code_on_the_card_of_a_plain_export_runs(tmp_path, monkeypatch, capsys):
    model_without_tokenizer(tmp_path / "base", MAMBA2)
    reshard(tmp_path / "base", tmp_path / "bytes", tokenizer="bytes")
    reshard(tmp_path / "base", tmp_path / "fast", tokenizer=str(write_tokenizer(tmp_path / "tokenizer")))
    for name in ("bytes", "fast"):
        assert run_card(tmp_path / name, monkeypatch, capsys)
    encoded = AutoTokenizer.from_pretrained(tmp_path / "bytes", trust_remote_code=True)("é")
    assert dict(encoded) == {"input_ids": [195, 169], "attention_mask": [1, 1]}


def test_a_model_without_a_tokenizer_says_so_and_can_be_given_one(tmp_path, monkeypatch, capsys):
    model_without_tokenizer(tmp_path / "base")
    reshard(tmp_path / "base", tmp_path / "none")
    text = (tmp_path / "none/README.md").read_text()
    assert "No tokenizer is included" in text
    assert "AutoTokenizer" not in text
    run_card(tmp_path / "none", monkeypatch, capsys)
    command = ["reshard", "--source", str(tmp_path / "base"), "--target", str(tmp_path / "bytes")]
    assert main([*command, "--tokenizer", "bytes"]) == 0
    assert isinstance(load_tokenizer(tmp_path / "bytes"), BytesTokenizer)
    BytesTokenizer().save(tmp_path)
    marker, ours = (json.loads((d / "tokenizer_config.json").read_text()) for d in (tmp_path, tmp_path / "bytes"))
    assert marker.items() <= ours.items()
    assert json.loads((tmp_path / "bytes/generation_config.json").read_text()) == {
        "eos_token_id": 256,
        "pad_token_id": 257,
    }
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tokenizer / "weights.bin").write_bytes(b"no part of it")
    reshard(tmp_path / "base", tmp_path / "fast", tokenizer=str(tokenizer))
    assert load_tokenizer(tmp_path / "fast").hash == load_tokenizer(tokenizer).hash
    assert not (tmp_path / "fast/weights.bin").exists()
    for name in ("bytes", "fast"):
        assert run_card(tmp_path / name, monkeypatch, capsys).startswith("Once")


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    base = model_without_tokenizer(tmp_path / "base")
    small = model_without_tokenizer(tmp_path / "small", {**GLA, "vocab_size": 200})
    tokenizer = write_tokenizer(tmp_path / "tokenizer", additional_special_tokens=["<more>", "<and more>"])
    reshard(base, tmp_path / "has", tokenizer="bytes")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/tokenizer.json").write_text('{"model": 1}')
    for source, spec, kind, words in (
        (small, "bytes", ConfigError, "--tokenizer bytes.* 258 .* 200"),
        (base, str(tokenizer), ConfigError, "259 .* 258"),
        (base, "nowhere", ConfigError, r"--tokenizer nowhere.*tokenizer\.json"),
        (base, str(tmp_path / "damaged"), CheckpointError, r"tokenizer\.json is not"),
        (tmp_path / "has", "bytes", ConfigError, "has a tokenizer already"),
    ):
        with pytest.raises(kind, match=words):
            reshard(source, tmp_path / "out", tokenizer=spec)
    with raises(ConfigError, "--tokenizer", "--to hf", "tp"):
        reshard(base, tmp_path / "out", to="tp", tp=2, tokenizer="bytes")
    (base / "config.json").unlink()
    with raises(CheckpointError, "--to hf", "--tokenizer", "known family"):
        reshard(base, tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()


def test_the_card_gives_the_ids_of_the_training_whatever_class_the_tokenizer_names(tmp_path, monkeypatch, capsys):
    base = model_without_tokenizer(tmp_path / "base")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    values = json.loads((tokenizer / "tokenizer.json").read_text())
    # The class of Llama's files, which gives a text another normalizer than this file's.
    values["normalizer"] = {"type": "Lowercase"}
    start = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    values["post_processor"] = {
        **{"type": "TemplateProcessing", "single": [start, {"Sequence": {"id": "A", "type_id": 0}}], "pair": []},
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [256], "tokens": ["<eos>"]}},
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps(values))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"}))
    reshard(base, tmp_path / "out", tokenizer=str(tokenizer))
    wanted = load_tokenizer(tokenizer).encode("Once upon a time").tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once upon a time")["input_ids"] != wanted
    seen = []
    generate = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda *a, **k: seen.append(k["input_ids"]) or generate(*a, **k))
    assert run_card(tmp_path / "out", monkeypatch, capsys).startswith("once upon a time")
    assert [ids.tolist() for ids in seen] == [[wanted]]


def test_an_expansion_warns_where_only_we_open_it(tmp_path, caplog):
    def warns(source, name, **options):
        caplog.clear()
        run_expand(source, tmp_path / name, layers="1", factor=2, init="inherit", **options)
        return "other software does not know the plan in config.json" in caplog.text

    assert warns(model_without_tokenizer(tmp_path / "base"), "bare")
    reshard(tmp_path / "base", tmp_path / "with-code")
    assert not warns(tmp_path / "with-code", "with-code-x")
    ids = torch.arange(9)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with-code-x", trust_remote_code=True)
    assert torch.allclose(loaded(ids).logits, from_pretrained(tmp_path / "with-code-x")(ids).logits, atol=1e-5)
    (tmp_path / "with-code/modeling_statex.py").unlink()
    (tmp_path / "with-code/MANIFEST.json").unlink()
    assert warns(tmp_path / "with-code", "without-code-x")


@pytest.mark.parametrize("op", ["mix_heads", "grow_features"])
def test_the_code_of_a_base_goes_along_with_the_names_of_an_expanded_model(tmp_path, op):
    reshard(model_without_tokenizer(tmp_path / "base"), tmp_path / "code")
    run_expand(tmp_path / "code", tmp_path / "x", layers="1", factor=2, op=op, init="lossless")
    assert verify_expansion(tmp_path / "code", tmp_path / "x").ok
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "code", trust_remote_code=True)
    ids = torch.arange(9)[None]
    for parameter in (*model.parameters(), *base.parameters()):
        parameter.data = parameter.data.clone()  # not in a mapped file, where sums may have another order
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert (model.config.model_type, model.config.architectures) == ("statex_gla", ["StateXForCausalLM"])
    model.save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved/config.json").read_text())
    assert values["model_type"] == "statex_gla"
    assert torch.equal(from_pretrained(tmp_path / "saved")(ids).logits, from_pretrained(tmp_path / "x")(ids).logits)
    code = tmp_path / "x/modeling_statex.py"
    text = code.read_text()
    if op == "grow_features":
        code.write_text((tmp_path / "code/modeling_statex.py").read_text())
        with pytest.raises(TypeError, match="'features'"):  # code without features does not leave them out
            AutoModelForCausalLM.from_pretrained(tmp_path / "x", trust_remote_code=True)
    code.write_text(text.replace("statex_gla", "statex_gl"))
    (tmp_path / "x/MANIFEST.json").unlink()
    assert verify_expansion(tmp_path / "code", tmp_path / "x").differences == [
        "modeling_statex.py differs from the base's"
    ]

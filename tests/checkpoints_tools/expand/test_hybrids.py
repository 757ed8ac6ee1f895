"""Hybrids that transformers hosts, from directories as the hub has them: expanded, verified, inspected, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools.plan.options import PlanOptions, plan_model
from checkpoints_tools.plan.report import report_plan
from checkpoints_tools.verify.inspect import inspect
from checkpoints_tools.verify.verify import verify_expansion
from statex_dist.errors import CheckpointError
from statex_dist.models.hf import from_pretrained
from statex_dist.models.hybrid import host_tensors
from statex_dist.models.registry import UNSUPPORTED, read_config
from tests.checkpoints_tools.builders import load_all, run_expand, write_model
from tests.models.hybrid.hosts import HOSTS, VOCABULARY, save_host
from tests.raising import raises

OPS = dict.fromkeys(HOSTS, "mix_heads") | dict.fromkeys(
    ("bamba", "granitemoehybrid", "falcon_h1", "zamba2", "nemotron_h"), "grow_state"
)


def tokens():
    return torch.randint(1, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a host once, and returns its directory and logits."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def save(model_type):
        if model_type not in made:
            directory = tmp_path_factory.mktemp(model_type)
            host = save_host(model_type, directory)
            with torch.no_grad():
                made[model_type] = directory, host(tokens(), use_cache=False).logits
        return made[model_type]

    return save


def check_lossless(source: Path, target: Path, logits: torch.Tensor, op: str, **options) -> None:
    """Expand losslessly, prove the expansion, and compare logits and ``config.json``."""
    run_expand(source, target, op=op, init="lossless", factor=2, layers="all", max_shard_size=40_000, **options)
    assert verify_expansion(source, target).ok
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(target)(tokens()).logits, logits, rtol=0, atol=1e-5)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, target))
    size_key = {"mamba_d_state", "ssm_state_size"}
    own_keys = {"architectures", "model_type", "hidden_act", "mamba_hidden_act", "text_config"}
    allowed = {"statex", *(size_key if op == "grow_state" else own_keys)}
    assert {key for key in before.keys() | after.keys() if before.get(key, ...) != after.get(key, ...)} <= allowed


@pytest.mark.parametrize(
    ("model_type", "op"),
    [*OPS.items(), *((name, "grow_features") for name in ("nemotron_h", "zamba2", "kimi_linear"))],
)
def test_lossless_growth_of_every_host(saved, tmp_path, model_type, op):
    source, logits = saved(model_type)
    check_lossless(source, tmp_path / "out", logits, op)
    facts = inspect(tmp_path / "out")
    assert facts.complete
    assert facts.problem is None
    assert all(facts.able.values()), facts.unable
    assert facts.unchecked == [f"values: statex verify {tmp_path / 'out'} reads them and compares digests"]
    assert facts.sequence.kv_bytes_per_token == inspect(source).sequence.kv_bytes_per_token > 0


def memory_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return a model's tensors under the names of memory, with experts as one tensor."""
    stored = from_pretrained(directory).stored_tensors()
    return {name: tensor.detach().clone() for name, tensor in stored.items()}


@pytest.mark.parametrize("model_type", ["nemotron_h", "granitemoehybrid", "olmo_hybrid", "kimi_linear", "minimax"])
def test_names_of_memory_become_those_of_the_hub(saved, tmp_path, model_type):
    directory, logits = saved(model_type)
    values = json.loads((directory / "config.json").read_text())
    prefix = "module." if model_type == "nemotron_h" else ""  # as a trainer's wrapper saves them
    tensors = {prefix + name: tensor for name, tensor in memory_tensors(directory).items()}
    write_model(tmp_path / "in", values, tensors, shards=3)
    check_lossless(tmp_path / "in", tmp_path / "out", logits, OPS[model_type])
    of_files = host_tensors.host_tensors(read_config(tmp_path / "out"))
    # Experts stay one tensor where nothing else of their name changes.
    assert {name for name in of_files if ".experts." not in name} <= load_all(tmp_path / "out").keys()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "each"])
def test_other_parts_of_a_multimodal_model_are_passed_through(saved, tmp_path, fused):
    """Names stay, also of experts that the hub has as one tensor, of the vision tower and of further token heads."""
    directory, logits = saved("qwen3_5_moe_text")
    tensors = memory_tensors(directory) if fused else load_all(directory)
    whole = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    whole |= {f"mtp.{n.removeprefix('model.')}": t.clone() for n, t in tensors.items() if "layers.3." in n}
    whole |= {"model.visual.patch_embed.proj.weight": torch.randn(4, 3, 2).bfloat16(), "mtp.fc.weight": torch.randn(4)}
    text = json.loads((directory / "config.json").read_text())
    values = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 1}, "image_token_id": 5}
    write_model(tmp_path / "in", {**values, "tie_word_embeddings": False}, whole, shards=3)
    check_lossless(tmp_path / "in", tmp_path / "out", logits, "mix_heads")
    written = load_all(tmp_path / "out")
    assert {name for name in written if not name.endswith("linear_attn.mix")} == whole.keys()
    facts = inspect(tmp_path / "in")
    strange = len([name for name in whole if name.startswith(("mtp.", "model.visual."))])
    assert fused or any(line.startswith(f"{strange} tensors: of other parts") for line in facts.unchecked)


def test_either_name_of_kimis_dense_layer(saved, tmp_path):
    directory, logits = saved("kimi_linear")
    tensors = {n.replace("layers.0.block_sparse_moe", "layers.0.mlp"): t for n, t in load_all(directory).items()}
    write_model(tmp_path / "in", json.loads((directory / "config.json").read_text()), tensors)
    check_lossless(tmp_path / "in", tmp_path / "out", logits, "mix_heads")
    assert tensors.keys() < load_all(tmp_path / "out").keys()


Q, K = (f"model.layers.3.self_attn.{name}_proj.weight" for name in "qk")
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "values", "words"),
    [
        ({}, {"layer_types": ["linear_attention"] * 3}, ("list of layers", "3", "4")),
        ({}, {"layer_types": ["linear_attention"] * 3 + ["x"]}, ("layer_types", "'x'")),
        (
            {},
            {"layer_types": ["linear_attention", "full_attention"] * 2},
            ("lacks", "model.layers.1.self_attn.q_proj.weight"),
        ),
        ({Q: None}, {}, ("lacks", Q)),
        ({EXPERT: None}, {}, ("lacks", EXPERT)),
        ({Q.replace("weight", "bias"): torch.zeros(4)}, {}, ("q_proj.bias", "unknown")),
        ({K: torch.zeros(8, 32)}, {}, (K, "(8, 32)", "(16, 32)")),
        ({K: torch.zeros(16, 32, dtype=torch.int8)}, {}, (K, "int8")),
    ],
    ids=["short", "unknown", "other", "attention", "expert", "bias", "shape", "integers"],
)
def test_layers_of_the_host_are_checked(saved, tmp_path, tensors, values, words):
    directory, _ = saved("qwen3_next")
    held = {name: tensor for name, tensor in {**load_all(directory), **tensors}.items() if tensor is not None}
    write_model(tmp_path / "in", {**json.loads((directory / "config.json").read_text()), **values}, held)
    with raises(CheckpointError, *words):
        run_expand(tmp_path / "in", tmp_path / "out")
    assert all(word in inspect(tmp_path / "in").problem for word in words)
    assert not (tmp_path / "out").exists()


def test_what_is_not_checked_without_transformers_is_counted(saved, tmp_path, monkeypatch):
    directory, _ = saved("qwen3_next")
    held = {name: tensor for name, tensor in load_all(directory).items() if name != Q}
    write_model(tmp_path / "in", json.loads((directory / "config.json").read_text()), held)
    host_tensors._built.cache_clear()
    monkeypatch.setattr(host_tensors.importlib.util, "find_spec", lambda name: None)
    facts = inspect(tmp_path / "in")
    host_tensors._built.cache_clear()
    assert facts.problem is None
    recurrent = 7 * 3 + 3  # of each recurrent layer, and embeddings, norm and head
    assert f"{len(held) - recurrent} tensors: of layers that are not recurrent, kept as they are" in facts.unchecked


def test_a_truncated_shard_is_refused(saved, tmp_path):
    directory, _ = saved("qwen3_next")
    write_model(tmp_path / "in", json.loads((directory / "config.json").read_text()), load_all(directory), shards=3)
    shard = tmp_path / "in/model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with raises(CheckpointError, shard.name, "truncated"):
        run_expand(tmp_path / "in", tmp_path / "out")


def test_plans_count_every_layer(saved):
    for model_type in ("nemotron_h", "qwen3_next", "minimax"):
        before = read_config(saved(model_type)[0])
        after = plan_model(before, PlanOptions(layers="all", op="grow_features", factor=2))
        report = report_plan(before, after, context_length=100)
        model = from_pretrained(saved(model_type)[0])
        assert report.before.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert report.before.sequence.kv_bytes == report.after.sequence.kv_bytes > 0
        assert report.after.sequence.state_bytes > report.before.sequence.state_bytes
        assert report.counted


@pytest.mark.parametrize("model_type", ["jamba", "mamba", "recurrent_gemma", "lfm2", "rwkv7"])
def test_models_that_are_not_supported_say_why(tmp_path, model_type):
    save_file({"model.embed_tokens.weight": torch.zeros(9, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 9, "hidden_size": 8}))
    with raises(CheckpointError, model_type, UNSUPPORTED[model_type]):
        run_expand(tmp_path, tmp_path / "out")
    facts = inspect(tmp_path)
    assert not any(facts.able.values())
    assert set(facts.unable.values()) == {f"not supported: {UNSUPPORTED[model_type]}"}

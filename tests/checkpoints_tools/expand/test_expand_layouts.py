"""Sources of other layouts and models of mixed kind: what the plan does not touch passes through bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools.expand.expand import prepare_expansion
from checkpoints_tools.verify.inspect import inspect
from checkpoints_tools.verify.verify import verify_expansion
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import read_config
from tests.checkpoints_tools.builders import (
    GLA,
    MAMBA2,
    load_all,
    random_tensors,
    read_tensor,
    run_expand,
    write_model,
)
from tests.raising import raises

STATE_SPACES = {
    "d_model": 16,
    "d_intermediate": 0,
    "n_layer": 3,
    "vocab_size": 37,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 4, "d_state": 6, "ngroups": 2},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


def state_spaces_tensors() -> dict[str, torch.Tensor]:
    values = {**MAMBA2, "vocab_size": 40, "n_groups": 2, "use_bias": False}
    tensors = random_tensors(values)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    return tensors


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class TestStateSpaces:
    """mamba_ssm's own config and names, padded vocabulary, tied head stored twice."""

    def test_uniform_growth_is_said_in_its_own_words(self, tmp_path):
        tensors = state_spaces_tensors()
        write_model(tmp_path / "in", STATE_SPACES, tensors)
        run_expand(tmp_path / "in", tmp_path / "out", layers="all", factor=4, init="lossless")
        values = json.loads((tmp_path / "out/config.json").read_text())
        assert values["ssm_cfg"] == {**STATE_SPACES["ssm_cfg"], "d_state": 24}
        assert "model_type" not in values
        assert {k: v for k, v in values.items() if k not in ("ssm_cfg", "statex")} == {
            k: v for k, v in STATE_SPACES.items() if k != "ssm_cfg"
        }
        written = load_all(tmp_path / "out")
        assert set(written) == set(tensors)
        assert written["backbone.layers.0.mixer.in_proj.weight"].shape == (2 * 32 + 2 * 2 * 24 + 8, 16)
        assert bits(written["lm_head.weight"]) == bits(tensors["lm_head.weight"])
        assert verify_expansion(tmp_path / "in", tmp_path / "out").ok
        assert inspect(tmp_path / "out").complete
        ids = torch.arange(20)[None]
        before, after = (from_pretrained(tmp_path / d, dtype=torch.float64) for d in ("in", "out"))
        with torch.no_grad():
            assert (before(ids).logits - after(ids).logits).abs().max() < 1e-12

    def test_it_is_the_same_model_as_transformers_layout(self, tmp_path):
        tensors = state_spaces_tensors()
        write_model(tmp_path / "ours", STATE_SPACES, tensors)
        renamed = {n.replace("embedding.weight", "embeddings.weight"): t for n, t in tensors.items()}
        renamed.pop("lm_head.weight")
        write_model(tmp_path / "theirs", {**MAMBA2, "vocab_size": 40, "n_groups": 2, "use_bias": False}, renamed)
        ids = torch.arange(20)[None]
        one, other = (from_pretrained(tmp_path / d, dtype=torch.float64)(ids).logits for d in ("ours", "theirs"))
        assert torch.equal(one, other)

    def test_other_growth_is_a_plan(self, tmp_path):
        write_model(tmp_path / "in", STATE_SPACES, state_spaces_tensors())
        run_expand(tmp_path / "in", tmp_path / "out", layers="0", factor=2)
        values = json.loads((tmp_path / "out/config.json").read_text())
        assert values["ssm_cfg"] == STATE_SPACES["ssm_cfg"]
        assert [e.layer for e in read_config(tmp_path / "out").statex.layers] == [0]
        run_expand(tmp_path / "out", tmp_path / "all", layers="1,2", factor=2)
        grown = json.loads((tmp_path / "all/config.json").read_text())
        assert grown["ssm_cfg"]["d_state"] == 12
        assert read_config(tmp_path / "all").layer_geometry(1).key_dim == 12

    def test_pytorch_model_bin(self, tmp_path):
        tensors = state_spaces_tensors()
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]  # one memory, two names, as mamba_ssm saves it
        (tmp_path / "in").mkdir()
        torch.save(tensors, tmp_path / "in/pytorch_model.bin")
        (tmp_path / "in/config.json").write_text(json.dumps(STATE_SPACES))
        run_expand(tmp_path / "in", tmp_path / "out", layers="all", factor=2)
        written = load_all(tmp_path / "out")
        assert bits(written["backbone.layers.1.mixer.D"]) == bits(tensors["backbone.layers.1.mixer.D"])
        assert verify_expansion(tmp_path / "in", tmp_path / "out").ok

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg .* Mamba1 .* Mamba2 "),
            ({"ssm_cfg": {}}, "ssm_cfg is of a Mamba1 model"),
            ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim=True is not supported"),
            ({"rms_norm": False}, "rms_norm=false"),
            ({"n_layer": "3"}, "n_layer .* '3'"),
        ],
    )
    def test_variants_that_we_do_not_know(self, tmp_path, changes, message):
        write_model(tmp_path / "in", {**STATE_SPACES, **changes}, state_spaces_tensors())
        with pytest.raises(CheckpointError, match=message):
            prepare_expansion(tmp_path / "in")


class TestBamba:
    """Mamba2 layers beside softmax attention, as transformers makes and runs them."""

    @pytest.fixture
    def model(self, tmp_path):
        from transformers import BambaConfig, BambaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]}
        mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 8}
        model = BambaForCausalLM(BambaConfig(**sizes, **attention, **mamba)).eval()
        model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
        return model

    def test_uniform_growth_opens_in_transformers_and_computes_the_same(self, tmp_path, model):
        from transformers import BambaForCausalLM

        run_expand(tmp_path / "in", tmp_path / "out", layers="all", factor=3, init="lossless")
        grown, report = BambaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert grown.config.mamba_d_state == 18
        ids = torch.arange(22).remainder(41)[None]
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, grown.eval()(ids).logits, atol=1e-5)
            torch.nn.init.normal_(grown.model.layers[0].mamba.in_proj.weight)
            assert not torch.allclose(model(ids).logits, grown(ids).logits, atol=1e-2)

    def test_what_the_plan_does_not_touch_is_bit_equal(self, tmp_path, model):
        run_expand(tmp_path / "in", tmp_path / "out", layers="0,3", factor=2)
        before, after = load_all(tmp_path / "in"), load_all(tmp_path / "out")
        assert set(before) == set(after)
        changed = {n for n in before if bits(before[n]) != bits(after[n])}
        mixers = {
            f"model.layers.{i}.mamba.{n}" for i in (0, 3) for n in ("in_proj.weight", "conv1d.weight", "conv1d.bias")
        }
        assert changed == mixers
        assert verify_expansion(tmp_path / "in", tmp_path / "out").ok

    def test_attention_layers_have_nothing_to_grow(self, tmp_path, model):
        with pytest.raises(ConfigError, match=r"layers \[1\] .* \[0, 2, 3\]"):
            run_expand(tmp_path / "in", tmp_path / "out", layers="0,1")
        assert [e.layer for e in prepare_expansion(tmp_path / "in").after.statex.layers] == [0]


DELTA_HYBRID = {
    "model_type": "gated_deltanet",
    "vocab_size": 37,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "attn": {"layers": [1], "num_heads": 4},
    "tie_word_embeddings": False,
}


MIXED = {
    **{"d_model": 16, "n_layer": 3, "vocab_size": 40, "tie_embeddings": True, "attn_layer_idx": [1]},
    "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8},
    "attn_cfg": {"num_heads": 4},
}
"""Attention that sees later tokens, which we do not run."""


def test_layers_that_are_not_run_here_pass_through(tmp_path):
    """Whatever they hold: integers, float8, empty and scalar tensors, NaN-like bits only where allowed."""
    tensors = random_tensors(MIXED, torch.bfloat16)
    others = {
        "backbone.layers.1.mixer.in_proj.weight": torch.randn(48, 16).bfloat16(),
        "backbone.layers.1.mixer.rotary_emb.inv_freq": torch.rand(4, dtype=torch.float64),
        "backbone.layers.1.mlp.fc1.weight": torch.randn(48, 16).to(torch.float8_e4m3fn),
        "backbone.layers.1.mlp.packed": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "backbone.empty": torch.empty(0, 3),
        "backbone.step": torch.tensor(5),
    }
    write_model(tmp_path / "in", MIXED, {**tensors, **others}, shards=3)
    report = run_expand(
        *(tmp_path / "in", tmp_path / "out"),
        **{"layers": "all", "op": "grow_features", "factor": 2, "init": "lossless", "max_shard_size": 5000},
    )
    written, new = load_all(tmp_path / "out"), {f"backbone.layers.{i}.mixer.feature_gain" for i in (0, 2)}
    for name, tensor in {**tensors, **others}.items():
        assert bits(written[name]) == bits(tensor), name
    assert set(written) - set(tensors) - set(others) == new
    assert {n for n, row in report.tensors.items() if row.change == "new"} == new
    assert verify_expansion(tmp_path / "in", tmp_path / "out").ok
    with raises(ConfigError, 1, "attn_cfg", "causal"):
        from_pretrained(tmp_path / "out")


def test_a_mixed_model_still_needs_its_recurrent_tensors(tmp_path):
    tensors = random_tensors(DELTA_HYBRID)
    for name in ("model.layers.0.attn.A_log", "model.layers.2.attn.q_proj.weight"):
        tensors.pop(name)
    write_model(tmp_path / "in", DELTA_HYBRID, tensors)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.attn.A_log', 'model.layers.2.attn.q_proj.weight'"):
        prepare_expansion(tmp_path / "in")


def test_minimax_beside_softmax_attention(tmp_path):
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "block_size": 8}
    MiniMaxForCausalLM(MiniMaxConfig(**sizes, **heads)).save_pretrained(tmp_path / "in")
    config = read_config(tmp_path / "in")
    assert config.recurrent_layers
    assert len(config.recurrent_layers) < 2
    run_expand(tmp_path / "in", tmp_path / "out", layers="all", factor=2, init="lossless")
    before, after = load_all(tmp_path / "in"), load_all(tmp_path / "out")
    assert all(bits(before[n]) == bits(after[n]) for n in before)
    assert set(after) - set(before) == {f"model.layers.{config.recurrent_layers[0]}.self_attn.mix"}


def test_zero3_as_source_equals_safetensors_as_source(tmp_path):
    from benchmarks.synthetic_zero3 import write_zero3
    from statex_dist.models.source import open_source

    tensors = write_model(tmp_path / "hf", GLA)
    tag = tmp_path / "run/checkpoints/global_step7"
    write_zero3(tag, tensors, 3, sub_group_size=2000)
    (tag / "model").mkdir()
    (tag / "model/config.json").write_text(json.dumps(GLA))
    options = {"layers": "0,2", "factor": 2, "init": "inherit", "op": "grow_state", "seed": 3}
    run_expand(tmp_path / "hf", tmp_path / "a", **options)
    run_expand(tmp_path / "run", tmp_path / "b", **options)
    one, other = load_all(tmp_path / "a"), load_all(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(bits(one[n]) == bits(other[n]) for n in one)
    assert verify_expansion(tmp_path / "run", tmp_path / "b").ok
    assert all(torch.equal(read_tensor(open_source(tmp_path / "run"), n), t) for n, t in tensors.items())


def test_metadata_and_companions_are_carried_along(tmp_path):
    tensors = write_model(tmp_path / "in", {**GLA, "my_note": {"a": [1]}})
    save_file(tensors, tmp_path / "in/model.safetensors", metadata={"format": "pt", "base": "mine"})
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE"):
        (tmp_path / "in" / name).write_text(name)
    run_expand(tmp_path / "in", tmp_path / "out", factor=2)
    from safetensors import safe_open

    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "base": "mine"}
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert list(values) == [*GLA, "my_note", "hidden_act", "statex"], "keys and their order are the source's, ours last"
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "LICENSE", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()

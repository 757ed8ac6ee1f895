import json

import pytest
import torch
import xxhash

from checkpoints_tools.plan.options import PlanOptions, plan_model
from checkpoints_tools.verify.inspect import inspect
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.registry import config_from_dict, expand_state_dict, family_of, read_config
from tests.checkpoints_tools.builders import (
    CONFIGS,
    GLA,
    MAMBA2,
    load_all,
    random_tensors,
    run_expand,
    write_model,
)

CASES = [
    ("gla", {"factor": 2, "init": "reinit"}),
    ("gla", {"factor": "full", "init": "inherit"}),
    ("gla", {"factor": 3, "init": "lossless"}),
    ("gla", {"op": "mix_heads", "factor": 2, "init": "reinit"}),
    ("gla", {"op": "grow_state", "factor": 3, "init": "lossless"}),
    ("gla", {"op": "grow_features", "rolls": "0,1", "relu": True}),
    ("mamba2", {"factor": 2, "init": "copy", "reset_dynamics": True}),
    ("mamba2", {"factor": 2, "init": "reinit"}),
    ("mamba2", {"factor": 3, "init": "inherit"}),
    ("mamba2", {"factor": 2, "init": "lossless"}),
    ("mamba2", {"op": "grow_features"}),
]


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("family", "options"), CASES)
def test_streaming_equals_in_memory(tmp_path, family, options):
    values = CONFIGS[family]
    tensors = write_model(tmp_path / "in", values)
    report = run_expand(tmp_path / "in", tmp_path / "out", layers="0,2", seed=5, max_shard_size=3000, **options)
    before, after = config_from_dict(values), read_config(tmp_path / "out")
    written = load_all(tmp_path / "out")
    expected = expand_state_dict(tensors, before, plan_model(before, PlanOptions(layers="0,2", seed=5, **options)))
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert {n: tuple(t.shape) for n, t in written.items()} == {
        n: spec.shape for n, spec in family_of(family).tensors(after).items()
    }
    names = family_of(family).names
    outside = [n for n in written if names.split(n) is None or names.split(n)[0] == 1]
    assert all(torch.equal(written[n], tensors[n]) for n in outside)
    assert report.kept_outside == len(outside)
    assert set(report.tensors) == set(written)
    for name, change in report.tensors.items():
        if change.change == "kept":
            assert torch.equal(written[name], tensors[name])
        assert change.xxh3_128 == digest(written[name])
        assert change.source_xxh3_128 == (digest(tensors[name]) if change.change == "kept" else None)
    assert json.loads((tmp_path / "out/expansion_report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert (tmp_path / "out/tokenizer_config.json").exists()
    assert (tmp_path / "out/generation_config.json").exists()
    assert inspect(tmp_path / "out").complete
    assert inspect(tmp_path / "out").manifest == "sizes agree"


def changes(report, prefix: str) -> dict[str, str]:
    return {n.removeprefix(prefix): row.change for n, row in report.tensors.items() if n.startswith(prefix)}


def test_the_report_names_what_happened(tmp_path):
    write_model(tmp_path / "g", GLA)
    write_model(tmp_path / "m", MAMBA2)
    merged = run_expand(tmp_path / "g", tmp_path / "g1", layers="0", factor=2, init="reinit")
    change = changes(merged, "model.layers.0.")
    assert change["attn.q_proj.weight"] == "reinitialised"
    assert change["attn.g_norm_swish_gate.weight"] == "grown"
    assert change["mlp.up_proj.weight"] == change["attn_norm.weight"] == "kept"
    assert set(changes(merged, "model.layers.1.").values()) == {"kept"}
    rows = merged.to_dict()["tensors"]["model.layers.0.attn.q_proj.weight"]["rows"]
    assert rows == [{"rows": 16, "distribution": "Normal", "std": 0.02}]
    mixed = run_expand(tmp_path / "g", tmp_path / "g2", layers="0", factor=2, init="lossless")
    assert [n for n, row in mixed.tensors.items() if row.change != "kept"] == ["model.layers.0.attn.mix"]
    featured = run_expand(tmp_path / "g2", tmp_path / "g3", layers="1", op="grow_features", rolls="1", match_norm=True)
    assert [n for n, row in featured.tensors.items() if row.change != "kept"] == ["model.layers.1.attn.feature_gain"]
    row = featured.to_dict()["tensors"]["model.layers.1.attn.feature_gain"]
    assert row["rows"] == [{"rows": 4, "distribution": "Constant", "value": 0.0}]
    assert featured.parameters_after - featured.parameters_before == 4 * 4
    assert featured.to_dict()["layers"][0]["features"] == {"rolls": [1], "relu": False, "match_norm": True}
    grown = run_expand(tmp_path / "m", tmp_path / "m1", layers="0", factor=2, init="lossless", seed=7)
    change = changes(grown, "backbone.layers.0.mixer.")
    assert [n for n, c in change.items() if c == "grown"] == [
        "in_proj.weight",
        "in_proj.bias",
        "conv1d.weight",
        "conv1d.bias",
    ]
    row = grown.to_dict()["tensors"]["backbone.layers.0.mixer.in_proj.weight"]
    # z and x of 32 rows each and 6 of B; new B; 6 of C; new C; dt of 8 heads
    assert row["rows"] == [
        {"rows": 70, "from": [0, 70]},
        {"rows": 6, "distribution": "Normal", "std": 0.1},
        {"rows": 6, "from": [70, 76]},
        {"rows": 6, "distribution": "Constant", "value": 0.0},
        {"rows": 8, "from": [76, 84]},
    ]
    assert row["seed"] == 7
    assert grown.to_dict()["layers"][0]["changes"] == {"kept": 7, "grown": 4}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("init", ["inherit", "lossless"])
def test_new_mamba2_rows_stand_behind_each_group(tmp_path, groups, init):
    values = {**MAMBA2, "n_groups": groups}
    tensors = write_model(tmp_path / "in", values)
    run_expand(tmp_path / "in", tmp_path / "out", layers="1", factor=2, init=init)
    written, state, inner = load_all(tmp_path / "out"), 6, 32
    # Rows of in_proj, spelled out: z, x, then B of every group, C of every group, then one dt a head.
    old_rows = torch.arange(inner * 2 + 2 * groups * state + 8)
    z_x, old_b, old_c, dt = old_rows.split([2 * inner, groups * state, groups * state, 8])
    for suffix, skip in (("in_proj.weight", 0), ("conv1d.weight", inner), ("in_proj.bias", 0), ("conv1d.bias", inner)):
        name = f"backbone.layers.1.mixer.{suffix}"
        old, new = tensors[name], written[name]
        place = 2 * inner - skip
        assert torch.equal(new[:place], old[:place])
        for part, rows in enumerate((old_b, old_c)):
            for group in range(groups):
                begin = place + (part * groups + group) * 2 * state
                kept = rows[group * state : (group + 1) * state] - skip
                assert torch.equal(new[begin : begin + state], old[kept])
                added = new[begin + state : begin + 2 * state]
                zero = "bias" in suffix or (init == "lossless" and part == 1 and suffix == "in_proj.weight")
                assert bool((added == 0).all()) == zero
        if skip == 0:
            assert torch.equal(new[place + 4 * groups * state :], old[dt])
        assert z_x.numel() == 2 * inner


def test_random_values_do_not_depend_on_shards(tmp_path):
    tensors = write_model(tmp_path / "one", GLA)
    write_model(tmp_path / "many", GLA, tensors, shards=4)
    run_expand(tmp_path / "one", tmp_path / "out1", factor=2, layers="all", seed=3)
    run_expand(tmp_path / "many", tmp_path / "out2", factor=2, layers="all", seed=3, max_shard_size=2000)
    run_expand(tmp_path / "one", tmp_path / "out3", factor=2, layers="all", seed=4)
    one, two, three = (load_all(tmp_path / f"out{i}") for i in (1, 2, 3))
    assert len(list((tmp_path / "out2").glob("*.safetensors"))) > 4
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.layers.0.attn.q_proj.weight"], three["model.layers.0.attn.q_proj.weight"])


def test_dtype_is_written_and_named(tmp_path):
    tensors = write_model(tmp_path / "in", GLA)
    run_expand(tmp_path / "in", tmp_path / "out", factor=2, init="inherit", dtype="bf16")
    written = load_all(tmp_path / "out")
    assert all(t.dtype == torch.bfloat16 for t in written.values())
    assert torch.equal(written["lm_head.weight"], tensors["lm_head.weight"].bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_defaults(tmp_path):
    assert plan_model(config_from_dict(GLA)).statex.to_dict()["layers"] == [
        {"layer": 0, "op": "merge_heads", "factor": 4, "init": "reinit", "seed": 0}
    ]
    assert plan_model(config_from_dict({**MAMBA2, "num_hidden_layers": 8})).statex.to_dict()["layers"] == [
        {"layer": layer, "op": "grow_state", "factor": 4, "init": "reinit", "seed": 0} for layer in (0, 6)
    ]


def test_tied_head_in_the_file(tmp_path):
    tensors = random_tensors(MAMBA2)
    equal = {**tensors, "lm_head.weight": tensors["backbone.embeddings.weight"].clone()}
    write_model(tmp_path / "equal", MAMBA2, equal)
    run_expand(tmp_path / "equal", tmp_path / "out", factor=2)
    # Stored twice in the source, stored twice in the target: still equal, so still tied for who reads it.
    written = load_all(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], written["backbone.embeddings.weight"])
    write_model(tmp_path / "other", MAMBA2, {**equal, "lm_head.weight": equal["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*backbone\.embeddings\.weight"):
        run_expand(tmp_path / "other", tmp_path / "out2", factor=2)


@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        ({"num_heads": 5, "hidden_size": 40}, {"factor": 2}, ConfigError, "5 heads"),
        ({}, {"factor": 2, "layers": "0,3"}, ConfigError, "layer 3.*range"),
        ({}, {"factor": "most"}, ConfigError, "'most'"),
        ({}, {"factor": 2, "workers": 0}, ConfigError, "--workers.*not 0"),
        ({}, {"factor": 2, "dtype": "int4"}, ConfigError, "int4"),
        ({}, {"factor": 2, "init": "lossless", "op": "merge_heads"}, ConfigError, "cannot be lossless"),
        ({}, {"factor": 2, "init": "copy"}, ConfigError, "init copy.*mamba2"),
        ({}, {"op": "grow_features", "factor": 4}, ConfigError, "factor 4 .* 2 to 3: 4 key channels"),
        ({}, {"op": "grow_features", "factor": 2, "init": "reinit"}, ConfigError, "grow_features .*lossless.* reinit"),
    ],
)
def test_wrong_options(tmp_path, values, options, error, message):
    write_model(tmp_path / "in", {**GLA, **values})
    with pytest.raises(error, match=message):
        run_expand(tmp_path / "in", tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_wrong_sources_and_targets(tmp_path):
    tensors = write_model(tmp_path / "in", GLA)
    write_model(tmp_path / "llama", {**GLA, "model_type": "gla"})
    (tmp_path / "llama/config.json").write_text(json.dumps({**GLA, "model_type": "llama"}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("x")
    write_model(tmp_path / "lacking", GLA, {n: t for n, t in tensors.items() if "2.mlp.up" not in n})
    write_model(tmp_path / "more", GLA, {**tensors, "model.rotary": torch.zeros(2)})
    write_model(tmp_path / "shape", GLA, {**tensors, "lm_head.weight": torch.zeros(36, 32)})
    for source, target, message in (
        ("llama", "out", "'llama'"),
        ("nowhere", "out", "not found"),
        ("empty", "out", "not a checkpoint: looked for"),
        ("file", "out", "is a file"),
        ("lacking", "out", "lacks tensor 'model.layers.2.mlp.up_proj.weight'"),
        ("more", "out", "holds tensor 'model.rotary'"),
        ("shape", "out", "'lm_head.weight' has shape"),
        ("in", "full", "not empty"),
        ("in", "in", "overlaps the source"),
        ("in", "in/deeper", "overlaps the source"),
        ("in", "file", "is a file"),
        ("in", "file/deeper", "cannot be written"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run_expand(tmp_path / source, tmp_path / target, factor=2)
    assert not list(tmp_path.glob(".tmp*"))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/precious").exists()
    run_expand(tmp_path / "in", tmp_path / "full", factor=2, overwrite=True)
    assert not (tmp_path / "full/precious").exists()


def test_truncated_weights_leave_nothing(tmp_path):
    write_model(tmp_path / "in", GLA)
    path = tmp_path / "in/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        run_expand(tmp_path / "in", tmp_path / "out", factor=2)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_expanding_again(tmp_path):
    write_model(tmp_path / "in", GLA)
    run_expand(tmp_path / "in", tmp_path / "one", layers="0", factor=2)
    with pytest.raises(ConfigError, match=r"\[0\] are already expanded"):
        run_expand(tmp_path / "one", tmp_path / "two", layers="0,1", factor=2)
    account = run_expand(tmp_path / "one", tmp_path / "two", layers="1", factor=2)
    assert [layer.expansion.layer for layer in account.layers] == [1]
    assert [e.layer for e in read_config(tmp_path / "two").statex.layers] == [0, 1]
    first, second = load_all(tmp_path / "one"), load_all(tmp_path / "two")
    assert all(torch.equal(first[n], second[n]) for n in first if ".layers.0." in n)


def test_flipped_byte_is_caught_by_the_manifest(tmp_path):
    write_model(tmp_path / "in", GLA)
    run_expand(tmp_path / "in", tmp_path / "out", factor=2)
    path = tmp_path / "out/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"out .* tensor '.*' .*MANIFEST"):
        run_expand(tmp_path / "out", tmp_path / "again", factor=2, layers="1")


def test_failure_while_writing_keeps_the_old_target(tmp_path):
    write_model(tmp_path / "in", GLA)
    run_expand(tmp_path / "in", tmp_path / "out", factor=2, seed=1)
    before = (tmp_path / "out/model.safetensors").read_bytes()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_expand(tmp_path / "in", tmp_path / "out", factor=2, seed=2, overwrite=True, progress=stop)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("groups", [1, 2])
def test_lossless_growth_keeps_the_logits_of_transformers(tmp_path, groups):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 19,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 8,
        "chunk_size": 8,
    }
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=6, n_groups=groups)).eval()
    model.save_pretrained(tmp_path / "in")
    run_expand(tmp_path / "in", tmp_path / "out", layers="all", factor=3, init="lossless", max_shard_size=4000)
    # Every layer grew alike, so the result is a plain Mamba2 of three times the state.
    grown = Mamba2ForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert grown.config.state_size == 18
    ids = torch.arange(22).remainder(19)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, grown(ids).logits, atol=1e-5)
        torch.nn.init.normal_(grown.backbone.layers[0].mixer.in_proj.weight)
        assert not torch.allclose(model(ids).logits, grown(ids).logits, atol=1e-2)

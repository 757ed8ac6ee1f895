"""Hosts of delta-rule and Lightning layers: precision, packs, decoding, expansion, names, refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.hf import from_pretrained
from statex_dist.models.mitigation import parse_mitigation
from statex_dist.models.registry import config_from_dict, expand_state_dict, make_plan, read_config
from tests.models.hybrid.hosts import DELTA_HOSTS, VOCABULARY, save_host
from tests.raising import raises

LENGTHS = [7, 1, 9]
LOGITS = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=DELTA_HOSTS)
def made(request, tmp_path_factory):
    """Return a host, its directory and our model of it."""
    directory = tmp_path_factory.mktemp(request.param)
    host = save_host(request.param, directory)
    return host, directory, from_pretrained(directory).eval()


def tokens():
    return torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def packed(model, ids, **options):
    """Return the logits of a pack."""
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    places = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None].int()
    return model(ids, cu_seqlens=borders, seq_idx=places, **options).logits


def expand(directory, target, **plan):
    """Expand the tensors of a directory into another one, and return the model there."""
    before = read_config(directory)
    after = make_plan(before, layers="all", **plan)
    stored = load_file(directory / "model.safetensors")
    names = {name: tuple(x.shape) for name, x in stored.items()}
    renamed = {name: parts[0].name for name, parts in before.file_parts(names).items()}
    stored = {renamed.get(name, name): x for name, x in stored.items()}
    target.mkdir()
    save_file(expand_state_dict(stored, before, after), target / "model.safetensors")
    (target / "config.json").write_text(after.to_json())
    return from_pretrained(target).eval()


@pytest.mark.parametrize("op", ["mix_heads", "grow_features"])
def test_an_expansion_starts_at_the_same_function(made, tmp_path, op):
    _, directory, ours = made
    grown = expand(directory, tmp_path / op, op=op, factor=2, init="lossless")
    assert grown.config.state_elements > ours.config.state_elements
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens()).logits, ours(tokens()).logits, **LOGITS)
    packed(grown, tokens()).logsumexp(-1).sum().backward()
    new = [x for name, x in grown.named_parameters() if name.endswith((".mix", ".feature_gain"))]
    assert new
    assert all(x.grad.abs().max() > 0 for x in new)


@pytest.mark.parametrize(
    ("op", "init"), [("merge_heads", "inherit"), ("merge_heads", "reinit"), ("grow_state", "lossless")]
)
def test_a_mixed_minimax_merges_and_grows(tmp_path, op, init):
    save_host("minimax", tmp_path / "base")
    ours = from_pretrained(tmp_path / "base").eval()
    grown = expand(tmp_path / "base", tmp_path / "grown", op=op, factor=2, init=init)
    assert grown.config.state_elements == 2 * ours.config.state_elements
    ids = tokens()
    with torch.no_grad():
        logits = grown(ids).logits
        if init == "lossless":
            torch.testing.assert_close(logits, ours(ids).logits, **LOGITS)
        alone = torch.cat([grown(part).logits for part in ids.split(LENGTHS, 1)], 1)
        torch.testing.assert_close(packed(grown, ids), alone, **LOGITS)


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_model_of_a_multimodal_one_is_run(tmp_path, model_type):
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, **DELTA_HOSTS[f"{model_type}_text"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "patch_size": 4}
    save_host(f"{model_type}_text", tmp_path / "text")  # its module without kernels
    settings = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision)
    host = AutoModelForImageTextToText.from_config(settings).eval()
    host.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "mtp.norm.weight": torch.ones(32)}, path)
    ours = from_pretrained(tmp_path / "whole").eval()
    files = {part.name for parts in ours.file_parts().values() for part in parts}
    assert files == {name for name in tensors if "visual" not in name}
    with torch.no_grad():
        expected = host(tokens(), use_cache=False).logits
        torch.testing.assert_close(ours(tokens()).logits, expected, **LOGITS)
    grown = expand(tmp_path / "whole", tmp_path / "grown", op="mix_heads", factor=2, init="lossless")
    with torch.no_grad():
        torch.testing.assert_close(grown(tokens()).logits, expected, **LOGITS)
    with pytest.raises(KeyError, match="expanded"):  # a class that is named knows no plan
        type(host).from_pretrained(tmp_path / "grown")
    if model_type == "qwen3_5_moe":  # the hub stores a layer's experts in one tensor
        fused = {name: x for name, x in tensors.items() if ".experts." not in name}
        memory = {name: x for name, x in host.state_dict().items() if ".experts." in name}
        save_file({**fused, **memory}, path)
        with torch.no_grad():
            again = from_pretrained(tmp_path / "whole").eval()
            torch.testing.assert_close(again(tokens()).logits, expected, **LOGITS)


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("qwen3_next", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ("qwen3_next", {"linear_num_value_heads": 3}, [3, 2]),
        ("qwen3_5_text", {"linear_key_head_dim": 0}, [0]),
        ("olmo_hybrid", {"linear_num_key_heads": "4"}, ["linear_num_key_heads"]),
        ("olmo_hybrid", {"linear_num_key_heads": 0}, ["linear_num_key_heads", 0]),
        ("kimi_linear", {"linear_attn_config": 3}, ["linear_attn_config", 3]),
        (
            "kimi_linear",
            {"layer_types": None, "linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [3]}},
            ["linear_attn_config", 3],
        ),
        (
            "kimi_linear",
            {"layer_types": None, "linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [5]}},
            ["linear_attn_config", 4, 5],
        ),
    ],
)
def test_what_the_mixers_do_not_implement_is_refused(tmp_path, model_type, changes, named):
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, **DELTA_HOSTS[model_type]}
    values = CONFIG_MAPPING[model_type](**settings).to_dict()
    with raises(CheckpointError, *named):
        config_from_dict({**values, **changes})


def test_a_minimax_with_a_window_is_expanded_and_not_run():
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, **DELTA_HOSTS["minimax"], "sliding_window": 4}
    config = config_from_dict(CONFIG_MAPPING["minimax"](**settings).to_dict())
    make_plan(config, layers="all", factor=2, init="inherit")
    with raises(ConfigError, "minimax", "sliding_window"):
        config.require_runnable()


def test_layers_of_kimi_are_counted_from_one_in_their_section():
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, **DELTA_HOSTS["kimi_linear"]}
    values = CONFIG_MAPPING["kimi_linear"](**settings).to_dict()
    section = {"kda_layers": [1, 2, 4, 5], "full_attn_layers": [3], "num_heads": 2, "head_dim": 16}
    config = config_from_dict({**values, "layer_types": None, "linear_attn_config": section})
    assert config.attention_layers == (2,)
    assert (config.layer_geometry(0).num_heads, config.layer_geometry(0).key_dim) == (2, 16)


def test_mitigations_act_on_recurrent_layers_in_training_and_decoding(made):
    _, _, ours = made
    ids = tokens()
    with torch.no_grad():
        plain = ours(ids).logits
    for text in ("forget-more", "state-norm:limit=0.01,every=1"):
        ours.mitigation = parse_mitigation(text)
        try:
            with torch.no_grad():
                whole = ours(ids).logits
                step = ours(ids[:, :9], output_states=True)
                logits = [step.logits]
                for token in ids[:, 9:].split(1, 1):
                    step = ours(token, states=step.states, output_states=True)
                    logits.append(step.logits)
        finally:
            ours.mitigation = None
        assert not torch.allclose(whole, plain)
        torch.testing.assert_close(torch.cat(logits, 1), whole, **LOGITS)


def test_a_window_of_states_fits_lightning_and_no_delta_rule(made):
    _, _, ours = made
    window = parse_mitigation("sliding-window:tokens=4")
    if ours.config.RECURRENCE == "delta_rule":
        with raises(ConfigError, ours.config.MODEL_TYPE):
            window.check_model(ours.config)
    else:
        window.check_model(ours.config)

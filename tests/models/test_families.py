"""HGRN2, RetNet, Lightning (MiniMax), Gated DeltaNet and KDA against models that are not ours.

The four families of flash-linear-attention are written out here as plain functions on weights under their published
names, around its naive recurrences; MiniMax is compared with transformers' class. Then come the requirements on every
expansion of these families.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open

from statex_dist.errors import ConfigError
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import expand_state_dict, family_of, make_plan
from tests.models.tiny import (
    build,
    gated_deltanet_config,
    hgrn2_config,
    kda_config,
    minimax_config,
    retnet_config,
    tokens,
)
from tests.ops.scan_cases import borders

# --- the published models, equation by equation ---------------------------------------------------------------------


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


def convolve(x, kernel):
    x = F.pad(x.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    return F.conv1d(x, kernel, groups=kernel.shape[0]).transpose(1, 2)


def projections(config, w, x, names, *, activation):
    """Three projections, each through its short convolution where the model has them, then the activation."""
    result = []
    for name in names:
        y = x @ w[f"attn.{name}_proj.weight"].T
        if config.use_short_conv:
            y = convolve(y, w[f"attn.{name}_conv1d.weight"])
        result.append(activation(y))
    return result


def layer_weights(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def lower_bound(config, weights, layer):
    """HGRN2's bounds: a cumulative softmax over the layers, moved so that the first layer's is zero."""
    shares = weights["model.lower_bounds"].softmax(0)
    return shares[: layer + 1].sum(0) - shares[0]


def hgrn2_inputs(config, w, x, weights, layer):
    q, f, v = projections(config, w, x, "qfi", activation=lambda y: y)
    forget = torch.sigmoid(f)
    if config.use_lower_bound and layer > 0:
        bound = lower_bound(config, weights, layer)
        forget = bound + (1 - bound) * forget
    heads = config.num_heads if config.expand_ratio is None else config.hidden_size // config.expand_ratio
    return [split(y, heads) for y in (F.silu(q), 1 - forget, v, forget.log())]


def rotated(x, size):
    """Rotary positions as complex numbers: channel ``i`` is the real part, ``i + size / 2`` the imaginary part."""
    x = x.unflatten(-1, (-1, size))
    real, imaginary = x.chunk(2, dim=-1)
    frequency = 10000 ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None, None] * frequency
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).flatten(-2)


def retnet_inputs(config, w, x, weights, layer):
    activation = F.silu if config.use_short_conv else (lambda y: y)
    q, k, v = (split(y, config.num_heads) for y in projections(config, w, x, "qkv", activation=activation))
    size = int(config.hidden_size * config.expand_k) // config.num_heads
    decay = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(config.num_heads)], dtype=x.dtype)
    return [rotated(q, size), rotated(k, size), v, decay[:, None].expand_as(k)]


def minimax_inputs(config, w, x, weights, layer):
    """Queries, keys and values of a head stand side by side; rates fall with the head and with the layer."""
    heads, size = config.num_attention_heads, config.head_dim or config.hidden_size // config.num_attention_heads
    qkv = F.silu(split(x @ w["self_attn.qkv_proj.weight"].T, heads))
    keys = (qkv.shape[-1] - size) // 2
    q, k, v = qkv.split([keys, keys, size], dim=-1)
    depth = 1 - layer / (config.num_hidden_layers - 1 + 1e-5) + 1e-5
    rates = torch.tensor([(0.5 ** (8 / heads)) ** (h + 1) * depth for h in range(heads)], dtype=x.dtype)
    return [q, k, v, -rates[:, None].expand_as(k)]


def hgrn2_attention(config, w, x, weights, layer):
    naive = pytest.importorskip("fla.ops.gla.naive", reason="fla-core is not installed")
    o, _ = naive.naive_recurrent_gla(*hgrn2_inputs(config, w, x, weights, layer))
    return rms(o.flatten(2), w["attn.g_norm.weight"], 1e-5)  # whatever norm_eps says


def retnet_attention(config, w, x, weights, layer):
    naive = pytest.importorskip("fla.ops.retention.naive", reason="fla-core is not installed")
    q, k, v, _ = (y.transpose(1, 2) for y in retnet_inputs(config, w, x, weights, layer))
    o = naive.naive_retention(q, k, v).transpose(1, 2)
    norm = "g_norm_swish_gate" if config.fuse_norm else "g_norm"
    o = rms(o, w[f"attn.{norm}.weight"], config.norm_eps)
    return o.flatten(2) * F.silu(x @ w["attn.g_proj.weight"].T)


def delta_inputs(config, w, x):
    q, k, v = projections(config, w, x, "qkv", activation=F.silu)
    q, k = (unit(split(y, config.num_heads)) for y in (q, k))
    beta = torch.sigmoid(x @ w["attn.b_proj.weight"].T) * (2 if config.allow_neg_eigval else 1)
    return q, k, split(v, beta.shape[-1]), beta


def gated_deltanet_attention(config, w, x, weights, layer):
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="fla-core is not installed")
    q, k, v, beta = delta_inputs(config, w, x)
    g = -w["attn.A_log"].exp() * F.softplus(x @ w["attn.a_proj.weight"].T + w["attn.dt_bias"])
    q, k = (y.repeat_interleave(v.shape[2] // y.shape[2], dim=2) for y in (q, k))
    o, _ = naive.naive_recurrent_gated_delta_rule(q, k, v, beta, g)
    o = rms(o, w["attn.o_norm.weight"], config.norm_eps).flatten(2)
    if not config.use_gate:
        return o
    gate = x @ w["attn.g_proj.weight"].T
    return o * (torch.sigmoid(gate) if config.output_gate_activation == "sigmoid" else F.silu(gate))


def kda_attention(config, w, x, weights, layer):
    naive = pytest.importorskip("fla.ops.kda.naive", reason="fla-core is not installed")
    gates = pytest.importorskip("fla.ops.kda.gate", reason="fla-core is not installed")
    q, k, v, beta = delta_inputs(config, w, x)
    f = split(x @ w["attn.f_proj.0.weight"].T @ w["attn.f_proj.1.weight"].T, v.shape[2])
    parameters = {"A_log": w["attn.A_log"], "dt_bias": w["attn.dt_bias"]}
    if config.lower_bound is None:
        g = gates.naive_kda_gate(f, **parameters)
    else:
        g = gates.naive_kda_lowerbound_gate(f, **parameters, lower_bound=config.lower_bound)
    o, _ = naive.naive_recurrent_kda(q, k, v, g, beta)
    gate = x @ w["attn.g_proj.0.weight"].T @ w["attn.g_proj.1.weight"].T + w["attn.g_proj.1.bias"]
    return rms(o, w["attn.o_norm.weight"], config.norm_eps).flatten(2) * torch.sigmoid(gate)


ATTENTION = {
    "hgrn2": hgrn2_attention,
    "retnet": retnet_attention,
    "gated_deltanet": gated_deltanet_attention,
    "kda": kda_attention,
}


def assembled(config, weights, ids):
    """The published model around one of these; all are stacks of pre-norm blocks with a SwiGLU MLP."""
    eps = config.norm_eps
    x = weights["model.embeddings.weight"][ids]
    for layer in range(config.num_hidden_layers):
        w = layer_weights(weights, f"model.layers.{layer}.")
        h = rms(x, w["attn_norm.weight"], eps)
        x = x + ATTENTION[config.MODEL_TYPE](config, w, h, weights, layer) @ w["attn.o_proj.weight"].T
        h = rms(x, w["mlp_norm.weight"], eps)
        x = (
            x
            + (F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
        )
    return rms(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


FLA_VARIANTS = {
    "hgrn2": hgrn2_config(),
    "hgrn2, three layers": hgrn2_config(num_hidden_layers=3, initializer_range=0.2),
    "hgrn2, heads by number": hgrn2_config(expand_ratio=None, num_heads=2),
    "hgrn2, both given: the ratio decides": hgrn2_config(expand_ratio=8, num_heads=4),
    "hgrn2, short convolution": hgrn2_config(use_short_conv=True, conv_size=3),
    "hgrn2, no lower bound": hgrn2_config(use_lower_bound=False, tie_word_embeddings=True),
    "hgrn2, no fused norm": hgrn2_config(fuse_norm=False, norm_eps=1e-3),
    "retnet": retnet_config(),
    "retnet, no fused norm": retnet_config(fuse_norm=False, norm_eps=1e-3),
    "retnet, short convolution": retnet_config(use_short_conv=True),
    "retnet, short convolution of three, no fused norm": retnet_config(
        use_short_conv=True, conv_size=3, fuse_norm=False
    ),
    "retnet, public ratios": retnet_config(intermediate_size=None, hidden_ratio=2),
    "retnet, small keys": retnet_config(expand_k=0.5, expand_v=1.0),
    "retnet, one head": retnet_config(num_heads=1, tie_word_embeddings=True),
    "gated_deltanet": gated_deltanet_config(),
    "gated_deltanet, no shared heads": gated_deltanet_config(num_v_heads=None, expand_v=2.0),
    "gated_deltanet, one key head": gated_deltanet_config(num_heads=1, num_v_heads=3),
    "gated_deltanet, no convolution": gated_deltanet_config(use_short_conv=False),
    "gated_deltanet, no gate": gated_deltanet_config(use_gate=False, norm_eps=1e-3),
    "gated_deltanet, sigmoid gate": gated_deltanet_config(output_gate_activation="sigmoid", conv_size=3),
    "gated_deltanet, negative eigenvalues": gated_deltanet_config(allow_neg_eigval=True),
    "kda": kda_config(),
    "kda, shared heads": kda_config(num_heads=2, num_v_heads=4, expand_v=1.5),
    "kda, no convolution": kda_config(use_short_conv=False, tie_word_embeddings=True),
    "kda, safe gate": kda_config(lower_bound=-5.0, safe_gate=True),
    "kda, bound alone, shared heads": kda_config(lower_bound=-2.0, num_heads=1, num_v_heads=2),
    "kda, negative eigenvalues": kda_config(allow_neg_eigval=True, expand_v=2.0, norm_eps=1e-3),
}


def with_memory(model):
    """Spread the decay rates: the ones of a fresh model forget all but a few tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-4, 1, len(parameter)))
            elif name.endswith("lower_bounds"):
                parameter.mul_(8)
    return model


@pytest.mark.parametrize("config", FLA_VARIANTS.values(), ids=FLA_VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_logits_equal_the_assembled_model(config, num_tokens):
    """Both in float64, so that the rounding left is that of fla's recurrences, which run in fp32."""
    model = with_memory(build(config))
    ids = tokens(2, num_tokens)
    with torch.no_grad():
        ours = model(ids, chunk_size=16).logits
        expected = assembled(config, model.state_dict(), ids)
    assert expected.abs().max() > 0.1, "a comparison of zeros would prove nothing"
    assert (ours - expected).abs().max() < 5e-5


@pytest.mark.parametrize("config", [FLA_VARIANTS[name] for name in ATTENTION], ids=ATTENTION)
def test_the_comparison_sees_the_memory(config):
    """A check of the check: the first token still moves the logits of the last one."""
    model = with_memory(build(config))
    ids = tokens(1, 40)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 40
    with torch.no_grad():
        moved = assembled(config, model.state_dict(), ids) - assembled(config, model.state_dict(), other)
    assert moved[:, -1].abs().max() > 1e-3


MINIMAX_VARIANTS = {
    "default": {},
    "wide heads": {"head_dim": 8},
    "three heads": {"num_attention_heads": 3, "head_dim": 6},
    "one expert": {"num_experts_per_tok": 1},
    "every expert": {"num_experts_per_tok": 3, "tie_word_embeddings": True},
    "five layers": {"num_hidden_layers": 5, "initializer_range": 0.2},
    "factors": {
        "linear_attn_alpha_factor": 3.5,
        "linear_attn_beta_factor": 0.5,
        "mlp_alpha_factor": 2.5,
        "mlp_beta_factor": 1.5,
    },
    # transformers gives this epsilon to every norm but that of the attention's outputs, which has 1e-6
    "norm epsilon": {"rms_norm_eps": 1e-2},
}


class TestMiniMaxIsTransformers:
    """transformers 5 fuses the experts in memory; files keep the published names, so models pass through files."""

    def theirs(self, config, directory=None):
        """transformers' model with random weights, or with those in a directory."""
        values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        values |= {"block_size": 16, "attn_implementation": "eager"}
        settings = transformers.MiniMaxConfig(**values)
        if directory is None:
            return transformers.MiniMaxForCausalLM(settings).eval()
        model, report = transformers.MiniMaxForCausalLM.from_pretrained(
            directory, config=settings, output_loading_info=True
        )
        assert not report["unexpected_keys"]
        assert all(name.endswith(config.DERIVED) for name in report["missing_keys"])
        return model.eval()

    @pytest.mark.parametrize("variant", MINIMAX_VARIANTS)
    @pytest.mark.parametrize("num_tokens", [1, 40])
    def test_logits_and_states(self, tmp_path, variant, num_tokens):
        config = minimax_config(**MINIMAX_VARIANTS[variant])
        model = build(config, dtype=torch.float32)
        save_pretrained(model, tmp_path / "model")
        other, ids = self.theirs(config, tmp_path / "model"), tokens(2, num_tokens)
        with torch.no_grad():
            ours, expected = model(ids, output_states=True, chunk_size=8), other(ids, use_cache=True)
        assert expected.logits.abs().max() > 0.1, "a comparison of zeros would prove nothing"
        assert (ours.logits - expected.logits).abs().max() < 5e-5
        for (state,), cached in zip(ours.states, expected.past_key_values.linear_cache, strict=True):
            assert (state - cached).abs().max() < 5e-5

    def test_we_load_what_transformers_writes(self, tmp_path):
        """Its buffers are in the file and belong to no parameter of ours."""
        config = minimax_config()
        torch.manual_seed(0)
        other = self.theirs(config)
        other.save_pretrained(tmp_path)
        ids = tokens(2, 30)
        with torch.no_grad():
            assert (from_pretrained(tmp_path)(ids).logits - other(ids).logits).abs().max() < 5e-5


# --- names and shapes -----------------------------------------------------------------------------------------------

BLOCK = {
    "attn_norm.weight": (2048,),
    "mlp_norm.weight": (2048,),
    "mlp.gate_proj.weight": (5632, 2048),
    "mlp.up_proj.weight": (5632, 2048),
    "mlp.down_proj.weight": (2048, 5632),
}
PUBLISHED = {
    "hgrn2": (
        {"use_short_conv": True, "expand_ratio": 128},
        BLOCK
        | {
            "attn.q_proj.weight": (2048, 2048),
            "attn.f_proj.weight": (2048, 2048),
            "attn.i_proj.weight": (2048, 2048),
            "attn.q_conv1d.weight": (2048, 1, 4),
            "attn.f_conv1d.weight": (2048, 1, 4),
            "attn.i_conv1d.weight": (2048, 1, 4),
            "attn.g_norm.weight": (2048,),
            "attn.o_proj.weight": (2048, 2048),
        },
    ),
    "retnet": (
        {"num_heads": 8, "hidden_ratio": 2, "use_short_conv": True},
        BLOCK
        | {
            "mlp.gate_proj.weight": (2816, 2048),
            "mlp.up_proj.weight": (2816, 2048),
            "mlp.down_proj.weight": (2048, 2816),
            "attn.q_proj.weight": (2048, 2048),
            "attn.k_proj.weight": (2048, 2048),
            "attn.v_proj.weight": (4096, 2048),
            "attn.g_proj.weight": (4096, 2048),
            "attn.q_conv1d.weight": (2048, 1, 4),
            "attn.k_conv1d.weight": (2048, 1, 4),
            "attn.v_conv1d.weight": (4096, 1, 4),
            "attn.g_norm_swish_gate.weight": (512,),
            "attn.o_proj.weight": (2048, 4096),
        },
    ),
    "gated_deltanet": (
        {"num_heads": 6, "num_v_heads": 12, "head_dim": 256, "expand_v": 1.0},
        BLOCK
        | {
            "attn.q_proj.weight": (1536, 2048),
            "attn.k_proj.weight": (1536, 2048),
            "attn.v_proj.weight": (3072, 2048),
            "attn.a_proj.weight": (12, 2048),
            "attn.b_proj.weight": (12, 2048),
            "attn.A_log": (12,),
            "attn.dt_bias": (12,),
            "attn.q_conv1d.weight": (1536, 1, 4),
            "attn.k_conv1d.weight": (1536, 1, 4),
            "attn.v_conv1d.weight": (3072, 1, 4),
            "attn.g_proj.weight": (3072, 2048),
            "attn.o_norm.weight": (256,),
            "attn.o_proj.weight": (2048, 3072),
        },
    ),
    "kda": (
        {"num_heads": 16, "num_v_heads": 32, "head_dim": 128, "expand_v": 0.5},
        BLOCK
        | {
            "attn.q_proj.weight": (2048, 2048),
            "attn.k_proj.weight": (2048, 2048),
            "attn.v_proj.weight": (2048, 2048),
            "attn.q_conv1d.weight": (2048, 1, 4),
            "attn.k_conv1d.weight": (2048, 1, 4),
            "attn.v_conv1d.weight": (2048, 1, 4),
            "attn.f_proj.0.weight": (64, 2048),
            "attn.f_proj.1.weight": (4096, 64),
            "attn.b_proj.weight": (32, 2048),
            "attn.A_log": (32,),
            "attn.dt_bias": (4096,),
            "attn.g_proj.0.weight": (64, 2048),
            "attn.g_proj.1.weight": (2048, 64),
            "attn.g_proj.1.bias": (2048,),
            "attn.o_norm.weight": (64,),
            "attn.o_proj.weight": (2048, 2048),
        },
    ),
    "minimax": (
        {"num_attention_heads": 16, "head_dim": 64, "intermediate_size": 1000, "num_local_experts": 2},
        {
            "input_layernorm.weight": (2048,),
            "self_attn.qkv_proj.weight": (3072, 2048),
            "self_attn.norm.weight": (1024,),
            "self_attn.output_gate.weight": (1024, 2048),
            "self_attn.out_proj.weight": (2048, 1024),
            "post_attention_layernorm.weight": (2048,),
            "block_sparse_moe.gate.weight": (2, 2048),
            "block_sparse_moe.experts.0.w1.weight": (1000, 2048),
            "block_sparse_moe.experts.0.w2.weight": (2048, 1000),
            "block_sparse_moe.experts.0.w3.weight": (1000, 2048),
            "block_sparse_moe.experts.1.w1.weight": (1000, 2048),
            "block_sparse_moe.experts.1.w2.weight": (2048, 1000),
            "block_sparse_moe.experts.1.w3.weight": (1000, 2048),
        },
    ),
}
MAKERS = {
    "hgrn2": hgrn2_config,
    "retnet": retnet_config,
    "minimax": minimax_config,
    "gated_deltanet": gated_deltanet_config,
    "kda": kda_config,
}
OPTIONAL = {
    "hgrn2 without convolution": ("hgrn2", {"use_short_conv": False}, "conv1d", ()),
    "retnet without convolution": ("retnet", {"use_short_conv": False}, "conv1d", ()),
    "retnet without fused norm": ("retnet", {"fuse_norm": False}, "g_norm_swish_gate", ("attn.g_norm.weight",)),
    "gated_deltanet without convolution": ("gated_deltanet", {"use_short_conv": False}, "conv1d", ()),
    "gated_deltanet without gate": ("gated_deltanet", {"use_gate": False}, "g_proj", ()),
    "kda without convolution": ("kda", {"use_short_conv": False}, "conv1d", ()),
}


def shapes_on_meta(config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in RecurrentLM(config).named_parameters()}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_names_and_shapes(kind):
    changes, layer = PUBLISHED[kind]
    if kind != "minimax":
        changes = {"intermediate_size": None, "hidden_ratio": 4} | changes
    config = MAKERS[kind](vocab_size=32000, hidden_size=2048, num_hidden_layers=3, **changes)
    embeddings = "model.embed_tokens.weight" if kind == "minimax" else "model.embeddings.weight"
    expected = {embeddings: (32000, 2048), "model.norm.weight": (2048,), "lm_head.weight": (32000, 2048)}
    if kind == "hgrn2":
        expected["model.lower_bounds"] = (3, 2048)
    for index in range(3):
        expected |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    assert shapes_on_meta(config) == expected
    assert {name: spec.shape for name, spec in family_of(kind).tensors(config).items()} == expected


def test_published_names_and_shapes_of_minimax_are_transformers(tmp_path):
    config = minimax_config(head_dim=6)
    TestMiniMaxIsTransformers().theirs(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not name.endswith(config.DERIVED)]  # noqa: SIM118 - no mapping
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    assert shapes == {name: spec.shape for name, spec in family_of("minimax").tensors(config).items()}


@pytest.mark.parametrize("case", OPTIONAL)
def test_optional_tensors_go_with_their_key(case):
    kind, changes, absent, instead = OPTIONAL[case]
    configs = [MAKERS[kind](**{"use_short_conv": True} | c) for c in ({}, changes)]
    full, less = (layer_weights(shapes_on_meta(config), "model.layers.0.") for config in configs)
    assert any(absent in name for name in full)
    assert less.keys() == {name for name in full if absent not in name} | set(instead)


def test_lower_bounds_go_with_their_key():
    assert "model.lower_bounds" not in shapes_on_meta(hgrn2_config(use_lower_bound=False))


# --- expansions -----------------------------------------------------------------------------------------------------

EXPANDABLE = {
    "hgrn2": hgrn2_config(),
    "hgrn2-conv": hgrn2_config(use_short_conv=True, use_lower_bound=False),
    "retnet": retnet_config(),
    "retnet-conv": retnet_config(use_short_conv=True, fuse_norm=False),
    "minimax": minimax_config(),
    "minimax-wide": minimax_config(head_dim=6),
    "gated_deltanet": gated_deltanet_config(),
    "gated_deltanet-plain": gated_deltanet_config(num_heads=4, use_short_conv=False, use_gate=False),
    "kda": kda_config(),
    "kda-bound": kda_config(num_heads=2, num_v_heads=4, use_short_conv=False, lower_bound=-5.0, safe_gate=True),
}
HEADS = 4
"""Of each of them."""


def cases(*ops):
    """Every model with every one of these operations that it allows."""
    return pytest.mark.parametrize(
        ("config", "op"),
        [
            pytest.param(config, op, id=f"{name}-{op}")
            for name, config in EXPANDABLE.items()
            for op in ops
            if op in config.OPS
        ],
    )


def loaded(config, tensors):
    model = RecurrentLM(config).double()
    model.load_state_dict(tensors)
    return model


def expand(config, op, init, factor, *, layers="all"):
    """Return the original, the expanded model and the expanded config."""
    source = with_memory(build(config))
    target = make_plan(config, layers=layers, factor=factor, init=init, op=op, seed=3)
    after = expand_state_dict(source.state_dict(), config, target)
    return source, loaded(target, after), target


def gradients(model):
    model.zero_grad()
    model(tokens(1, 30), labels=tokens(1, 30, seed=1)).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def mixer_of(model, layer):
    return model.trunk.layers[layer].get_submodule("self_attn" if model.config.MODEL_TYPE == "minimax" else "attn")


def test_every_family_has_the_operations_it_should():
    """So that the cases below cannot shrink unseen."""
    ops = {config.MODEL_TYPE: set(config.OPS) for config in EXPANDABLE.values()}
    assert ops == {
        "hgrn2": {"merge_heads", "mix_heads", "grow_features"},
        "retnet": {"merge_heads", "mix_heads", "grow_state", "grow_features"},
        "minimax": {"merge_heads", "mix_heads", "grow_state", "grow_features"},
        "gated_deltanet": {"mix_heads", "grow_features"},
        "kda": {"mix_heads", "grow_features"},
    }


@cases("mix_heads")
@pytest.mark.parametrize("factor", [2, HEADS])
def test_lossless_mixing_is_exact(config, op, factor):
    source, model, target = expand(config, op, "lossless", factor)
    assert [target.layer_geometry(layer).elements for layer in (0, 1)] == [
        factor * config.layer_geometry(layer).elements for layer in (0, 1)
    ]
    ids = tokens(2, 70)
    with torch.no_grad():
        assert (model(ids).logits - source(ids).logits).abs().max() == 0.0


@cases("grow_state")
@pytest.mark.parametrize("factor", [2, HEADS])
def test_lossless_growth_is_exact_but_for_rounding(config, op, factor):
    source, model, target = expand(config, op, "lossless", factor)
    for layer in (0, 1):
        assert target.layer_geometry(layer).key_dim == factor * config.layer_geometry(layer).key_dim
    ids = tokens(2, 70)
    with torch.no_grad():
        assert (model(ids).logits - source(ids).logits).abs().max() < 1e-12


@cases("mix_heads", "grow_state")
def test_lossless_holds_for_packed_sequences_and_decoding(config, op):
    source, model, _ = expand(config, op, "lossless", 2)
    ids, states = tokens(1, 20), {}
    with torch.no_grad():
        packed = [m(ids, cu_seqlens=borders([7, 1, 12]), chunk_size=8).logits for m in (model, source)]
        assert (packed[0] - packed[1]).abs().max() < 1e-12
        for segment in ids.split([4] + [1] * 8 + [8], dim=1):
            steps = []
            for m in (model, source):
                out = m(segment, states=states.get(m), output_states=True, chunk_size=8)
                states[m] = out.states
                steps.append(out.logits)
            assert (steps[0] - steps[1]).abs().max() < 1e-12


@cases("mix_heads")
@pytest.mark.parametrize("factor", [2, HEADS])
def test_mixing_learns_off_the_diagonal_at_once(config, op, factor):
    _, model, _ = expand(config, op, "lossless", factor)
    grads = gradients(model)
    names = [name for name in grads if name.endswith("attn.mix")]
    assert len(names) == 2
    for name in names:
        assert grads[name].shape == (HEADS, factor)
        assert (grads[name].abs() > 1e-9).all()


@cases("grow_state")
def test_grown_queries_learn_at_once_and_grown_keys_from_the_second_step_on(config, op):
    """Lossless growth writes random new keys and does not read them: their gradient waits for the queries."""
    factor, layer = 3, 1
    _, model, _ = expand(config, op, "lossless", factor)
    size = config.layer_geometry(layer).key_dim

    def new_rows(values):
        if config.MODEL_TYPE == "minimax":
            rows = values[f"model.layers.{layer}.self_attn.qkv_proj.weight"].unflatten(0, (HEADS, -1))
            q, k = rows[:, : 2 * factor * size].chunk(2, dim=1)
        else:
            q, k = (values[f"model.layers.{layer}.attn.{n}_proj.weight"].unflatten(0, (HEADS, -1)) for n in "qk")
        return q[:, size:], k[:, size:]

    with torch.no_grad():
        new_q, new_k = new_rows(model.state_dict())
        assert new_q.abs().max() == 0
        assert (new_k.abs().amax(-1) > 0).all()
    first = gradients(model)
    new_q, new_k = new_rows(first)
    assert new_q.shape == (HEADS, (factor - 1) * size, config.hidden_size)
    assert (new_q.abs().amax(-1) > 0).all()
    assert new_k.abs().max() == 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 1e-2 * first[name]
    assert (new_rows(gradients(model))[1].abs().amax(-1) > 0).all()


DELTA_MERGE = "cannot be merged: the delta rule couples all key channels of a head (I - b k k^T)"
DELTA_GROWTH = "cannot be grown: keys and queries are normalised over a whole head"
HGRN2_GROWTH = "op grow_state does not apply to hgrn2: the layers share their lower bounds, one per key channel"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("gated_deltanet", {"op": "merge_heads"}, (f"heads of gated_deltanet {DELTA_MERGE}", "use mix_heads")),
        ("kda", {"op": "merge_heads"}, (f"heads of kda {DELTA_MERGE}", "use mix_heads")),
        ("gated_deltanet", {"op": "grow_state"}, (f"key channels of gated_deltanet {DELTA_GROWTH}", "use mix_heads")),
        ("kda", {"op": "grow_state"}, (f"key channels of kda {DELTA_GROWTH}", "use mix_heads")),
        ("hgrn2", {"op": "grow_state"}, (HGRN2_GROWTH, "use merge_heads or mix_heads")),
        ("hgrn2", {"factor": 3}, ("4 heads do not divide into groups of 3; the factor must divide num_heads=4",)),
        ("hgrn2", {"factor": 8, "op": "mix_heads"}, ("factor 8 is larger than num_heads=4",)),
        ("retnet", {"factor": 3}, ("4 heads do not divide into groups of 3; the factor must divide num_heads=4",)),
        ("retnet", {"factor": 5, "op": "mix_heads"}, ("factor 5 is larger than num_heads=4",)),
        ("retnet", {"init": "copy"}, ("init copy is for mamba2",)),
        ("retnet", {"init": "lossless", "op": "merge_heads"}, ("merging heads cannot be lossless; use op mix_heads",)),
        ("minimax", {"factor": 3}, ("4 heads do not divide into groups of 3; the factor must divide num_heads=4",)),
        ("minimax", {"factor": 5, "op": "mix_heads"}, ("factor 5 is larger than num_heads=4",)),
        ("minimax", {"init": "copy"}, ("init copy is for mamba2",)),
        ("gated_deltanet", {"factor": 5}, ("factor 5 is larger than num_heads=4",)),
        ("kda", {"factor": 5}, ("factor 5 is larger than num_heads=4",)),
    ],
)
def test_plans_that_do_not_fit_are_refused_with_their_reason(kind, options, words):
    with pytest.raises(ConfigError) as caught:
        make_plan(MAKERS[kind](), **{"layers": "1", "factor": 2, "init": "inherit"} | options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- packing, segments, decoding ------------------------------------------------------------------------------------


def same_states(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@cases("merge_heads", "mix_heads", "grow_state")
class TestSequences:
    lengths = (7, 1, 20, 2)
    further = (3, 9, 0, 1)

    def test_packed_equals_documents_run_alone(self, config, op):
        _, model, _ = expand(config, op, "inherit", 2)
        ids = tokens(1, sum(self.lengths))
        with torch.no_grad():
            packed = model(ids, cu_seqlens=borders(list(self.lengths)), output_states=True, chunk_size=8)
            alone = [model(part, output_states=True, backend="naive") for part in ids.split(self.lengths, dim=1)]
        torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], 1), rtol=0, atol=1e-9)
        joined = [[torch.cat(parts) for parts in zip(*layer, strict=True)] for layer in self.by_layer(alone)]
        same_states(packed.states, joined)

    def test_packed_sequences_go_on_from_their_states(self, config, op):
        """The second pack has one sequence of no tokens: its state stays."""
        _, model, _ = expand(config, op, "inherit", 2)
        first, second = tokens(1, sum(self.lengths)), tokens(1, sum(self.further), seed=1)
        parts = [first.split(self.lengths, dim=1), second.split(self.further, dim=1)]
        with torch.no_grad():
            out = model(first, cu_seqlens=borders(list(self.lengths)), output_states=True, chunk_size=8)
            out = model(
                second,
                cu_seqlens=borders(list(self.further)),
                states=out.states,
                output_states=True,
                chunk_size=8,
            )
            whole = [model(torch.cat(pair, 1), output_states=True) for pair in zip(*parts, strict=True)]
        ends = [o.logits[:, start:] for o, start in zip(whole, self.lengths, strict=True)]
        torch.testing.assert_close(out.logits, torch.cat(ends, 1), rtol=0, atol=1e-9)
        joined = [[torch.cat(parts) for parts in zip(*layer, strict=True)] for layer in self.by_layer(whole)]
        same_states(out.states, joined)

    @pytest.mark.parametrize("cuts", [[7, 13], [5, 1, 1, 1, 12], [1] * 20])
    def test_segments_and_single_steps_equal_one_pass(self, config, op, cuts):
        _, model, _ = expand(config, op, "inherit", 2)
        ids = tokens(2, 20)
        with torch.no_grad():
            whole = model(ids, output_states=True, backend="naive")
            states, logits = None, []
            for segment in ids.split(cuts, dim=1):
                out = model(segment, states=states, output_states=True, chunk_size=8)
                states = out.states
                logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=0, atol=1e-9)
        same_states(states, whole.states)

    def by_layer(self, outputs):
        return [[out.states[layer] for out in outputs] for layer in (0, 1)]


@pytest.mark.parametrize("config", [retnet_config(), retnet_config(use_short_conv=True)], ids=["plain", "convolution"])
class TestPositionsOfRetNet:
    def test_the_state_counts_tokens_per_sequence(self, config):
        model = build(config)
        with torch.no_grad():
            rows = model(tokens(3, 6), output_states=True).states
            rows = model(tokens(3, 1), states=rows, output_states=True).states
            packed = model(tokens(1, 9), cu_seqlens=borders([2, 0, 7]), output_states=True).states
            packed = model(tokens(1, 9), cu_seqlens=borders([4, 5, 0]), states=packed, output_states=True).states
        for layer in (0, 1):
            assert rows[layer][1].tolist() == [7, 7, 7]
            assert packed[layer][1].tolist() == [6, 5, 7]
            assert not packed[layer][1].is_floating_point()

    def test_they_matter(self, config):
        """Positions are relative: a later start of a sequence changes nothing, a state with a wrong position does."""
        model = build(config)
        ids = tokens(1, 20)
        with torch.no_grad():
            whole = model(ids).logits
            states = model(ids[:, :12], output_states=True).states
            moved = [(matrix, position - 5, *tail) for matrix, position, *tail in states]
            right = model(ids[:, 12:], states=states).logits
            wrong = model(ids[:, 12:], states=moved).logits
            empty = [(torch.zeros_like(m), p + 1000, *map(torch.zeros_like, tail)) for m, p, *tail in states]
            late = model(ids, states=empty).logits
        assert (right - whole[:, 12:]).abs().max() < 1e-9
        assert (wrong - whole[:, 12:]).abs().max() > 1e-3
        assert (late - whole).abs().max() < 1e-9


# --- what merged and grown heads read -------------------------------------------------------------------------------

INPUTS = {"hgrn2": hgrn2_inputs, "retnet": retnet_inputs, "minimax": minimax_inputs}


def observed(model, layer, ids):
    """Return the input of a layer's mixer, and its outputs before the output norm, ``[B, T, H V]``."""
    mixer, seen = mixer_of(model, layer), SimpleNamespace()
    name = next(n for n, _ in mixer.named_children() if n in ("norm", "g_norm", "g_norm_swish_gate"))
    hooks = [
        mixer.register_forward_pre_hook(lambda _m, args: setattr(seen, "x", args[0])),
        mixer.get_submodule(name).register_forward_pre_hook(lambda _m, args: setattr(seen, "o", args[0])),
    ]
    with torch.no_grad():
        model(ids, chunk_size=8)
    for hook in hooks:
        hook.remove()
    return seen.x, seen.o if seen.o.dim() == 3 else seen.o.flatten(2)


def readings(q, k, g):
    """``[B, H, T, T]``: what query ``t`` gives value ``u``, each channel decayed by its own head's rate."""
    b = g.cumsum(1)
    decay = (b[:, :, None] - b[:, None]).exp()
    return torch.einsum("bthc,buhc,btuhc->bhtu", q, k, decay).tril()


@cases("merge_heads")
def test_a_whole_merge_is_mixing_with_equal_weights(config, op):
    """One wide head is ``M = 1/sqrt(H)`` over all heads, up to the output norm; both keep the old parameters."""
    ids = tokens(2, 30)
    _, merged, _ = expand(config, op, "inherit", HEADS, layers="0")
    _, mixed, _ = expand(config, "mix_heads", "inherit", HEADS, layers="0")
    assert torch.equal(mixer_of(mixed, 0).mix, torch.full((HEADS, HEADS), 0.5, dtype=torch.float64))
    (_, wide), (_, blocks) = observed(merged, 0, ids), observed(mixed, 0, ids)
    assert wide.abs().max() > 0.01
    torch.testing.assert_close(wide, blocks, rtol=0, atol=1e-12)


@cases("merge_heads")
@pytest.mark.parametrize("factor", [2, HEADS])
@pytest.mark.parametrize("layer", [0, 1])
def test_merged_heads_read_every_block_with_its_own_decay(config, op, factor, layer):
    """Direct sums over time: queries of head ``i`` read the values of every head of its group at the rate of ``i``."""
    _, model, _ = expand(config, op, "inherit", factor)
    x, o = observed(model, layer, tokens(2, 20))
    weights = model.state_dict()
    w = layer_weights(weights, f"model.layers.{layer}.")
    q, k, v, g = INPUTS[config.MODEL_TYPE](config, w, x, weights, layer)
    if config.MODEL_TYPE != "hgrn2":
        rates = g[0, 0, :, 0]
        assert len(set(rates.tolist())) == HEADS, "with equal rates the blocks could not be told apart"
    groups = readings(q, k, g).unflatten(1, (-1, factor)).sum(2)
    values = v.unflatten(2, (-1, factor)).flatten(3)
    # the scale follows the merged keys; Lightning's queries have none, and get that of a sum of heads
    scale = factor**-0.5 if config.MODEL_TYPE == "minimax" else (factor * k.shape[-1]) ** -0.5
    expected = scale * torch.einsum("bgtu,bugv->btgv", groups, values).flatten(2)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


@cases("grow_state")
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("layer", [0, 1])
def test_grown_heads_read_old_and_new_channels_with_the_heads_decay(config, op, factor, layer):
    _, model, target = expand(config, op, "inherit", factor)
    x, o = observed(model, layer, tokens(2, 20))
    weights = model.state_dict()
    w = layer_weights(weights, f"model.layers.{layer}.")
    q, k, v, g = INPUTS[config.MODEL_TYPE](config, w, x, weights, layer)
    size = config.layer_geometry(layer).key_dim
    assert k.shape[-1] == factor * size == target.layer_geometry(layer).key_dim
    scale = 1 if config.MODEL_TYPE == "minimax" else size**-0.5
    expected = scale * torch.einsum("bhtu,buhv->bthv", readings(q, k, g), v).flatten(2)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)

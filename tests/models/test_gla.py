"""Our GLA against a model written here as plain functions around flash-linear-attention's naive recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from statex_dist.models.gla.config import GLAConfig
from tests.models.tiny import build, gla_config, tokens

naive = pytest.importorskip("fla.ops.gla.naive", reason="fla-core is not installed")

VARIANTS = {
    "default": {},
    "no fused norm": {"fuse_norm": False},
    "short convolution": {"use_short_conv": True},
    "short convolution, no fused norm": {"use_short_conv": True, "fuse_norm": False, "conv_size": 3},
    "clamped gate": {"clamp_min": -0.02},
    "public ratios": {"expand_k": 0.5, "expand_v": 1.0, "intermediate_size": None, "hidden_ratio": 4},
    "tied": {"tie_word_embeddings": True},
    "one head": {"num_heads": 1},
}


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def assembled(config: GLAConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The published model, equation by equation, on weights under their published names."""
    eps = config.norm_eps
    x = weights["model.embeddings.weight"][ids]
    for layer in range(config.num_hidden_layers):
        w = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        h = rms(x, w["attn_norm.weight"], eps)
        q, k, v = (h @ w[f"attn.{name}_proj.weight"].T for name in "qkv")
        if config.use_short_conv:

            def convolve(y, kernel):
                y = F.pad(y.transpose(1, 2), (kernel.shape[-1] - 1, 0))
                return F.silu(F.conv1d(y, kernel, groups=kernel.shape[0])).transpose(1, 2)

            q, k, v = (convolve(y, w[f"attn.{name}_conv1d.weight"]) for name, y in zip("qkv", (q, k, v), strict=True))
        gk = h @ w["attn.gk_proj.0.weight"].T @ w["attn.gk_proj.1.weight"].T + w["attn.gk_proj.1.bias"]
        gk = F.logsigmoid(gk) / 16
        if config.clamp_min is not None:
            gk = gk.clamp(min=config.clamp_min)
        split = (ids.shape[0], ids.shape[1], config.num_heads, -1)
        o, _ = naive.naive_recurrent_gla(*(y.reshape(split) for y in (q, k, v, gk)))
        norm = "g_norm_swish_gate" if config.fuse_norm else "g_norm"
        o = rms(o, w[f"attn.{norm}.weight"], eps) * F.silu((h @ w["attn.g_proj.weight"].T).reshape(split))
        x = x + o.flatten(2) @ w["attn.o_proj.weight"].T
        h = rms(x, w["mlp_norm.weight"], eps)
        h = F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
        x = x + h @ w["mlp.down_proj.weight"].T
    return rms(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_logits_equal_the_assembled_model(variant, num_tokens):
    config = gla_config(**VARIANTS[variant])
    model = build(config, dtype=torch.float32)
    ids = tokens(2, num_tokens)
    with torch.no_grad():
        ours = model(ids, chunk_size=16).logits
        expected = assembled(config, model.state_dict(), ids)
    assert expected.abs().max() > 0.1, "a comparison of zeros would prove nothing"
    assert (ours - expected).abs().max() < 1e-4


def test_published_names_and_shapes():
    """GLA-1.3B as flash-linear-attention writes it."""
    config = gla_config(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=24,
        expand_k=0.5,
        expand_v=1.0,
        intermediate_size=None,
        hidden_ratio=4,
    )
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in type(build(gla_config()))(config).named_parameters()}
    prefix = "model.layers.23."
    assert shapes["model.embeddings.weight"] == (32000, 2048)
    assert shapes[prefix + "attn.q_proj.weight"] == (1024, 2048)
    assert shapes[prefix + "attn.v_proj.weight"] == (2048, 2048)
    assert shapes[prefix + "attn.gk_proj.0.weight"] == (16, 2048)
    assert shapes[prefix + "attn.gk_proj.1.weight"] == (1024, 16)
    assert shapes[prefix + "attn.gk_proj.1.bias"] == (1024,)
    assert shapes[prefix + "attn.g_norm_swish_gate.weight"] == (512,)
    assert shapes[prefix + "mlp.gate_proj.weight"] == (5632, 2048)
    assert len([name for name in shapes if name.startswith(prefix)]) == 14

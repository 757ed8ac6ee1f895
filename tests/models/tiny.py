"""Tiny configurations and models, made on the spot."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

from statex_dist.models.config import ModelConfig
from statex_dist.models.gated_deltanet.config import GatedDeltaNetConfig
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.models.kda.config import KDAConfig
from statex_dist.models.lightning.config import LightningConfig
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import config_from_dict, make_plan
from statex_dist.models.retnet.config import RetNetConfig
from statex_dist.state.geometry import FeatureMap

COMMON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}


def gla_config(**changes) -> GLAConfig:
    values = {"num_heads": 4, "expand_k": 1.0, "expand_v": 2.0, "intermediate_size": 24}
    return GLAConfig(**COMMON | values | changes)


def mamba2_config(**changes) -> Mamba2Config:
    values = {"num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 8}
    return Mamba2Config(**COMMON | values | changes)


def hgrn2_config(**changes) -> HGRN2Config:
    """Four heads of four key channels."""
    return HGRN2Config(**COMMON | {"expand_ratio": 4, "intermediate_size": 24} | changes)


def retnet_config(**changes) -> RetNetConfig:
    return RetNetConfig(**COMMON | {"num_heads": 4, "intermediate_size": 24} | changes)


def minimax_config(**changes) -> LightningConfig:
    """Lightning layers only; two of three experts per token, so that every expert sees tokens."""
    values = {"num_attention_heads": 4, "intermediate_size": 24, "num_local_experts": 3}
    layers = changes.get("num_hidden_layers", COMMON["num_hidden_layers"])
    return LightningConfig(**COMMON | values | {"layer_types": ["linear_attention"] * layers} | changes)


def gated_deltanet_config(**changes) -> GatedDeltaNetConfig:
    """Two key heads, each shared by two value heads."""
    values = {"num_heads": 2, "num_v_heads": 4, "head_dim": 4, "expand_v": 1.5, "intermediate_size": 24}
    return GatedDeltaNetConfig(**COMMON | values | changes)


def kda_config(**changes) -> KDAConfig:
    return KDAConfig(**COMMON | {"num_heads": 4, "head_dim": 4, "intermediate_size": 24} | changes)


def with_features(config: ModelConfig, *, layers: str = "0", rolls: tuple[int, ...] = (1, 0), **options: bool):
    """Return a config with features in some layers, beside the expansions that it has."""
    features = FeatureMap(rolls=rolls, **options)
    return make_plan(config, layers=layers, factor=None, init="lossless", op="grow_features", features=features)


def expanded(config: ModelConfig, init: str, *, factor: int = 2, op: str | None = None, layers: str = "0"):
    return make_plan(config, layers=layers, factor=factor, init=init, op=op)


CONFIGS = {
    "gla": gla_config(),
    "gla-conv": gla_config(use_short_conv=True, fuse_norm=False, tie_word_embeddings=True),
    "gla-merged": expanded(gla_config(use_short_conv=True), "inherit", factor=4),
    "gla-mixed": expanded(gla_config(), "inherit", factor=3, op="mix_heads", layers="1"),
    "gla-grown": with_features(
        expanded(gla_config(use_short_conv=True), "inherit", factor=3, op="grow_state"), layers="1"
    ),
    "mamba2": mamba2_config(),
    "mamba2-one-group": mamba2_config(n_groups=1, use_bias=True, use_conv_bias=False, tie_word_embeddings=True),
    "mamba2-grown": expanded(mamba2_config(), "inherit", factor=3, layers="1"),
    "mamba2-features": with_features(mamba2_config(), layers="1", rolls=(1, 2, 0)),
    "hgrn2": hgrn2_config(),
    "hgrn2-conv-merged": with_features(
        expanded(hgrn2_config(use_short_conv=True), "inherit", factor=4), layers="1", match_norm=True
    ),
    "retnet": retnet_config(),
    "retnet-grown": expanded(retnet_config(use_short_conv=True), "inherit", op="grow_state"),
    "retnet-merged": with_features(expanded(retnet_config(fuse_norm=False), "inherit", layers="1"), relu=True),
    "minimax": minimax_config(),
    "minimax-mixed": with_features(expanded(minimax_config(), "inherit", factor=3, op="mix_heads", layers="1")),
    "gated_deltanet": gated_deltanet_config(),
    "gated_deltanet-mixed": with_features(expanded(gated_deltanet_config(), "inherit", factor=3, layers="1")),
    "kda": kda_config(),
    "kda-mixed": with_features(
        expanded(kda_config(num_heads=2, num_v_heads=4, use_short_conv=False), "inherit", factor=4),
        layers="1",
        rolls=(1,),
    ),
}
"""Every family and operation; the layer beside an expanded one has features in every family."""


_ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 100.0}
STATE_SPACES = {
    **{"d_model": 16, "n_layer": 3, "vocab_size": 40, "tie_embeddings": True, "attn_layer_idx": [1]},
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "chunk_size": 8},
    "attn_cfg": {"causal": True, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 2},
}
HYBRIDS = {
    "gla": gla_config(num_hidden_layers=3, attn={"layers": [1], **_ATTENTION}),
    "hgrn2": hgrn2_config(num_hidden_layers=3, attn=[{"layers": [0], "num_heads": 2}, {"layers": [2], **_ATTENTION}]),
    "retnet": retnet_config(attn={"layers": [0], **_ATTENTION, "window_size": 3}, tie_word_embeddings=True),
    "gated_deltanet": gated_deltanet_config(attn={"layers": [1], **_ATTENTION, "num_kv_heads": None}),
    "kda": kda_config(attn={"layers": [1], **_ATTENTION, "window_size": 3}),
    "state_spaces": config_from_dict(
        {**STATE_SPACES, "attn_cfg": {**STATE_SPACES["attn_cfg"], "d_conv": 4, "out_proj_bias": False}}
    ),
    "state_spaces-mlp": config_from_dict(
        {
            **{**STATE_SPACES, "d_intermediate": 20, "tie_embeddings": False},
            "attn_cfg": {**STATE_SPACES["attn_cfg"], "head_dim": 6, "rotary_emb_interleaved": True},
        }
    ),
}
"""Models with attention layers of our own."""


def build(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> RecurrentLM:
    """A model whose every parameter is random, the ones that start at a constant included."""
    model = RecurrentLM(config).to(dtype)
    model.init_parameters(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng).to(dtype))
    return model


def tokens(*shape: int, vocab: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def skip_where_transformers_norm_is_wrong(config: ModelConfig) -> None:
    """Skip a comparison with transformers' Mamba2 where its output norm is taken over all groups together."""
    if getattr(config, "n_groups", 1) > 1 and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"Mamba2 of transformers {transformers.__version__} does not normalise each group by itself")

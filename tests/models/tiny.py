"""Tiny configurations and models, made on the spot."""

from __future__ import annotations

import torch

from statex_dist.models.config import ModelConfig
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.kinds import make_plan
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.mamba2.config import Mamba2Config


def gla_config(**changes) -> GLAConfig:
    values = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "expand_k": 1.0,
        "expand_v": 2.0,
        "intermediate_size": 24,
        "initializer_range": 0.3,
    }
    return GLAConfig(**values | changes)


def mamba2_config(**changes) -> Mamba2Config:
    values = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 6,
        "n_groups": 2,
        "chunk_size": 8,
        "initializer_range": 0.3,
    }
    return Mamba2Config(**values | changes)


def expanded(config: ModelConfig, init: str, *, factor: int = 2, op: str | None = None, layers: str = "0"):
    return make_plan(config, layers=layers, factor=factor, init=init, op=op)


CONFIGS = {
    "gla": gla_config(),
    "gla-conv": gla_config(use_short_conv=True, fuse_norm=False, tie_word_embeddings=True),
    "gla-merged": expanded(gla_config(use_short_conv=True), "inherit", factor=4),
    "gla-mixed": expanded(gla_config(), "inherit", factor=3, op="mix_heads", layers="1"),
    "mamba2": mamba2_config(),
    "mamba2-one-group": mamba2_config(n_groups=1, use_bias=True, use_conv_bias=False, tie_word_embeddings=True),
    "mamba2-grown": expanded(mamba2_config(), "inherit", factor=3, layers="1"),
}
"""Every family and operation."""


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

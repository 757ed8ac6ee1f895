"""Tiny models of every family and operation, exported as the command line does."""

from pathlib import Path

import torch

from checkpoints_tools.reshard.reshard import ReshardSummary, reshard
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.models.config import ModelConfig
from statex_dist.models.hf import save_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import make_plan
from statex_dist.models.state_spaces.config import StateSpacesConfig
from statex_dist.state.geometry import FeatureMap
from tests.models.tiny import (
    CONFIGS,
    build,
    expanded,
    gated_deltanet_config,
    gla_config,
    hgrn2_config,
    kda_config,
    mamba2_config,
    minimax_config,
    retnet_config,
)

STATE_SPACES = StateSpacesConfig.from_dict(
    {
        **{"d_model": 16, "n_layer": 2, "vocab_size": 37, "tie_embeddings": True, "pad_vocab_size_multiple": 8},
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8},
    }
)
_OTHER_MAP = FeatureMap(rolls=[1], relu=True, match_norm=True)


def with_features(config: ModelConfig) -> ModelConfig:
    """A model whose first layer has products and squares, and whose second has products of another kind."""
    first = expanded(config, "lossless", factor=3, op="grow_features", layers="0")
    return make_plan(first, layers="1", factor=2, init="lossless", op="grow_features", features=_OTHER_MAP)


_FEATURES = {
    "gla": gla_config(use_short_conv=True),
    "mamba2": mamba2_config(),
    "state_spaces": STATE_SPACES,
    "gated_deltanet": gated_deltanet_config(),
    "kda": kda_config(),
}
MODELS = {
    **CONFIGS,
    "gla-slow": gla_config(gate_logit_normalizer=128),
    "retnet-conv": retnet_config(use_short_conv=True),
    "hgrn2-mixed": expanded(hgrn2_config(), "inherit", op="mix_heads"),
    "retnet-mixed": expanded(retnet_config(), "inherit", op="mix_heads"),
    "minimax-merged": expanded(minimax_config(), "inherit", op="merge_heads"),
    "minimax-grown": expanded(minimax_config(), "inherit", op="grow_state"),
    "mamba2-even": expanded(mamba2_config(tie_word_embeddings=True), "inherit", factor=3, layers="all"),
    "state_spaces": STATE_SPACES,
    "state_spaces-grown": expanded(STATE_SPACES, "inherit", factor=3, layers="1"),
    "state_spaces-even": expanded(STATE_SPACES, "inherit", factor=3, layers="all"),
    **{f"{name}-features": with_features(config) for name, config in _FEATURES.items()},
}
PLAIN = ("mamba2", "mamba2-one-group", "mamba2-even", "minimax")
"""Those that transformers' own classes open."""


def export(
    name: str, directory: Path, *, dtype: torch.dtype = torch.float64, **options
) -> tuple[RecurrentLM, Path, ReshardSummary]:
    """Build a model, save it with a tokenizer of bytes, export it; return model, exported directory and summary."""
    model = build(MODELS[name], dtype=dtype).eval()
    source, target = directory / f"{name}-source", directory / name
    save_pretrained(model, source)
    BytesTokenizer().save(source)
    return model, target, reshard(source, target, **options)

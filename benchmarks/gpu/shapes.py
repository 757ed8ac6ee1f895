"""The models that :mod:`benchmarks.gpu.model` and :mod:`benchmarks.gpu.decode` run, before and after an expansion.

The shapes are those of the published GLA and Mamba2 models (fla-hub's and state-spaces' configs). An expansion is
StateX's: heads merged, or ``d_state`` 512, in every sixth layer; *mixed* is the lossless form of the first. *keys* and
*features* grow the keys of a GLA layer to a state of the same size.
Values are random: neither time nor memory depends on them.
"""

from __future__ import annotations

from typing import Any

import torch

from statex_dist.models.config import ModelConfig
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict, make_plan
from statex_dist.models.row_mapping import generator_for


def _gla(hidden: int, layers: int, vocab: int = 32000) -> dict[str, Any]:
    return {
        "model_type": "gla",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": 4,
        "expand_k": 0.5,
        "expand_v": 1.0,
        "tie_word_embeddings": False,
    }


def _mamba2(hidden: int, layers: int, vocab: int = 50288, state: int = 128, head_dim: int = 64) -> dict[str, Any]:
    return {
        "model_type": "mamba2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": 2 * hidden // head_dim,
        "head_dim": head_dim,
        "state_size": state,
        "n_groups": 1,
        "tie_word_embeddings": True,
    }


MODELS = {
    "GLA 1.3B": _gla(2048, 24),
    "Mamba2 1.3B": _mamba2(2048, 48),
    "GLA 340M": _gla(1024, 24),
    "Mamba2 370M": _mamba2(1024, 48),
}
TINY_MODELS = {
    "GLA tiny": _gla(64, 2, vocab=256),
    "Mamba2 tiny": _mamba2(64, 2, vocab=256, state=8, head_dim=16),
}
"""The same kinds, for a machine without a GPU."""

EXPANSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "gla": {
        "as it was": {},
        "merged": {"layers": "every:6", "factor": None, "init": "reinit", "op": "merge_heads"},
        "mixed": {"layers": "every:6", "factor": None, "init": "lossless", "op": "mix_heads"},
        "keys x 4": {"layers": "every:6", "factor": 4, "init": "lossless", "op": "grow_state"},
        "features x 4": {"layers": "every:6", "factor": 4, "init": "lossless", "op": "grow_features"},
    },
    "mamba2": {
        "as it was": {},
        "d_state x 4": {"layers": "every:6", "factor": 4, "init": "lossless"},
    },
}
UNEXPANDED = "as it was"


def expansions(model: dict[str, Any]) -> list[str]:
    """Return the names of a model's variants, the unexpanded one first."""
    return list(EXPANSIONS[model["model_type"]])


def expanded_config(model: dict[str, Any], expansion: str) -> ModelConfig:
    """Return a model's config with the expansion's plan."""
    config, plan = config_from_dict(model), EXPANSIONS[model["model_type"]][expansion]
    return make_plan(config, **plan) if plan else config


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> RecurrentLM:
    """Build a model on its device; matrices are drawn there, what is small and sets the dynamics as a new model's.

    Drawing 1.3 B numbers the reproducible way, on the CPU, would take longer than the measurement.
    """
    with torch.device(device):
        model = RecurrentLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = model.family.names.split(name)
            if parameter.dim() > 1 and min(parameter.shape) > 16:
                parameter.normal_(std=0.02)
            elif place is not None:
                first = model.family.first_value(place[1], tuple(parameter.shape), config=config)
                values = torch.from_numpy(first.draw(generator_for(0, name), 0, parameter.numel()))
                parameter.copy_(values.view(parameter.shape))
            else:
                parameter.fill_(1.0)  # the final norm
    return model.to(dtype)

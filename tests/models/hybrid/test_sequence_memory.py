"""Memory of a sequence as the tools tell it, against the tensors that a model holds after reading one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.build import build_lm
from statex_dist.models.registry import config_from_dict, family_of
from statex_dist.models.sequence_memory import sequence_memory
from statex_dist.ops.attention import KeyValues
from tests.models.hybrid.hosts import HOSTS, VOCABULARY

TOKENS = 7


def settings(model_type):
    """What transformers writes into ``config.json``."""
    values = {"vocab_size": VOCABULARY, "hidden_size": 32, **HOSTS[model_type]}
    return CONFIG_MAPPING[model_type](**values).to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", HOSTS)
def test_bytes_are_those_of_the_states(model_type, dtype):
    config = config_from_dict(settings(model_type))
    model = build_lm(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        states = model(torch.ones(1, TOKENS, dtype=torch.int64), output_states=True).states
    kept = [state[:2] if isinstance(state, KeyValues) else () for state in states]
    grown = [() if isinstance(state, KeyValues) else state for state in states]
    found = sequence_memory(config, tokens=TOKENS, dtype=str(dtype))
    assert found.kv_bytes == sum(tensor.nbytes for state in kept for tensor in state) > 0
    assert found.state_bytes == sum(tensor.nbytes for state in grown for tensor in state)
    assert found.kv_bytes_per_token * TOKENS == found.kv_bytes


@pytest.mark.parametrize("model_type", HOSTS)
def test_sizes_that_a_file_leaves_out_are_transformers(model_type):
    theirs = CONFIG_MAPPING[model_type]()
    cached = config_from_dict(settings(model_type)).HOST.cached
    given = {key: value for key, value in theirs.to_dict().items() if value is not None}
    assert cached({"hidden_size": theirs.hidden_size}) == cached(given)


def test_length_and_dtype_are_the_files():
    values = {**settings("qwen3_next"), "max_position_embeddings": 5000}
    found = sequence_memory(config_from_dict({**values, "dtype": "float16"}))
    assert (found.tokens, found.dtype) == (5000, "float16")
    bare = {key: value for key, value in values.items() if key not in ("max_position_embeddings", "dtype")}
    found = sequence_memory(config_from_dict(bare), dtype="torch.float32")
    assert (found.tokens, found.dtype) == (65536, "float32")
    with pytest.raises(ConfigError, match="--context-length"):
        sequence_memory(config_from_dict(values), tokens=0)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        config_from_dict({**values, "num_attention_heads": "16"})


def test_layers_that_another_library_runs_have_no_figure():
    values = {"model_type": "gla", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 2}
    assert sequence_memory(config_from_dict(values)).kv_bytes == 0

    class Other(family_of("gla").config):
        attention_layers = (1,)

        def attention_layer(self, layer):
            return None

    other = Other(**{f.name: getattr(config_from_dict(values), f.name) for f in dataclasses.fields(Other)})
    assert sequence_memory(other).kv_bytes is None

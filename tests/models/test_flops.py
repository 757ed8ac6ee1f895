"""FLOPs per token against a count by hand and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import forward_flops_per_token, make_plan, training_flops_per_token
from tests.models.tiny import gla_config, mamba2_config


def test_a_gla_model_by_hand():
    config = gla_config(hidden_size=16, num_hidden_layers=2, num_heads=4, intermediate_size=24, vocab_size=40)
    keys, values = 16, 32
    attention = 16 * (2 * keys + 2 * values) + 16 * 16 + 16 * keys + values * 16
    matrices = 2 * (attention + 3 * 16 * 24) + 40 * 16
    scan = 4 * keys * values // 4 + 2 * 64 * (keys + values)
    assert forward_flops_per_token(config) == 2 * matrices + 2 * scan
    assert training_flops_per_token(config) == 3 * forward_flops_per_token(config)


@pytest.mark.parametrize("config", [gla_config(), mamba2_config(tie_word_embeddings=True)], ids=["gla", "mamba2"])
def test_torch_counts_the_same_for_the_matrices(config):
    model, tokens = RecurrentLM(config), 32
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    # Products of activations with weights are mm and addmm; the scan's are bmm.
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    scan = sum(config.layer_geometry(layer).scan_flops for layer in config.recurrent_layers)
    convolutions = 2 * sum(p.numel() for name, p in model.named_parameters() if name.endswith("conv1d.weight"))
    assert linear == tokens * (forward_flops_per_token(config) - scan - convolutions)


def test_a_bigger_state_costs_more():
    before = gla_config()
    after = make_plan(before, layers="0", factor=4, init="inherit")
    more = after.layer_geometry(0).numbers - before.layer_geometry(0).numbers
    assert forward_flops_per_token(after) - forward_flops_per_token(before) == 4 * more

"""The count of FLOPs against torch's own, on a model that runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statex_dist.models.flops import forward_flops_per_token, training_flops_per_pair
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import make_plan
from statex_dist.ops.packed_attention import ScoreRule
from tests.models.hybrid.hosts import HOSTS, save_host

TOKENS = 32
TOLERANCE = 0.002
"""Of rotary embeddings and norms of the host that torch takes for products."""


@pytest.mark.parametrize("model_type", HOSTS)
def test_torch_counts_the_same(tmp_path, model_type, monkeypatch):
    save_host(model_type, tmp_path)
    model = from_pretrained(tmp_path)
    model.model.config._experts_implementation = "eager"  # products of one expert each, which torch counts
    pairs = []

    def product(score, q, k, v, **mask):
        pairs.append(2 * q.shape[1] * (q.shape[-1] + v.shape[-1]) * TOKENS * (TOKENS + 1) // 2)
        return q.new_zeros(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(ScoreRule, "product", product)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.long))
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    config = model.config
    scan = sum(config.layer_geometry(layer).scan_flops for layer in config.recurrent_layers)
    of_convolutions = {p for name, p in model.named_parameters() if name.endswith("conv1d.weight")}
    expected = TOKENS * (forward_flops_per_token(config) - scan - 2 * sum(p.numel() for p in of_convolutions))
    assert linear == pytest.approx(expected, rel=TOLERANCE)
    assert 3 * sum(pairs) == training_flops_per_pair(config) * TOKENS * (TOKENS + 1) // 2


def test_a_bigger_state_costs_more(tmp_path):
    save_host("nemotron_h", tmp_path)
    config = from_pretrained(tmp_path).config
    grown = make_plan(config, layers="all", factor=2, init="lossless")
    assert forward_flops_per_token(grown) > 1.05 * forward_flops_per_token(config)
    assert training_flops_per_pair(grown) == training_flops_per_pair(config)

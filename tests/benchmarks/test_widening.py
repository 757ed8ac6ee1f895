"""The control with wider MLPs: the same function, new rows that can learn."""

from pathlib import Path

import pytest
import torch

from benchmarks.widening import widen, widened
from statex_dist.errors import ConfigError
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict

GLA = {"model_type": "gla", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2}
HEADS = {"num_heads": 2, "head_dim": 16, "n_groups": 1}
MAMBA2 = {"model_type": "mamba2", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, **HEADS}


def test_a_wider_mlp_computes_the_same_and_its_new_channels_get_gradients(tmp_path: Path):
    narrow = RecurrentLM(config_from_dict({**GLA, "intermediate_size": 24})).double()
    narrow.init_parameters(0)
    save_pretrained(narrow, tmp_path / "narrow")
    widen(tmp_path / "narrow", tmp_path / "wide", channels=8, seed=3)
    wide = from_pretrained(tmp_path / "wide")
    ids = torch.arange(20).view(1, 20)
    torch.testing.assert_close(wide(ids).logits, narrow(ids).logits)
    assert sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in narrow.parameters()) == 2 * 3 * 8 * 16
    wide(ids, labels=ids).loss_sum.backward()
    for layer in wide.trunk.layers:
        assert layer.mlp.down_proj.weight.grad[:, 24:].abs().min() > 0
        assert layer.mlp.gate_proj.weight[24:].std() > 0


@pytest.mark.parametrize(("values", "channels"), [(MAMBA2, 8), (GLA, 0)], ids=["no MLP", "nothing added"])
def test_what_cannot_be_widened_is_refused(values: dict, channels: int):
    with pytest.raises(ConfigError, match="mlp_channels"):
        widened(config_from_dict(values), channels)

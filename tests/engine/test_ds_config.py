"""DeepSpeed's configuration as our settings make it, read by DeepSpeed itself."""

from __future__ import annotations

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from statex_dist.engine.config import EngineConfig
from statex_dist.engine.deepspeed_settings import deepspeed_config
from statex_dist.errors import ConfigError


def made(accumulation_steps: int = 1, **settings):
    return deepspeed_config(EngineConfig(**settings), gradient_clipping=1.0, accumulation_steps=accumulation_steps)


@pytest.mark.parametrize(("optimizer", "parameters"), [("none", "none"), ("cpu", "cpu"), ("cpu", "nvme")])
def test_offloading(optimizer: str, parameters: str):
    path = {"nvme_path": "/mnt/nvme"} if parameters == "nvme" else {}
    settings = made(offload_optimizer=optimizer, offload_parameters=parameters, **path)["zero_optimization"]
    zero = DeepSpeedZeroConfig(**settings)
    if optimizer == "none":
        assert zero.offload_optimizer is zero.offload_param is None
        return
    assert zero.offload_optimizer.device == optimizer
    assert zero.offload_param.device == parameters
    assert str(zero.offload_param.nvme_path or "") == path.get("nvme_path", "")


def test_only_one_part_is_offloaded():
    zero = DeepSpeedZeroConfig(**made(offload_optimizer="cpu")["zero_optimization"])
    assert zero.offload_optimizer.device == "cpu"
    assert zero.offload_param is None


def test_gradients_are_summed_in_fp32():
    assert made()["data_types"] == {}
    assert made(accumulation_steps=2)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made(segment_tokens=64)["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_optimizer": "nvme", "nvme_path": "/mnt"}, "offload_optimizer nvme"),
        ({"offload_optimizer": "cpu", "offload_parameters": "nvme"}, "needs engine.nvme_path"),
        ({"nvme_path": "/mnt"}, "offloaded.*nvme"),
        ({"name": "plain", "precision": "fp32", "offload_parameters": "cpu"}, "need engine.name deepspeed"),
        ({"loss_chunk_tokens": -1}, "engine.loss_chunk_tokens.*not -1"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)

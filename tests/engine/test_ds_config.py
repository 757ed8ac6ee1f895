"""DeepSpeed's configuration as our settings make it, read by DeepSpeed itself."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from statex_dist.engine.config import EngineConfig, deepspeed_config
from statex_dist.engine.zero.validation import check_settings
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


def test_the_earlier_name_is_stage_3():
    assert EngineConfig(name="zero3") == EngineConfig(name="deepspeed", stage=3) == EngineConfig()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages(stage: int):
    precision = "bf16" if stage else "fp32"
    settings = made(2, stage=stage, precision=precision)
    assert DeepSpeedZeroConfig(**settings["zero_optimization"]).stage == stage
    reduced = {"communication_data_type": "fp32"} if stage == 1 else {}
    assert {key: settings[key] for key in ("communication_data_type",) if key in settings} == reduced
    assert "communication_data_type" not in made(1, stage=stage, precision=precision), "nothing is summed"


def test_keys_are_passed_on():
    passed = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000},
        "communication_data_type": "bf16",
    }
    settings, default = made(2, stage=1, deepspeed=passed), made(2, stage=1)
    check_settings(made(deepspeed=passed), passed, world_size=2, device=torch.device("cpu"))
    assert settings.pop("zero_optimization") == {**default.pop("zero_optimization"), **passed["zero_optimization"]}
    assert settings == {**default, "communication_data_type": "bf16"}


ZERO = "zero_optimization"


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ({ZERO: {"nosuch": 1}}, "engine.deepspeed.zero_optimization.nosuch: DeepSpeed refuses it"),
        ({ZERO: {"reduce_bucket_size": "many"}}, "zero_optimization.reduce_bucket_size: DeepSpeed refuses it"),
        ({"communication_data_type": "fp64"}, "communication_data_type"),
        ({"comms_logger": {"nosuch": True}}, "engine.deepspeed.comms_logger.nosuch"),
        ({ZERO: {"zero_hpz_partition_size": 3}}, "zero_hpz_partition_size=3 does not divide 2 ranks"),
        ({ZERO: {"zero_hpz_partition_size": 0}}, "zero_hpz_partition_size=0"),
        ({ZERO: {"zero_quantized_weights": True}}, "zero_quantized_weights needs a GPU"),
        ({ZERO: {"zero_quantized_gradients": True}}, "zero_quantized_gradients needs a GPU"),
    ],
)
def test_what_deepspeed_refuses_is_one_line_before_anything_is_read(passed, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_settings(made(deepspeed=passed), passed, world_size=2, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_operators_that_the_cpu_lacks_are_for_gpus():
    passed = {ZERO: {"zero_quantized_weights": True, "zero_hpz_partition_size": 2}}
    check_settings(made(deepspeed=passed), passed, world_size=4, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_optimizer": "nvme", "nvme_path": "/mnt"}, "offload_optimizer nvme"),
        ({"offload_optimizer": "cpu", "offload_parameters": "nvme"}, "needs engine.nvme_path"),
        ({"nvme_path": "/mnt"}, "offloaded.*nvme"),
        ({"name": "plain", "precision": "fp32", "offload_parameters": "cpu"}, "need engine.name deepspeed"),
        ({"stage": 4}, "engine.stage must be"),
        ({"name": "zero3", "stage": 2}, "engine.name zero3 is stage 3"),
        ({"stage": 0}, "fp32 only"),
        ({"stage": 2, "offload_optimizer": "cpu"}, "need engine.stage 3"),
        ({"name": "plain", "precision": "fp32", "deepspeed": {ZERO: {}}}, "needs engine.name deepspeed"),
        ({"deepspeed": {ZERO: 3}}, "must be a mapping"),
        ({"deepspeed": {"zero_optimisation": {}}}, "zero_optimisation is not passed on"),
        ({"deepspeed": {"aio": {"depth": 3}}}, "aio.depth is not known"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "use engine.precision"),
        ({"deepspeed": {"gradient_clipping": 1}}, "use optimizer.gradient_clipping"),
        ({"deepspeed": {"train_batch_size": 8}}, "use data.packs_per_step"),
        ({"deepspeed": {ZERO: {"stage": 1}}}, "use engine.stage"),
        ({"deepspeed": {ZERO: {"offload_param": {}}}}, "use engine.offload_parameters"),
        ({"deepspeed": {ZERO: {"round_robin_gradients": True}}}, "layout of checkpoints"),
        ({"stage": 1, "deepspeed": {ZERO: {"stage3_max_live_parameters": 1}}}, "needs engine.stage 3"),
        ({"loss_chunk_tokens": -1}, "engine.loss_chunk_tokens.*not -1"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)

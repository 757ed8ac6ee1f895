"""The keys of DeepSpeed's configuration that a user may give, and those that a setting of ours gives.

DeepSpeed itself ignores a section that it does not know, so the sections that ``engine.deepspeed`` may have are listed
here. Unknown keys inside ``zero_optimization`` are found by DeepSpeed (:mod:`statex_dist.engine.zero.validation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from statex_dist.errors import ConfigError

ZERO = "zero_optimization"

_SECTIONS = (
    *(ZERO, "communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("aio", "comms_logger", "wall_clock_breakdown", "memory_breakdown"),
)
_AIO = ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds")

_PACKS, _PRECISION = "data.packs_per_step", "engine.precision"
_OWN = {
    "train_batch_size": _PACKS,
    "train_micro_batch_size_per_gpu": _PACKS,
    "gradient_accumulation_steps": _PACKS,
    "elasticity": _PACKS,
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "the section optimizer",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "scheduler": "the section schedule",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "fp16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "activation_checkpointing": "engine.activation_checkpointing",
    "checkpoint": "the section train",
    "load_universal_checkpoint": "the section train",
    "steps_per_print": "metrics.log_every",
    "flops_profiler": "the section profile",
    "wandb": "metrics.wandb_project",
    "tensorboard": "the section metrics",
    "csv_monitor": "the section metrics",
    "comet": "the section metrics",
}
_FIXED = "leave it out: the layout of checkpoints depends on it"
_OWN_ZERO = {
    "stage": "engine.stage",
    "stage3_param_persistence_threshold": "engine.param_persistence_threshold",
    "param_persistence_threshold": "engine.param_persistence_threshold",
    "sub_group_size": "engine.sub_group_size",
    "offload_optimizer": "engine.offload_optimizer",
    "cpu_offload": "engine.offload_optimizer",
    "cpu_offload_use_pin_memory": "engine.offload_optimizer",
    "zenflow": "engine.offload_optimizer",
    "offload_param": "engine.offload_parameters",
    "cpu_offload_param": "engine.offload_parameters",
    "elastic_checkpoint": "",
    "load_from_fp32_weights": "",
    "pipeline_loading_checkpoint": "",
    "round_robin_gradients": "",
    "parameter_alignment": "",
    "compute_grad_norm": "optimizer.gradient_clipping",
    "save_muon_momentum_buffer_in_memory": "optimizer.name",
}
_STAGE_3 = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""Settings of stage 3 whose names do not begin with ``stage3_``."""


def check_passed(passed: Mapping[str, Any], stage: int) -> None:
    """Raise unless every key of ``engine.deepspeed`` is one that no setting of ours gives, as far as names tell.

    Raises:
        ConfigError: A key is ours (the setting to use is named), is not known, or has no effect in this stage.
    """
    for key, value in passed.items():
        _refuse_own(key, _OWN.get(key))
        if key not in _SECTIONS:
            raise ConfigError(f"engine.deepspeed.{key} is not passed on; allowed here: {', '.join(_SECTIONS)}")
        if key in (ZERO, "aio", "comms_logger") and not isinstance(value, Mapping):
            raise ConfigError(f"engine.deepspeed.{key} must be a mapping of keys to values, not {value!r}")
    for key in passed.get(ZERO, {}):
        _refuse_own(f"{ZERO}.{key}", _OWN_ZERO.get(key))
        if stage < 3 and (key.startswith("stage3_") or key in _STAGE_3):
            raise ConfigError(f"engine.deepspeed.{ZERO}.{key} needs engine.stage 3, not {stage}")
    if unknown := sorted(set(passed.get("aio", {})) - set(_AIO)):
        raise ConfigError(f"engine.deepspeed.aio.{unknown[0]} is not known; allowed here: {', '.join(_AIO)}")


def _refuse_own(key: str, setting: str | None) -> None:
    if setting is not None:
        advice = f"use {setting} instead" if setting else _FIXED
        raise ConfigError(f"engine.deepspeed.{key} is set by this program; {advice}")


def merged(own: Mapping[str, Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``own`` with the keys of ``passed`` added, at any depth."""
    result = dict(own)
    for key, value in passed.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result

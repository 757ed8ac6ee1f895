"""DeepSpeed's configuration: the part that our settings make, and the keys that a user may add to it.

DeepSpeed itself ignores a section that it does not know, so the sections that ``engine.deepspeed`` may have are listed
here. Unknown keys inside ``zero_optimization`` are found by DeepSpeed (:mod:`statex_dist.engine.zero.validation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from statex_dist.errors import ConfigError

if TYPE_CHECKING:
    from statex_dist.engine.config import EngineConfig

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


def deepspeed_config(config: EngineConfig, *, gradient_clipping: float, accumulation_steps: int) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize``.

    Args:
        config: The engine's section of the run's configuration.
        gradient_clipping: Largest global gradient norm; 0 for none.
        accumulation_steps: Packs per rank and optimizer step.
    """
    # Several packs per step are summed: in bf16 the later ones would be rounded away.
    accumulate = {"grad_accum_dtype": "fp32"} if accumulation_steps > 1 or config.segment_tokens else {}
    # In stage 1 DeepSpeed reduces the sum, once a step. To round it to bf16 for that is to lose what was summed; stages
    # 2 and 3 reduce every pack in bf16 and sum what comes of it in fp32.
    sums = config.stage == 1 and config.precision == "bf16" and accumulate
    own = {
        "data_types": accumulate,
        **({"communication_data_type": "fp32"} if sums else {}),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        # The optimizer is torch's AdamW: DeepSpeed's own would be compiled on first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        ZERO: {
            "stage": config.stage,
            "stage3_param_persistence_threshold": config.param_persistence_threshold,
            "sub_group_size": config.sub_group_size,
            "contiguous_gradients": True,
            "overlap_comm": True,
            **_offload(config),
        },
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 10**12,
    }
    return _merged(own, config.deepspeed)


def _merged(own: Mapping[str, Any], passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``own`` with the keys of ``passed`` added, at any depth."""
    merged = dict(own)
    for key, value in passed.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _offload(config: EngineConfig) -> dict[str, Any]:
    """Return the sections that move optimizer states and parameters off the GPU."""
    sections = {}
    for name, place in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if place != "none":
            path = {"nvme_path": config.nvme_path} if place == "nvme" else {}
            sections[name] = {"device": place, "pin_memory": torch.cuda.is_available(), **path}
    return sections

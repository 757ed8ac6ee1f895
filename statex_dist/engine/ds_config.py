"""DeepSpeed's configuration, made from ours."""

from __future__ import annotations

from typing import Any

import torch

from statex_dist.engine.base import EngineConfig


def deepspeed_config(config: EngineConfig, *, gradient_clipping: float, accumulation_steps: int) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize``.

    Args:
        config: The engine's section of the run's configuration.
        gradient_clipping: Largest global gradient norm; 0 for none.
        accumulation_steps: Packs per rank and optimizer step.
    """
    # Several packs per step are summed: in bf16 the later ones would be rounded away.
    accumulate = {"grad_accum_dtype": "fp32"} if accumulation_steps > 1 or config.segment_tokens else {}
    return {
        "data_types": accumulate,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        # The optimizer is torch's AdamW: DeepSpeed's own would be compiled on first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": config.param_persistence_threshold,
            "sub_group_size": config.sub_group_size,
            "contiguous_gradients": True,
            "overlap_comm": True,
            **_offload(config),
        },
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 10**12,
    }


def _offload(config: EngineConfig) -> dict[str, Any]:
    """Return the sections that move optimizer states and parameters off the GPU."""
    sections = {}
    for name, place in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if place != "none":
            path = {"nvme_path": config.nvme_path} if place == "nvme" else {}
            sections[name] = {"device": place, "pin_memory": torch.cuda.is_available(), **path}
    return sections

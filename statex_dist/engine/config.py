"""The section ``engine``: how the model is trained, the engine that does so, and DeepSpeed's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from statex_dist.config import check_finite
from statex_dist.distributed.context_group import ContextGroup
from statex_dist.distributed.env import ProcessEnv
from statex_dist.engine.base import ParameterValues, TrainEngine
from statex_dist.engine.deepspeed_keys import ZERO, check_passed, merged
from statex_dist.engine.segment_states import StatePassing
from statex_dist.errors import ConfigError
from statex_dist.state.geometry import MAX_STATE_BYTES

Place = Literal["none", "cpu", "nvme"]
STAGES = (0, 1, 2, 3)


@dataclass(kw_only=True)
class EngineConfig:
    """How the model is trained.

    Attributes:
        name: ``deepspeed`` (any number of ranks) or ``plain`` (PyTorch, one process). ``zero3`` is an earlier name of
            ``deepspeed``.
        stage: What ZeRO partitions over the ranks: nothing (0), optimizer states and master weights (1), gradients too
            (2), parameters too (3). Stage 0 trains in fp32 only. A run keeps its stage.
        deepspeed: Further settings of DeepSpeed, as its JSON configuration has them; those that another setting here
            gives are refused.
        precision: Of parameters and activations; optimizer states and master weights are fp32 either way.
        activation_checkpointing: Layers that are recomputed in the backward pass: ``none``, every ``block``, or only
            the ``expanded`` ones, whose states are the largest.
        loss_chunk_tokens: Tokens whose logits are held at once, nothing being computed twice for it; 0 holds those of
            the whole sequence.
        segment_tokens: A packed sequence is run in segments of this many tokens, each with its own backward pass;
            states continue from one to the next, gradients do not (truncated BPTT). 0 runs it whole.
        max_state_bytes: Bound of the chunk states that the GPU scan of an expanded GLA layer holds at once; the
            backward pass computes them again, segment by segment.
        param_persistence_threshold: ZeRO-3 keeps parameters with fewer elements whole on every rank.
        sub_group_size: Elements that ZeRO-3's optimizer updates at once, per rank.
        offload_optimizer: Where ZeRO-3 keeps optimizer states and master weights instead of the GPU: ``none`` or
            ``cpu``.
        offload_parameters: The same of the parameters, which may go to ``nvme`` too.
        nvme_path: Directory on a local disk, for ``nvme``.
        timeout_minutes: After which a collective gives up on a dead peer.
        router_loss: Factor of the load-balancing loss of a hybrid's experts, over the tokens of each pack (or segment);
            None takes the model's ``router_aux_loss_coef`` where its configuration has ``output_router_logits``.
    """

    name: Literal["deepspeed", "zero3", "plain"] = "deepspeed"
    stage: int = 3
    deepspeed: dict[str, Any] = field(default_factory=dict)
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "block", "expanded"] = "none"
    loss_chunk_tokens: int = 8192
    segment_tokens: int = 0
    max_state_bytes: int = MAX_STATE_BYTES
    param_persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    nvme_path: str | None = None
    timeout_minutes: float = 30.0
    router_loss: float | None = None

    def __post_init__(self) -> None:
        check_finite(self, "engine")
        if self.stage not in STAGES:
            raise ConfigError(f"engine.stage must be 0, 1, 2 or 3, not {self.stage}")
        if self.name == "zero3" and self.stage != 3:
            raise ConfigError(f"engine.name zero3 is stage 3; for engine.stage {self.stage} set it to deepspeed")
        if self.name == "zero3":
            self.name = "deepspeed"
        if self.name == "plain" and self.precision != "fp32":
            raise ConfigError(f"engine.name plain trains in fp32; set engine.precision to fp32, not {self.precision}")
        if self.router_loss is not None and self.router_loss < 0:
            raise ConfigError(f"engine.router_loss must be 0 or more, or null, not {self.router_loss}")
        for name in ("max_state_bytes", "sub_group_size", "timeout_minutes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"engine.{name} must be above 0, not {getattr(self, name)}")
        for name in ("loss_chunk_tokens", "segment_tokens", "param_persistence_threshold"):
            if getattr(self, name) < 0:
                raise ConfigError(f"engine.{name} must be 0 or more, not {getattr(self, name)}")
        places = {self.offload_optimizer, self.offload_parameters}
        if self.name == "plain" and places != {"none"}:
            raise ConfigError("engine.offload_optimizer and engine.offload_parameters need engine.name deepspeed")
        if self.stage < 3 and places != {"none"}:
            raise ConfigError(
                f"engine.offload_optimizer and engine.offload_parameters need engine.stage 3, not {self.stage}"
            )
        if self.name == "deepspeed" and self.stage == 0 and self.precision != "fp32":
            raise ConfigError(
                "engine.stage 0 trains in fp32 only: DeepSpeed would sum gradients in bf16; set engine.stage to 1, "
                "which keeps parameters and gradients whole too"
            )
        if self.name == "plain" and self.deepspeed:
            raise ConfigError("engine.deepspeed needs engine.name deepspeed")
        check_passed(self.deepspeed, self.stage)
        if self.offload_optimizer == "nvme":
            raise ConfigError(
                "engine.offload_optimizer nvme is refused: DeepSpeed 0.19 does not restore such a run from its "
                "checkpoint (it continues with the wrong weights); use cpu. engine.offload_parameters may be nvme"
            )
        if "nvme" in places and self.nvme_path is None:
            raise ConfigError("engine: offloading to nvme needs engine.nvme_path, a directory on a local disk")
        if self.nvme_path is not None and "nvme" not in places:
            raise ConfigError("engine.nvme_path is given, but nothing is offloaded to nvme")

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def shards_start(self) -> bool:
        """Whether :meth:`partition` can make the model, of which no rank then holds more than its part.

        Stages 0 to 2 keep the model whole. Parameters on NVMe are written there by DeepSpeed itself, from whole ones.
        """
        quantized = self.deepspeed.get(ZERO, {}).get("zero_quantized_nontrainable_weights")  # changes what is kept
        return self.stage == 3 and self.name == "deepspeed" and self.offload_parameters != "nvme" and not quantized

    def join(self, env: ProcessEnv, facts: Mapping[str, object]) -> None:
        """Join the other ranks, unless that has been done or there are none.

        Args:
            env: This process.
            facts: Settings that must be equal on all ranks, by name.

        Raises:
            StateXError: DeepSpeed refuses its settings, or the ranks do not find each other, or differ.
        """
        if self.name == "plain":
            return
        from statex_dist.engine.zero.process_group import init_process_group
        from statex_dist.engine.zero.validation import check_settings

        if self.deepspeed:
            settings = deepspeed_config(self, gradient_clipping=0.0, accumulation_steps=1)
            check_settings(settings, self.deepspeed, world_size=env.world_size, device=env.device)
        init_process_group(env, timeout_minutes=self.timeout_minutes, facts=facts)

    def prepare(self, model: Any) -> None:
        """Tell a model what this section says of its memory."""
        model.recompute = self.activation_checkpointing
        model.lm_head.chunk_tokens = self.loss_chunk_tokens
        model.max_state_bytes = self.max_state_bytes
        model.set_router_loss(self.router_loss)

    def partition(
        self, model: nn.Module, values: ParameterValues | None, env: ProcessEnv, *, accumulation_steps: int
    ) -> None:
        """Give this rank its part of a model on ``meta``.

        Args:
            model: Its parameters are on ``meta``; :meth:`build` takes it afterwards.
            values: What its parameters and buffers begin with; None where a checkpoint will set all of them.
            env: This process; :meth:`join` has been called.
            accumulation_steps: As for :meth:`build`.

        Raises:
            StateXError: The values cannot be read, or are damaged.
        """
        from statex_dist.engine.zero.sharded_start import Unset, partition_model

        values = Unset() if values is None else values
        settings = deepspeed_config(self, gradient_clipping=0.0, accumulation_steps=accumulation_steps)
        partition_model(model, values, settings, env.device)
        values.verify(env.rank, env.world_size)

    def build(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
        *,
        env: ProcessEnv,
        gradient_clipping: float,
        accumulation_steps: int,
        context: int = 1,
        passing: StatePassing | None = None,
    ) -> TrainEngine:
        """Return the engine around ``model``.

        Args:
            model: The same on all ranks, or made by :meth:`partition`.
            optimizer: Over its parameters.
            schedule: Over the optimizer.
            env: This process; :meth:`join` has been called.
            gradient_clipping: Largest global gradient norm; 0 for none.
            accumulation_steps: Packs per data-parallel rank and optimizer step.
            context: Ranks that share each pack.
            passing: State passing, or None.
        """
        if self.name == "plain":
            from statex_dist.engine.plain import PlainEngine

            return PlainEngine(
                model,
                optimizer,
                schedule,
                gradient_clipping=gradient_clipping,
                device=env.device,
                segment_tokens=self.segment_tokens,
                passing=passing,
            )
        from statex_dist.engine.zero.engine import ZeroEngine

        settings = deepspeed_config(self, gradient_clipping=gradient_clipping, accumulation_steps=accumulation_steps)
        group = ContextGroup.join(context, timeout=timedelta(minutes=self.timeout_minutes))
        return ZeroEngine(
            model,
            optimizer,
            schedule,
            settings=settings,
            env=env,
            segment_tokens=self.segment_tokens,
            context=group,
            passing=passing,
        )


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
    return merged(own, config.deepspeed)


def _offload(config: EngineConfig) -> dict[str, Any]:
    """Return the sections that move optimizer states and parameters off the GPU."""
    sections = {}
    for name, place in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if place != "none":
            path = {"nvme_path": config.nvme_path} if place == "nvme" else {}
            sections[name] = {"device": place, "pin_memory": torch.cuda.is_available(), **path}
    return sections

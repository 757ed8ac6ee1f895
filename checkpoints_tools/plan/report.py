"""The costs of an expansion, before it is made: states, parameters, FLOPs and the memory of training.

FLOPs are those of a forward pass for one token (:func:`~statex_dist.models.flops.forward_flops_per_token`); memory
is that of one rank under ZeRO-3 (:mod:`checkpoints_tools.plan.memory`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from checkpoints_tools.plan.forgetting import Evidence, Forgetting, judge_forgetting
from checkpoints_tools.plan.memory import (
    CountActivations,
    TrainingMemory,
    TrainingSettings,
    parameter_shapes,
    training_memory,
)
from statex_dist.models.config import ModelConfig
from statex_dist.models.flops import forward_flops_per_token
from statex_dist.models.hybrid.host_tensors import memory_tensors
from statex_dist.models.sequence_memory import SequenceMemory, sequence_memory
from statex_dist.state.geometry import LARGEST_DELTA_KERNEL_KEYS


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerState:
    """One layer's state; bytes are of one sequence."""

    layer: int
    expansion: str | None
    numbers_before: int
    numbers_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """Figures of one model, all layers together.

    ``forget_tokens`` is the training length that its state asks for; None where it asks for none.
    """

    state_numbers: int
    state_bytes: int
    parameters: int
    flops_per_token: int
    memory: TrainingMemory
    sequence: SequenceMemory
    forget_tokens: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """The report that ``statex plan`` prints.

    Attributes:
        model_type: Family of the model.
        training: The run that memory is predicted for.
        layers: Every layer's state.
        before: Figures of the model as it is.
        after: Figures of the expanded model.
        forgetting: Whether ``seq_len`` is long enough for the state, with the evidence and the proposals.
        mixed: Whether the model has layers of another kind (attention and others).
        counted: Whether their parameters, memory and FLOPs are counted.
        notes: Limits of kernels that the plan meets.
    """

    model_type: str
    training: TrainingSettings
    layers: tuple[LayerState, ...]
    before: ModelCost
    after: ModelCost
    forgetting: Forgetting
    mixed: bool = False
    counted: bool = True
    notes: tuple[str, ...] = ()

    @property
    def warning(self) -> str | None:
        """One line on the forget threshold where ``seq_len`` is below it, or None."""
        return self.forgetting.warning

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        values = asdict(self)
        for side in ("before", "after"):
            values[side]["memory"] = getattr(self, side).memory.to_dict()
            values[side]["sequence"] = getattr(self, side).sequence.to_dict()
        return {**values, "forgetting": self.forgetting.to_dict(), "warning": self.warning}


def report_plan(
    before: ModelConfig,
    after: ModelConfig,
    training: TrainingSettings | None = None,
    count_activations: CountActivations | None = None,
    evidence: Evidence | None = None,
    context_length: int | None = None,
) -> PlanReport:
    """Return the costs of expanding ``before`` into ``after``.

    Args:
        before: The model as it is.
        after: The model with its plan.
        training: The run to predict the memory of.
        count_activations: Counts activations instead of the estimate for GPU kernels.
        evidence: What the forget threshold is concluded from; None for the paper's law.
        context_length: Tokens of the sequence whose states, keys and values are counted; None takes the model's.
    """
    training, evidence = training or TrainingSettings(), evidence or Evidence()
    layers = []
    for layer in before.recurrent_layers:
        old, new = before.layer_geometry(layer), after.layer_geometry(layer)
        expansion = after.statex.get(layer) if after.statex else None
        layers.append(
            LayerState(
                layer=layer,
                expansion=expansion.summary if expansion else None,
                numbers_before=old.elements,
                numbers_after=new.elements,
                bytes_before=old.state_bytes,
                bytes_after=new.state_bytes,
            )
        )
    return PlanReport(
        model_type=before.MODEL_TYPE,
        training=training,
        layers=tuple(layers),
        before=_cost(before, training, count_activations, evidence, context_length),
        after=_cost(after, training, count_activations, evidence, context_length),
        forgetting=judge_forgetting(before, after, training.seq_len, evidence),
        mixed=before.is_mixed,
        counted=not before.is_mixed or memory_tensors(before) is not None,
        notes=_kernel_notes(after),
    )


def _kernel_notes(config: ModelConfig) -> tuple[str, ...]:
    """Return what has to be known about the kernels of layers with features."""
    if config.RECURRENCE != "delta_rule":
        return ()
    geometries = {layer: config.layer_geometry(layer) for layer in config.recurrent_layers}
    wide = [
        layer for layer, g in geometries.items() if g.features is not None and g.key_dim > LARGEST_DELTA_KERNEL_KEYS
    ]
    if not wide:
        return ()
    projected, widest = geometries[wide[0]].projected_key_dim, max(geometries[layer].key_dim for layer in wide)
    line = (
        f"layers {wide}: up to {widest} key channels of a head, features included; fla-core's kernels of the delta "
        f"rule end at {LARGEST_DELTA_KERNEL_KEYS}, and our slower PyTorch form runs, whose activations the GPU "
        "estimate leaves out"
    )
    most = LARGEST_DELTA_KERNEL_KEYS // projected
    return (f"{line}; a factor of at most {most} keeps the kernels" if most > 1 else line,)


def _cost(
    config: ModelConfig,
    training: TrainingSettings,
    count_activations: CountActivations | None,
    evidence: Evidence,
    context_length: int | None,
) -> ModelCost:
    geometries = [config.layer_geometry(layer) for layer in config.recurrent_layers]
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    numbers = sum(geometry.elements for geometry in geometries)
    needed = math.ceil(evidence.threshold(numbers))
    return ModelCost(
        state_numbers=numbers,
        state_bytes=sum(geometry.state_bytes for geometry in geometries),
        parameters=parameters,
        flops_per_token=forward_flops_per_token(config),
        memory=training_memory(config, training, count_activations),
        sequence=sequence_memory(config, tokens=context_length),
        forget_tokens=needed if needed > 0 else None,
    )

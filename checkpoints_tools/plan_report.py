"""What an expansion costs, before anything is done.

Memory of training under ZeRO-3, per rank, for ``P`` parameters on ``W`` ranks and ``T`` tokens a rank:

* states: ``16 P / W`` bytes: bf16 parameters 2, bf16 gradients 2, fp32 master weights 4, Adam moments 8;
* gathered: ``4`` bytes per parameter of the largest layer (or of the embeddings): whole weights and whole gradients;
* activations, with every layer checkpointed: ``2 T hidden`` bytes at each layer's input, and for the one layer that is
  recomputed ``2 T (rows + columns)`` of each of its matrices and ``4 T / C`` times its state numbers (the states at the
  borders of chunks of ``C`` tokens);
* logits: ``12 T vocab`` bytes: bf16 logits and their gradient, and both once more in fp32.

FLOPs are those of a forward pass for one token: ``2`` per element of every matrix that multiplies it, and the scan's.
These are estimates to plan with: allocator slack, communication buffers and kernels' workspaces come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.kinds import Family, family_of
from statex_dist.models.layout import TensorSpec

STATE_BYTES_PER_PARAMETER = 16
_THOUSAND_TOKENS = 1024


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
class TrainingMemory:
    """Bytes per rank; the module's docstring has the formulas."""

    states: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.states + self.gathered + self.activations + self.logits


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """Figures of one model, all layers together."""

    state_numbers: int
    state_bytes: int
    parameters: int
    flops_per_token: int
    memory: TrainingMemory
    forget_tokens: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """What ``statex plan`` prints.

    Attributes:
        model_type: Family of the model.
        world_size: Ranks that share the training states.
        seq_len: Tokens a rank holds at once.
        layers: Every layer's state.
        before: Figures of the model as it is.
        after: Figures of the expanded model.
        warning: One line on the forget threshold where ``seq_len`` is below it.
        mixed: Whether the model has layers that are not counted (attention and what else is passed through).
    """

    model_type: str
    world_size: int
    seq_len: int
    layers: tuple[LayerState, ...]
    before: ModelCost
    after: ModelCost
    warning: str | None
    mixed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        values = asdict(self)
        for side in ("before", "after"):
            values[side]["memory"]["total"] = getattr(self, side).memory.total
        return values


def forget_threshold(state_numbers: int) -> int | None:
    """Return the training length in tokens above which forgetting is learned, or None for small states.

    ``5.172 N_S - 4.469`` thousand tokens for ``N_S`` million state numbers in all layers: fitted on Mamba-2 by
    Stuffed Mamba (arXiv 2410.07145).
    """
    thousands = 5.172 * state_numbers / 1e6 - 4.469
    return int(thousands * _THOUSAND_TOKENS) if thousands > 0 else None


def report_plan(before: ModelConfig, after: ModelConfig, *, world_size: int = 1, seq_len: int = 65536) -> PlanReport:
    """Return the costs of expanding ``before`` into ``after``.

    Args:
        before: The model as it is.
        after: The model with its plan.
        world_size: Ranks that share the training states.
        seq_len: Tokens a rank holds at once in training.

    Raises:
        ConfigError: ``world_size`` or ``seq_len`` is below 1.
    """
    for name, value in (("--world-size", world_size), ("--seq-len", seq_len)):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value}")
    layers = []
    for layer in before.recurrent_layers:
        old, new = before.layer_geometry(layer), after.layer_geometry(layer)
        expansion = after.statex.get(layer) if after.statex else None
        layers.append(
            LayerState(
                layer=layer,
                expansion=f"{expansion.op} x{expansion.factor} {expansion.init}" if expansion else None,
                numbers_before=old.numbers,
                numbers_after=new.numbers,
                bytes_before=old.state_bytes,
                bytes_after=new.state_bytes,
            )
        )
    cost = _cost(after, world_size, seq_len)
    warning = None
    if cost.forget_tokens and seq_len < cost.forget_tokens:
        warning = (
            f"--seq-len {seq_len} is below the forget threshold of {cost.forget_tokens} tokens for "
            f"{cost.state_numbers / 1e6:.1f} M state numbers: the model may not learn to forget and can collapse "
            "beyond its training length (Stuffed Mamba, arXiv 2410.07145; a law fitted on Mamba-2)"
        )
    return PlanReport(
        model_type=before.MODEL_TYPE,
        world_size=world_size,
        seq_len=seq_len,
        layers=tuple(layers),
        before=_cost(before, world_size, seq_len),
        after=cost,
        warning=warning,
        mixed=before.is_mixed,
    )


def _cost(config: ModelConfig, world_size: int, seq_len: int) -> ModelCost:
    family = family_of(config.MODEL_TYPE)
    specs = family.tensors(config)
    geometries = [config.layer_geometry(layer) for layer in config.recurrent_layers]
    parameters = sum(spec.numel for spec in specs.values())
    numbers = sum(geometry.numbers for geometry in geometries)
    matrices = sum(spec.numel for spec in specs.values() if spec.trunk and len(spec.shape) >= 2)
    return ModelCost(
        state_numbers=numbers,
        state_bytes=sum(geometry.state_bytes for geometry in geometries),
        parameters=parameters,
        flops_per_token=2 * matrices + sum(geometry.scan_flops for geometry in geometries),
        memory=_memory(family, config, specs, world_size, seq_len),
        forget_tokens=forget_threshold(numbers),
    )


def _memory(
    family: Family, config: ModelConfig, specs: dict[str, TensorSpec], world_size: int, seq_len: int
) -> TrainingMemory:
    parameters = sum(spec.numel for spec in specs.values())
    layer_parameters = [0] * config.num_hidden_layers
    layer_widths = [0] * config.num_hidden_layers
    for name, spec in specs.items():
        if place := family.names.split(name):
            layer_parameters[place[0]] += spec.numel
            if len(spec.shape) == 2:
                layer_widths[place[0]] += sum(spec.shape)
    working = []
    for layer in config.recurrent_layers:
        width = layer_widths[layer]
        geometry = config.layer_geometry(layer)
        chunks = -(-seq_len // geometry.chunk_size)
        working.append(2 * seq_len * width + 4 * chunks * geometry.numbers)
    return TrainingMemory(
        states=-(-STATE_BYTES_PER_PARAMETER * parameters // world_size),
        gathered=4 * max(*layer_parameters, specs[family.names.embeddings].numel),
        activations=2 * seq_len * config.hidden_size * config.num_hidden_layers + max(working),
        logits=12 * seq_len * config.vocab_size,
    )

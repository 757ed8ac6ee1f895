"""Contents of a training checkpoint besides its tensors, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from statex_dist.checkpoint.formats.tensor_io import TensorInfo
from statex_dist.checkpoint.formats.torch_archive.pickle import TensorRef, UnsafePickleError, mapped, named
from statex_dist.checkpoint.formats.torch_archive.reader import gathered
from statex_dist.checkpoint.formats.torch_archive.zip import TorchArchive
from statex_dist.checkpoint.formats.zero3.layout import DEFAULT_SUB_GROUP_SIZE
from statex_dist.checkpoint.formats.zero3.rank import Scalar, base_states
from statex_dist.checkpoint.formats.zero3.reader import Zero3Source
from statex_dist.errors import CheckpointError

MAX_CLIENT_BYTES = 64 << 20
"""Bytes of tensors in a rank's client state that are carried along, in memory: states of generators, not models."""

_CARRIED = "carried"
"""States between packs, in the client state: of one rank's share of the data, in the model's shapes, and large."""

_OURS = ("module", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params", "dp_world_size")
"""Keys of DeepSpeed's model states that are made for the target, not copied."""
_DEEPSPEED = (
    *_OURS,
    *("buffer_names", "optimizer", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
    *("skipped_steps", "global_steps", "global_samples", "mp_world_size", "checkpoint_parallel_dimensions"),
    *("ds_config", "ds_version"),
)
"""Keys of DeepSpeed's model states that are not the client's."""


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A small tensor with its values."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Stands for a parameter or a buffer, whose values are elsewhere; of this dtype."""

    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStates:
    """A ZeRO-3 checkpoint without its tensors.

    Attributes:
        groups: Shapes of each optimizer group's parameters, by name in flat order.
        settings: Each group's settings (learning rate, weight decay, ...).
        scalars: What the optimizer keeps once per group, such as ``step``.
        states: Names of the optimizer's states with a value per element, such as ``exp_avg``.
        sub_group_size: DeepSpeed's setting of that name.
        buffers: The buffers.
        frozen: The frozen parameters.
        module: Every entry of the module's state dict: a placeholder of a parameter, a buffer, or what else it holds
            (an alias of a buffer, extra state), which goes along as it is.
        shared: Tied names and their owners.
        optim: What the optimizer file holds beside the optimizer's states.
        optimizer: What those hold beside values, settings and the number of ranks.
        frozen_excluded: Whether there are no frozen parameters because they were left out when it was saved.
        prefix: Beginning of the name of an optimizer file: ``bf16_`` of a bf16 run.
        step: Optimizer steps done.
        client: Returns all else that is in the model states of a rank.
    """

    groups: Sequence[Mapping[str, tuple[int, ...]]]
    settings: Sequence[Mapping[str, Any]]
    scalars: Sequence[Mapping[str, Scalar]]
    states: Sequence[str]
    sub_group_size: int | None
    buffers: Mapping[str, TensorInfo]
    frozen: Mapping[str, TensorInfo]
    module: Mapping[str, Placeholder | Any]
    shared: Mapping[str, str]
    optim: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    frozen_excluded: bool
    prefix: str
    step: int
    client: Callable[[int], Mapping[str, Any]]


def read_training_states(source: Zero3Source, world_size: int) -> tuple[TrainingStates, list[str]]:
    """Return the training states of a checkpoint, and notes on carrying them to ``world_size`` ranks.

    Values that each rank has of its own (generators, in the client state) go to the rank of the same number. Further
    ranks get the values of the first ranks again. States between packs are left out.

    Raises:
        CheckpointError: The client state holds more than is carried along.
    """
    states = source.optim["optimizer_state_dict"]
    optim_archive = source.ranks[0].archives[1]
    settings = [
        {key: _held(value, optim_archive) for key, value in group.items() if key != "params"}
        for group in base_states(source.optim).get("param_groups") or []
    ]
    zero = (source.model.get("ds_config") or source.optim.get("ds_config") or {}).get("zero_optimization") or {}
    kept = {k: v for k, v in states.items() if k not in ("optimizer_state_dict", "fp32_flat_groups", "partition_count")}
    shapes = source.layout.shapes

    same: list[tuple[Any, Mapping[str, Any]]] = []  # the last contents without tensors, before and after

    @lru_cache(maxsize=2)
    def client(rank: int) -> Mapping[str, Any]:
        opened = source.model_states(rank % source.world_size)
        if same and same[0][0] is opened.content:
            return same[0][1]
        left_out = (*_OURS, _CARRIED)
        found = {key: value for key, value in opened.content.items() if key not in left_out}
        held = {key: _held(value, opened) for key, value in found.items()}
        if held == found:
            same[:] = [(opened.content, held)]
        return held

    training = TrainingStates(
        groups=[{name: tuple(shapes[name]) for name in group} for group in source.groups],
        settings=settings or [{} for _ in source.groups],
        scalars=source.scalars,
        states=list(source.states()),
        sub_group_size=zero.get("sub_group_size", DEFAULT_SUB_GROUP_SIZE),
        buffers={name: source.info(name) for name in source.owned() if name in source.buffers},
        frozen={name: source.info(name) for name in source.frozen},
        module={name: _entry(name, value, source) for name, value in source.model["module"].items()}
        | {name: Placeholder(source.info(name).dtype) for name in source.filled},
        shared=dict(source.model.get("shared_params") or {}),
        optim={k: _held(v, optim_archive) for k, v in source.optim.items() if k != "optimizer_state_dict"},
        optimizer={key: _held(value, optim_archive) for key, value in kept.items()},
        frozen_excluded=source.frozen_excluded,
        prefix=source.ranks[0].files.optim.name.partition("zero_pp_rank_")[0],
        step=int(source.model.get("global_steps") or 0),
        client=client,
    )
    notes = _client_notes(client, source.world_size, world_size)
    if _CARRIED in source.model:
        notes.append("states between packs are left out: what would begin from one of them begins from an empty one")
    return training, notes


def _entry(name: str, value: Any, source: Zero3Source) -> Any:
    """Return an entry of the module's state dict."""
    is_parameter = name in source.layout.shapes or name in source.frozen or name in source.aliases
    if isinstance(value, TensorRef) and (is_parameter or name in source.buffers or not value.numel):
        return Placeholder(value.dtype)
    return _held(value, source.first)


def _client_notes(client: Callable[[int], Mapping[str, Any]], old: int, new: int) -> list[str]:
    first = client(0)
    others = (held for rank in range(1, old) if (held := client(rank)) is not first)
    own = sorted({k for held in others for k, v in held.items() if k not in _DEEPSPEED and v != first.get(k)})
    if not own or old == new:
        return []
    listed = ", ".join(own)
    if new < old:
        return [
            f"each rank has its own client state ({listed}): that of ranks 0..{new - 1} is kept, the rest is left out"
        ]
    return [f"each rank has its own client state ({listed}): ranks {old}..{new - 1} get copies of those of ranks 0.."]


def _held(value: Any, archive: TorchArchive) -> Any:
    """Return a value with the tensors in it read."""
    left = [MAX_CLIENT_BYTES]

    def hold(value: Any) -> Any:
        if not isinstance(value, TensorRef):
            return value
        data = gathered(archive, value) if value.numel * 8 <= left[0] else None
        if data is None or len(data) > left[0]:
            raise CheckpointError(
                f"{archive.path}: tensors beside the model's own need more than {MAX_CLIENT_BYTES >> 20} MiB; a "
                "client state of that size cannot be carried along"
            )
        left[0] -= len(data)
        return HeldTensor(value.dtype, value.shape, data)

    try:
        return mapped(value, hold)
    except UnsafePickleError as error:
        raise CheckpointError(f"{archive.path}: {error}") from None


def fresh_training_states(
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    settings: Sequence[Mapping[str, Any]],
    *,
    module: Collection[str],
    shared: Mapping[str, str],
    bf16: bool,
) -> TrainingStates:
    """Return the states of a run that has not made a step: weights alone, from any other layout.

    Args:
        groups: Shapes of each optimizer group's parameters, by name in the order of the model.
        settings: Each group's settings.
        module: Names of the module's state dict.
        shared: Tied names and their owners.
        bf16: Whether the run trains in bf16.
    """
    scaler = named("deepspeed.runtime.fp16.loss_scaler.LossScaler")()
    scaler.by_call, scaler.state = False, {"cur_scale": 1.0, "dynamic": False}
    stage = named("deepspeed.runtime.zero.config.ZeroStageEnum")(3)
    config = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": 3}}
    schedule = {
        "base_lrs": [0.0] * len(groups),
        "last_epoch": 0,
        "_step_count": 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [0.0] * len(groups),
        "lr_lambdas": [{} for _ in groups],
    }
    counters = dict.fromkeys(("skipped_steps", "global_steps", "global_samples", "step"), 0)
    nothing = dict.fromkeys(("optimizer", "data_sampler", "random_ltd"))
    client = {
        **{"buffer_names": [], "lr_scheduler": schedule, "mp_world_size": 1, **nothing, **counters},
        **{"checkpoint_parallel_dimensions": {"tp_degree": 1, "pp_degree": 1}},
        **{"ds_config": config, "ds_version": "0.19.8"},
    }
    return TrainingStates(
        groups=groups,
        settings=settings,
        scalars=[{} for _ in groups],
        states=[],
        sub_group_size=DEFAULT_SUB_GROUP_SIZE,
        buffers={},
        frozen={},
        module=dict.fromkeys(module, Placeholder("BF16" if bf16 else "F32")),
        shared=shared,
        optim={"ds_config": config, "ds_version": "0.19.8"},
        optimizer={"zero_stage": stage, "loss_scaler": scaler, "dynamic_loss_scale": False, "overflow": False},
        frozen_excluded=False,
        prefix="bf16_" if bf16 else "",
        step=0,
        client=lambda rank: client,
    )


def batch_proposal(ds_config: Mapping[str, Any], old: int, new: int) -> dict[str, Any] | None:
    """Return how the global batch is kept on another number of ranks, or None where the settings do not say.

    Args:
        ds_config: DeepSpeed's configuration.
        old: Ranks that wrote the checkpoint.
        new: Ranks that will load it.

    Returns:
        ``global`` (sequences per optimizer step), ``micro_batch_size_per_gpu``, ``gradient_accumulation_steps``, and
        ``kept``: whether these give the same global batch; if not, the nearest smaller one.
    """

    def setting(name: str) -> int:
        value = ds_config.get(name)
        return value if isinstance(value, int) and value > 0 else 0

    micro, steps = setting("train_micro_batch_size_per_gpu"), setting("gradient_accumulation_steps")
    total = setting("train_batch_size")
    # Of the three DeepSpeed takes any two, or the first alone.
    if not micro and total and steps:
        micro = total // (steps * old)
    if micro and not steps:
        steps = total // (micro * old) if total else 1
    if not micro or not steps:
        return None
    total = micro * steps * old
    share = total // new
    if share == 0:
        return {
            "global": total,
            "micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "kept": False,
        }
    best = max(size for size in range(1, micro + 1) if share % size == 0)
    return {
        "global": total,
        "micro_batch_size_per_gpu": best,
        "gradient_accumulation_steps": share // best,
        "kept": share * new == total,
    }

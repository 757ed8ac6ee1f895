"""Memory of a training run under ZeRO, per rank, before anything is started.

``N`` parameters over ``W`` ranks are ``E = N / W`` elements a rank; ``p`` are bytes of a parameter (bf16 2, fp32 4),
``g`` of a gradient that waits for the step (``p``; 4 where several packs or segments are summed). In stage 3 DeepSpeed
0.19 holds all the time:

* parameters: ``p E``, and whole copies ``p`` of those below ``param_persistence_threshold``;
* master weights: ``4 E`` in bf16; in fp32 the parameters are their own, unless the optimizer is offloaded;
* moments of Adam: ``8 E``;
* gradients: ``g E``; with an offloaded optimizer once more ``4 E`` in fp32 beside the master weights;
* reduce bucket, where gradients wait for their reduction: ``p`` times 5e8 (``reduce_bucket_size``) on a GPU, which is
  allocated whole; on a CPU only the pages that ``N`` parameters touch.

Stages 0 to 2 are in :mod:`checkpoints_tools.plan.whole_model`.

On top of this comes, in turn:

* ``start``: the rank's partition ``p E``, where the parameters are placed, and the largest parameter, which DeepSpeed
  gathers once: ``p max``. With parameters on NVMe every rank makes the whole model: in host memory with the file that
  it is read from, mapped, ``2 p N``, and then on the GPU ``p N``;
* ``pass`` (forward and backward): gathered parameters and activations. Parameters are kept for the backward pass if
  they are used again within 1e9 elements (``stage3_max_reuse_distance``), so of a smaller model all are there; of a
  larger one ``1e9 / passes`` (2, or 3 with checkpointing), the next 5e7 (``stage3_prefetch_bucket_size``) and the
  largest tensor;
* ``reduce``: the bucket once more, in the order of ranks; gloo (CPU) copies that again;
* ``update``: the gradients of a sub-group in fp32, and on a CPU Adam's denominator: two tensors of ``4 E`` (the root,
  and the root corrected); the fused kernel on a GPU has none;
* ``save``, with ``train.save_async``: a copy of the saved values in host memory, ``12 E``. It stays from the first save
  and so counts in all of the above.

The peak is the largest of ``start``, ``pass``, ``reduce`` and ``update``. Offloaded parts are in host memory; on NVMe,
the swap buffers remain there: 4 buffers of a sub-group's master weights, moments and gradients, 5 of 1e8 parameters.

Activations on a CPU are counted, not estimated (``statex_dist/models/activations.py``); the caller passes them. With
GPU kernels they are estimated: a layer keeps ``p T (rows + columns)`` of each of its matrices for ``T`` tokens, or ``p
T hidden`` where it is recomputed, one such layer being whole at a time. To this comes what the backward pass of the
most demanding layer holds: the states at the borders of chunks of ``C`` tokens and their gradients, ``8 T / C`` times
its state elements. Where our own scan runs (``ops/gla/triton``: large heads, and linear attention with features), these
are bounded by ``max_state_bytes``, and the layer keeps one state in fp32 for each time the bound is filled. Other
kernels get the queries and keys with their features (and KDA's decays): ``p T`` for each added channel. Logits take
``p`` bytes each, those of one loss chunk at a time: their gradient overwrites them. The loss computes its gradients at
once, in the forward pass: ``p T hidden``, and of the head ``8 vocab hidden``: a fp32 sum and the term added to it.
Allocator slack, kernels' workspaces and the process itself (CUDA context; 0.5 GiB of Python on a CPU) come on top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from checkpoints_tools.plan.whole_model import whole_model_memory
from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.hybrid.host_tensors import memory_tensors
from statex_dist.models.layout import GAIN_NAME
from statex_dist.models.registry import family_of
from statex_dist.state.geometry import CHUNK_SIZE, MAX_STATE_BYTES, chunks_per_segment

Place = Literal["none", "cpu", "nvme"]

_REDUCE_BUCKET = 500_000_000
_PREFETCH_BUCKET = 50_000_000
_REUSE_DISTANCE = 1_000_000_000
_SWAP_PARAMETERS = 5 * 100_000_000
_SWAP_SUB_GROUPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """What of a run's configuration decides its memory; names and defaults are those of the configuration.

    Attributes:
        world_size: Ranks that share the training states.
        stage: What they share: nothing (0), optimizer states (1), gradients (2), parameters (3).
        seq_len: Tokens of a packed sequence.
        context: Ranks that share one.
        precision: Of parameters and activations.
        activation_checkpointing: Layers that are recomputed.
        loss_chunk_tokens: Tokens whose logits are held at once; 0 for all.
        segment_tokens: Tokens that are run at once; 0 for the whole sequence.
        max_state_bytes: Bound of the chunk states of an expanded GLA layer.
        accumulation: Packed sequences per rank and step.
        offload_optimizer: Where master weights, moments and gradients are.
        offload_parameters: Where the partitions of the parameters are.
        param_persistence_threshold: Tensors with fewer elements are whole on every rank.
        sub_group_size: Elements that are updated at once.
        save_async: Whether checkpoints are written from a copy.
        device: ``cuda`` (with kernels) or ``cpu``.
    """

    world_size: int = 1
    stage: int = 3
    seq_len: int = 65536
    context: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "block", "expanded"] = "none"
    loss_chunk_tokens: int = 8192
    segment_tokens: int = 0
    max_state_bytes: int = MAX_STATE_BYTES
    accumulation: int = 1
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    param_persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000
    save_async: bool = False
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        for name in ("world_size", "seq_len", "context", "accumulation", "max_state_bytes", "sub_group_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_option(name)} must be 1 or more, not {getattr(self, name)}")
        for name in ("loss_chunk_tokens", "segment_tokens", "param_persistence_threshold"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{_option(name)} must be 0 or more, not {getattr(self, name)}")
        allowed: tuple[Any, ...]
        for name, allowed in (
            ("stage", (0, 1, 2, 3)),
            ("precision", ("fp32",) if self.stage == 0 else ("bf16", "fp32")),
            ("activation_checkpointing", ("none", "block", "expanded")),
            ("offload_optimizer", ("none", "cpu") if self.stage == 3 else ("none",)),
            ("offload_parameters", get_args(Place) if self.stage == 3 else ("none",)),
            ("device", ("cuda", "cpu")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{_option(name)} must be one of {', '.join(map(str, allowed))}, not {getattr(self, name)!r}"
                )
        if self.world_size % self.context:
            raise ConfigError(f"--context {self.context} does not divide --world-size {self.world_size}")

    @property
    def tokens(self) -> int:
        """Tokens that a rank runs at once."""
        segments = -(-self.seq_len // self.segment_tokens) if self.segment_tokens else 1
        return -(-self.seq_len // (segments * self.context))

    @property
    def carried(self) -> bool:
        """Whether states pass from segment to segment."""
        return 0 < self.segment_tokens < self.seq_len


CountActivations = Callable[[ModelConfig, TrainingSettings], int]
"""Returns the bytes of activations of a model's pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Bytes of one rank on its GPU and in host memory; on a CPU all are in host memory."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(device=self.device + other.device, host=self.host + other.host)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Memory of one rank; the module's docstring has the formulas.

    Attributes:
        parts: What is held all the time, by name.
        passing: What a forward and backward pass adds, by name.
        phases: Bytes that are held at the peak of each phase, by name.
    """

    parts: dict[str, Share]
    passing: dict[str, Share]
    phases: dict[str, Share]

    @property
    def peak(self) -> Share:
        """The most bytes of any phase, GPU and host each."""
        return Share(
            device=max(share.device for share in self.phases.values()),
            host=max(share.host for share in self.phases.values()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {**asdict(self), "peak": asdict(self.peak)}


def training_memory(
    config: ModelConfig, settings: TrainingSettings, count_activations: CountActivations | None = None
) -> TrainingMemory:
    """Return what a rank needs to train ``config``.

    Args:
        config: The model.
        settings: The run.
        count_activations: Counts activations instead of the estimate for GPU kernels.
    """
    shapes = parameter_shapes(config)
    sizes = [math.prod(shape) for shape in shapes.values()]
    total, cpu = sum(sizes), settings.device == "cpu"
    whole = sum(size for size in sizes if size <= settings.param_persistence_threshold)
    mine = sum(-(-size // settings.world_size) for size in sizes)
    group = min(settings.sub_group_size, mine)
    width = 2 if settings.precision == "bf16" else 4
    summed = 4 if settings.accumulation > 1 or settings.carried else width
    bucket = width * min(total, _REDUCE_BUCKET)

    def on_device(count: int) -> Share:
        return Share(host=count) if cpu else Share(device=count)

    def placed(count: int, place: Place, buffers: int) -> Share:
        if place == "none":
            return on_device(count)
        return Share(host=count if place == "cpu" else min(buffers, count))

    optimizer = settings.offload_optimizer
    at_host = cpu or optimizer != "none"
    if settings.stage < 3:
        below = whole_model_memory(
            settings.stage,
            sizes,
            world_size=settings.world_size,
            width=width,
            summed=settings.accumulation > 1 or settings.carried,
            cpu=cpu,
            bucket=_REDUCE_BUCKET,
        )
        parts = {
            "parameters": on_device(below.parameters),
            "master weights": on_device(below.master),
            "moments": on_device(below.moments),
            "gradients": on_device(below.gradients),
            "copy to save": Share(host=below.saved if settings.save_async else 0),
        }
        passing = {"reduce bucket": on_device(below.passing)}
        reduce, update = on_device(below.reduce), below.update
    else:
        swapped = 4 * _SWAP_SUB_GROUPS * group
        master = 4 * mine if width == 2 or optimizer != "none" else 0
        again = Share() if optimizer == "none" else placed(4 * mine, optimizer, swapped)
        parts = {
            "parameters": placed(width * mine, settings.offload_parameters, width * _SWAP_PARAMETERS)
            + on_device(width * whole),
            "master weights": placed(master, optimizer, swapped),
            "moments": placed(8 * mine, optimizer, 2 * swapped),
            "gradients": (on_device(summed * mine) if optimizer == "none" else Share(host=summed * mine)) + again,
            "reduce bucket": on_device(bucket if cpu else width * _REDUCE_BUCKET),
            "copy to save": Share(host=12 * mine if settings.save_async else 0),
        }
        passing = {"gathered": on_device(_gathered(settings, sizes, whole) * width)}
        reduce = on_device(bucket * (2 if cpu else 1))
        update = 4 * group * ((1 if optimizer == "none" else 0) + (2 if at_host else 0))
    if count_activations is None:
        tokens, chunk = settings.tokens, min(settings.loss_chunk_tokens or settings.tokens, settings.tokens)
        passing |= {
            "activations": on_device(_estimate(config, settings, shapes, width)),
            "logits": on_device(width * chunk * config.vocab_size),
            "loss gradients": on_device((width * tokens + 8 * config.vocab_size) * config.hidden_size),
        }
    else:
        passing["activations"] = on_device(count_activations(config, settings))
    held = sum(parts.values(), Share())
    return TrainingMemory(
        parts=parts,
        passing=passing,
        phases={
            "start": _start(settings, sizes, parts["parameters"], width),
            "pass": held + sum(passing.values(), Share()),
            "reduce": held + reduce,
            "update": held + (Share(host=update) if at_host else Share(device=update)),
        },
    )


def _start(settings: TrainingSettings, sizes: list[int], partition: Share, width: int) -> Share:
    """Return what a rank holds while the model is made, before the optimizer."""
    on_gpu = settings.device == "cuda"
    if settings.offload_parameters == "nvme" or settings.stage < 3:
        total = width * sum(sizes)
        if settings.stage in (1, 2) and on_gpu:  # each group becomes one flat tensor
            return Share(host=2 * total, device=2 * total)
        return Share(host=2 * total, device=total) if on_gpu else Share(host=2 * total)
    largest = width * max(sizes)
    return partition + (Share(device=largest) if on_gpu else Share(host=largest))


def _gathered(settings: TrainingSettings, sizes: list[int], whole: int) -> int:
    """Return the elements that are gathered at the end of the forward pass, beside those that are whole anyway."""
    passes = 2 if settings.activation_checkpointing == "none" else 3
    rest, kept = sum(sizes) - whole, _REUSE_DISTANCE // passes
    return rest if rest <= kept else min(rest, kept + _PREFETCH_BUCKET + max(sizes))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by name; of a mixed model those of all layers where they are known."""
    found = memory_tensors(config) if config.is_mixed else None
    if found is not None:
        return dict(found)
    return {name: spec.shape for name, spec in family_of(config.MODEL_TYPE).tensors(config).items()}


def _estimate(
    config: ModelConfig, settings: TrainingSettings, shapes: Mapping[str, tuple[int, ...]], width: int
) -> int:
    """Return the bytes of the layers' activations with GPU kernels."""
    tokens = settings.tokens
    chosen = getattr(config, "num_experts_per_tok", None) or config.said("num_experts_per_tok")
    widths = [0] * config.num_hidden_layers
    for name, shape in shapes.items():
        place = re.search(r"\.layers\.(\d+)\.", name)
        if place is None or name.endswith((GAIN_NAME, "conv1d.weight")):
            continue
        if len(shape) == 2:
            widths[int(place[1])] += sum(shape)
        elif len(shape) == 3 and isinstance(chosen, int):  # experts as one tensor, of which a token takes some
            widths[int(place[1])] += chosen * sum(shape[1:])
    kept, again, states = 0, [0], [0]
    recurrent = frozenset(config.recurrent_layers)
    for layer in range(config.num_hidden_layers) if config.is_mixed or config.kv_elements else config.recurrent_layers:
        whole = width * tokens * widths[layer]
        geometry = config.layer_geometry(layer) if layer in recurrent else None
        if geometry is None:
            pass  # attention keeps its inputs and outputs alone, which the matrices have
        elif geometry.is_large or (geometry.features is not None and config.RECURRENCE == "gla"):
            chunks, state = -(-tokens // CHUNK_SIZE), width * geometry.elements
            held = min(chunks, chunks_per_segment(chunks, state, settings.max_state_bytes))
            states.append(2 * state * held)
            whole += 4 * geometry.elements * -(-chunks // held)
        else:
            states.append(8 * -(-tokens // geometry.chunk_size) * geometry.elements)
            added = geometry.num_key_groups * (geometry.key_dim - geometry.projected_key_dim)
            whole += width * tokens * added * (3 if config.MODEL_TYPE == "kda" else 2)
        expanded = config.statex is not None and config.statex.get(layer) is not None
        policy = settings.activation_checkpointing
        if policy == "block" or (policy == "expanded" and expanded):
            kept += width * tokens * config.hidden_size
            again.append(whole)
        else:
            kept += whole
    return kept + max(again) + max(states)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"

"""Memory of ZeRO stages 0 to 2, where every rank holds the whole model.

Symbols are those of :mod:`checkpoints_tools.plan.memory`. DeepSpeed 0.19 holds all the time:

* parameters: ``p N``;
* master weights: ``4 E``, in fp32 too; stage 0 (fp32 only) has none;
* moments of Adam: ``8 E``, in stage 0 ``8 N``;
* gradients: ``g E`` in stage 2; ``4 N`` in stage 0. Where stage 1 sums bf16 gradients in fp32, ``4 N`` and the bf16
  ones, ``2 N``; else its gradients are there in the pass alone: ``p N``.

In the pass two reduce buckets of 5e8 elements come on top, of which one is filled while the other is reduced; on a CPU
only the pages that the gradients touch, which lie in the bucket then. Stage 0, and stage 1 where it sums in fp32, have
no buckets: they reduce copies of up to 5e8 gradients in fp32.

In the update come the rank's part of the gradients (``p E`` in stage 1, ``g E`` more in stage 2 where fp32 gradients
are summed), a copy of it in fp32 (``4 E``) and, on a CPU, Adam's denominators: two tensors of a flat group (``8 E``),
in stage 0 of the largest parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeModelMemory:
    """Bytes of a rank; the module's docstring has the formulas.

    Attributes:
        parameters: Of the model.
        master: Of the master weights.
        moments: Of Adam's moments.
        gradients: Of gradients between passes.
        passing: What the pass adds beside activations.
        reduce: What the reduction adds.
        update: What the update adds.
        saved: Of what rank 0 writes.
    """

    parameters: int
    master: int
    moments: int
    gradients: int
    passing: int
    reduce: int
    update: int
    saved: int


def whole_model_memory(
    stage: int, sizes: Sequence[int], *, world_size: int, width: int, summed: bool, cpu: bool, bucket: int
) -> WholeModelMemory:
    """Return the memory of a rank in a stage from 0 to 2.

    Args:
        stage: The stage.
        sizes: Elements of each parameter.
        world_size: Ranks.
        width: Bytes of a parameter.
        summed: Whether the gradients of several packs or segments are summed.
        cpu: Whether the model is trained on a CPU.
        bucket: Elements of a reduce bucket.
    """
    total = sum(sizes)
    mine = sum(-(-size // world_size) for size in sizes) if stage else total
    whole_sums = stage == 1 and summed and width == 2
    in_bucket = cpu and total <= bucket
    denominators = (8 * mine if stage else 8 * max(sizes)) if cpu else 0
    gradients, passing, part = 0, 0, 0
    if stage == 0:
        gradients = width * total
    elif stage == 1:
        gradients = (4 + width) * total if whole_sums else 0
        passing = 0 if whole_sums or in_bucket else width * total
        part = 0 if whole_sums else (width + 4) * mine
    else:
        held = 4 if summed else width
        gradients = held * mine
        part = 4 * mine + (held * mine if summed and width == 4 else 0)
    no_buckets = stage == 0 or whole_sums
    buckets = 0 if no_buckets else width * total if in_bucket else 2 * width * bucket
    return WholeModelMemory(
        parameters=width * total,
        master=4 * mine if stage else 0,
        moments=8 * mine,
        gradients=gradients,
        passing=passing + buckets,
        reduce=4 * min(total, bucket) if no_buckets else buckets,
        update=part + denominators,
        saved=12 * mine + (width * total if stage else 0),
    )

"""What a checkpoint directory holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.model_check import check_tensors, read_source_config
from checkpoints_tools.sources import open_source
from checkpoints_tools.tensor_io import TORCH_NAMES
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFacts:
    """What ``statex inspect`` prints.

    Attributes:
        path: Directory of the files (of a run: its newest tag).
        kind: ``hf``, ``zero3`` or ``plain``.
        tensors: Number of tensors, tied names not counted.
        parameters: Their elements.
        dtypes: Tensors by dtype.
        tied: Tied names and their owners.
        manifest: ``verified`` (every file agrees with it) or that there is none.
        model_type: From ``config.json``, or None.
        state_numbers: Of all layers, for a family of ours.
        plan: The expansion plan, if any.
        complete: Whether names and shapes are just those of ``config.json``; None where that is not known.
        problem: Why not.
        step: Optimizer step.
        world_size: Ranks that wrote it.
    """

    path: str
    kind: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    tied: dict[str, str]
    manifest: str
    model_type: str | None
    state_numbers: int | None
    plan: dict[str, Any] | None
    complete: bool | None
    problem: str | None = None
    step: int | None = None
    world_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return asdict(self)


def inspect(directory: str | Path) -> CheckpointFacts:
    """Describe a checkpoint; every file listed in a manifest is compared with it.

    Raises:
        CheckpointError: Not a checkpoint, or a damaged one.
    """
    source = open_source(directory)
    values, config = read_source_config(source)
    problem = None
    if config is not None:
        try:
            check_tensors(source, config)
        except CheckpointError as error:
            problem = str(error)
    infos = [source.info(name) for name in source.keys() if name not in source.aliases]  # noqa: SIM118 - not a mapping
    dtypes: dict[str, int] = {}
    for info in infos:
        dtypes[TORCH_NAMES[info.dtype]] = dtypes.get(TORCH_NAMES[info.dtype], 0) + 1
    facts = source.facts
    return CheckpointFacts(
        path=str(facts.path),
        kind=facts.kind,
        tensors=len(infos),
        parameters=sum(info.numel for info in infos),
        dtypes=dtypes,
        tied=dict(source.aliases),
        manifest="verified" if facts.verified else f"no {MANIFEST_NAME}",
        model_type=config.MODEL_TYPE if config else values.get("model_type") if values else None,
        state_numbers=config.state_numbers if config else None,
        plan=config.statex.to_dict() if config and config.statex else None,
        complete=None if config is None else problem is None,
        problem=problem,
        step=facts.info.get("step"),
        world_size=facts.info.get("world_size"),
    )

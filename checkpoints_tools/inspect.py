"""What a checkpoint directory holds, told from names, sizes and headers: no value is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_tools.model_check import check_names, check_whole, read_source_config, tied_names
from checkpoints_tools.sources import open_source, recognise
from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.errors import CheckpointError

_SHOWN_FILES = 16


@dataclass(kw_only=True, slots=True)
class CheckpointFacts:
    """What ``statex inspect`` prints; None where something is not known.

    Attributes:
        path: Directory of the files (of a run: its newest tag).
        kind: Layout: ``hf``, ``torch``, ``zero3``, ``plain``, ``tp`` or ``megatron``.
        model_type: From ``config.json``.
        plan: The expansion plan, if any.
        step: Optimizer step.
        world_size: Ranks that wrote it, or that it is cut for.
        tensors: Number of tensors, tied names not counted.
        parameters: Elements of the floating-point tensors that are no buffers.
        dtypes: Tensors by dtype.
        tied: Tied names and their owners.
        states: Names of the optimizer's states.
        state_numbers: Size of the recurrent state of all layers, of a family of ours.
        files: Number of files below the directory.
        bytes: Bytes of all of them.
        largest: The largest files and their bytes.
        manifest: ``sizes agree`` or that there is none.
        complete: Whether nothing is missing; None where that is not known.
        problem: What is missing or wrong.
        notes: What has to be known of it besides.
    """

    path: str
    kind: str
    model_type: str | None = None
    plan: dict[str, Any] | None = None
    step: int | None = None
    world_size: int | None = None
    tensors: int | None = None
    parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    state_numbers: int | None = None
    files: int = 0
    bytes: int = 0
    largest: dict[str, int] = field(default_factory=dict)
    manifest: str = f"no {MANIFEST_NAME}"
    complete: bool | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return asdict(self)


def inspect(directory: str | Path) -> CheckpointFacts:
    """Describe a checkpoint; one that is incomplete or damaged is described as far as it can be.

    Raises:
        CheckpointError: Not a checkpoint.
    """
    kind, path = recognise(directory)
    sizes = {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_SHOWN_FILES]
    facts = CheckpointFacts(
        path=str(path),
        kind=kind,
        files=len(sizes),
        bytes=sum(sizes.values()),
        largest={name: sizes[name] for name in largest},
    )
    try:
        _describe(facts, path)
    except CheckpointError as error:
        facts.complete, facts.problem = False, str(error)
    return facts


def _describe(facts: CheckpointFacts, path: Path) -> None:
    """Add what the headers say.

    Raises:
        CheckpointError: Files are missing, damaged, or not those of the manifest.
    """
    if (path / MANIFEST_NAME).is_file():
        manifest = Manifest.read(path)
        facts.step, facts.world_size = manifest.info.get("step"), manifest.info.get("world_size")
        manifest.verify_sizes(path)
        facts.manifest, facts.complete = "sizes agree", True
    source = open_source(path, verify=False, describe=True)
    if facts.kind in ("zero3", "tp", "megatron"):
        facts.complete = True  # these layouts say which files and tensors there are
    infos = [source.info(name) for name in source.owned()]
    for info in infos:
        facts.dtypes[TORCH_NAMES[info.dtype]] = facts.dtypes.get(TORCH_NAMES[info.dtype], 0) + 1
    facts.tensors = len(infos)
    facts.notes = list(source.facts.notes)
    facts.parameters = sum(i.numel for i in infos if i.dtype in FLOATS and i.name not in source.buffers)
    facts.tied, facts.states = dict(source.aliases), list(source.states())
    told = source.facts.info
    facts.step = told.get("step", facts.step)
    facts.world_size = told.get("world_size", told.get("tp", facts.world_size))
    values, config = read_source_config(source)
    if config is None:
        check_whole(source)
        facts.model_type = values.get("model_type") if values else None
        return
    facts.model_type, facts.state_numbers = config.MODEL_TYPE, config.state_numbers
    facts.plan = config.statex.to_dict() if config.statex else None
    facts.parameters -= sum(i.numel for i in infos if i.name in tied_names(config))
    check_names(source, config)
    facts.complete = True

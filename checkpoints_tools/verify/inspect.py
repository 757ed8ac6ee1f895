"""Describe the contents of a checkpoint directory from names, sizes and headers, without reading values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.dtypes import FLOATS, TORCH_NAMES
from statex_dist.checkpoint.formats.detect import find_model_dir, open_files, recognise
from statex_dist.checkpoint.formats.registry import find_layout
from statex_dist.checkpoint.formats.safetensors import read_header
from statex_dist.checkpoint.formats.tensor_io import TensorSource
from statex_dist.checkpoint.layout import CONFIG_NAME, MANIFEST_NAME, STATES_FORMAT
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.errors import CheckpointError
from statex_dist.models.config import ModelConfig, read_config_dict
from statex_dist.models.model_check import tied_names, unchecked_tensors
from statex_dist.models.registry import UNSUPPORTED, config_from_dict, family_of, find_family
from statex_dist.models.sequence_memory import SequenceMemory, sequence_memory
from statex_dist.models.source import OpenModel, interpret

USES = ("plan", "expand", "train", "run")
"""Uses of a model in this package."""

_SHOWN_FILES = 16


@dataclass(kw_only=True, slots=True)
class CheckpointFacts:
    """Facts that ``statex inspect`` prints; None where something is not known.

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
        state_numbers: State elements of all layers together, of a family of ours.
        sequence: Memory of one sequence, states apart from keys and values
            (:class:`statex_dist.models.sequence_memory.SequenceMemory`), of a family of ours.
        files: Number of files below the directory.
        bytes: Bytes of all of them.
        largest: The largest files and their bytes.
        manifest: ``sizes agree``, or a statement that no manifest exists.
        complete: Whether nothing is missing; None where that is not known.
        problem: The missing or wrong part.
        notes: Further messages for the user.
        able: Whether the model can be planned for, expanded, trained and run here.
        unable: Reasons against a use, by the same names.
        checks: Comparisons that were made.
        unchecked: Comparisons that were not made, with the command that makes them.
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
    sequence: SequenceMemory | None = None
    files: int = 0
    bytes: int = 0
    largest: dict[str, int] = field(default_factory=dict)
    manifest: str = f"no {MANIFEST_NAME}"
    complete: bool | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    able: dict[str, bool] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {**asdict(self), "sequence": None if self.sequence is None else self.sequence.to_dict()}


def inspect(directory: str | Path, *, context_length: int | None = None) -> CheckpointFacts:
    """Describe a checkpoint; one that is incomplete or damaged is described as far as it can be.

    Args:
        directory: The checkpoint, or a run.
        context_length: Tokens of the sequence whose keys and values are counted; None takes the model's.

    Raises:
        CheckpointError: Not a checkpoint.
        ConfigError: The length is no number of tokens.
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
    config: ModelConfig | None = None
    values: dict[str, Any] | None = None
    try:
        values, config = _config(kind, path)
        opened = _describe(facts, path, context_length)
        values, config = opened.values, opened.config  # a run may have its config under another name
    except CheckpointError as error:
        facts.complete, facts.problem = False, str(error)
    facts.unable = _reasons(facts, values, config)
    facts.able = {use: use not in facts.unable for use in USES}
    return facts


def _config(kind: str, path: Path) -> tuple[dict[str, Any] | None, ModelConfig | None]:
    """Return a checkpoint's ``config.json``, and the same typed where it is of one of our families."""
    model_dir = find_model_dir(kind, path)
    values = None if model_dir is None else read_config_dict(model_dir)
    return values, config_from_dict(values) if values is not None and find_family(values) else None


def _reasons(facts: CheckpointFacts, values: dict[str, Any] | None, config: ModelConfig | None) -> dict[str, str]:
    """Return why a model cannot be planned for, expanded, trained or run; possible uses have no entry."""
    if config is None:
        kind = values.get("model_type") if values else None
        why = UNSUPPORTED.get(kind) if isinstance(kind, str) else None
        text = f"not supported: {why or f'expand cannot read model_type {kind!r}'}" if values else ""
        if facts.problem is not None and (not values or find_family(values)):
            text = facts.problem
        return dict.fromkeys(USES, text or f"not known: there is no {CONFIG_NAME}")
    reasons = {} if facts.problem is None else dict.fromkeys(USES, facts.problem)
    if config.obstacle:
        reasons |= dict.fromkeys(("train", "run"), config.obstacle)
    if any(name.startswith("float8") for name in facts.dtypes):
        reasons.setdefault("expand", "float8 has no room for new values: convert the model first")
    return reasons


def _describe(facts: CheckpointFacts, path: Path, context_length: int | None) -> OpenModel:
    """Add what the headers say, and return the model; arguments of :func:`inspect`.

    Raises:
        CheckpointError: Files are missing, damaged, or not those of the manifest, or tensors not those of the model.
    """
    layout = find_layout(facts.kind).load()
    if (path / MANIFEST_NAME).is_file():
        manifest = Manifest.read(path)
        facts.step, facts.world_size = manifest.info.get("step"), manifest.info.get("world_size")
        manifest.verify_sizes(path)
        facts.manifest, facts.complete = "sizes agree", True
        facts.checks.append(f"sizes of {len(manifest.files)} files: those of {MANIFEST_NAME}")
        facts.unchecked.append(f"values: statex verify {facts.path} reads them and compares digests")
    elif layout.has_checksums:
        facts.unchecked.append(f"values: statex verify {facts.path} reads them and compares the files' checksums")
    else:
        facts.unchecked.append(f"values: there is no {MANIFEST_NAME} and no checksum, so that damage cannot be noticed")
    source = open_files(path, describe=True)
    facts.checks.append("headers of the weight files: consistent, and as long as the files")
    if layout.lists_tensors:
        facts.complete = True
    try:
        opened = interpret(source, describe=True)
        source = opened.source
    finally:
        _describe_tensors(facts, source)
    facts.model_type = opened.values.get("model_type") if opened.values else None
    if opened.config is None:
        return opened
    facts.model_type, facts.state_numbers = opened.config.MODEL_TYPE, opened.config.state_elements
    facts.plan = opened.config.statex.to_dict() if opened.config.statex else None
    dtype = TORCH_NAMES[source.info(family_of(opened.config.MODEL_TYPE).names.embeddings).dtype]
    facts.sequence = sequence_memory(opened.config, tokens=context_length, dtype=dtype)
    stored = [source.info(name) for name in tied_names(opened.config) if name in source and name not in source.aliases]
    facts.parameters = (facts.parameters or 0) - sum(info.numel for info in stored)
    others, unknown = unchecked_tensors(opened.names, opened.config)
    checked = len(opened.names) - others - unknown
    facts.checks.append(f"names, shapes and dtypes of {checked} tensors: those of {CONFIG_NAME}")
    if others:
        facts.unchecked.append(f"{others} tensors: of other parts than the language model, kept as they are")
    if unknown:
        facts.unchecked.append(f"{unknown} tensors: of layers that are not recurrent, kept as they are")
    facts.complete = True
    return opened


def _describe_tensors(facts: CheckpointFacts, source: TensorSource) -> None:
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


def read_states_header(path: Path) -> dict[str, str]:
    """Return whose states a file holds and how many tokens were read, from its header alone.

    Raises:
        CheckpointError: It is another file, or damaged.
    """
    try:
        tensors, header = read_header(path)
    except CheckpointError:
        header = {}
    if header.get("format") != STATES_FORMAT:
        raise CheckpointError(f"{path} is a file, and no file of states; give the directory that holds the checkpoint")
    size = sum(info.nbytes for info, _ in tensors.values())
    return {**{key: value for key, value in header.items() if key != "digest"}, "bytes": str(size)}

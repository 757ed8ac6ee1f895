"""Proof that two checkpoints are the same model, or that one is an expansion of the other and of nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from checkpoints_tools.convert import cast
from checkpoints_tools.expand import plan_expansion, read_model
from checkpoints_tools.expansion_report import REPORT_NAME, read_checksums
from checkpoints_tools.hf_writer import carried_files
from checkpoints_tools.sources import open_source
from checkpoints_tools.tensor_io import FLOATS, OPTIONS, TORCH_NAMES, Progress, TensorInfo, TensorSource
from checkpoints_tools.transfer import TensorJob, TensorStream
from statex_dist.errors import CheckpointError
from statex_dist.models.config import read_config_dict
from statex_dist.models.kinds import config_from_dict

DTYPE_KEYS = ("torch_dtype", "dtype")


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What a verification found.

    Attributes:
        first: The one directory (the base of an expansion).
        second: The other.
        tensors: Tensors that agree, by what was to become of them.
        differences: Every disagreement in words; empty for a proof.
        notes: What was not or could not be checked.
    """

    first: str
    second: str
    tensors: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {"ok": self.ok, **asdict(self), "tensors": dict(self.tensors)}


def verify_expansion(base: str | Path, expanded: str | Path, *, progress: Progress | None = None) -> Verdict:
    """Prove that ``expanded`` is ``base`` with the plan in its ``config.json``, and that nothing else changed.

    Kept rows are compared with the base byte by byte, new rows are drawn again from the plan's seeds, checksums are
    compared with ``expansion_report.json``, and ``config.json`` and carried files with what they must be.

    Raises:
        CheckpointError: One of the two is damaged, incomplete, or the second has no plan beyond the first's.
    """
    source, values, before = read_model(base)
    other = open_source(expanded)
    if other.facts.model_dir is None:
        raise CheckpointError(f"{other.facts.path} has no config.json: its plan is not known")
    found = read_config_dict(other.facts.model_dir)
    after = config_from_dict(found)
    old = {e.layer: e for e in (before.statex.layers if before.statex else ())}
    new = {e.layer: e for e in (after.statex.layers if after.statex else ())}
    if after.MODEL_TYPE != before.MODEL_TYPE or not set(new) > set(old):
        raise CheckpointError(f"{expanded} has no expansion plan beyond that of {base}: nothing to verify")
    verdict = Verdict(first=str(source.facts.path), second=str(other.facts.path))
    if changed := [layer for layer in old if new[layer] != old[layer]]:
        verdict.differences.append(f"plan: layers {changed} of the base have another entry")
        return verdict
    after = before.replace(statex=after.statex)
    _compare_configs(after.with_plan(values), found, verdict)
    expansion = plan_expansion(source, values, before, after, dtype=_one_dtype(other))
    jobs = {job.info.name: job for job in expansion.jobs}
    if converted := {TORCH_NAMES[j.info.dtype] for j in jobs.values() if j.source and j.source.dtype != j.info.dtype}:
        verdict.notes.append(f"floating-point tensors were converted to {', '.join(converted)}")
    held = {name for name in other.keys() if name not in other.aliases}  # noqa: SIM118 - not a mapping
    verdict.differences += [f"tensor '{name}' is missing" for name in jobs if name not in held]
    verdict.differences += [f"tensor '{name}' should not be there" for name in sorted(held - jobs.keys())]
    checksums = read_checksums(other.facts.path)
    if checksums is None:
        verdict.notes.append(f"no {REPORT_NAME}: checksums not compared")
    stream = TensorStream(source, allow_nonfinite=True)
    pairs = [(job, other.info(name)) for name, job in jobs.items() if name in held]
    _compare_all(pairs, stream, other, verdict, checksums=checksums, progress=progress)
    _compare_carried(source.facts.model_dir, other.facts.model_dir, verdict)
    return verdict


def verify_same(
    first: str | Path, second: str | Path, *, rtol: float | None = None, progress: Progress | None = None
) -> Verdict:
    """Compare two checkpoints of any layout tensor by tensor.

    Args:
        first: The one.
        second: The other.
        rtol: Largest relative difference of a value, dtypes aside; None asks for the same dtype and the same bytes.
        progress: Told of the bytes compared.

    Raises:
        CheckpointError: One of the two is damaged or incomplete.
    """
    a, b = open_source(first), open_source(second)
    verdict = Verdict(first=str(a.facts.path), second=str(b.facts.path))
    names, others = a.keys(), set(b.keys())
    verdict.differences += [f"tensor '{name}' is in the first alone" for name in names if name not in others]
    verdict.differences += [f"tensor '{name}' is in the second alone" for name in sorted(others - set(names))]
    pairs = [(TensorJob(info=a.info(name), source=a.info(name)), b.info(name)) for name in names if name in others]
    _compare_all(pairs, TensorStream(a, allow_nonfinite=True), b, verdict, rtol=rtol, progress=progress)
    return verdict


def _one_dtype(source: TensorSource) -> str | None:
    """Return the dtype that ``--dtype`` may have given a checkpoint: the same for all floating-point tensors.

    A single tensor of another dtype than the base's is no conversion but a difference.
    """
    dtypes = {source.info(name).dtype for name in source.keys()} & set(FLOATS)  # noqa: SIM118 - not a mapping
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(OPTIONS.values()) else None


def _compare_configs(expected: dict[str, Any], found: dict[str, Any], verdict: Verdict) -> None:
    """Compare ``config.json``; the stored dtype may differ, for ``--dtype`` changes it."""
    for key in sorted(expected.keys() | found.keys()):
        if key not in DTYPE_KEYS and expected.get(key) != found.get(key):
            verdict.differences.append(f"config.json: {key} is {found.get(key)!r}, not {expected.get(key)!r}")


def _compare_carried(base: Path | None, other: Path | None, verdict: Verdict) -> None:
    for path in carried_files(base):
        copy = other / path.name if other else None
        if copy is None or not copy.is_file():
            verdict.notes.append(f"{path.name} of the base was not carried along")
        elif copy.read_bytes() != path.read_bytes():
            verdict.differences.append(f"{path.name} differs from the base's")


def _compare_all(
    pairs: list[tuple[TensorJob, TensorInfo]],
    stream: TensorStream,
    other: TensorSource,
    verdict: Verdict,
    *,
    rtol: float | None = None,
    checksums: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Compare tensors of ``other`` with what the jobs say they are, and note agreement and differences."""
    total = sum(found.nbytes for _, found in pairs)
    done = 0
    for job, found in pairs:
        kind = job.surgery.recipe.change if job.surgery else "kept"
        if found.shape != job.info.shape:
            problem: str | None = f"has shape {found.shape}, not {job.info.shape}"
        elif rtol is None and found.dtype != job.info.dtype:
            problem = f"has dtype {TORCH_NAMES[found.dtype]}, not {TORCH_NAMES[job.info.dtype]}"
        else:
            problem, digest = _compare(stream.blocks(job), job.info, found, other, rtol)
            if problem is None and checksums is not None and checksums.get(found.name) != digest:
                problem = f"has another checksum than {REPORT_NAME} says"
        if problem:
            verdict.differences.append(f"tensor '{found.name}' ({kind}) {problem}")
        else:
            verdict.tensors[kind] += 1
        done += found.nbytes
        if progress:
            progress(done, total)


def _compare(
    blocks: Iterator[np.ndarray], expected: TensorInfo, found: TensorInfo, other: TensorSource, rtol: float | None
) -> tuple[str | None, str]:
    """Return what differs in one tensor, if anything, and the digest of the bytes that were found."""
    digest = xxhash.xxh3_128()
    row = max(found.numel // found.shape[0], 1) if found.shape and found.shape[0] else 1
    element, problem = 0, None
    for block in blocks:
        count = len(block) // expected.item_bytes
        actual = np.empty(count * found.item_bytes, dtype=np.uint8)
        other.read_into(found.name, element * found.item_bytes, actual.data)
        digest.update(actual.data)
        if problem is None:
            wrong = _differing(block, actual, expected, found, rtol)
            if wrong.any():
                problem = f"differs from row {(element + int(wrong.argmax())) // row} on"
        element += count
    return problem, digest.hexdigest()


def _differing(
    block: np.ndarray, actual: np.ndarray, expected: TensorInfo, found: TensorInfo, rtol: float | None
) -> np.ndarray:
    """Return, per element of two blocks, whether it differs."""
    if rtol is None or expected.dtype not in FLOATS:
        return (block.reshape(-1, expected.item_bytes) != actual.reshape(-1, found.item_bytes)).any(axis=1)
    a, b = (cast(x, info.dtype, "F64").view("<f8") for x, info in ((block, expected), (actual, found)))
    return ~np.isclose(a, b, rtol=rtol, atol=0, equal_nan=True)

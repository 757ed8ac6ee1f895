"""Proof that two checkpoints are the same model, or that one is an expansion of the other and of nothing else."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_tools.expand.expand import Expansion, expansion_code, plan_expansion, read_model
from checkpoints_tools.io.documents import DTYPE_KEYS, REPORT_NAME, carried_files, read_report, with_one_dtype
from checkpoints_tools.io.journal import WrittenTensor
from checkpoints_tools.io.target_writer import DEFAULT_WORKERS, finish_crcs
from checkpoints_tools.io.tensor_stream import TensorJob
from checkpoints_tools.io.worker_processes import default_processes, share_of
from checkpoints_tools.verify.compare import Outcome, Pair, compare, read_all
from statex_dist.checkpoint.dtypes import FLOATS, OPTIONS, TORCH_NAMES
from statex_dist.checkpoint.formats.piece_io import SourceCrcs
from statex_dist.checkpoint.formats.safetensors import INDEX_NAME, SafetensorsSource
from statex_dist.checkpoint.formats.tensor_io import Progress, TensorSource
from statex_dist.checkpoint.json_file import differing_keys
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME, read_config_dict
from statex_dist.models.registry import config_from_dict
from statex_dist.models.source import open_source
from statex_dist.work_part import WorkPart


@dataclass(kw_only=True, slots=True)
class Verification:
    """Result of a verification.

    Attributes:
        first: The one directory (the base of an expansion).
        second: The other; None where one was verified by itself.
        tensors: Number of tensors that agree, by the change that was expected of them.
        plan: The expansions that were verified.
        differences: Every disagreement in words; empty for a proof.
        notes: Parts that were not or could not be checked.
        part: The share that was checked (``I/N``); None for all.
    """

    first: str
    second: str | None
    tensors: Counter[str] = field(default_factory=Counter)
    plan: list[dict[str, Any]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    part: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {"ok": self.ok, **asdict(self), "tensors": dict(self.tensors)}


def verify_expansion(
    base: str | Path,
    expanded: str | Path,
    *,
    workers: int = DEFAULT_WORKERS,
    processes: int | None = 1,
    progress: Progress | None = None,
) -> Verification:
    """Prove that ``expanded`` is ``base`` with the plan in its ``config.json``, and that nothing else changed.

    Kept rows are compared with the base byte by byte. New rows are drawn again from the plan's seeds. Checksums are
    compared with ``expansion_report.json``; ``config.json`` and the carried files with their expected contents.

    Raises:
        CheckpointError: One of the two is damaged, incomplete, or the second has no plan beyond the first's.
    """
    source, values, before = read_model(base)
    other = open_source(expanded, check=False, as_stored=True)
    if other.facts.model_dir is None:
        raise CheckpointError(f"{other.facts.path} has no config.json: its plan is not known")
    found = read_config_dict(other.facts.model_dir)
    after = config_from_dict(found)
    old = {e.layer: e for e in (before.statex.layers if before.statex else ())}
    new = {e.layer: e for e in (after.statex.layers if after.statex else ())}
    if after.MODEL_TYPE != before.MODEL_TYPE or not set(new) > set(old):
        raise CheckpointError(f"{expanded} has no expansion plan beyond that of {base}: nothing to verify")
    verdict = Verification(first=str(source.facts.path), second=str(other.facts.path))
    if changed := [layer for layer in old if new[layer] != old[layer]]:
        verdict.differences.append(f"plan: layers {changed} of the base have another entry")
        return verdict
    after = before.replace(statex=after.statex)
    verdict.plan = [e.to_dict() for e in after.statex.layers if e.layer not in old] if after.statex else []
    wanted = _recorded_dtype(with_one_dtype(values, source), found, other, verdict)
    expansion = plan_expansion(source, values, before, after, dtype=wanted)
    if (named := after.with_plan(found)) != found:
        verdict.notes.append(
            "config.json has the names of the base, as earlier releases wrote it: other software may run the base's "
            f"function on these weights; new names: statex reshard --source {expanded} --target DIR --to hf"
        )
    _compare_configs(expansion.config_values(), named, verdict)
    jobs = {job.info.name: job for job in expansion.jobs}
    held = {name for name in other.keys() if name not in other.aliases or name in jobs}  # noqa: SIM118 - not a mapping
    verdict.differences += [f"tensor '{name}' is missing" for name in jobs if name not in held]
    verdict.differences += [f"tensor '{name}' should not be there" for name in sorted(held - jobs.keys())]
    pairs = [Pair(job, name) for name, job in jobs.items() if name in held]
    checksums = _note(compare(pairs, source, other, workers=workers, processes=processes, progress=progress), verdict)
    _compare_reports(expansion, checksums, other.facts.model_dir, verdict)
    _compare_files(source, other, expansion_code(expansion), other.facts.model_dir, verdict)
    return verdict


def verify_same(
    first: str | Path,
    second: str | Path,
    *,
    rtol: float | None = None,
    workers: int = DEFAULT_WORKERS,
    processes: int | None = 1,
    part: WorkPart | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare two checkpoints of any layout tensor by tensor; of two training checkpoints the optimizer's states too.

    Args:
        first: The one.
        second: The other.
        rtol: Largest relative difference of a value, dtypes aside; None asks for the same dtype and the same bytes.
        workers: Tensors compared at a time by each process.
        processes: Processes that share the work; None for a number by cores and size of the job.
        part: The share of the tensors and checksums that is compared; None for all.
        progress: Told of the bytes compared.

    Raises:
        CheckpointError: One of the two is damaged or incomplete.
    """
    a, b = open_source(first, check=False), open_source(second, check=False)
    verdict = Verification(first=str(a.facts.path), second=str(b.facts.path))
    pairs = _paired(a, b, None, verdict)
    common = [state for state in a.states() if state in b.states()]
    for state in common:
        pairs += _paired(a.states()[state], b.states()[state], state, verdict)
    if left := sorted(a.states().keys() ^ b.states().keys()):
        verdict.notes.append(f"optimizer states {', '.join(left)} are in one of the two alone: not compared")
    outcomes = compare(*(pairs, a, b), workers=workers, processes=processes, part=part, rtol=rtol, progress=progress)
    _note(outcomes, verdict)
    _note_part(part, verdict)
    return verdict


def _paired(a: TensorSource, b: TensorSource, state: str | None, verdict: Verification) -> list[Pair]:
    """Pair the tensors of two checkpoints; note those that one of them lacks."""
    # A name that only points to another tensor is compared where both have it: other layouts write the owner alone.
    names, others = a.keys(), set(b.keys())
    names = [name for name in names if name in others or name not in a.aliases]
    others = {name for name in others if name in names or name not in b.aliases}
    what = "tensor" if state is None else state
    verdict.differences += [f"{what} '{name}' is in the first alone" for name in names if name not in others]
    verdict.differences += [f"{what} '{name}' is in the second alone" for name in sorted(others - set(names))]
    jobs = [TensorJob.copy(a.info(name), dtype=a.natural_dtype(name), state=state) for name in names if name in others]
    return [Pair(job, job.info.name) for job in jobs]


def _note(outcomes: list[Outcome], verdict: Verification) -> dict[str, str]:
    """Enter what was found in the verdict, and return the digests of the tensors that agree."""
    digests = {}
    for outcome in outcomes:
        pair = outcome.pair
        if outcome.problem:
            what = "tensor" if pair.job.state is None else pair.job.state
            verdict.differences.append(f"{what} '{pair.found}' ({pair.kind}) {outcome.problem}")
            continue
        verdict.tensors[pair.kind if pair.job.state is None else pair.job.state] += 1
        if outcome.digest is not None and pair.job.state is None:
            digests[pair.found] = outcome.digest
    return digests


def _recorded_dtype(
    base: dict[str, Any], found: dict[str, Any], other: TensorSource, verdict: Verification
) -> str | None:
    """Return the dtype that ``--dtype`` gave the expanded model, if its ``config.json`` says that it was converted.

    Without that record nothing may be converted: a model whose tensors were rounded is not the base's expansion.
    """
    said = {key: found[key] for key in DTYPE_KEYS if key in found and found[key] != base.get(key)}
    if not said:
        return None
    wanted = next((dtype for dtype in OPTIONS.values() if TORCH_NAMES[dtype] in said.values()), None)
    stored = {other.info(name).dtype for name in other.keys()} & set(FLOATS)  # noqa: SIM118 - not a mapping
    if len(said) > 1 or wanted is None or stored != {wanted}:
        names = ", ".join(sorted(TORCH_NAMES[dtype] for dtype in stored))
        verdict.differences.append(f"config.json says {said}; the base's says otherwise, and {names} is stored")
        return None
    verdict.notes.append(f"floating-point tensors were converted to {TORCH_NAMES[wanted]}, as config.json says")
    return wanted


def _compare_configs(expected: dict[str, Any], found: dict[str, Any], verdict: Verification) -> None:
    """Compare ``config.json`` with its expected contents."""
    for key in differing_keys(expected, found):
        if key not in DTYPE_KEYS:
            a, b = (json.dumps(values.get(key), sort_keys=True) for values in (expected, found))
            verdict.differences.append(f"config.json: {key} is {b}, not {a}")


def _compare_reports(expansion: Expansion, checksums: dict[str, str], directory: Path, verdict: Verification) -> None:
    """Compare ``expansion_report.json`` with the report that the expansion and the found checksums give."""
    report = read_report(directory)
    if report is None:
        verdict.differences.append(f"{REPORT_NAME} is missing")
        return
    found = {name: WrittenTensor(xxh3_128=digest) for name, digest in checksums.items()}
    expected = json.loads(json.dumps(expansion.report(found).to_dict()))
    layers = [row["layer"] for row in expected["layers"]]
    described = [row["layer"] for row in report["layers"]]
    if set(described) < set(layers):
        verdict.notes.append(f"{REPORT_NAME} describes the last of several expansions, of layers {described}")
        for name, digest in checksums.items():
            if report["tensors"].get(name, {}).get("xxh3_128") != digest:
                verdict.differences.append(f"{REPORT_NAME}: the checksum of '{name}' is not what was found")
        return
    for key in ("model_type", "state_before", "state_after", "parameters_before", "parameters_after", "layers"):
        if report.get(key) != expected[key]:
            verdict.differences.append(f"{REPORT_NAME}: {key} is not what was done")
    for name in sorted(checksums.keys() | (report["tensors"].keys() - expected["tensors"].keys())):
        said = dict(report["tensors"].get(name, {}))
        kept = said.pop("source_xxh3_128", None)
        wanted = expected["tensors"].get(name)
        unconverted = wanted is not None and wanted["change"] == "kept" and expansion.dtype is None
        if said != wanted or (unconverted and kept != said.get("xxh3_128")):
            verdict.differences.append(f"{REPORT_NAME}: the entry of '{name}' is not what was found")


def _compare_files(
    source: TensorSource, other: TensorSource, code: dict[str, str], directory: Path, verdict: Verification
) -> None:
    """Compare what lies beside the weights: carried files, metadata, and anything else."""
    expected = {CONFIG_NAME, REPORT_NAME, MANIFEST_NAME, INDEX_NAME, *(path.name for path in other.files)}
    for path in carried_files(source.facts.model_dir):
        expected.add(path.name)
        copy = directory / path.name
        if not copy.is_file():
            verdict.differences.append(f"{path.name} of the base is missing")
        elif copy.read_bytes() not in (path.read_bytes(), *(code[n].encode() for n in code if n == path.name)):
            verdict.differences.append(f"{path.name} differs from the base's")
    for path in sorted(directory.iterdir()):
        if path.name not in expected:
            verdict.differences.append(f"{path.name} is of neither the base nor the expansion")
    files = [side for side in (source, other) if isinstance(side, SafetensorsSource)]
    if len(files) == 2 and {"format": "pt", **files[1].metadata} != {**files[0].metadata, "format": "pt"}:
        verdict.differences.append("the metadata of the safetensors files differs from the base's")


def _note_part(part: WorkPart | None, verdict: Verification) -> None:
    """Say which share was checked."""
    if part is not None:
        verdict.part = str(part)
        verdict.notes.append(f"part {part} of the values was checked; the verdict needs every part")


def verify_alone(
    path: str | Path,
    *,
    workers: int = DEFAULT_WORKERS,
    processes: int | None = 1,
    part: WorkPart | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Read a whole checkpoint and hold it to everything that is known of it.

    Of files written by torch or DeepSpeed every entry has a CRC-32, so that a flipped byte is found without a manifest.
    With one, also a file or a tensor that was exchanged for another sound one is found.

    Args:
        path: Whatever :func:`statex_dist.models.source.open_source` opens.
        workers: Tensors read at a time by each process.
        processes: Processes that share the work; None for a number by cores and size of the job.
        part: The share of the tensors, files and storages that is checked; None for all.
        progress: Told of the bytes read.

    Raises:
        CheckpointError: The checkpoint cannot be opened: files are missing, truncated or of two saves.
    """
    source = open_source(path)
    facts = source.facts
    verdict = Verification(first=str(facts.path), second=None)
    manifest = Manifest.read(facts.path) if (facts.path / MANIFEST_NAME).is_file() else None
    weights = {file.name for file in source.files}
    recorded = [*(manifest.files if manifest else {}).items()]
    for name, record in recorded if part is None else share_of(recorded, [r.size for _, r in recorded], part):
        # If only an archive's directory is recorded, it is compared when the archive is opened; its CRCs, below.
        if name not in weights or record.xxh3_128 is not None:
            with _noted(verdict):
                record.check(facts.path / name)
    jobs = [
        TensorJob.copy(source.of_state(state).info(name), state=state)
        for state in (None, *source.states())
        for name in source.of_state(state).owned()
    ]
    archives = list(source.archives())
    crcs = SourceCrcs(archives)
    if part is not None:
        jobs = share_of(jobs, [job.info.nbytes for job in jobs], part)
    worth = default_processes(sum(job.info.nbytes for job in jobs), len(jobs) * len(source.files))
    processes = min(processes or worth, max(len(jobs), 1))
    with _noted(verdict):
        read_all(jobs, source, crcs, workers=workers, processes=processes, progress=progress)
    saved = [path for path in source.files if path.suffix in (".pt", ".bin")]
    if part is not None:
        saved = share_of(saved, [0] * len(saved), part)
    if saved:
        from statex_dist.checkpoint.formats.torch_archive.zip import check_small_entries  # only where there are some

        for path in saved:
            with _noted(verdict):
                check_small_entries(path)
    if archives:
        with _noted(verdict):
            verdict.tensors["storages by CRC-32"] = finish_crcs(crcs, processes, everything=True, part=part)
    if manifest is not None and manifest.tensors:
        held = len(manifest.tensors) + sum(map(len, manifest.states.values()))
        verdict.tensors["tensors by digest"] = held if part is None else len(jobs)
    elif manifest is not None:
        held = len(recorded)
        verdict.tensors["files by digest"] = held if part is None else len(share_of(recorded, [0] * held, part))
    elif not archives:
        verdict.notes.append(
            f"no {MANIFEST_NAME}, and safetensors have no checksums: only names and sizes were checked"
        )
    else:
        verdict.notes.append(
            f"no {MANIFEST_NAME}: a whole file that was exchanged for a sound one would not be noticed"
        )
    _note_part(part, verdict)
    return verdict


@contextlib.contextmanager
def _noted(verdict: Verification) -> Iterator[None]:
    """Record damage in the verdict and continue: there may be more."""
    try:
        yield
    except CheckpointError as error:
        verdict.differences.append(str(error))

"""The account of an expansion: what became of each tensor, with checksums (``expansion_report.json``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_tools.io.documents import read_report
from checkpoints_tools.io.journal import WrittenTensor
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.tensor_io import TensorInfo
from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import family_of, new_expansions
from statex_dist.models.row_mapping import Change
from statex_dist.state.plan import LayerExpansion

REPORT_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorChange:
    """What happened to one tensor.

    Attributes:
        change: ``kept`` (every value), ``grown`` (old rows kept, new ones added), ``reinitialised`` (no value kept) or
            ``new``.
        shape_before: Original shape; None for a new tensor.
        shape_after: Shape in the target.
        dtype: In which it is stored (a name of the safetensors format).
        rows: Of a tensor that changed, its blocks of rows in order: how many, and ``from`` which rows of the original
            or from which distribution.
        seed: Of the new rows.
        xxh3_128: Digest of the stored bytes.
        source_xxh3_128: Digest of the original's bytes, of a kept tensor.
    """

    change: Change
    shape_before: tuple[int, ...] | None
    shape_after: tuple[int, ...]
    dtype: str
    rows: list[dict[str, Any]] | None = None
    seed: int | None = None
    xxh3_128: str | None = None
    source_xxh3_128: str | None = None


def read_digests(directory: Path) -> dict[str, WrittenTensor]:
    """Return the digests of tensors in a directory's report, by name; none where it has no report.

    Raises:
        CheckpointError: It is unreadable.
    """
    rows = (read_report(directory) or {"tensors": {}})["tensors"]
    return {
        name: WrittenTensor(xxh3_128=row["xxh3_128"], source_xxh3_128=row.get("source_xxh3_128"))
        for name, row in rows.items()
        if "xxh3_128" in row
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAccount:
    """What happened to one expanded layer."""

    expansion: LayerExpansion
    state_before: int
    state_after: int
    changes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpansionReport:
    """The changes of an expansion, planned or done.

    Attributes:
        source: Directory that was read.
        model_type: Family of the model.
        numpy: Version of numpy, whose generators drew the new rows.
        state_before: State elements of all recurrent layers together.
        state_after: The same of the target.
        parameters_before: Elements of all tensors of the source.
        parameters_after: The same of the target.
        layers: The expanded layers.
        tensors: Every tensor of the target, by name.
    """

    source: str
    model_type: str
    numpy: str
    state_before: int
    state_after: int
    parameters_before: int
    parameters_after: int
    layers: list[LayerAccount]
    tensors: dict[str, TensorChange]

    @property
    def kept_outside(self) -> int:
        """Tensors outside the expanded layers, all of them kept."""
        return len(self.tensors) - sum(sum(layer.changes.values()) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        values = {"version": REPORT_VERSION, **asdict(self)}
        values["layers"] = [
            {
                **layer.expansion.to_dict(),
                "state_before": layer.state_before,
                "state_after": layer.state_after,
                "changes": layer.changes,
            }
            for layer in self.layers
        ]
        values["tensors"] = {
            name: {key: value for key, value in asdict(change).items() if value is not None}
            for name, change in self.tensors.items()
        }
        return values


def make_report(
    source: Path,
    before: ModelConfig,
    after: ModelConfig,
    jobs: Sequence[TensorJob],
    source_infos: Sequence[TensorInfo],
    written: Mapping[str, WrittenTensor],
) -> ExpansionReport:
    """Return the account of an expansion.

    Args:
        source: Directory that was read.
        before: Config of the original model.
        after: Config of the expanded model.
        jobs: Every tensor of the target.
        source_infos: Every tensor of the source.
        written: Digests of the written tensors; empty for a rehearsal.
    """
    tensors = {job.info.name: _change(job, written.get(job.info.name)) for job in jobs}
    layers = []
    for expansion in new_expansions(before, after).layers:
        prefix = family_of(before.MODEL_TYPE).names.layer(expansion.layer)
        inside = [change for name, change in tensors.items() if name.startswith(prefix)]
        layers.append(
            LayerAccount(
                expansion=expansion,
                state_before=before.layer_geometry(expansion.layer).elements,
                state_after=after.layer_geometry(expansion.layer).elements,
                changes=dict(Counter(change.change for change in inside)),
            )
        )
    return ExpansionReport(
        source=str(source),
        model_type=before.MODEL_TYPE,
        numpy=np.__version__,
        state_before=before.state_elements,
        state_after=after.state_elements,
        parameters_before=sum(info.numel for info in source_infos),
        parameters_after=sum(job.info.numel for job in jobs),
        layers=layers,
        tensors=tensors,
    )


def _change(job: TensorJob, written: WrittenTensor | None) -> TensorChange:
    rows = job.mapping.rows if job.mapping else None
    return TensorChange(
        change=rows.change if rows else "kept",
        shape_before=job.source.shape if job.source else None,
        shape_after=job.info.shape,
        dtype=job.info.dtype,
        rows=rows.to_list() if rows else None,
        seed=job.mapping.seed if job.mapping else None,
        xxh3_128=written.xxh3_128 if written else None,
        source_xxh3_128=written.source_xxh3_128 if written else None,
    )

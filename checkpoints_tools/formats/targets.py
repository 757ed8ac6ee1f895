"""The request from which a layout plans a target, and the choice of the layout that ``--to`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoints_tools.io.documents import with_dtype
from checkpoints_tools.io.target import Documents, TargetPlan
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import stored_dtype
from statex_dist.checkpoint.formats.registry import LayoutRow, layouts, load
from statex_dist.checkpoint.formats.tensor_io import TensorSource
from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import CONFIG_NAME, ModelConfig

Export = Callable[[Sequence[TensorJob]], tuple[Documents, list[str]]]
"""Returns what makes the documents of a directory that other software opens, and notes for the user."""

_READ_IN, _WRITTEN_IN = "statex_dist.checkpoint.formats.", "checkpoints_tools.formats."


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRequest:
    """A source, its model and the options of a target.

    Attributes:
        source: The checkpoint.
        values: Contents of its ``config.json``; None where it has none.
        config: The same, typed; None where the model is of none of our families.
        names: The tensors that are written.
        dtype: In which floating-point tensors are stored; None keeps each tensor's own.
        info: Facts for the manifest.
        write: How to write.
        world_size: Ranks of a training checkpoint; None keeps the source's.
        tp: Tensor-parallel ranks.
        export: Makes the documents of a layout that other software opens.
        grown: The tensors of an expansion; None where the source's are written as they are.
    """

    source: TensorSource
    values: dict[str, Any] | None
    config: ModelConfig | None
    names: list[str]
    dtype: str | None
    info: dict[str, Any]
    write: WriteOptions
    export: Export
    world_size: int | None = None
    tp: int | None = None
    grown: Sequence[TensorJob] | None = None

    def documents(self, dtype: str | None) -> dict[str, Any]:
        """Return the documents of the model, with the dtype of its weights."""
        if self.values is None:
            return {}
        # Earlier releases left an expanded model the names of its base.
        values = self.values if self.config is None else self.config.with_plan(self.values)
        return {CONFIG_NAME: values if dtype is None else with_dtype(values, dtype)}

    def jobs(self) -> list[TensorJob]:
        """Return the tensors of the target: of an expansion those, else a copy of each, in the wanted dtype."""
        if self.grown is not None:
            return list(self.grown)
        infos = [(self.source.info(name), self.source.natural_dtype(name)) for name in self.names]
        return [TensorJob.copy(info, dtype=stored_dtype(natural, self.dtype)) for info, natural in infos]

    def family_config(self, to: str) -> ModelConfig:
        """Return the config where a layout needs one.

        Raises:
            CheckpointError: The model is not of one of our families.
        """
        if self.config is None:
            given = "no config.json" if self.values is None else f"model_type {shown(self.values.get('model_type'))}"
            raise CheckpointError(
                f"{self.source.facts.path}: --to {to} from {self.source.facts.kind} needs a model of a known family; "
                f"it has {given}"
            )
        return self.config


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTarget:
    """A target, laid out.

    Attributes:
        plan: What to write.
        notes: What has to be known about the result.
        batch: How the global batch is kept on a new number of ranks.
    """

    plan: TargetPlan
    notes: list[str] = field(default_factory=list)
    batch: dict[str, Any] | None = None


def find_target(to: str, *, grown: bool = False) -> LayoutRow:
    """Return the layout that ``--to`` names, of those that are written, or, with ``grown``, that an expansion is.

    Raises:
        ConfigError: There is none.
    """
    rows = {row.name: row for row in layouts() if (row.grown if grown else row.written)}
    if to not in rows:
        raise ConfigError(f"--to {to!r} is not available; allowed: {', '.join(rows)}")
    return rows[to]


def plan_target(row: LayoutRow, request: TargetRequest) -> PlannedTarget:
    """Lay a target out.

    Raises:
        ConfigError: An option does not go with the layout or the source.
        CheckpointError: The source cannot be written in this layout.
    """
    planned: PlannedTarget = written_class(row).plan_target(request)
    return planned


def written_class(row: LayoutRow) -> Any:
    """Return the class that lays targets of a layout out: the layout's own, or of ours its subclass in this folder."""
    layout = row.load()
    if hasattr(layout, "plan_target"):
        return layout
    folder = row.where.removeprefix(_READ_IN).partition(":")[0].partition(".")[0]
    return load(f"{_WRITTEN_IN}{folder}:{layout.__name__}Target")


def check_options(row: LayoutRow, given: Mapping[str, object]) -> None:
    """Raise unless the options that are given go with the layout, and ``--world-size`` is a number of ranks.

    Args:
        row: The layout.
        given: Values by option; None and False are not given.

    Raises:
        ConfigError: One does not, or is not.
    """
    for option, value in given.items():
        if value is None or value is False:
            continue
        if option not in row.options:
            takers = " or ".join(other.name for other in layouts() if option in other.options)
            said = " is for the model card of" if option == "--evaluation" else " is for"
            shown = f" {value}" if type(value) is int else ""
            raise ConfigError(f"{option}{shown}{said} --to {takers}, not {row.name}")
        if option == "--world-size" and isinstance(value, int) and value < 1:
            raise ConfigError(f"--world-size must be a whole number from 1, not {value}")

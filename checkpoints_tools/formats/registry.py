"""The layouts that ``reshard`` writes, one row each; a row's class is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoints_tools.io.config_dtype import with_dtype
from checkpoints_tools.io.target import TargetPlan
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.dtypes import stored_dtype
from statex_dist.checkpoint.formats.registry import Layout, add_layout, load
from statex_dist.checkpoint.formats.tensor_io import TensorSource, natural_dtype
from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.model_check import tied_names

Export = Callable[[Sequence[TensorJob]], tuple[dict[str, Any], list[str]]]
"""Returns the documents of a directory that other software opens, and notes for the user."""


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
    """

    source: TensorSource
    values: dict[str, Any] | None
    config: ModelConfig | None
    names: list[str]
    dtype: str | None
    info: dict[str, Any]
    write: WriteOptions
    world_size: int | None
    tp: int | None
    export: Export

    @property
    def tied(self) -> frozenset[str]:
        """Names that are stored but are no parameters of their own: the head of a tied model."""
        return tied_names(self.config)

    def documents(self, dtype: str | None) -> dict[str, Any]:
        """Return the documents of the model, with the dtype of its weights."""
        if self.values is None:
            return {}
        # Earlier releases left an expanded model the names of its base.
        values = self.values if self.config is None else self.config.with_plan(self.values)
        return {CONFIG_NAME: values if dtype is None else with_dtype(values, dtype)}

    def jobs(self) -> list[TensorJob]:
        """Return a copy of each tensor, in the wanted dtype."""
        infos = [(self.source.info(name), natural_dtype(self.source, name)) for name in self.names]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetLayout:
    """A layout that is written.

    Its class has ``plan_target(request: TargetRequest) -> PlannedTarget``.

    Attributes:
        name: As ``--to`` calls it.
        where: Module and name of its class, with a colon between them.
        options: Those of ``reshard`` that it takes, beside the ones that all take.
        is_training: Whether it holds a training run: of a source with two checkpoints that of the training is meant.
    """

    name: str
    where: str
    options: tuple[str, ...] = ()
    is_training: bool = False

    def plan_target(self, request: TargetRequest) -> PlannedTarget:
        """Lay a target out.

        Raises:
            ConfigError: An option does not go with the layout or the source.
            CheckpointError: The source cannot be written in this layout.
        """
        return load(self.where).plan_target(request)


_HERE = __name__.rpartition(".")[0]
_ROWS = (
    TargetLayout(name="hf", where=f"{_HERE}.safetensors:Safetensors", options=("--evaluation", "--tokenizer")),
    TargetLayout(name="zero3", where=f"{_HERE}.zero3.target:Zero3", options=("--world-size",), is_training=True),
    TargetLayout(name="tp", where=f"{_HERE}.tensor_parallel:TensorParallel", options=("--tp",)),
    TargetLayout(name="megatron", where=f"{_HERE}.megatron:Megatron"),
)
_TARGETS = {row.name: row for row in _ROWS}


def find_target(to: str, allowed: Sequence[str] | None = None) -> TargetLayout:
    """Return the layout that ``--to`` names; ``allowed`` are those of the command, None are all.

    Raises:
        ConfigError: There is none.
    """
    names = tuple(_TARGETS) if allowed is None else allowed
    if to not in names:
        raise ConfigError(f"--to {to!r} is not available; allowed: {', '.join(names)}")
    return _TARGETS[to]


def register(readable: Layout, target: TargetLayout | None = None) -> None:
    """Add a layout that is read, and written too where its class has ``plan_target``."""
    add_layout(readable)
    if target is not None:
        assert target.name not in _TARGETS, target.name
        _TARGETS[target.name] = target


def check_options(
    target: TargetLayout,
    *,
    world_size: int | None = None,
    tp: int | None = None,
    evaluation: bool = False,
    tokenizer: bool = False,
) -> None:
    """Raise unless the options that are given go with the layout, and ``world_size`` is a number of ranks.

    Raises:
        ConfigError: One does not, or is not.
    """
    _check_option(target, "--world-size", None if world_size is None else f" {world_size} is for")
    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size must be a whole number from 1, not {world_size}")
    _check_option(target, "--tp", None if tp is None else f" {tp} is for")
    _check_option(target, "--evaluation", " is for the model card of" if evaluation else None)
    _check_option(target, "--tokenizer", " is for" if tokenizer else None)


def _check_option(target: TargetLayout, option: str, given: str | None) -> None:
    """Raise if an option is given that the layout does not take; ``given`` continues the message after the option."""
    if given is not None and option not in target.options:
        takers = " or ".join(row.name for row in _TARGETS.values() if option in row.options)
        raise ConfigError(f"{option}{given} --to {takers}, not {target.name}")

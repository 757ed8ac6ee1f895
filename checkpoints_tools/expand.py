"""Expansion of a checkpoint on disk, one tensor at a time.

What is done to a tensor is decided in ``statex_dist/models/<family>/expand.py`` and nowhere else; this file streams the
tensors through it, checks names and shapes before and after, and writes down what happened to each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoints_tools.hf_writer import with_dtype, write_hf_directory
from checkpoints_tools.model_check import check_apart, check_tensors
from checkpoints_tools.plan_options import plan_model
from checkpoints_tools.sources import open_source
from checkpoints_tools.tensor_io import Progress, TensorInfo, TensorSource, parse_dtype, stored_dtype, total_bytes
from statex_dist.config import parse_size
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.kinds import Family, family_of, new_expansions, read_config
from statex_dist.models.layout import TensorSpec
from statex_dist.state.plan import ExpansionPlan, Init, LayerExpansion, Op

ACCOUNT_NAME = "expansion.json"
ACCOUNT_VERSION = 1

Change = Literal["kept", "grown", "reinitialised", "new"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorChange:
    """What happened to one tensor of an expanded layer.

    Attributes:
        name: Full name.
        change: ``kept`` (bit-equal), ``grown`` (old values kept, new rows added), ``reinitialised`` (fresh values) or
            ``new``.
        shape_before: Original shape; None for a new tensor.
        shape_after: Shape in the target.
    """

    name: str
    change: Change
    shape_before: tuple[int, ...] | None
    shape_after: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAccount:
    """What happened to one expanded layer."""

    layer: int
    op: Op
    factor: int
    init: Init
    state_before: int
    state_after: int
    tensors: list[TensorChange] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpansionAccount:
    """What ``statex expand`` did; the contents of ``expansion.json``.

    Attributes:
        source: Directory that was read.
        model_type: Family of the model.
        seed: Seed of the random values.
        state_before: State numbers of all layers together.
        state_after: The same of the target.
        parameters_before: Parameters of the source.
        parameters_after: Parameters of the target.
        kept_outside: Tensors outside the expanded layers, all kept.
        layers: The expanded layers.
    """

    source: str
    model_type: str
    seed: int
    state_before: int
    state_after: int
    parameters_before: int
    parameters_after: int
    kept_outside: int
    layers: list[LayerAccount]

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers for JSON."""
        return {"version": ACCOUNT_VERSION, **asdict(self)}


def expand(
    source: str | Path,
    target: str | Path,
    *,
    layers: str | None = None,
    factor: str | int | None = None,
    init: Init = "reinit",
    op: Op | None = None,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExpansionAccount:
    """Write an expanded copy of a checkpoint as a Hugging Face directory.

    Args:
        source: Whatever :func:`checkpoints_tools.sources.open_source` opens, with a ``config.json``.
        target: Directory to make.
        layers: Which layers; see :func:`checkpoints_tools.plan_options.plan_model` for this and the next three.
        factor: By how much.
        init: From which start.
        op: By which operation.
        seed: Seed of the random values; with a tensor's name it decides them, whatever the sharding.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps each tensor's own. Values are made in the source's dtype and
            then rounded.
        max_shard_size: Size of a safetensors file, at most.
        overwrite: Whether a target that is not empty is replaced.
        progress: Told of every tensor written.

    Returns:
        The account, which is also written to ``expansion.json``.

    Raises:
        ConfigError: A wrong option, or a plan that does not fit the model.
        CheckpointError: The source is damaged, incomplete, of another architecture or already expanded there, or the
            target is not writable; the target is then as it was.
    """
    wanted, shard_bytes = parse_dtype(dtype), parse_size(max_shard_size, option="--max-shard-size")
    check_apart(Path(source), Path(target))
    opened = open_source(source)
    if opened.facts.model_dir is None:
        raise CheckpointError(f"{opened.facts.path} has no {CONFIG_NAME}: what to expand is not known")
    before = read_config(opened.facts.model_dir)
    after = plan_model(before, layers=layers, factor=factor, init=init, op=op, seed=seed)
    check_tensors(opened, before)
    stream = _Expansion(opened, before, after, wanted)
    infos = stream.infos()
    config = after.to_dict()
    if wanted is not None:
        config = with_dtype(config, wanted)
    account = stream.account()
    write_hf_directory(
        Path(target),
        infos=infos,
        read=stream.read,
        max_shard_size=shard_bytes,
        overwrite=overwrite,
        documents=lambda: {CONFIG_NAME: config, ACCOUNT_NAME: account.to_dict()},
        carry_from=opened.facts.model_dir,
        info={
            "source": str(opened.facts.path),
            "source_kind": opened.facts.kind,
            "step": opened.facts.info.get("step"),
            "seed": seed,
            "weight_bytes": total_bytes(infos),
        },
        progress=progress,
    )
    return account


class _Expansion:
    """Reads the tensors of the expanded model from the source of the original one, recording what it does."""

    def __init__(self, source: TensorSource, before: ModelConfig, after: ModelConfig, wanted: torch.dtype | None):
        self._source, self._before, self._after, self._wanted = source, before, after, wanted
        self._family: Family = family_of(before.MODEL_TYPE)
        self._plan: ExpansionPlan = new_expansions(before, after)
        self._old: dict[str, TensorSpec] = self._family.tensors(before)
        self._new: dict[str, TensorSpec] = self._family.tensors(after)
        self._added_dtype = source.info(self._family.names.embeddings).dtype
        self._layers = {
            expansion.layer: LayerAccount(
                layer=expansion.layer,
                op=expansion.op,
                factor=expansion.factor,
                init=expansion.init,
                state_before=before.layer_geometry(expansion.layer).numbers,
                state_after=after.layer_geometry(expansion.layer).numbers,
            )
            for expansion in self._plan.layers
        }

    def infos(self) -> list[TensorInfo]:
        """Return every tensor of the target, as it is stored."""
        return [
            TensorInfo(name=name, shape=spec.shape, dtype=stored_dtype(self._dtype(name), self._wanted))
            for name, spec in self._new.items()
        ]

    def account(self) -> ExpansionAccount:
        """Return the account, whose tensors are filled in as they are read."""
        layers = range(self._before.num_hidden_layers)
        touched = [name for name in self._new if self._expansion_of(name)[1]]
        return ExpansionAccount(
            source=str(self._source.facts.path),
            model_type=self._before.MODEL_TYPE,
            seed=self._plan.layers[0].seed,
            state_before=sum(self._before.layer_geometry(layer).numbers for layer in layers),
            state_after=sum(self._after.layer_geometry(layer).numbers for layer in layers),
            parameters_before=sum(spec.numel for spec in self._old.values()),
            parameters_after=sum(spec.numel for spec in self._new.values()),
            kept_outside=len(self._new) - len(touched),
            layers=list(self._layers.values()),
        )

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the expanded model in its stored dtype.

        Raises:
            CheckpointError: The family's expansion gives another shape than its layout says.
        """
        suffix, expansion = self._expansion_of(name)
        if expansion is None:
            tensor = self._source.read(name)
        elif name in self._old:
            tensor = self._expanded(name, suffix, expansion)
        else:
            tensor = self._created(name, expansion)
        if tuple(tensor.shape) != self._new[name].shape:
            raise CheckpointError(
                f"tensor '{name}' became {tuple(tensor.shape)}; the expanded model needs {self._new[name].shape}"
            )
        return tensor.to(stored_dtype(tensor.dtype, self._wanted))

    def _expansion_of(self, name: str) -> tuple[str, LayerExpansion | None]:
        place = self._family.names.split(name)
        return (place[1], self._plan.get(place[0])) if place else (name, None)

    def _dtype(self, name: str) -> torch.dtype:
        return self._source.info(name).dtype if name in self._old else self._added_dtype

    def _expanded(self, name: str, suffix: str, expansion: LayerExpansion) -> torch.Tensor:
        old = self._source.read(name)
        new = self._family.expand.expand_tensor(suffix, old, config=self._before, expansion=expansion, name=name)
        self._record(expansion, name, _change(old, new, self._old[name]), tuple(old.shape), tuple(new.shape))
        return new

    def _created(self, name: str, expansion: LayerExpansion) -> torch.Tensor:
        made = self._family.expand.new_tensors(
            config=self._before,
            expansion=expansion,
            prefix=self._family.names.layer(expansion.layer),
            dtype=self._added_dtype,
        )
        if name not in made:
            raise CheckpointError(f"the expansion of layer {expansion.layer} does not make tensor '{name}'")
        self._record(expansion, name, "new", None, tuple(made[name].shape))
        return made[name]

    def _record(
        self,
        expansion: LayerExpansion,
        name: str,
        change: Change,
        before: tuple[int, ...] | None,
        after: tuple[int, ...],
    ) -> None:
        row = TensorChange(name=name, change=change, shape_before=before, shape_after=after)
        self._layers[expansion.layer].tensors.append(row)


def _change(old: torch.Tensor, new: torch.Tensor, spec: TensorSpec) -> Change:
    """Return what happened, judged by the values: growth leaves the leading part's rows where they were."""
    if old.shape == new.shape:
        return "kept" if old is new or torch.equal(old, new) else "reinitialised"
    lead = spec.parts[0][1] if spec.parts else old.shape[0]
    return "grown" if torch.equal(old[:lead], new[:lead]) else "reinitialised"

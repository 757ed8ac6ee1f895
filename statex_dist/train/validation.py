"""Validation in training: the loss on packs that are the same every time, and the best checkpoint.

The packs are the first ones of a plan with a seed of its own; which they are depends on the data and the settings
alone. Data-parallel rank ``r`` of ``R`` runs the packs ``r``, ``r + R``, ...; each pack's sum comes to its place in one
float64 vector, which is summed in the order of the packs. So the value is the same, bit for bit, for any number of
data-parallel ranks; the ranks of a context group add up a pack's shares, and change it by rounding.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statex_dist.batch import IGNORE_INDEX, PackedBatch
from statex_dist.checkpoint.layout import CHECKPOINTS_DIR
from statex_dist.config import check_finite
from statex_dist.data.collate import PackReader, PackSpec, lay_out
from statex_dist.data.held_out import HeldOut
from statex_dist.data.manifest import DatasetManifest, check_same_tokenizer
from statex_dist.data.plan import Cursor, PackPlan, PackPlanOptions
from statex_dist.data.store import ShardStore
from statex_dist.engine.checkpoint_retention import best_step
from statex_dist.errors import ConfigError, DataError, StateXError, os_error_text
from statex_dist.models.config import ModelConfig
from statex_dist.train.callback import Callback
from statex_dist.train.model_files import check_data

logger = logging.getLogger(__name__)

ONLY_SET = "data"
_SEED = 0


@dataclass(kw_only=True)
class EvalConfig:
    """Validation in training; none without ``data`` or ``held_out``.

    Attributes:
        data: Prepared data, a directory or URL; or several by name, each with a loss of its own.
        held_out: Share of the documents of each training source that is left out of the training and read here.
        every: Optimizer steps between evaluations; the last step of the run has one in any case.
        tokens: Tokens that an evaluation reads of each data set at most, padding included.
        keep_best: Whether a checkpoint is written at every evaluation that is the best so far, and kept until a better
            one: ``checkpoints/best`` leads to it.
    """

    data: str | dict[str, str] | None = None
    held_out: float = 0.0
    every: int = 500
    tokens: int = 1 << 20
    keep_best: bool = False

    def __post_init__(self) -> None:
        check_finite(self, "eval")
        for name in ("every", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"eval.{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.held_out <= 0.5:
            raise ConfigError(f"eval.held_out is a share of the documents, from 0 to 0.5, not {self.held_out}")
        if self.data is not None and not (self.data and all(self.paths.values())):
            raise ConfigError("eval.data is empty; give prepared data, or null for none")
        if self.data and self.held_out:
            raise ConfigError("eval: give either eval.data or eval.held_out")
        if self.keep_best and not (self.data or self.held_out):
            raise ConfigError("eval.keep_best needs eval.data or eval.held_out")

    @property
    def paths(self) -> dict[str, str]:
        """Where each data set of ``data`` lies, by name."""
        return {ONLY_SET: self.data} if isinstance(self.data, str) else dict(self.data or {})

    def divide(
        self, stores: Mapping[str, ShardStore], open_stores: Callable[[Mapping[str, str]], Mapping[str, ShardStore]]
    ) -> tuple[dict[str, ShardStore], dict[str, ShardStore]]:
        """Return the training data and the validation data, each by name.

        Args:
            stores: The training sources.
            open_stores: Opens data sets by name.

        Raises:
            ConfigError: The same data is in both.
            DataError: A data set cannot be opened, was made with another tokenizer, or one side of it is empty.
        """
        if not self.held_out:
            found = dict(open_stores(self.paths))
            manifests = {**_manifests(stores, {}), **_manifests(found, self.paths)}
            if found:  # a new model has no tokenizer to compare both with
                check_same_tokenizer(manifests, None)
            known = {store.fingerprint: name for name, store in stores.items()}
            for name, store in found.items():
                if store.fingerprint in known:
                    raise ConfigError(
                        f"eval.data {name} has the content of the training source {known[store.fingerprint]}; give "
                        "eval.held_out to keep a share of it out of the training, or other data"
                    )
            return dict(stores), found
        rest: dict[str, ShardStore] = {n: HeldOut(s, self.held_out, held=False) for n, s in stores.items()}
        held: dict[str, ShardStore] = {n: HeldOut(s, self.held_out, held=True) for n, s in stores.items()}
        for name in stores:
            if not _has_tokens(held[name]) or not _has_tokens(rest[name]):
                raise DataError(
                    f"eval.held_out={self.held_out:g} of source {name} leaves one side without documents; give another "
                    "share, or eval.data"
                )
        return rest, held

    def build(
        self, stores: Mapping[str, ShardStore], model: ModelConfig, source: Path | None, *, seq_len: int
    ) -> list[Callback]:
        """Return the validation, if there is to be one.

        Args:
            stores: What is evaluated, by name.
            model: The model.
            source: Directory of the model that the run begins with; None for a new one.
            seq_len: Tokens of a pack.

        Raises:
            DataError: The data was made with another tokenizer than the model's.
        """
        if not stores:
            return []
        pad_id = check_data(model, source, {self.paths.get(name, name): store for name, store in stores.items()})
        return [Validation(self, stores, seq_len=seq_len, pad_id=pad_id, vocab_size=model.vocab_size)]


class Validation(Callback):
    """Evaluates every few steps; adds ``eval`` and ``time.eval`` to the record and calls ``on_evaluate``.

    Args:
        config: When, and how much.
        stores: The data sets by name.
        seq_len: Tokens of a pack.
        pad_id: Id of padding.
        vocab_size: Bound of the ids.
    """

    order = 30

    def __init__(
        self, config: EvalConfig, stores: Mapping[str, ShardStore], *, seq_len: int, pad_id: int, vocab_size: int
    ):
        self.name = "validation"
        self.config, self._stores, self._seq_len, self._pad_id = config, dict(stores), seq_len, pad_id
        self._reader = PackReader(self._stores, pad_id=pad_id, vocab_size=vocab_size, skip_corrupt=False)
        count = max(1, config.tokens // seq_len)
        self.packs = [spec for name, store in self._stores.items() for spec in first_packs(name, store, count, seq_len)]
        self._key = f"{seq_len} {len(self.packs)} {' '.join(store.fingerprint for store in stores.values())}"
        self._bests: list[tuple[int, float]] = []

    @property
    def best(self) -> float | None:
        """The least loss so far; with ``keep_best``, that of the checkpoint that ``best`` leads to or is to."""
        return self._bests[-1][1] if self._bests else None

    def post_step(self, record: dict[str, Any]) -> None:
        """Evaluate where it is due."""
        step = record["step"]
        if step % self.config.every and step != self.run.num_steps:
            return
        start = time.perf_counter()
        results = self.evaluate(step)
        record["eval"] = results
        record["time"]["eval"] = time.perf_counter() - start
        self._forget_lost()
        if math.isfinite(results["loss"]) and (self.best is None or results["loss"] < self.best):
            self._bests = [*self._bests[-2:], (step, results["loss"])]
            if self.config.keep_best:
                self.run.request_save(best=True)
        self.run.callbacks.call("on_evaluate", step, results)

    def evaluate(self, step: int) -> dict[str, Any]:
        """Return ``loss`` (nats per target token of all sets), ``targets``, and ``losses`` by set if there are several.

        All ranks call it together. Nothing of the training changes.

        Raises:
            DataError: A pack cannot be read, on this rank or another.
        """
        engine = self.run.engine
        size, rank, count = engine.data_parallel_size, engine.data_parallel_rank, len(self.packs)
        losses, targets = [0.0] * count, [0.0] * count
        problem: str | None = None
        with engine.evaluating():
            for first in range(0, count, size):
                self.run.callbacks.call("on_phase", "evaluation", step)
                number = first + rank
                batch = None
                if number < count and problem is None:
                    try:
                        batch = self._read(self.packs[number])
                    except StateXError as error:
                        problem = str(error)
                    except OSError as error:
                        problem = os_error_text(error)
                # A rank without a pack runs padding: ZeRO-3 gathers parameters on all of them.
                loss = engine.evaluate(self._padding() if batch is None else batch)
                if batch is not None:
                    losses[number] = loss
                    targets[number] = float(batch.num_target_tokens) if engine.counts else 0.0
        # One rank alone, or one context group, has more than zeros at a place.
        *sums, failed = engine.sum([*losses, *targets, float(problem is not None)])
        if failed:
            first_problem = next(text for text in engine.gather(problem) if text)
            raise DataError(f"the validation after step {step} cannot read: {first_problem}").on_all_ranks(engine.rank)
        return self._results(sums[:count], sums[count:])

    def _results(self, losses: list[float], targets: list[float]) -> dict[str, Any]:
        def mean(chosen: list[int]) -> float:
            total = math.fsum(targets[i] for i in chosen)
            return math.fsum(losses[i] for i in chosen) / total if total else math.nan

        results: dict[str, Any] = {"loss": mean(list(range(len(losses)))), "targets": int(math.fsum(targets))}
        if len(self._stores) > 1:
            results["losses"] = {
                name: mean([i for i, pack in enumerate(self.packs) if pack.source == name]) for name in self._stores
            }
        return results

    def _read(self, pack: PackSpec) -> PackedBatch:
        return lay_out([pack], [self._reader.read(pack.source, pack.pieces)], self._pad_id)[0]

    def _padding(self) -> PackedBatch:
        row = torch.arange(self._seq_len)[None]
        return PackedBatch(
            input_ids=torch.full_like(row, self._pad_id),
            labels=torch.full_like(row, IGNORE_INDEX),
            position_ids=row,
            cu_seqlens=torch.tensor([0, self._seq_len], dtype=torch.int32),
            seq_idx=torch.zeros_like(row, dtype=torch.int32),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best loss, and of what; also those before, as the save of the newest may fail."""
        self._forget_lost()
        return {"best": self.best, "of": self._key, "bests": self._bests}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the best loss, unless other packs are evaluated now or its checkpoint is not there."""
        if state["of"] != self._key:
            logger.info("the packs of the validation are others than before: the best loss starts over")
            return
        kept = self.run.engine.broadcast(best_step(self.run.run_dir / CHECKPOINTS_DIR))
        known = state.get("bests", [(kept, state["best"])])
        self._bests = [(step, loss) for step, loss in known if step == kept or not self.config.keep_best]

    def _forget_lost(self) -> None:
        """Go back to the best before where a checkpoint could not be written."""
        self._bests = [(step, loss) for step, loss in self._bests if step not in self.run.lost_best]


def first_packs(name: str, store: ShardStore, count: int, seq_len: int) -> list[PackSpec]:
    """Return the first ``count`` packs of one pass over a data set, or all of them."""
    plan = PackPlan(store, PackPlanOptions(seed=_SEED))
    found: list[PackSpec] = []
    cursor = Cursor()
    while len(found) < count and cursor.epoch == 0:
        ((window, pack),), cursor = plan.take(cursor, 1, seq_len)
        found.append(
            PackSpec(
                source=name,
                pieces=window.pieces(pack),
                origins=(),
                seq_len=seq_len,
                carried=False,
                continues=False,
                state={},
            )
        )
    return found


def _manifests(stores: Mapping[str, ShardStore], paths: Mapping[str, str]) -> dict[str, DatasetManifest]:
    """Return the manifests by the name that messages use."""
    return {paths.get(name, f"source {name}"): store.manifest for name, store in stores.items() if store.manifest}


def _has_tokens(store: ShardStore) -> bool:
    return any(store.num_tokens(shard) for shard in range(store.num_shards))

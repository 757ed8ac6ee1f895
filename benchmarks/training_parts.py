"""The ranks of :mod:`benchmarks.training`: real engine, real loader, blocks of steps of each kind in turn."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from statex_dist.batch import PackedBatch
from statex_dist.data.config import DataConfig
from statex_dist.data.corpus.source import WorkOptions
from statex_dist.data.prepare import prepare
from statex_dist.distributed.context_group import ContextGroup, ParallelConfig
from statex_dist.distributed.env import read_env
from statex_dist.engine.checkpoints import Checkpoints
from statex_dist.engine.config import EngineConfig
from statex_dist.engine.documents import Documents
from statex_dist.engine.zero.engine import Zero3Engine
from statex_dist.models.config import CONFIG_NAME
from statex_dist.models.registry import config_from_dict, make_plan
from statex_dist.optim.schedule import ScheduleConfig
from statex_dist.run_config import ModelSource, RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model, open_values
from statex_dist.train.callback import Callbacks
from statex_dist.train.config import TrainConfig
from statex_dist.train.guard import Guard
from statex_dist.train.loop import Trainer
from statex_dist.train.metrics import read_metrics
from statex_dist.train.status import StopRequest
from statex_dist.train.watchdog import Watchdog

Block = dict[str, float]


def run(part: str, args: argparse.Namespace) -> None:
    """Measure one part; rank 0 leaves ``result.json`` in the folder."""
    env = read_env()
    if env.rank == 0:
        _make_data(args.folder, args.seq_len)
    config = _configure(args)
    while not (args.folder / "data" / "manifest.json").exists():
        time.sleep(0.05)
    stores = config.data.open_stores()
    values = open_values(config)
    model = build_model(config, values)
    loader = build_loader(config, stores, model.config, env)
    parameters = sum(p.numel() for p in model.parameters())
    engine = build_engine(config, model, env, values)
    assert isinstance(engine, Zero3Engine)
    bench = _Bench(config, engine, iter(loader), args)
    kinds = {"loop": bench.loop, "saving": bench.saving, "context": bench.context}[part]()
    for action in kinds.values():
        action()
    blocks: dict[str, list[Block]] = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind, action in kinds.items():
            blocks[kind].append(action())
    if env.rank == 0:
        (args.folder / "result.json").write_text(json.dumps({"parameters": parameters, "kinds": blocks}))
    bench.batches.close()
    engine.close()


class _Bench:
    """One engine and one stream of batches, on which all kinds of blocks run."""

    def __init__(
        self, config: RunConfig, engine: Zero3Engine, batches: Iterator[list[PackedBatch]], args: argparse.Namespace
    ):
        self.config, self.engine, self.batches, self.args = config, engine, batches, args
        self.step = 10_000
        self.lives = 0

    def loop(self) -> dict[str, Callable[[], Block]]:
        return {"bare engine": self._bare, "our loop": self._trained}

    def saving(self) -> dict[str, Callable[[], Block]]:
        return {
            "no saves": self._trained,
            "asynchronous": lambda: self._trained(save_async=True),
            "in the loop": lambda: self._trained(save_async=False),
            "DeepSpeed's own save": self._deepspeed_saves,
        }

    def context(self) -> dict[str, Callable[[], Block]]:
        group = ContextGroup.join(dist.get_world_size(), timeout=timedelta(minutes=5))
        return {"data parallel": self._bare, "context parallel": lambda: self._split(group)}

    def _bare(self) -> Block:
        start = time.perf_counter()
        for _ in range(self.args.steps):
            self.engine.forward_backward(next(self.batches))
            self.engine.step()
        return {"step": (time.perf_counter() - start) / self.args.steps}

    def _split(self, group: ContextGroup | None) -> Block:
        """As many tokens per step as :meth:`_bare`: both ranks' packs, one after the other, each over both."""
        own, engine = self.engine.context, self.engine
        start = time.perf_counter()
        engine.context = engine.carried.context = group
        for _ in range(self.args.steps):
            packs = [pack for part in engine.gather(next(self.batches)) for pack in part]
            engine.forward_backward(packs)
            engine.step()
        engine.context = engine.carried.context = own
        return {"step": (time.perf_counter() - start) / self.args.steps}

    def _trained(self, save_async: bool | None = None) -> Block:
        """A block through the trainer; with ``save_async`` one save begins in its first step."""
        self.lives += 1
        run_dir = self.args.folder / f"life{self.lives}"
        run_dir.mkdir(exist_ok=True)
        saves = save_async is not None
        first = self.step
        config = TrainConfig(
            num_steps=first + self.args.steps,
            save_every=first + 1 if saves else 0,  # due once in a block
            save_async=bool(save_async),
        )
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        documents = Documents(model={CONFIG_NAME: "{}"}, settings={})
        checkpoints = _OneSave(self.engine, run_dir / "checkpoints", documents, config.save_policy)
        watchdog = Watchdog(600, run_dir, self.engine.rank)
        trainer = Trainer(
            self.engine,
            (packs for packs in self.batches),  # the trainer closes what it iterates
            config,
            run_dir=run_dir,
            checkpoints=checkpoints,
            guard=Guard(self.config.guard, run_dir, rank=self.engine.rank),
            callbacks=Callbacks([watchdog, *self.config.metrics.build(flops_per_token=0)], rank=self.engine.rank),
            stop=StopRequest(),
            start_step=first,
        )
        self.engine.barrier()
        start = time.perf_counter()
        trainer.run()
        seconds = time.perf_counter() - start
        self.step = trainer.step
        self._remove(run_dir / "checkpoints")
        if self.engine.rank:
            return {"step": seconds / self.args.steps}
        records = read_metrics(run_dir)
        block = {"step": seconds / self.args.steps}
        block["data"] = sum(record["time"]["data"] for record in records) / self.args.steps
        if saves:
            block["blocked"] = sum(record["time"]["save"] for record in records)
        return block

    def _deepspeed_saves(self) -> Block:
        self.lives += 1
        ours, self.engine.engine.checkpoint_engine = self.engine.engine.checkpoint_engine, TorchCheckpointEngine()
        self.engine.barrier()
        start = time.perf_counter()
        self.engine.engine.save_checkpoint(str(self.args.folder / f"life{self.lives}"), tag="one")
        blocked = time.perf_counter() - start
        self.engine.engine.checkpoint_engine = ours
        self._bare()
        seconds = time.perf_counter() - start
        self._remove(self.args.folder / f"life{self.lives}")
        return {"step": seconds / self.args.steps, "blocked": blocked}

    def _remove(self, directory: Path) -> None:
        self.engine.barrier()
        if self.engine.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)


class _OneSave(Checkpoints):
    """Checkpoints that are taken where they are due, and not at the end of a block."""

    def save(
        self,
        step: int,
        client_state: Mapping[str, Any],
        *,
        last: bool = False,
        doubtful: bool = False,
        best: bool = False,
    ) -> None:
        """Save where it is due; at the end only finish what is being written."""
        if not last:
            super().save(step, client_state)
        elif self.pending:
            self.finish()


def _configure(args: argparse.Namespace) -> RunConfig:
    model = {
        "model_type": "gla",
        "vocab_size": 4096,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_heads": 4,
        "intermediate_size": 2 * args.hidden,
    }
    plan = make_plan(config_from_dict(model), layers="every:3", factor=4, init="inherit", op="merge_heads")
    return RunConfig(
        run_dir=str(args.folder / "run"),
        model=ModelSource(config=json.loads(plan.to_json())),
        data=DataConfig(path=str(args.folder / "data"), seq_len=args.seq_len, packs_per_step=2),
        train=TrainConfig(num_steps=10**6),
        engine=EngineConfig(precision="fp32"),
        parallel=ParallelConfig(),
        schedule=ScheduleConfig(name="constant"),
    )


def _make_data(folder: Path, seq_len: int) -> None:
    """Documents of many lengths, as real MDS shards."""
    generator = np.random.default_rng(0)
    lines = folder / "texts.jsonl"
    with lines.open("w", encoding="utf-8") as file:
        for length in generator.integers(50, seq_len, size=2000):
            text = bytes(generator.integers(97, 123, size=int(length), dtype=np.uint8)).decode()
            file.write(json.dumps({"text": text}) + "\n")
    prepare([lines], folder / "data", options=WorkOptions(workers=1))

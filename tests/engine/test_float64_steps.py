"""Four optimizer steps on two real ZeRO-3 ranks beside an implementation in float64 that shares nothing but the model.

Loss, gradient norm, learning rate, parameters and Adam's moments of every step, for every schedule; with packs without
a target on one rank, with a step without any, with accumulation, segments, carried states and context groups. All cases
run in one launch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from statex_dist.batch import PackedBatch
from statex_dist.config import parse_config
from statex_dist.data.storage.mds import load_streaming
from statex_dist.distributed.env import read_env
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict, family_of
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model
from statex_dist.train.guard import Guard
from tests.data.options import make_loader
from tests.distributed_test import run_distributed_test
from tests.runs import GLA, save_model, write_run

pytestmark = pytest.mark.distributed

RANKS, STEPS, PACKS, SEQ_LEN = 2, 4, 4, 24
LENGTHS = [23, 24, 17, 24, 11, 24, 20, 9, 24, 24, 15, 24, 22, 24, 13, 24]
"""Tokens of the documents: one a pack, for all packs of all steps."""

LONG = [STEPS * SEQ_LEN] * PACKS
"""A lane each, from the first step to the last."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"name": "cosine", "warmup_steps": 1, "min_ratio": 0.1},
    "cosine that ends early": {"name": "cosine", "num_steps": 3, "warmup_steps": 0, "min_ratio": 0.25},
    "cosine of nine steps": {"name": "cosine", "num_steps": 9, "warmup_steps": 2},
    "wsd": {"name": "wsd", "warmup_steps": 2, "decay_steps": 2, "min_ratio": 0.2},
    "constant": {"name": "constant", "warmup_steps": 1},
}
CASES: dict[str, dict[str, Any]] = {
    "cosine": {"schedule": SCHEDULES["cosine"]},
    "wsd": {"schedule": SCHEDULES["wsd"]},
    **{f"{name}, masked": {"schedule": schedule, "data": "masked"} for name, schedule in SCHEDULES.items()},
    "segments, masked": {"data": "masked", "engine": {"segment_tokens": 10}},
    "carried states, masked": {"data": "long masked", "carry": True},
    "context groups, masked": {"data": "masked", "context": 2},
    "offloaded, masked": {"data": "masked", "engine": {"offload_optimizer": "cpu"}},
}
"""Masked: rank 1 has no target in step 2, and no rank has one in step 3."""

LR, BETAS, EPS, DECAY, CLIP = 0.01, (0.8, 0.9), 1e-3, 0.3, 0.5


def configure(directory: Path, case: dict[str, Any], *arguments: str) -> RunConfig:
    data = {"path": str(directory / case.get("data", "whole")), "seq_len": SEQ_LEN, "packs_per_step": PACKS}
    data |= {"packing": "one_document", "long_documents": "carry" if case.get("carry") else "restart"}
    optimizer = {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY, "gradient_clipping": CLIP}
    file = write_run(
        directory / f"run{os.getpid()}.yaml",
        run_dir=str(directory / "run"),  # ranks that differ in a setting are refused
        model={"path": str(directory / "model")},
        data=data,
        train={"num_steps": STEPS},
        engine=case.get("engine", {}),
        parallel={"context": case.get("context", 1)},
        optimizer=optimizer,
        schedule=case.get("schedule", SCHEDULES["cosine"]),
    )
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def write_documents(directory: Path, lengths: list[int], masks: list[np.ndarray] | None = None) -> None:
    """Write documents with streaming's own writer."""
    generator = np.random.default_rng(3)
    columns = {"tokens": "ndarray:uint16", "loss_mask": "ndarray:uint8"}
    with load_streaming().MDSWriter(out=str(directory), columns=columns) as out:
        for number, length in enumerate(lengths):
            mask = np.ones(length, np.uint8) if masks is None else masks[number]
            out.write({"tokens": generator.integers(97, 123, length).astype(np.uint16), "loss_mask": mask})


def global_batches(config: RunConfig, model: RecurrentLM) -> Iterator[list[PackedBatch]]:
    """The packs of every step, of all ranks."""
    stores = config.data.open_stores()
    loader = make_loader(
        stores,
        seq_len=SEQ_LEN,
        global_packs=PACKS,
        pad_id=model.config.pad_token_id,
        packing=config.data.packing,
        long_documents=config.data.long_documents,
        window_tokens=config.data.window_tokens,
    )
    return iter(loader)


def write_masked(directory: Path, name: str, lengths: list[int], config: RunConfig, model: RecurrentLM) -> None:
    """Mask what rank 1 has in step 2 and what all have in step 3: the order depends on the lengths alone."""
    masks = [np.ones(length, np.uint8) for length in lengths]
    batches = global_batches(config, model)
    for step in range(1, STEPS + 1):
        for place, pack in enumerate(next(batches)):
            if step == 3 or (step == 2 and place >= PACKS // RANKS):
                (origin,) = pack.origins
                # The target of a token is the one behind it.
                masks[origin.document][origin.start + (origin.start > 0) : origin.stop + 1] = 0
    batches.close()
    write_documents(directory / name, lengths, masks)


# ---- the real thing


def steps(config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Run the steps, and look at loss, norm, rate and every parameter after each."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    env = read_env()
    model = build_model(config)
    loader = build_loader(config, config.data.open_stores(), model.config, env)
    engine = build_engine(config, model, env)
    guard, batches, found = Guard(config.guard, run_dir, rank=env.rank), iter(loader), []
    for _ in range(STEPS):
        loss = engine.forward_backward(next(batches))
        norm = sum(norm**2 for norm in engine.grad_norms().values()) ** 0.5
        result = engine.step(skip=guard.judge(loss, norm, targets=engine.num_targets) is not None)
        named = list(engine.engine.module.named_parameters())
        found.append(
            {
                **{"loss": loss, "norm": norm, "lr": result.lr, "updated": result.updated},
                "targets": engine.num_targets,
                "parameters": {name: safe_get_full_fp32_param(p).clone() for name, p in named},
                "moments": {name: safe_get_full_optimizer_state(p, "exp_avg_sq") for name, p in named},
            }
        )
        found[-1]["moments"] = {n: None if m is None else m.clone() for n, m in found[-1]["moments"].items()}
    batches.close()
    engine.engine.destroy()  # the process group stays: DeepSpeed remembers its groups
    return found


def work(rank: int, directory: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: steps(configure(directory, case), directory) for name, case in CASES.items()}


# ---- the same in float64


def rate(schedule: dict[str, Any], step: int) -> float:
    """docs/training.md: the learning rate of a step, counted from 1."""
    t, n = step - 1, schedule.get("num_steps") or STEPS
    w, d, m = schedule.get("warmup_steps", 0), schedule.get("decay_steps", 0), schedule.get("min_ratio", 0.0)
    if t < w:
        return LR * t / w
    if schedule["name"] == "constant":
        return LR
    if t >= n:
        return LR * m
    if schedule["name"] == "cosine":
        return LR * (m + (1 - m) * (1 + math.cos(math.pi * (t - w) / (n - w))) / 2)
    return LR if t < n - d else LR * (m + (1 - m) * (n - t) / d)


class Reference:
    """AdamW with clipping on the mean loss per target of a global batch, written out, in float64."""

    def __init__(self, model: RecurrentLM, no_decay: set[str], segment_tokens: int):
        self.model, self.no_decay, self.segment_tokens = model.double(), no_decay, segment_tokens
        self.first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.updates = 0
        self.lanes: dict[int, Any] = {}

    def loss_sum(self, lane: int, piece: PackedBatch) -> torch.Tensor:
        count, before = len(piece.cu_seqlens) - 1, None
        if piece.carried:
            before = [
                tuple(torch.cat([part, part.new_zeros(count - 1, *part.shape[1:])]) for part in layer)
                for layer in self.lanes.pop(lane)
            ]
        out = self.model(
            piece.input_ids, cu_seqlens=piece.cu_seqlens, seq_idx=piece.seq_idx, states=before, output_states=True
        )
        if piece.continues:
            self.lanes[lane] = [tuple(part[-1:].detach() for part in layer) for layer in out.states]
        return F.cross_entropy(out.logits[0].double(), piece.labels[0], ignore_index=-100, reduction="sum")

    def step(self, packs: list[PackedBatch], lr: float) -> dict[str, Any]:
        targets = sum(int((pack.labels != -100).sum()) for pack in packs)
        sums = []
        self.model.zero_grad()
        for lane, pack in enumerate(packs):
            for piece in pack.segments(self.segment_tokens):
                loss = self.loss_sum(lane, piece)
                loss.backward()
                sums.append(loss.item())
        named = dict(self.model.named_parameters())
        gradients = {name: p.grad / max(targets, 1) for name, p in named.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        if targets:
            self._update(named, gradients, min(1.0, CLIP / (norm + 1e-6)), lr)
        return {
            **{"loss": math.fsum(sums) / targets if targets else math.nan, "norm": norm, "lr": lr},
            **{"updated": targets > 0, "targets": targets},
            "parameters": {name: p.detach().clone() for name, p in named.items()},
            "moments": {name: moment.clone() for name, moment in self.second.items()},
        }

    @torch.no_grad()
    def _update(self, named, gradients, clip: float, lr: float) -> None:
        self.updates += 1
        for name, parameter in named.items():
            gradient, (first, second) = gradients[name] * clip, (self.first[name], self.second[name])
            first.copy_(BETAS[0] * first + (1 - BETAS[0]) * gradient)
            second.copy_(BETAS[1] * second + (1 - BETAS[1]) * gradient**2)
            mean, square = first / (1 - BETAS[0] ** self.updates), second / (1 - BETAS[1] ** self.updates)
            kept = 1 - lr * (0.0 if name in self.no_decay else DECAY)
            parameter.copy_(parameter * kept - lr * mean / (square.sqrt() + EPS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("float64")
    save_model(config_from_dict({**GLA, "num_hidden_layers": 1}), directory / "model")
    for name, lengths, carry in (("whole", LENGTHS, False), ("long", LONG, True)):
        write_documents(directory / name, lengths)
        config = configure(directory, {"data": name, "carry": carry})
        masked = "masked" if name == "whole" else f"{name} masked"
        write_masked(directory, masked, lengths, config, build_model(config))
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> dict[str, list[dict[str, Any]]]:
    return run_distributed_test(work, RANKS, directory, group=False)[0]


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_those_in_float64(directory: Path, found, case: str):
    config = configure(directory, CASES[case])
    model = build_model(config)
    tensors = family_of(model.config.MODEL_TYPE).tensors(model.config)
    no_decay = {name for name, spec in tensors.items() if not spec.decay}
    reference = Reference(model, no_decay, config.engine.segment_tokens)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    start, moved = before, 0.0
    batches = global_batches(config, model)
    schedule = CASES[case].get("schedule", SCHEDULES["cosine"])
    masked = "masked" in case
    for number, ours in enumerate(found[case], 1):
        theirs = reference.step(next(batches), rate(schedule, number))
        assert ours["targets"] == theirs["targets"], number
        assert ours["updated"] == theirs["updated"] == (not masked or number != 3), number
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-12, abs=1e-18), number
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=2e-5), number
        if theirs["updated"]:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6), number
            assert theirs["norm"] > CLIP or number > 1, "clipping must be active"
        else:
            assert math.isnan(ours["loss"]), number
            assert ours["norm"] == 0, number
            same = found[case][number - 2]
            assert all(torch.equal(ours["parameters"][n], p) for n, p in same["parameters"].items()), "the same bits"
            assert all(torch.equal(ours["moments"][n], m) for n, m in same["moments"].items())
        change = distance(ours["parameters"], theirs["parameters"])
        scale = distance(theirs["parameters"], start)
        moved = max(moved, distance(theirs["parameters"], before))
        # fp32 holds parameters of about 1 to 6e-8; what is learned by the first steps is some 1e-2 of them.
        assert change <= 1e-4 * scale + 1e-6, (number, change, scale)
        assert distance(ours["moments"], theirs["moments"]) <= 1e-4 * norm_of(theirs["moments"]) + 1e-12, number
        before = theirs["parameters"]
    batches.close()
    assert moved > 0.01, "something must have been learned"
    assert theirs["targets"] > 0
    if masked:
        assert [step["targets"] == 0 for step in found[case]] == [False, False, True, False]


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return norm_of({name: tensor.double() - b[name].double() for name, tensor in a.items()})

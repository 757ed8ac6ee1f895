"""What `statex plan` predicts beside what real runs on two ranks use."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.plan.memory import TrainingSettings, training_memory
from launch.cmd_plan import count_activations
from statex_dist.batch import PackedBatch
from statex_dist.engine.plain import PlainEngine
from statex_dist.models.config import ModelConfig
from statex_dist.models.lm import RecurrentLM
from tests.data.options import prepare
from tests.runs import (
    GLA,
    MAMBA2,
    command,
    environment,
    expanded,
    losses,
    make_shards,
    run_training,
    save_model,
    write_run,
)

pytestmark = pytest.mark.distributed

SEQ_LEN = 4096
LARGE = {
    "gla": {**GLA, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 4096},
    "mamba2": {**MAMBA2, "hidden_size": 128, "num_heads": 8, "head_dim": 32, "state_size": 32, "vocab_size": 4096},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents longer than a pack."""
    directory = tmp_path_factory.mktemp("long")
    lines = [json.dumps({"text": f"document {i}: " + "abc def " * 3000}) for i in range(12)]
    (directory / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare([directory / "texts.jsonl"], directory / "shards", workers=1)
    return directory / "shards"


def used(directory: Path, shards: Path, config: ModelConfig, seq_len: int, engine: dict[str, Any]) -> int:
    """Return the most bytes that were resident on rank 0 of a real run on two ranks."""
    directory.mkdir()
    file = write_run(
        directory / "run.yaml",
        model={"path": str(save_model(config, directory / "model"))},
        data={"path": str(shards), "seq_len": seq_len, "packs_per_step": 2, "window_tokens": 100_000},
        train={"num_steps": 2},
        engine=engine,
    )
    # By default glibc keeps what is freed of tensors below 32 MiB: up to twice what lives.
    settings = environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run(command(2, "--config", str(file)), env=os.environ | settings, check=True, timeout=200)
    lines = (directory / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["memory_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "recompute", "chunk"), [("gla", "none", 0), ("mamba2", "block", 512)], ids=["gla-none", "mamba2-block"]
)
def test_prediction_is_what_a_run_uses(tmp_path: Path, shards: Path, family: str, recompute: Any, chunk: int):
    engine = {"activation_checkpointing": recompute, "loss_chunk_tokens": chunk}
    config, small = expanded(LARGE[family]), expanded(GLA if family == "gla" else MAMBA2)
    process = used(tmp_path / "small", shards, small, 64, engine)
    measured = used(tmp_path / "large", shards, config, SEQ_LEN, engine) - process
    settings = TrainingSettings(
        world_size=2,
        seq_len=SEQ_LEN,
        precision="fp32",
        activation_checkpointing=recompute,
        loss_chunk_tokens=chunk,
        param_persistence_threshold=0,
        device="cpu",
    )
    predicted = training_memory(config, settings, count_activations).peak.host
    assert measured > 100 << 20, "too little to be told from Python"
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_all_that_saves_memory_at_once_equals_the_plain_engine(tmp_path: Path):
    """Recomputed expanded layers, chunked loss, segments, optimizer and parameters in host memory: the same losses."""
    texts = make_shards(tmp_path / "data")
    model = save_model(expanded(GLA), tmp_path / "model")
    saving = {"activation_checkpointing": "expanded", "loss_chunk_tokens": 16, "segment_tokens": 50}
    offloaded = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    found = {}
    for name, ranks, engine in (
        ("zero3", 2, {**saving, **offloaded}),
        ("plain", 1, {"name": "plain", "segment_tokens": 50}),
    ):
        sections = {"model": {"path": str(model)}, "data": {"path": str(texts)}, "engine": engine}
        file = write_run(tmp_path / f"{name}.yaml", **sections, train={"num_steps": 3})
        done = run_training(ranks, "--config", str(file))
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = losses(tmp_path / name)
    assert len(found["plain"]) == 3
    assert found["zero3"] == pytest.approx(found["plain"], rel=2e-5)


def test_segments_have_the_gradient_of_truncated_backpropagation():
    ids = torch.randint(0, 258, (1, 60), generator=torch.Generator().manual_seed(0))
    marks = torch.tensor([0, 25, 60], dtype=torch.int32)
    documents = torch.tensor([[0] * 25 + [1] * 35], dtype=torch.int32)
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    pack = PackedBatch(input_ids=ids, labels=ids.roll(-1), position_ids=positions, cu_seqlens=marks, seq_idx=documents)
    model = RecurrentLM(expanded(GLA)).double()
    model.init_parameters(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine = PlainEngine(
        model, optimizer, schedule, gradient_clipping=0.0, device=torch.device("cpu"), segment_tokens=20
    )
    loss = engine.forward_backward([pack])
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    whole = model(ids, labels=pack.labels, cu_seqlens=marks, seq_idx=documents).loss_sum / 60
    assert loss == pytest.approx(whole.item(), rel=1e-12)
    model.zero_grad()
    # By hand: 0-20 | 20-25, 25-40 | 40-60, where the state at 20 and at 40 is carried as a value.
    first = model(ids[:, :20], labels=pack.labels[:, :20], output_states=True)
    kept = [tuple(part.detach() for part in layer) for layer in first.states]
    rest = model(ids[:, 20:25], labels=pack.labels[:, 20:25], states=kept)
    second = model(ids[:, 25:40], labels=pack.labels[:, 25:40], output_states=True)
    kept = [tuple(part.detach() for part in layer) for layer in second.states]
    third = model(ids[:, 40:], labels=pack.labels[:, 40:], states=kept)
    (sum(part.loss_sum for part in (first, rest, second, third)) / 60).backward()
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-10, atol=1e-12)

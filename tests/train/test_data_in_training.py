"""The loader's guarantees, seen from a training run: carried states, mixtures, bad shards, every launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.cli import main
from statex_dist.config import parse_config
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from statex_dist.errors import ConfigError
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.metrics import read_metrics
from statex_dist.train.status import read_status
from tests.data.options import prepare
from tests.raising import raises
from tests.runs import GLA, MAMBA2, command, environment, expanded, losses, run_training, save_model, write_run


def make_data(directory: Path, sizes: list[int], seed: int = 0) -> Path:
    """Make documents of ``sizes`` bytes (one token each, and EOS)."""
    generator = torch.Generator().manual_seed(seed)
    letters = [torch.randint(97, 123, (n,), generator=generator).tolist() for n in sizes]
    directory.mkdir(parents=True, exist_ok=True)
    lines = directory / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": bytes(ids).decode()}) + "\n" for ids in letters))
    prepare([lines], directory / "shards", workers=1, shard_bytes=2048)
    return directory / "shards"


LONG = [90, 400, 33, 700, 5, 260, 12, 130, 511, 64, 8, 300]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), LONG)


@pytest.fixture(scope="module", params=[GLA, MAMBA2], ids=["gla", "mamba2"])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh model, but one that says loudly what its states hold."""
    directory = save_model(expanded(request.param), tmp_path_factory.mktemp("model"))
    module = from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        module.lm_head.weight.mul_(30)
    save_pretrained(module, directory, overwrite=True)
    return directory


def start(path: Path, *arguments: str, **sections) -> RunConfig:
    file = write_run(path.with_suffix(".yaml"), **sections)
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def frozen_run(path: Path, model: Path, shards: Path, long_documents: str, steps: int) -> list[float]:
    """Losses of an epoch with a learning rate of next to nothing, packed by ``concat`` into one lane of 64 tokens."""
    config = start(
        path,
        model={"path": str(model)},
        data={
            "path": str(shards),
            "seq_len": 64,
            "packs_per_step": 1,
            "packing": "concat",
            "window_tokens": 100_000,
            "long_documents": long_documents,
        },
        train={"num_steps": steps},
        optimizer={"lr": 1e-12, "weight_decay": 0.0},
        engine={"name": "plain"},
    )
    assert train(config)
    return losses(path)


def test_a_carried_state_makes_a_cut_document_whole(tmp_path: Path, model: Path, shards: Path):
    """In one lane, carried, nothing is cut off: the losses add up to those of the whole documents run alone."""
    tokens = sum(LONG) + len(LONG)
    steps = -(-tokens // 64)
    module = from_pretrained(model, dtype=torch.float32)
    whole = 0.0
    with torch.no_grad():
        for piece in sequential_documents(open_store(shards)):
            ids = torch.from_numpy(piece.tokens.astype("int64"))[None]
            labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
            whole += float(module(ids, labels=labels).loss_sum)
    carried = sums(frozen_run(tmp_path / "carry", model, shards, "carry", steps), shards, "carry")
    restarted = sums(frozen_run(tmp_path / "restart", model, shards, "restart", steps), shards, "restart")
    assert carried == pytest.approx(whole, rel=1e-5)
    assert abs(restarted - whole) > 50 * abs(carried - whole)


def sums(means: list[float], shards: Path, long_documents: str) -> float:
    """The summed loss of a run, from its mean losses and the packs' own counts of targets."""
    from tests.data.options import make_loader

    loader = make_loader(
        open_store(shards),
        seq_len=64,
        global_packs=1,
        pad_id=257,
        packing="concat",
        window_tokens=100_000,
        long_documents=long_documents,
    )
    return sum(mean * batch.num_target_tokens for mean, (batch,) in zip(means, loader, strict=False))


@pytest.mark.slow
@pytest.mark.distributed
def test_carried_states_on_two_ranks_equal_one_and_survive_a_restart(tmp_path: Path, shards: Path):
    sections = {
        "model": {"config": GLA},
        "data": {"path": str(shards), "seq_len": 64, "packs_per_step": 4, "long_documents": "carry"},
        "train": {"num_steps": 7},
        "schedule": {"name": "constant"},
    }
    assert train(start(tmp_path / "one", **sections, engine={"name": "plain"}))
    runs = {"two": ["7"], "parts": ["3", "7"]}  # step 3 lies in the middle of long documents
    for name, ends in runs.items():
        file = write_run(tmp_path / f"{name}.yaml", **sections)
        for steps in ends:
            result = run_training(2, "--config", str(file), "--train.num_steps", steps)
            assert result.returncode == 0, result.stderr
            assert "no state was kept" not in result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    assert losses(tmp_path / "parts") == losses(tmp_path / "two")


def test_a_mixture_with_a_curriculum_resumes_exactly(tmp_path: Path, shards: Path):
    other = make_data(tmp_path / "other", [40, 50, 60, 70, 300] * 6, seed=1)
    sections = {
        "model": {"config": GLA},
        "data": {
            "sources": {"long": {"path": str(shards), "weight": 2}, "short": {"path": str(other)}},
            "seq_len": 32,
            "packs_per_step": 2,
            "tail": "split",
            "num_workers": 2,
            "curriculum": [{"from_step": 3, "seq_len": 96}, {"from_step": 6, "weights": {"short": 1}}],
        },
        "engine": {"name": "plain"},
        "schedule": {"name": "constant"},
    }
    assert train(start(tmp_path / "whole", "--train.num_steps", "9", **sections))
    for steps in ("2", "4", "9"):
        assert train(start(tmp_path / "parts", "--train.num_steps", steps, **sections))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [64] * 3 + [192] * 6


LAUNCHERS = {
    "torchrun": command(2),
    "deepspeed": [
        str(Path(sys.executable).parent / "deepspeed"),
        *("--num_accelerators", "2"),
        str(Path(command(1)[-1])),
    ],
    "python": [sys.executable, command(1)[-1]],
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=() if name == "python" else pytest.mark.slow) for name in LAUNCHERS]
)
def test_a_bad_shard_ends_every_launcher_with_its_name(tmp_path: Path, launcher: str):
    data = make_data(tmp_path / "data", LONG * 6)
    (data / "shard.00003.mds").write_bytes(b"x" * 100)
    sections = {
        "model": {"config": GLA},
        "data": {"path": str(data), "seq_len": 128, "packs_per_step": 2},
        "train": {"num_steps": 200},
    }
    file = write_run(tmp_path / "run.yaml", **sections)
    done = subprocess.run(
        [*LAUNCHERS[launcher], "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(),
        check=False,
    )
    assert done.returncode != 0
    said = done.stderr + done.stdout
    # A rank that has the same error as a lower one leaves the line to it.
    assert said.count("shard.00003.mds has 100 bytes, the index says") >= 1, said[-3000:]
    assert "Traceback" not in said or launcher == "torchrun"  # torchrun prints its own


def test_a_stage_from_step_0_stands_for_the_whole_section_only_at_the_front(tmp_path: Path, shards: Path):
    def stages(*curriculum):
        sections = {"model": {"config": GLA}, "data": {"path": str(shards), "curriculum": list(curriculum)}}
        return start(tmp_path / "run", **sections, engine={"name": "plain"}).data.stages()

    assert [(s.from_step, s.seq_len) for s in stages({"from_step": 0, "seq_len": 32})] == [(0, 32)]
    assert [(s.from_step, s.seq_len) for s in stages({"from_step": 9, "seq_len": 32})] == [(0, 128), (9, 32)]
    config = start(
        tmp_path / "run",
        model={"config": GLA},
        data={"path": str(shards), "curriculum": [{"from_step": 9}, {"from_step": 0, "seq_len": 32}]},
        engine={"name": "plain"},
    )
    with raises(ConfigError, "stage", "step 0", "step 9"):
        train(config)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["preemption of the group", "a killed worker"])
def test_signals_with_workers(tmp_path: Path, shards: Path, how: str):
    sections = {
        "model": {"config": GLA},
        "data": {"path": str(shards), "seq_len": 128, "packs_per_step": 2, "num_workers": 2},
        "train": {"num_steps": 100_000},
        "engine": {"name": "plain"},
    }
    file = write_run(tmp_path / "run.yaml", **sections)
    process = subprocess.Popen(
        [sys.executable, command(1)[-1], "--config", str(file)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    if how == "a killed worker":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert "Traceback" not in said
    if how == "a killed worker":
        assert process.returncode == 2
        assert "data worker" in said
    else:
        assert process.returncode == 75
        assert "stopped at step" in said


def test_skip_corrupt_goes_on_and_says_what_was_lost(tmp_path: Path, caplog):
    data = make_data(tmp_path / "data", LONG * 6)
    (data / "shard.00003.mds").unlink()
    sections = {
        "model": {"config": GLA},
        "data": {"path": str(data), "seq_len": 128, "packs_per_step": 2, "skip_corrupt": True},
        "engine": {"name": "plain"},
    }
    assert train(start(tmp_path / "run", "--train.num_steps", "40", **sections))
    assert any("damaged shards" in record.message for record in caplog.records)
    assert len(losses(tmp_path / "run")) == 40


def test_a_source_seen_too_often_is_visible_everywhere(tmp_path: Path, caplog, capsys):
    """In the warning at the start, every record, the log, the status and the report."""
    sources = {
        "big": {"path": str(make_data(tmp_path / "big", [300] * 12)), "weight": 1},
        "small": {"path": str(make_data(tmp_path / "small", [5])), "weight": 1},
    }
    sections = {"model": {"config": GLA}, "engine": {"name": "plain"}, "train": {"num_steps": 45}}
    caplog.set_level("INFO")
    data = {"sources": sources, "seq_len": 64, "packs_per_step": 4, "packing": "concat"}
    config = start(tmp_path / "run", **sections, data=data)
    assert train(config)
    (warned,) = [record.message for record in caplog.records if "data.warn_epochs" in record.message]
    assert "source small (6 tokens) will be seen" in warned
    records = read_metrics(tmp_path / "run")
    epochs = records[-1]["epochs"]
    assert epochs["small"] * 6 == pytest.approx(epochs["big"] * 12 * 301, rel=0.1), "half of the tokens each"
    assert epochs["small"] > 150
    forecast = float(warned.split("will be seen ")[1].split(" times")[0])
    assert forecast == pytest.approx(epochs["small"], rel=0.1)
    assert read_status(tmp_path / "run").epochs == epochs
    assert any(f"epochs small {epochs['small']:.2f} big" in record.message for record in caplog.records)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "epochs of small" in page
    assert f"{epochs['small']:,.2f}" in page
    caplog.clear()
    more = ("--data.warn_epochs", ".inf", "--train.num_steps", "47")
    assert train(start(tmp_path / "run", *more, **sections, data=data))
    assert not any("data.warn_epochs" in record.message for record in caplog.records)
    assert read_metrics(tmp_path / "run")[-1]["epochs"]["small"] > epochs["small"]

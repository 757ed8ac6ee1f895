"""The whole way of a hybrid: hub directory, expansion, training in two ranks, kill -9, resume, export, transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.models.hf import from_pretrained
from statex_dist.train.metrics import read_metrics
from tests.checkpoints_tools.builders import run_expand
from tests.faults.test_faults import broken
from tests.models.hybrid.hosts import HOSTS, save_host, without_kernels
from tests.runs import REPOSITORY, losses, make_shards, run_training, write_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NUM_STEPS = 6
PLANS = {
    "nemotron_h": {"op": "grow_state", "init": "lossless", "factor": 2, "layers": "all"},
    "granitemoehybrid": {"op": "grow_features", "init": "lossless", "factor": 2, "layers": "all"},
    "falcon_h1": {"op": "grow_state", "init": "inherit", "factor": 2, "layers": "0"},
    "qwen3_next": {"op": "mix_heads", "init": "lossless", "factor": 2, "layers": "all"},
}


@pytest.mark.parametrize("model_type", PLANS)
def test_hub_to_transformers(tmp_path: Path, model_type: str):
    source, model = tmp_path / "hub", tmp_path / "model"
    before = save_host(model_type, source, vocab_size=258, eos_token_id=256, pad_token_id=257)
    run_expand(source, model, **PLANS[model_type])
    ids = torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(0))
    if PLANS[model_type]["init"] == "lossless":
        with torch.no_grad():
            expected = before(ids, use_cache=False).logits
            torch.testing.assert_close(from_pretrained(model)(ids).logits, expected, rtol=0, atol=1e-5)
    sections = {
        "model": {"path": str(model)},
        "data": {"path": str(make_shards(tmp_path / "data"))},
        "train": {"num_steps": NUM_STEPS, "save_every": 2, "keep_last": 3},
    }
    calm = write_run(tmp_path / "calm.yaml", **sections)
    done = run_training(2, "--config", str(calm))
    assert done.returncode == 0, done.stderr[-3000:]
    file = write_run(tmp_path / "run.yaml", **sections)
    command = [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), "--nproc", "2", "--backoff", "0.1"]
    faults = broken(tmp_path / "done", {"point": "forward", "rank": 1, "call": 6})
    done = subprocess.run(
        [*command, "--", "--config", str(file)], env=faults, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done" / "0").exists(), "the rank was not killed"
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))
    assert losses(tmp_path / "run") == losses(tmp_path / "calm")
    export = tmp_path / "export"
    reshard(tmp_path / "run" / "checkpoints" / f"global_step{NUM_STEPS}", export, to="hf")
    with without_kernels():
        opened, report = AutoModelForCausalLM.from_pretrained(
            export, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
        )
    assert not any(report.values()), report
    ours = from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(ours(ids).logits, before(ids, use_cache=False).logits, atol=1e-3), "not trained"
    kept, given = (json.loads((path / "config.json").read_text()) for path in (export, source))
    changed = {key for key in given if kept.get(key) != given[key]}
    assert changed <= {"architectures", "model_type", "hidden_act", "ssm_state_size", "mamba_d_state"}, changed


@pytest.mark.parametrize("model_type", HOSTS)
def test_two_ranks_train_every_host_as_one_process_does(tmp_path: Path, model_type: str):
    save_host(model_type, tmp_path / "model", vocab_size=258, eos_token_id=256, pad_token_id=257)
    sections = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"path": str(make_shards(tmp_path / "data"))},
        "train": {"num_steps": 3},
    }
    engines = {"one": {"name": "plain"}, "two": {"name": "zero3", "activation_checkpointing": "block"}}
    for ranks, (name, engine) in enumerate(engines.items(), 1):
        file = write_run(tmp_path / f"{name}.yaml", **sections, engine={**engine, "precision": "fp32"})
        done = run_training(ranks, "--config", str(file))
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=2e-6)

"""Real training runs for tests: tiny data, tiny models, and one helper that starts the training script on N ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from statex_dist.models.config import ModelConfig
from statex_dist.models.hf import save_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict, make_plan
from tests.data.options import prepare

REPOSITORY = Path(__file__).resolve().parent.parent

GLA: dict[str, Any] = {
    "model_type": "gla",
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "use_short_conv": True,
    "intermediate_size": 48,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
MAMBA2: dict[str, Any] = {
    "model_type": "mamba2",
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 2,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "pad_token_id": 257,
}

_SHARED = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "eos_token_id": 256}
OTHERS: dict[str, dict[str, Any]] = {
    # a parameter that all layers share, experts that a rank's tokens may leave out, decays per channel
    "hgrn2": {"model_type": "hgrn2", "expand_ratio": 8, **_SHARED},
    "minimax": {
        "model_type": "minimax",
        "num_attention_heads": 4,
        "num_local_experts": 4,
        "layer_types": ["linear_attention"] * 2,
        **_SHARED,
    },
    "kda": {"model_type": "kda", "num_heads": 4, "head_dim": 8, **_SHARED},
}


def expanded(values: dict[str, Any]) -> ModelConfig:
    """Return a config with every kind of expansion that its family has."""
    config = config_from_dict(values)
    if config.MODEL_TYPE == "gla":
        config = config.replace(num_hidden_layers=max(4, config.num_hidden_layers))
        config = make_plan(config, layers="3", factor=3, init="lossless", op="grow_features")
        config = make_plan(config, layers="0", factor=2, init="reinit", op="merge_heads")
        config = make_plan(config, layers="1", factor=4, init="inherit", op="mix_heads")
        return make_plan(config, layers="2", factor=2, init="inherit", op="grow_state")
    config = make_plan(config, layers="0", factor=4, init="lossless", op="grow_features")
    if config.MODEL_TYPE != "mamba2":
        return make_plan(config, layers="1", factor=2, init="lossless", op="mix_heads")
    return make_plan(config, layers="1", factor=4, init="inherit")


def save_model(config: ModelConfig, directory: Path, *, seed: int = 0) -> Path:
    """Write a fresh fp32 model."""
    model = RecurrentLM(config)
    model.init_parameters(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("mix", "feature_gain")):
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))
    save_pretrained(model, directory)
    return directory


def make_shards(directory: Path, *, num_documents: int = 60) -> Path:
    """Write a few documents of uneven length as MDS shards."""
    texts = directory / "texts.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"document {i}: " + "abc def " * (i % 17)}) for i in range(num_documents)]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare([texts], directory / "shards", workers=1)
    return directory / "shards"


def write_run(path: Path, **sections: Any) -> Path:
    """Write a run's YAML: small defaults, overridden section by section."""
    values: dict[str, Any] = {
        "run_dir": str(path.parent / path.stem),
        "data": {"seq_len": 128, "packs_per_step": 4, "window_tokens": 2000},
        "train": {"num_steps": 6, "hang_minutes": 0},  # a loaded machine may be slow for longer than a collective waits
        "engine": {"name": "deepspeed", "precision": "fp32", "param_persistence_threshold": 0, "timeout_minutes": 1},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "metrics": {"log_every": 1},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """Return the environment of a CPU rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline"}


def command(world_size: int, *arguments: str) -> list[str]:
    """Return the command that starts the training script on ``world_size`` gloo ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    return [sys.executable, *launcher, str(REPOSITORY / "launch" / "train.py"), *arguments]


def run_training(world_size: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Start the training script on ``world_size`` gloo ranks and wait for it."""
    return subprocess.run(
        command(world_size, *arguments), capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )


def losses(run_dir: Path) -> list[float]:
    """Return the loss of every step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]

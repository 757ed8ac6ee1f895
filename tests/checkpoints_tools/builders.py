"""Tiny checkpoints, made with safetensors' own writer so that reader and writer are not tested against themselves."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints_tools.expand.expand import expand, prepare_expansion
from checkpoints_tools.expand.report import ExpansionReport
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.plan.options import PlanOptions
from statex_dist.checkpoint.dtypes import TORCH_NAMES
from statex_dist.checkpoint.formats.piece_io import blocks
from statex_dist.checkpoint.formats.tensor_io import TensorInfo, TensorSource
from statex_dist.models.registry import config_from_dict, family_of

GLA = {
    "model_type": "gla",
    "vocab_size": 37,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "intermediate_size": 48,
    "tie_word_embeddings": False,
    "architectures": ["GLAForCausalLM"],
}
MAMBA2 = {
    "model_type": "mamba2",
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_heads": 8,
    "head_dim": 4,
    "state_size": 6,
    "n_groups": 1,
    "use_bias": True,
    "tie_word_embeddings": True,
}
CONFIGS = {"gla": GLA, "mamba2": MAMBA2}


PLAN_KEYS = [field.name for field in dataclasses.fields(PlanOptions)]


def run_expand(source: Path, target: Path, *, progress=None, dtype: str | None = None, **options) -> ExpansionReport:
    """Expand as the command line does; ``options`` are those of the plan and of the writer."""
    plan = PlanOptions(**{key: value for key, value in options.items() if key in PLAN_KEYS})
    writing = {key: value for key, value in options.items() if key not in PLAN_KEYS}
    expansion = prepare_expansion(source, plan, dtype=dtype)
    return expand(expansion, target, WriteOptions(**writing), progress=progress)[0]


def info_of(name: str, tensor: torch.Tensor) -> TensorInfo:
    """Return a tensor's entry as our readers give it."""
    dtype = next(ours for ours, theirs in TORCH_NAMES.items() if f"torch.{theirs}" == str(tensor.dtype))
    return TensorInfo(name=name, shape=tuple(tensor.shape), dtype=dtype)


def read_tensor(source: TensorSource, name: str) -> torch.Tensor:
    """Return one tensor of a source."""
    info = source.info(name)
    tensor = torch.empty(info.shape, dtype=getattr(torch, TORCH_NAMES[info.dtype]))
    for block in blocks(source, name, max(info.numel, 1)):
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = block
    return tensor


def random_tensors(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return random values for every tensor that a config asks for."""
    config = config_from_dict(values)
    rng = torch.Generator().manual_seed(1)
    specs = family_of(config.MODEL_TYPE).tensors(config)
    return {name: torch.randn(spec.shape, generator=rng).to(dtype) for name, spec in specs.items()}


def write_model(
    directory: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, *, shards: int = 1
) -> dict[str, torch.Tensor]:
    """Write a Hugging Face directory and return its tensors; several shards are filled in reverse order of names."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(values) if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BytesTokenizer"}')
    (directory / "generation_config.json").write_text('{"max_new_tokens": 3}')
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return tensors
    names = sorted(tensors, reverse=True)
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    """Read every safetensors file of a directory with safetensors' own reader."""
    from safetensors.torch import load_file

    result: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        part = load_file(path)
        assert not set(part) & set(result)
        result.update(part)
    return result

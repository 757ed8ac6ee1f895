"""Model directories as other tools write them, good and bad, of one tiny model that transformers saved."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.data.tokenizer import BytesTokenizer

Make = Callable[[Path], object]
HEAD, TABLE = "lm_head.weight", "backbone.embeddings.weight"
NEW_MODEL = {
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 1,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "bos_token_id": 256,
}


@functools.cache
def state_dict(*, tied: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights that every good directory holds."""
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**NEW_MODEL, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def start(directory: Path, *, tied: bool = False, **changes: object) -> dict[str, torch.Tensor]:
    """Write config and tokenizer, and return the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    transformers.Mamba2Config(**NEW_MODEL, tie_word_embeddings=tied).save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    BytesTokenizer().save(directory)
    return dict(state_dict(tied=tied))


def saved(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **changes) -> Path:
    """Write one safetensors file."""
    found = start(directory, **changes)
    save_file(found if tensors is None else tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def indexed(directory: Path, tensors: dict[str, torch.Tensor] | None = None, *, safe: bool = True) -> Path:
    """Write shards and their index as the Hub's library does."""
    found = tensors or start(directory)
    save_torch_state_dict(found, directory, max_shard_size=8_000, safe_serialization=safe)
    return directory


def binary(directory: Path, content: object = None, **options) -> Path:
    """Write one ``pytorch_model.bin``."""
    torch.save(start(directory) if content is None else content, directory / "pytorch_model.bin", **options)
    return directory


def with_manifest(directory: Path, **options) -> Path:
    """Write a directory with a manifest by way of our tools."""
    reshard(saved(directory.with_name(f"{directory.name}-source")), directory, **options)
    return directory


def spoilt(directory: Path, place: int = 5000) -> None:
    """Flip one bit of the weights."""
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def changed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**state_dict(), name: tensor}


def _stale(directory: Path) -> None:
    indexed(directory)
    save_file(changed(TABLE, state_dict()[TABLE] + 1), directory / "model.safetensors", {"format": "pt"})


def _both_equal(directory: Path) -> None:
    indexed(directory)
    save_file(state_dict(), directory / "model.safetensors", {"format": "pt"})


def _bin_beside(directory: Path) -> None:
    saved(directory)
    torch.save(state_dict(), directory / "pytorch_model.bin")


def _other_bin_beside(directory: Path) -> None:
    saved(directory)
    torch.save(changed(TABLE, state_dict()[TABLE] + 1), directory / "pytorch_model.bin")


def _tied_head(directory: Path, offset: float) -> None:
    tensors = start(directory, tied=True)
    tensors[HEAD] = tensors[TABLE] + offset
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _hub(directory: Path, *, blobs: bool = True, main: bool = True) -> None:
    snapshot = saved(directory / "snapshots" / "0a1b")
    (directory / "blobs").mkdir()
    (directory / "refs").mkdir()
    shutil.move(snapshot / "model.safetensors", directory / "blobs" / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    saved(directory / "snapshots" / "2c3d")
    if main:
        (directory / "refs" / "main").write_text("0a1b")
    if not blobs:
        (directory / "blobs" / "f00d").unlink()


def _pipe(directory: Path, name: str) -> None:
    saved(directory)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)


def _cut_download(directory: Path) -> None:
    indexed(directory)
    shard = sorted(directory.glob("*.safetensors"))[0]
    folder = directory / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    shard.rename(folder / f"{shard.name}.incomplete")


def _dcp(directory: Path) -> None:
    dcp.save(start(directory), checkpoint_id=directory, no_dist=True)


def _iterations(directory: Path) -> None:
    _dcp(directory / "iter_0000007")
    (directory / "latest_checkpointed_iteration.txt").write_text("7")


def beside_zero(directory: Path, *, scale: float = 1.0) -> None:
    """Make a ZeRO-3 checkpoint with gathered weights beside it, which are those of the checkpoint times ``scale``."""
    reshard(saved(directory), directory.with_name("run"), to="zero3", world_size=2, dtype="fp32")
    if scale != 1.0:
        saved(directory, changed(HEAD, scale * state_dict()[HEAD]))
    shutil.copytree(directory.with_name("run"), directory, dirs_exist_ok=True)


def _wrong_place(directory: Path) -> None:
    indexed(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names, files = list(index["weight_map"]), sorted(set(index["weight_map"].values()))
    index["weight_map"][names[0]] = next(file for file in files if file != index["weight_map"][names[0]])
    path.write_text(json.dumps(index))


EXTRA = {
    "backbone.layers.0.rotary.inv_freq": torch.ones(4),
    "backbone.position_ids": torch.arange(9)[None],
    "backbone.empty": torch.zeros(0),
}

GOOD: dict[str, Make] = {
    "safetensors": saved,
    "index": indexed,
    "both, equal": _both_equal,
    "an equal .bin beside": _bin_beside,
    "bin": binary,
    "bin index": lambda d: indexed(d, safe=False),
    "nested bin": lambda d: binary(d, {"state_dict": start(d), "epoch": 3, "scheduler": None}),
    "bin with an int and None": lambda d: binary(d, {**start(d), "steps": 7, "nothing": None}),
    "transposed bin": lambda d: binary(d, changed(TABLE, start(d)[TABLE].T.contiguous().T)),
    "torch.compile's prefix": lambda d: saved(d, {f"_orig_mod.{n}": t for n, t in state_dict().items()}),
    "DDP's prefix": lambda d: binary(d, {f"module.{n}": t for n, t in start(d).items()}),
    "a prefix of some library": lambda d: saved(d, {f"base_model.model.{n}": t for n, t in state_dict().items()}),
    "two prefixes in a row": lambda d: saved(d, {f"module._orig_mod.{n}": t for n, t in state_dict().items()}),
    "extra buffers": lambda d: saved(d, {**state_dict(), **EXTRA}),
    "a manifest": with_manifest,
    "shards for ranks": lambda d: with_manifest(d, to="tp", tp=2),
    "megatron": lambda d: with_manifest(d, to="megatron"),
    "zero3": lambda d: with_manifest(d, to="zero3", world_size=2, dtype="fp32"),
    "DCP": _dcp,
    "a hub cache": _hub,
    "megatron iterations": _iterations,
}

BAD: dict[str, tuple[Make, str]] = {
    "a stale single file": (_stale, "model.safetensors.index.json and model.safetensors hold different weights"),
    "another .bin": (_other_bin_beside, "model.safetensors and pytorch_model.bin hold different weights"),
    "a tied head of its own": (lambda d: _tied_head(d, 1.0), "config.json ties lm_head.weight"),
    "integers": (lambda d: saved(d, changed(HEAD, torch.ones(258, 16).to(torch.int8))), "has dtype int8: integer or"),
    "a quantised model": (
        lambda d: saved(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        "config.json has quantization_config (gptq)",
    ),
    "placeholders": (lambda d: saved(d, {n: torch.zeros(0) for n in state_dict()}), "is an empty placeholder"),
    "one tensor less": (
        lambda d: saved(d, {n: t for n, t in state_dict().items() if n != HEAD}),
        "lacks tensor 'lm_head.weight'",
    ),
    "one more": (lambda d: saved(d, changed("stranger", torch.ones(3))), "holds tensor 'stranger', unknown to"),
    "another shape": (lambda d: saved(d, changed(HEAD, torch.ones(258, 15))), "has shape (258, 15); config.json asks"),
    "a prefix of some names": (
        lambda d: saved(d, {("" if n == HEAD else "module.") + n: t for n, t in state_dict().items()}),
        "lacks tensors",
    ),
    "torch's legacy format": (
        lambda d: binary(d, _use_new_zipfile_serialization=False),
        "is in torch's format from before version 1.6",
    ),
    "links to nothing": (lambda d: _hub(d, blobs=False), "model.safetensors is a link to ../../blobs/f00d"),
    "a pipe for weights": (lambda d: _pipe(d, "model.safetensors"), "model.safetensors is not a regular file"),
    "a pipe for a config": (lambda d: _pipe(d, "config.json"), "config.json is not a regular file"),
    "several snapshots": (lambda d: _hub(d, main=False), "it holds snapshots/0a1b, snapshots/2c3d: give one"),
    "a download that was cut": (_cut_download, "its download is not complete"),
    "a wrong index": (_wrong_place, f"lacks tensor '{TABLE}' of model.safetensors.index.json"),
    "weights of another model beside ZeRO": (lambda d: beside_zero(d, scale=1.5), "which are not the same model"),
    "a pointer of Git LFS": (
        lambda d: saved(d) and (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git LFS",
    ),
    "no state dict": (lambda d: start(d) and binary(d, [1, 2]), "holds no state dict"),
    "two state dicts": (
        lambda d: binary(d, {"model": start(d), "state_dict": start(d)}),
        "holds several state dicts, under 'state_dict' and 'model'",
    ),
}


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")

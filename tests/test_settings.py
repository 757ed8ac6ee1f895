"""Every setting is read by something, documented, and every option that a document names exists."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.cli import build_parser
from launch.supervise import build_parser as build_supervise_parser
from statex_dist.config import _dataclass_of, parse_config
from statex_dist.engine.config import EngineConfig, deepspeed_config
from statex_dist.errors import DataError
from statex_dist.models.registry import config_from_dict
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from tests.runs import GLA, REPOSITORY, make_shards, save_model, write_run

DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def sections(cls: type, path: str = "") -> Iterator[tuple[type, str]]:
    """Yield every dataclass of a configuration with its dotted path, those in containers too."""
    yield cls, path
    for name, hint in typing.get_type_hints(cls).items():
        parts = [hint, *typing.get_args(hint), *(a for arg in typing.get_args(hint) for a in typing.get_args(arg))]
        for found in dict.fromkeys(filter(None, map(_dataclass_of, parts))):
            yield from sections(found, f"{path}.{name}".lstrip("."))


SECTIONS = list(sections(RunConfig))
FIELDS = {(cls, field.name) for cls, _ in SECTIONS for field in dataclasses.fields(cls)}
GENERIC = {str(REPOSITORY / "statex_dist" / "config.py"), dataclasses.__file__, "<string>"}
"""Code that reads fields whatever they mean: dumps, checks for finite numbers, methods that dataclasses write."""


ONE_LAYER = {**GLA, "num_hidden_layers": 1}


class Reads:
    """Records which fields of some dataclasses are read, but for their own validation and generic dumps."""

    def __init__(self, patch: pytest.MonkeyPatch, classes: list[type]):
        self.found: set[tuple[type, str]] = set()
        for cls in classes:
            names = {field.name for field in dataclasses.fields(cls)}
            patch.setattr(cls, "__getattribute__", self._recorder(cls, names))

    def _recorder(self, cls: type, names: set[str]):
        def read(instance, name: str):
            if name in names and (cls, name) not in self.found and self._counts():
                self.found.add((cls, name))
            return object.__getattribute__(instance, name)

        return read

    @staticmethod
    def _counts() -> bool:
        frame = sys._getframe(2)
        if frame.f_code.co_filename in GENERIC or "site-packages" in frame.f_code.co_filename:
            return False
        while frame is not None:
            if frame.f_code.co_name == "__post_init__":
                return False
            frame = frame.f_back
        return True


def test_the_record_tells_reading_from_validation_and_dumps(monkeypatch):
    @dataclasses.dataclass
    class Example:
        read: int = 1
        validated: int = 2
        dumped: int = 3

        def __post_init__(self) -> None:
            assert self.validated

    reads = Reads(monkeypatch, [Example])
    example = Example()
    dataclasses.asdict(example)
    repr(example)
    assert not reads.found
    assert example.read == 1
    assert reads.found == {(Example, "read")}


def test_every_setting_is_read(tmp_path: Path, monkeypatch):
    """By runs that turn on what reads them, in this process, and DeepSpeed's configuration."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    shards = make_shards(tmp_path / "data", num_documents=30)
    model = save_model(config_from_dict(ONE_LAYER), tmp_path / "model")
    damaged = make_shards(tmp_path / "damaged", num_documents=2)
    for shard in damaged.glob("*.mds"):
        shard.unlink()
    reads = Reads(monkeypatch, [cls for cls, _ in SECTIONS])
    small = {"seq_len": 64, "packs_per_step": 2}
    held = {"held_out": 0.3, "every": 1, "tokens": 64, "keep_best": True}
    other = make_shards(tmp_path / "other", num_documents=8)
    mixture = {
        "sources": {"a": {"path": str(shards), "weight": 2}, "b": {"path": str(shards)}},
        "curriculum": [{"from_step": 1, "seq_len": 32, "weights": {"a": 1, "b": 1}}],
        "cache_limit": "1GB",
        **small,
    }
    for name, changes in {
        "one": {
            "model": {"config": ONE_LAYER},
            "data": mixture,
            "schedule": {"name": "wsd", "warmup_steps": 0, "decay_steps": 1},
            "profile": {"steps": "1:1"},
            "metrics": {"wandb_project": "settings"},
            "eval": held,
        },
        "two": {
            "model": {"path": str(model)},
            "data": {"path": str(shards), **small},
            "train": {"save_every": 1},
            "optimizer": {"lr": 1e30},  # a bad step
            "eval": {"data": str(other), "tokens": 64},
        },
        "three": {"model": {"path": str(model)}, "data": {"path": str(damaged), "skip_corrupt": True, **small}},
    }.items():
        changes["train"] = {"num_steps": 2, **changes.get("train", {})}
        changes.setdefault("schedule", {"warmup_steps": 0})
        file = write_run(tmp_path / f"{name}.yaml", engine={"name": "plain"}, **changes)
        config = parse_config(RunConfig, ["--config", str(file)], prog="train.py")
        if name == "three":
            with pytest.raises(DataError, match="had a target"):
                train(config)
        else:
            assert train(config)
    offloaded = EngineConfig(offload_parameters="nvme", nvme_path=str(tmp_path))
    deepspeed_config(offloaded, gradient_clipping=1.0, accumulation_steps=1)
    unread = sorted(f"{cls.__name__}.{name}" for cls, name in FIELDS - reads.found)
    assert not unread, "settings without an effect"
    assert len(FIELDS) > 80


# ---- documents

NAMES = {path: {f.name for f in dataclasses.fields(cls)} for cls, path in SECTIONS}
FILES = ("md", "py", "sh", "json", "jsonl", "yaml", "safetensors", "pt")
NO_SETTINGS = {
    *("engine.checkpoint_engine", "model.mitigation", "model.eval", "model.tokenizer"),  # attributes in Python
    *("model.norm", "model.model", "model.embed_tokens", "model.layers"),  # tensors
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_settings_named_in_documents_exist(path: Path):
    top = "|".join(name for name in NAMES[""] if name in NAMES)
    for found in re.finditer(rf"(?<![\w/.-])(?:--)?({top})\.([a-z_]+)\b", path.read_text(encoding="utf-8")):
        section, name = found.groups()
        if name in FILES or f"{section}.{name}" in NO_SETTINGS:
            continue
        assert name in NAMES[section], f"{path.name}: {found[0]}"


def test_every_setting_is_in_the_table():
    """Of docs/training.md: the row of its section, by name; those of nested lists in docs/data.md."""
    training = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", training, flags=re.MULTILINE))
    rows |= {"run_dir": rows.get("run_dir", ""), "data.sources": "path weight", "data.curriculum": ""}
    for section, names in NAMES.items():
        if section.startswith("data."):
            text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
        else:
            text = rows[section] if section else training
        for name in names:
            assert re.search(rf"\b{name}\b", text), f"{section}.{name} is not documented"


FOREIGN = {
    "deepspeed": "num_gpus num_nodes hostfile master_addr master_port node_rank no_ssh num_accelerators module "
    "no_local_rank enable_each_rank_log include exclude launcher force_multi no_python",
    "torchrun": "nproc_per_node nnodes standalone master-port rdzv_backend rdzv_endpoint rdzv_id max_restarts "
    "rdzv-backend rdzv-endpoint rdzv-id rdzv-conf max-restarts local-addr log-dir tee",
    "docker": "gpus shm-size network user build-arg entrypoint rm volume name secret restart",
    "slurm": "array dependency wait wrap parsable job-name jobs nodes time signal requeue gpus-per-node cpus-per-task "
    "export ntasks-per-node nodelist duplicates batch no-kill ntasks",
    "kubectl": "grace-period namespace previous",
    "pip and hf": "no-deps no-build-isolation force-reinstall local-dir upgrade index-url extra-index-url bootstrap",
    "Hugging Face's Trainer": "safe_serialization",
}
FOREIGN_OPTIONS = {f"--{name}" for names in FOREIGN.values() for name in names.split()}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All options of a parser and its subcommands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                found |= options_of(sub)
    return found


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    ours = options_of(build_parser()) | options_of(build_supervise_parser()) | FOREIGN_OPTIONS
    ours |= {f"--{section}.{name}" if section else f"--{name}" for section, names in NAMES.items() for name in names}
    for file in (REPOSITORY / "benchmarks").rglob("*.py"):
        ours |= set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", file.read_text(encoding="utf-8")))
    for file in (REPOSITORY / "configs" / "experiments").glob("*.yaml"):
        ours |= {f"--{key}" for key in yaml.safe_load(file.read_text(encoding="utf-8"))}
    return ours | {"--config", "--print_config", "--help", "--section.key"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_named_in_documents_exist(path: Path, known_options: set[str]):
    text = re.sub(r"--[\w ]+-->", "", path.read_text(encoding="utf-8"))  # arrows with a word in them
    for found in re.finditer(r"(?<![\w-])--[a-z][a-z0-9_.-]*[a-z0-9](?![\w-])", text):
        option = found[0]
        shortest = option if option in known_options else option.rsplit(".", 1)[0]  # --model.config.vocab_size
        if option.startswith("--engine.deepspeed."):
            continue  # a free mapping, of any depth
        assert shortest in known_options, f"{path.name}: {option}"

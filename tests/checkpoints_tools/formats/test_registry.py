"""The registry of layouts: what a command imports, and a layout that is added from outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from inspect import getsource as inspect_source

import pytest
import torch

from checkpoints_tools.formats import targets
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.inspect import inspect
from checkpoints_tools.verify.verify import verify_alone, verify_same
from statex_dist.checkpoint.formats import registry
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import GLA, read_tensor, write_model
from tests.checkpoints_tools.toy import layout as toy
from tests.runs import REPOSITORY

OTHERS = {
    "torch_archive": (".formats.torch_archive",),
    "zero3": (".zero3",),
    "dcp": (".dcp",),
    "tensor_parallel": (".tensor_parallel",),
}


MOST_MODULES = 90
"""That a reader of one command may have to open, packages included."""


def loaded(*argv: str) -> set[str]:
    """Run a command in a new process; return the layouts other than safetensors of which modules were imported."""
    script = (
        "import sys\nfrom launch.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "print('LOADED', *(n for n in sys.modules if n.startswith(('checkpoints_tools', 'launch', 'statex_dist'))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *argv], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    names = run.stdout.split("LOADED")[1].split()
    assert "statex_dist.checkpoint.formats.safetensors" in names
    assert len(names) <= MOST_MODULES
    assert {name for name in names if name.startswith("launch.cmd_")} == {f"launch.cmd_{argv[0]}"}
    return {kind for kind, marks in OTHERS.items() if any(mark in name for mark in marks for name in names)}


def test_a_command_imports_only_the_layouts_that_it_uses(tmp_path):
    write_model(tmp_path / "hf", GLA)
    source = ["--source", str(tmp_path / "hf"), "--target"]
    assert loaded("inspect", str(tmp_path / "hf")) == set()
    assert loaded("expand", *source, str(tmp_path / "grown"), "--layers", "1") == set()
    assert loaded("reshard", *source, str(tmp_path / "out"), "--to", "hf") == set()
    assert loaded("reshard", *source, str(tmp_path / "shards"), "--to", "tp", "--tp", "2") == {"tensor_parallel"}
    zero3 = loaded("reshard", *source, str(tmp_path / "run"), "--to", "zero3", "--world-size", "2")
    assert zero3 == {"torch_archive", "zero3"}


@pytest.mark.parametrize("row", registry.layouts(), ids=lambda row: row.name)
def test_every_row_names_a_class_that_does_what_it_says(row):
    layout = row.load()
    assert issubclass(layout, registry.Layout)
    own = {name for cls in layout.__mro__[: layout.__mro__.index(registry.Layout)] for name in vars(cls)}
    assert "ways" in own if row.is_hub else {"detect", "read"} <= own
    assert not (row.grown or row.options) or row.written
    assert not hasattr(layout, "plan_target"), "the layouts of statex_dist are read there, and written by the tools"
    if row.written:
        written = targets.written_class(row)
        assert issubclass(written, layout)
        assert callable(written.plan_target)


@pytest.fixture
def toy_layout(monkeypatch):
    """The registry with one more layout, for one test."""
    monkeypatch.setattr(registry, "_LAYOUTS", dict(registry._LAYOUTS))
    toy.add()


def test_a_layout_is_one_folder_and_one_line_of_the_registry():
    line = ast.parse(inspect_source(toy.add)).body[0].body[1:]
    assert [ast.unparse(statement).partition("(")[0] for statement in line] == ["add_layout"]
    assert {"detect", "read", "plan_target"} <= vars(toy.Toy).keys()


def test_a_layout_from_outside_is_written_and_read(tmp_path, toy_layout):
    tensors = write_model(tmp_path / "hf", GLA)
    summary = reshard(tmp_path / "hf", tmp_path / "toy", to="toy")
    assert (summary.to, summary.notes, summary.tensors) == ("toy", ["a toy"], len(tensors))
    opened = open_source(tmp_path / "toy")
    assert opened.facts.kind == "toy"
    assert opened.facts.verified
    assert set(opened.keys()) == set(tensors)
    assert all(torch.equal(read_tensor(opened, name), tensor) for name, tensor in tensors.items())
    assert reshard(tmp_path / "toy", tmp_path / "back").kind == "toy"
    assert verify_same(tmp_path / "hf", tmp_path / "back").ok
    assert reshard(tmp_path / "toy", tmp_path / "half", to="toy", dtype="bf16").weight_bytes * 2 == summary.weight_bytes
    assert inspect(tmp_path / "toy").problem is None
    assert verify_alone(tmp_path / "toy").ok


def test_a_layout_from_outside_has_the_checks_of_the_others(tmp_path, toy_layout):
    write_model(tmp_path / "hf", GLA)
    for option in ({"tp": 2}, {"world_size": 2}, {"tokenizer": "bytes"}):
        with pytest.raises(ConfigError, match="not toy"):
            reshard(tmp_path / "hf", tmp_path / "toy", to="toy", **option)
    reshard(tmp_path / "hf", tmp_path / "toy", to="toy")
    values = bytearray((tmp_path / "toy" / toy.VALUES).read_bytes())
    values[100] ^= 1
    (tmp_path / "toy" / toy.VALUES).write_bytes(values)
    with pytest.raises(CheckpointError, match="digest"):
        reshard(tmp_path / "toy", tmp_path / "back")
    (tmp_path / "toy" / "model.safetensors").write_bytes((tmp_path / "hf" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds both model\.safetensors and toy\.json"):
        reshard(tmp_path / "toy", tmp_path / "back")


def test_without_registration_it_is_unknown(tmp_path):
    write_model(tmp_path / "hf", GLA)
    with pytest.raises(ConfigError, match="allowed: hf, zero3, tp, megatron"):
        reshard(tmp_path / "hf", tmp_path / "toy", to="toy")

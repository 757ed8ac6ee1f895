"""Resharding of runs as our trainer writes them, on synthetic files; DeepSpeed's own are in the neighbouring file."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic_zero3 import write_zero3
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_alone, verify_same
from statex_dist.checkpoint.formats.zero3.layout import FlatLayout, partition_size
from statex_dist.checkpoint.manifest import Manifest, record_file
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import GLA, MAMBA2, load_all, random_tensors, run_expand, write_model
from tests.checkpoints_tools.verify.test_integrity import damage


def write_run(run: Path, values, step: int, *, world_size: int = 3, manifest: bool = True, tensors=None):
    """Write one tag of a run and return its tensors."""
    tag = run / "checkpoints" / f"global_step{step}"
    tensors = random_tensors(values) if tensors is None else tensors
    tensors = {name: tensor + step for name, tensor in tensors.items()}
    write_zero3(tag, tensors, world_size, sub_group_size=500)
    (tag / "model").mkdir()
    (tag / "model/config.json").write_text(json.dumps(values))
    (tag / "model/tokenizer_config.json").write_text("{}")
    if manifest:
        paths = [path for path in tag.rglob("*") if path.is_file()]
        files = {str(path.relative_to(tag)): record_file(path) for path in paths}
        Manifest(kind="zero3", files=files, info={"step": step}).write(tag)
    return tensors


def test_newest_complete_tag_of_a_run(tmp_path):
    write_run(tmp_path / "run", MAMBA2, 9)
    expected = write_run(tmp_path / "run", MAMBA2, 10)
    write_run(tmp_path / "run", MAMBA2, 11, manifest=False)
    summary = reshard(tmp_path / "run", tmp_path / "out", options=WriteOptions(max_shard_size=4000))
    assert summary.verified
    assert summary.source.endswith("global_step10")
    written = load_all(tmp_path / "out")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert (tmp_path / "out/tokenizer_config.json").exists()
    manifest = Manifest.read(tmp_path / "out")
    manifest.verify(tmp_path / "out")
    assert (manifest.kind, manifest.info["step"]) == ("hf", 1)
    again = reshard(tmp_path / "out", tmp_path / "bf16", dtype="bf16")
    assert again.kind == "hf"
    assert all(torch.equal(t, expected[n].bfloat16()) for n, t in load_all(tmp_path / "bf16").items())


def test_expanding_a_training_checkpoint(tmp_path):
    write_run(tmp_path / "run", GLA, 4)
    run_expand(tmp_path / "run", tmp_path / "out", factor=2, layers="1", init="inherit")
    assert load_all(tmp_path / "out")["model.layers.1.attn.g_norm_swish_gate.weight"].shape == (16,)


def test_plain_checkpoint(tmp_path):
    tag = tmp_path / "run/checkpoints/global_step3"
    (tag / "model").mkdir(parents=True)
    (tag / "model/config.json").write_text(json.dumps(MAMBA2))
    tensors = random_tensors(MAMBA2)
    tied = {**tensors, "lm_head.weight": tensors["backbone.embeddings.weight"]}
    state = {"module": tied, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "rng": torch.get_rng_state()}
    torch.save(state, tag / "plain_state.pt")
    (tag.parent / "latest").write_text("global_step3\n")
    assert open_source(tmp_path / "run").aliases == {"lm_head.weight": "backbone.embeddings.weight"}
    reshard(tmp_path / "run", tmp_path / "out")
    written = load_all(tmp_path / "out")
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_names_and_shapes_must_be_those_of_the_config(tmp_path):
    tensors = random_tensors(GLA)
    write_run(tmp_path / "a", GLA, 1, tensors={n: t for n, t in tensors.items() if n != "lm_head.weight"})
    write_run(tmp_path / "b", GLA, 1, tensors={**tensors, "model.extra": torch.zeros(2)})
    write_run(tmp_path / "c", GLA, 1, tensors={**tensors, "model.norm.weight": torch.zeros(31)})
    for run, message in (("a", "lacks tensor 'lm_head.weight'"), ("b", "'model.extra'"), ("c", "has shape")):
        with pytest.raises(CheckpointError, match=message):
            reshard(tmp_path / run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_wrong_options_and_markers(tmp_path):
    write_run(tmp_path / "run", GLA, 1, manifest=False)
    for options, message in (
        ({"to": "gguf"}, "--to 'gguf'.*hf, zero3, tp, megatron"),
        ({"dtype": "fp8"}, "fp8"),
        ({"to": "tp"}, "--to tp needs --tp"),
        ({"to": "tp", "tp": 3}, ": 3 tensor-parallel ranks"),
        ({"tp": 2}, "--tp 2.*--to tp, not hf"),
        ({"world_size": 2}, "--world-size 2.*--to zero3, not hf"),
        ({"to": "zero3", "world_size": 0}, "--world-size .* 0$"),
        ({"to": "zero3", "dtype": "bf16"}, "--dtype"),
    ):
        with pytest.raises(ConfigError, match=message):
            reshard(tmp_path / "run", tmp_path / "out", **options)
    latest = tmp_path / "run/checkpoints/latest"
    for text, message in (("global_step7", "does not exist"), ("../..", "not a tag"), ("", "not a tag")):
        latest.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            reshard(tmp_path / "run", tmp_path / "out")
    latest.unlink()
    with pytest.raises(CheckpointError, match=str(latest.parent)):
        reshard(tmp_path / "run", tmp_path / "out")


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=3).map(tuple), min_size=1, max_size=8),
    world_size=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
def test_cut_then_join_is_the_identity(shapes, world_size, cuts):
    names = [f"p{i}" for i in range(len(shapes))]
    tensors = {n: torch.randn(torch.Size(s)) for n, s in zip(names, shapes, strict=True)}
    ranks = []
    for rank in range(world_size):
        parts = []
        for tensor in tensors.values():
            size = partition_size(tensor.numel(), world_size)
            piece = tensor.reshape(-1)[rank * size : (rank + 1) * size]
            parts.append(torch.cat([piece, torch.full((size - piece.numel(),), torch.nan)]))
        ranks.append(torch.cat(parts))
    total = ranks[0].numel()
    borders = sorted({0, total, *(cut for cut in cuts if cut < total)})
    sizes = [b - a for a, b in itertools.pairwise(borders)]
    layout = FlatLayout.build(dict(zip(names, shapes, strict=True)), sizes, world_size, where=Path("x"))
    for name, tensor in tensors.items():
        out = torch.full((tensor.numel(),), torch.inf)
        for p in layout.runs(name):
            group = ranks[p.rank].split(sizes)[p.group]
            assert torch.isinf(out[p.target : p.target + p.numel]).all()
            out[p.target : p.target + p.numel] = group[p.start : p.start + p.numel]
        assert torch.equal(out.view(tensor.shape), tensor)


_MEASURED = """
import sys
from pathlib import Path
from checkpoints_tools.expand.expand import expand
from checkpoints_tools.expand.expand import prepare_expansion
from checkpoints_tools.plan.options import PlanOptions
from checkpoints_tools.reshard.reshard import reshard

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

before = status("VmRSS")
if sys.argv[1] == "reshard":
    reshard(sys.argv[2], sys.argv[3])
else:
    expand(prepare_expansion(sys.argv[2], PlanOptions(factor=2)), sys.argv[3])
assert "torch" not in sys.modules, "the tools need no torch"
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_bounded_by_a_tensor_not_by_the_model(tmp_path):
    values = {**GLA, "vocab_size": 4000, "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048}
    tensors = write_model(tmp_path / "hf", values)
    write_zero3(tmp_path / "zero/global_step1", tensors, 2, moments=False)
    model = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    assert model > 190
    for tool, source in (("reshard", "zero"), ("expand", "hf")):
        command = [sys.executable, "-c", _MEASURED, tool, str(tmp_path / source), str(tmp_path / tool)]
        grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert grown < model / 2, f"{tool}: {grown:.0f} MiB on top of the imports for a model of {model:.0f} MiB"


@pytest.mark.parametrize("model_type", ["llama", [], None])
def test_models_of_others_keep_their_tensors(tmp_path, model_type):
    tensors = write_model(tmp_path / "in", GLA)
    (tmp_path / "in/config.json").write_text(json.dumps({"model_type": model_type, "hidden": 1}))
    reshard(tmp_path / "in", tmp_path / "out", dtype="fp16")
    assert {n: t.dtype for n, t in load_all(tmp_path / "out").items()} == dict.fromkeys(tensors, torch.float16)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float16"


def test_names_with_colons_and_names_like_states(tmp_path):
    """Of a foreign model any name may come: ``exp_avg:x`` is a weight, not what Adam remembers of ``x``."""
    tensors = {"x": torch.randn(3), "exp_avg:x": torch.randn(4), "a:b/c": torch.randn(2, 2), "ü": torch.randn(1)}
    write_zero3(tmp_path / "run/global_step1", tensors, 2)
    for name, options in (("hf", {}), ("zero", {"to": "zero3", "world_size": 3}), ("mega", {"to": "megatron"})):
        reshard(tmp_path / "run", tmp_path / name, **options)
        assert verify_same(tmp_path / "run", tmp_path / name).ok
        assert verify_alone(tmp_path / name).ok
    manifest = Manifest.read(tmp_path / "zero/global_step1")
    assert manifest.tensors.keys() == tensors.keys() == manifest.states["exp_avg"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2, kind 'hf'; only 1 is known"),
        (lambda m: m.update(kind=3), "version 1, kind 3"),
        (lambda m: m.update(info=[]), "info is not a mapping"),
        (lambda m: m.update(files={}), "is not one of the files that MANIFEST.json lists"),
        (lambda m: m["files"].update({"x" * 5000: {"size": 1, "xxh3_128": "0"}}), "cannot be read: File name too long"),
        (lambda m: m["files"].update({"../x": {"size": 1, "xxh3_128": "0"}}), "names a file outside the directory"),
        (lambda m: m["tensors"].pop("lm_head.weight"), None),
        (lambda m: m["tensors"]["lm_head.weight"].update(shape=[1]), "tensor 'lm_head.weight' has dtype F32 and shape"),
        (lambda m: m["tensors"].update(ghost=m["tensors"]["lm_head.weight"]), "tensor 'ghost' is missing"),
    ],
)
def test_manifests_that_say_something_else(tmp_path, change, message):
    write_model(tmp_path / "in", GLA)
    reshard(tmp_path / "in", tmp_path / "out")
    content = json.loads((tmp_path / "out/MANIFEST.json").read_text())
    change(content)
    (tmp_path / "out/MANIFEST.json").write_text(json.dumps(content))
    if message is None:
        assert verify_alone(tmp_path / "out").ok  # the file's own digest covers it
        return
    assert re.search(message, damage(tmp_path / "out")[0])

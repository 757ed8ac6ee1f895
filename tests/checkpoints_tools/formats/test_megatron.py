"""Megatron and torch DCP checkpoints: ours as torch and megatron-core read them, theirs as we do, and damaged ones."""

import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from checkpoints_tools.formats.dcp import lay_out, metadata_bytes
from checkpoints_tools.formats.targets import TargetRequest, find_target, plan_target
from checkpoints_tools.io.target import write_target
from checkpoints_tools.io.target_writer import WriteOptions
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.dcp.format import read_metadata
from statex_dist.checkpoint.formats.dcp.reader import CHECKPOINT_CONFIG, Dcp
from statex_dist.checkpoint.formats.safetensors import SafetensorsSource
from statex_dist.checkpoint.formats.tensor_io import TensorInfo
from statex_dist.errors import CheckpointError
from statex_dist.models.config import CONFIG_NAME
from statex_dist.models.megatron import has_megatron_names, megatron_notes, name_map
from statex_dist.models.registry import FAMILIES, config_from_dict, family_of
from statex_dist.models.source import interpret, open_source
from tests.checkpoints_tools.builders import (
    GLA,
    MAMBA2,
    load_all,
    random_tensors,
    read_tensor,
    run_expand,
    write_model,
)
from tests.distributed_test import run_distributed_test
from tests.models.tiny import CONFIGS
from tests.raising import raises

GROUPED = {**MAMBA2, "n_groups": 2, "use_bias": False, "tie_word_embeddings": False, "vocab_size": 38}


def request_of(source, jobs, values, config, max_shard_size: int) -> TargetRequest:
    """What ``statex reshard`` asks a layout for, with ``config.json`` as it is and no other documents."""
    documents = {} if values is None else {CONFIG_NAME: values}
    return TargetRequest(
        source=source,
        values=values,
        config=config,
        names=[job.info.name for job in jobs],
        dtype=None,
        info={},
        write=WriteOptions(max_shard_size=max_shard_size),
        export=lambda jobs: (lambda written: documents, []),
        grown=jobs,
    )


def convert(source, target: Path, to: str = "megatron", max_shard_size: int = 4000, **options) -> None:
    """Write all of a source in another layout, as ``statex reshard`` does."""
    opened = interpret(source)
    jobs = [TensorJob.copy(source.info(name)) for name in opened.names]
    request = request_of(source, jobs, opened.values, opened.config, max_shard_size)
    write_target(target, source, plan_target(find_target(to), request).plan, WriteOptions(**options))


def to_megatron(model: Path, target: Path, **options) -> Path:
    """Write a Hugging Face directory as a Megatron checkpoint."""
    convert(SafetensorsSource(model), target, **options)
    return target


def read_everything(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint as we read it."""
    source = open_source(directory)
    return {name: read_tensor(source, name) for name in source.keys()}  # noqa: SIM118 - not a mapping


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(x.dtype == b[n].dtype and torch.equal(x, b[n]) for n, x in a.items())


def hf_parts(config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a Mamba2 model's tensors by Megatron's names, cut by hand."""
    inner, grouped, heads = config.inner_size, config.n_groups * config.state_size, config.num_heads
    rows = {
        "in_proj": {"z": inner, "x": inner, "B": grouped, "C": grouped, "dt": heads},
        "conv1d": {"x": inner, "B": grouped, "C": grouped},
    }
    found = {
        "embedding.word_embeddings.weight": tensors["backbone.embeddings.weight"],
        "decoder.final_norm.weight": tensors["backbone.norm_f.weight"],
    }
    if "lm_head.weight" in tensors:
        found["output_layer.weight"] = tensors["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"decoder.layers.{layer}.mixer.", f"backbone.layers.{layer}.mixer."
        found[theirs + "in_proj.layer_norm_weight"] = tensors[f"backbone.layers.{layer}.norm.weight"]
        for name in [name.removeprefix(ours) for name in tensors if name.startswith(ours)]:
            parts = rows.get(name.split(".")[0])
            if parts is None:
                found[theirs + name] = tensors[ours + name]
            else:
                cut = tensors[ours + name].split(list(parts.values()))
                found |= {f"{theirs}{name}.{part}": tensor for part, tensor in zip(parts, cut, strict=True)}
    return found


@pytest.mark.parametrize("values", [GLA, MAMBA2, GROUPED], ids=["gla", "mamba2", "mamba2-2groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip(tmp_path, values, dtype):
    tensors = {n: t.to(dtype) for n, t in write_model(tmp_path / "hf", values).items()}
    write_model(tmp_path / "hf", values, tensors, shards=2)
    (tmp_path / "hf/model.safetensors").unlink()
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert Dcp.detect(tmp_path / "megatron")
    assert not Dcp.detect(tmp_path / "hf")
    assert len(list((tmp_path / "megatron").glob("__0_*.distcp"))) > 2
    source = open_source(tmp_path / "megatron")
    assert source.keys() == list(family_of(values["model_type"]).tensors(config_from_dict(values)))
    assert (source.facts.kind, source.ignored) == ("megatron", ())
    convert(source, tmp_path / "back", "hf")
    assert same(load_all(tmp_path / "back"), tensors)
    assert (tmp_path / "back/tokenizer_config.json").exists()


def test_expanded_models(tmp_path):
    for name, values in (("gla", GLA), ("mamba2", GROUPED)):
        write_model(tmp_path / name, values)
        run_expand(tmp_path / name, tmp_path / f"{name}-expanded", factor=2, layers="1", init="reinit")
        to_megatron(tmp_path / f"{name}-expanded", tmp_path / f"{name}-megatron")
        convert(open_source(tmp_path / f"{name}-megatron"), tmp_path / f"{name}-back", "hf")
        assert same(load_all(tmp_path / f"{name}-back"), load_all(tmp_path / f"{name}-expanded"))


def odd_tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.randn(3, 5, 7).half(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(-4, 5),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(256).to(torch.uint8),
        "small": torch.tensor([1, -2], dtype=torch.int16),
    }


def test_models_of_others_keep_their_names(tmp_path):
    tensors = write_model(tmp_path / "hf", {"model_type": "unheard-of"}, odd_tensors())
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert same(read_everything(tmp_path / "megatron"), tensors)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "megatron", no_dist=True)
    assert same(loaded, tensors)


def test_without_a_config(tmp_path):
    save_file(odd_tensors(), tmp_path / "model.safetensors")
    to_megatron(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    assert open_source(tmp_path / "out").facts.model_dir is None


STATE_SPACES = {
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 40,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 6},
    "tie_embeddings": False,
}
BAMBA = {
    **{"model_type": "bamba", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "mamba_n_heads": 4},
    **{"mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 1, "attn_layer_indices": [1]},
}
FEATURES = {"version": 1, "layers": [{"layer": 1, "op": "grow_features", "factor": 2, "init": "lossless"}]}
FEATURES["layers"][0]["features"] = {"rolls": [2]}
EVERY = {name: config.to_dict() for name, config in CONFIGS.items()} | {"state_spaces": STATE_SPACES, "bamba": BAMBA}
EVERY["state_spaces-features"] = {**STATE_SPACES, "statex": FEATURES}


@pytest.mark.parametrize("name", EVERY)
def test_every_family(tmp_path, name):
    config = config_from_dict(EVERY[name])
    further = {"model.layers.1.self_attn.q_proj.weight": torch.randn(16, 16)} if name == "bamba" else {}
    tensors = write_model(tmp_path / "hf", EVERY[name], {**random_tensors(EVERY[name]), **further})
    if has_megatron_names(config) and any("feature_gain" in tensor for tensor in tensors):
        with raises(CheckpointError, "layer 1", "grow_features", "hf, zero3 or tp"):
            to_megatron(tmp_path / "hf", tmp_path / "megatron")
        return
    stored = read_metadata(to_megatron(tmp_path / "hf", tmp_path / "megatron") / ".metadata").tensors
    parts = name_map(config)
    assert {part.name for parts in parts.values() for part in parts} | set(further) == set(stored)
    for tensor, pieces in parts.items():
        assert [pieces[0].start, pieces[-1].stop] == [0, tensors[tensor].shape[0]]
        assert all(a.stop == b.start for a, b in itertools.pairwise(pieces))
    assert same(read_everything(tmp_path / "megatron"), tensors)


def test_names_and_notes():
    bamba = name_map(config_from_dict(BAMBA))["model.layers.0.mamba.conv1d.weight"]
    assert [part.name.removeprefix("model.layers.0.mamba.") for part in bamba] == [
        f"conv1d.weight.{part}" for part in ("x", "B", "C")
    ]
    spaces = name_map(config_from_dict(STATE_SPACES))
    assert spaces["backbone.embedding.weight"][0].name == "embedding.word_embeddings.weight"
    assert {kind for kind in FAMILIES if family_of(kind).megatron} == {"mamba2", "mamba2_state_spaces"}
    uneven = CONFIGS["mamba2-grown"]
    for config, words in (
        (config_from_dict(MAMBA2), ["no bias in its projections", "tensor parallelism of size 1"]),
        (config_from_dict(GROUPED), []),
        (uneven, ["layers have [6, 18]"]),
        (CONFIGS["mamba2-one-group"], ["no bias", "conv1d.bias, which this model has not", "size 1"]),
        (config_from_dict(GLA), ["no module of gla models"]),
        (None, ["no module of this model"]),
    ):
        notes = megatron_notes(config)
        assert len(notes) == len(words)
        assert all(word in note for word, note in zip(words, notes, strict=True)), notes


def test_plain_torch_loads_ours(tmp_path):
    tensors = write_model(tmp_path / "hf", GROUPED)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=3)
    expected = hf_parts(config_from_dict(GROUPED), tensors)
    loaded = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "megatron", no_dist=True)
    assert same(loaded, expected)
    reader = dcp.FileSystemReader(tmp_path / "megatron")
    assert set(reader.read_metadata().state_dict_metadata) == set(expected)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "megatron", tmp_path / "all.pt")
    assert same(torch.load(tmp_path / "all.pt"), expected)
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        assert os.fsencode(tmp_path) not in (tmp_path / "megatron" / name).read_bytes()
    assert json.loads((tmp_path / "megatron/metadata.json").read_text()) == CHECKPOINT_CONFIG
    assert torch.load(tmp_path / "megatron/common.pt") == {"checkpoint_version": 3.0, "iteration": 0}


def test_reading_what_torch_wrote(tmp_path):
    tensors = {**odd_tensors(), "b": torch.randn(9).bfloat16(), "turned": torch.randn(4, 6).t()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({**tensors, "step": 7}, checkpoint_id=tmp_path / "dcp")
    source = open_source(tmp_path / "dcp")
    assert source.ignored == ("step",)
    assert same(read_everything(tmp_path / "dcp"), tensors)
    convert(source, tmp_path / "hf", "hf")
    assert same(load_all(tmp_path / "hf"), tensors)


class Megatron(NamedTuple):
    """Our checkpoint, each rank's findings with megatron-core, the axis of each tensor's cut, and its tensors."""

    root: Path
    ranks: list[dict[str, Any]]
    axes: dict[str, int | None]
    expected: dict[str, torch.Tensor]


def shard(key: str, tensor: torch.Tensor, axis: int | None, rank: int) -> Any:
    """Return a rank's part of a tensor in megatron-core's terms; the whole one where it is not cut."""
    from megatron.core.dist_checkpointing import ShardedTensor

    if axis is None:
        return ShardedTensor.from_rank_offsets(key, tensor, replica_id=rank)
    return ShardedTensor.from_rank_offsets(key, tensor.chunk(2, axis)[rank].contiguous(), (axis, rank, 2))


def load_and_write(
    rank: int, root: Path, wanted: dict[str, dict[str, tuple[list[int], int | None]]], sections: dict[str, int]
) -> dict[str, Any]:
    """Load our checkpoint with megatron-core, whole, cut and merged; write what we have to read."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.ssm.mamba_mixer import _split_tensor_factory

    found = {}
    for name, tensors in wanted.items():
        state = {key: shard(key, torch.zeros(shape), axis, rank) for key, (shape, axis) in tensors.items()}
        found[name] = dist_checkpointing.load(state, str(root / "megatron"))
    # What megatron-core itself needs to merge the parts of a layer, on this rank.
    key, hidden = "decoder.layers.1.mixer.in_proj.weight", GROUPED["hidden_size"]
    whole, local = torch.zeros(sum(sections.values()), hidden), [rows // 2 for rows in sections.values()]
    factory = _split_tensor_factory(shard(key, whole, 0, rank), local, list(sections), 0)
    found["merged"] = dist_checkpointing.load({key: factory}, str(root / "megatron"))[key]

    torch.manual_seed(0)
    tensors = {"rows": torch.randn(5, 4), "columns": torch.randn(6, 8), "grid": torch.randn(3, 4, 6)}
    tensors["all"] = torch.arange(7)
    found["written"] = tensors
    mesh = init_device_mesh("cpu", (2,))
    ways = {"rows": Shard(0), "columns": Shard(1), "grid": Shard(2), "all": Replicate()}
    dcp.save(
        {name: distribute_tensor(tensor, mesh, [ways[name]]) for name, tensor in tensors.items()},
        checkpoint_id=root / "dtensors",
    )
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    axes = {"columns": 1, "grid": 2, "all": None}
    state = {name: shard(name, tensors[name], axis, rank) for name, axis in axes.items()}
    state["extra"] = ShardedObject("mixer._extra_state", {"x": 1}, (1,), (0,), replica_id=rank)
    state["iteration"] = 3
    (root / "mcore").mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(root / "mcore"))
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def megatron(tmp_path_factory) -> Megatron:
    """Two gloo ranks load what we wrote with megatron-core, and write what we are to read."""
    root = tmp_path_factory.mktemp("two_ranks")
    config = config_from_dict(GROUPED)
    expected = hf_parts(config, write_model(root / "hf", GROUPED))
    to_megatron(root / "hf", root / "megatron")

    def axis(name: str) -> int | None:
        if name.endswith("out_proj.weight"):
            return 1
        return None if name.endswith(("final_norm.weight", "layer_norm_weight")) else 0

    wanted = {
        "tp1": {name: (list(tensor.shape), None) for name, tensor in expected.items()},
        "tp2": {name: (list(tensor.shape), axis(name)) for name, tensor in expected.items()},
    }
    inner, grouped = config.inner_size, config.n_groups * config.state_size
    sections = {
        "z": inner,
        "x": inner,
        "B": grouped,
        "C": grouped,
        "dt": config.num_heads,
    }
    ranks = run_distributed_test(load_and_write, 2, root, wanted, sections)
    return Megatron(root, ranks, {name: axis(name) for name in expected}, expected)


@pytest.mark.distributed
def test_megatron_core_loads_ours_at_any_tp(megatron):
    expected = megatron.expected
    for rank, found in enumerate(megatron.ranks):
        loaded = found["tp1"]
        assert loaded.pop("checkpoint_version") == 3.0
        assert loaded.pop("iteration") == 0
        assert same(loaded, expected)
        for name, tensor in expected.items():
            axis = megatron.axes[name]
            assert torch.equal(found["tp2"][name], tensor if axis is None else tensor.chunk(2, axis)[rank]), name
        parts = [expected[f"decoder.layers.1.mixer.in_proj.weight.{part}"] for part in ("z", "x", "B", "C", "dt")]
        merged = torch.cat([part.chunk(2)[rank] for part in parts])
        assert torch.equal(found["merged"], merged)


@pytest.mark.distributed
def test_reading_what_several_ranks_wrote(megatron, tmp_path):
    root, written = megatron.root, megatron.ranks[0]["written"]
    assert same(read_everything(root / "dtensors"), written)
    source = open_source(root / "mcore")
    assert source.ignored == ("mixer._extra_state/shard_0_1",)
    del written["rows"]
    assert same(read_everything(root / "mcore"), written)
    assert len(source.pieces("columns")) == 2
    convert(source, tmp_path / "hf", "hf")
    assert same(load_all(tmp_path / "hf"), written)


def test_checkpoints_that_megatron_trained(tmp_path):
    """The vocabulary filled up, chunks of several ranks, states of the optimizer beside the weights."""
    tensors = write_model(tmp_path / "hf", GROUPED)
    theirs = hf_parts(config_from_dict(GROUPED), tensors)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        theirs[name] = torch.cat([theirs[name], torch.full((26, 16), torch.nan)])
    states = {f"optimizer.state.exp_avg.{name}": torch.zeros(1) for name in theirs}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({**theirs, **states}, checkpoint_id=tmp_path / "megatron")
    (tmp_path / "megatron/config.json").write_text(json.dumps(GROUPED))
    assert same(read_everything(tmp_path / "megatron"), tensors)
    assert set(open_source(tmp_path / "megatron").ignored) == set(states)
    cases = (
        ({"stranger": torch.zeros(1)}, "'stranger'.*mamba2"),
        ({"decoder.final_norm.weight": None}, "lacks tensor 'decoder.final_norm.weight'"),
        ({"decoder.layers.0.mixer.in_proj.weight.B": torch.zeros(3, 16)}, r"has shape \[3, 16\]; 12 rows of"),
        ({"decoder.layers.0.mixer.in_proj.weight.B": torch.zeros(12, 16).half()}, "shape or dtype"),
    )
    for number, (wrong, message) in enumerate(cases):
        changed = {n: t for n, t in {**theirs, **wrong}.items() if t is not None}
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(changed, checkpoint_id=tmp_path / f"wrong{number}")
        (tmp_path / f"wrong{number}/config.json").write_text(json.dumps(GROUPED))
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / f"wrong{number}")


def test_tensors_cut_along_two_axes(tmp_path):
    """A grid of chunks in two files, as two-dimensional parallelism writes it."""
    tensor = torch.randn(5, 7)
    chunks, places = [], {}
    files = [(tmp_path / f"__{rank}_0.distcp").open("wb") for rank in range(2)]
    for (top, bottom), (left, right) in itertools.product([(2, 5), (0, 2)], [(0, 3), (3, 7)]):
        file = files[left > 0]
        offset = file.tell()
        torch.save(tensor[top:bottom, left:right].clone(), file)
        box = ChunkStorageMetadata(torch.Size([top, left]), torch.Size([bottom - top, right - left]))
        place = _StorageInfo(Path(file.name).name, offset, file.tell() - offset)
        chunks.append(box)
        places[MetadataIndex("w", box.offsets)] = place
    for file in files:
        file.close()
    entry = TensorStorageMetadata(TensorProperties(torch.float32), tensor.shape, chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, None, places)))
    assert torch.equal(read_everything(tmp_path)["w"], tensor)


def test_layout_of_files():
    infos = [TensorInfo(name=str(i), shape=(10,), dtype="F32") for i in range(7)]
    layout = lay_out([infos[:2], infos[2:5], [infos[5]], [infos[6]]], 100)
    assert [file.name for file in layout.files] == [f"__0_{i}.distcp" for i in range(3)]
    assert [len(file.archives) for file in layout.files] == [2, 3, 2]
    assert all(offset % 64 == 0 for _, offset in layout.values.values())


def test_metadata_of_many_tensors_is_read_in_linear_time(tmp_path):
    infos = [TensorInfo(name=f"decoder.layers.{i}.w", shape=(4,), dtype="F32") for i in range(5000)]
    (tmp_path / ".metadata").write_bytes(metadata_bytes(lay_out([[info] for info in infos], 1 << 30).tensors))
    assert [tensor.info for tensor in read_metadata(tmp_path / ".metadata").tensors.values()] == infos

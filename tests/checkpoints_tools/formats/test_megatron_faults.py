"""Megatron and torch DCP checkpoints that are damaged, contradict themselves or want to run something."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from checkpoints_tools.formats.dcp import DcpTarget, lay_out
from checkpoints_tools.io.tensor_stream import TensorJob
from statex_dist.checkpoint.formats.dcp.format import read_metadata
from statex_dist.checkpoint.formats.dcp.reader import DcpSource
from statex_dist.checkpoint.formats.safetensors import SafetensorsSource
from statex_dist.checkpoint.formats.tensor_io import TensorInfo
from statex_dist.errors import CheckpointError
from statex_dist.models.registry import config_from_dict
from tests.checkpoints_tools.builders import info_of, write_model
from tests.checkpoints_tools.formats.test_megatron import GROUPED, convert, request_of, to_megatron


@pytest.fixture
def megatron(tmp_path) -> Path:
    """A small checkpoint of ours."""
    write_model(tmp_path / "hf", {"model_type": "unheard-of"}, {"a": torch.randn(40, 50), "b": torch.randn(30)})
    return to_megatron(tmp_path / "hf", tmp_path / "megatron", max_shard_size=1 << 20)


def test_missing_truncated_and_damaged_files(megatron, tmp_path):
    file = megatron / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=rf"__0_0.distcp .* {len(data) - 10} bytes.* 'b' "):
        DcpSource.open(megatron)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing"):
        DcpSource.open(megatron)
    damaged = bytearray(data)
    damaged[4000] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp .* 'data/0' "):
        convert(DcpSource.open(megatron), tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    pickled = data.index(b"\x80\x02ctorch._utils")
    file.write_bytes(data[:pickled] + b"x" + data[pickled + 1 :])
    with pytest.raises(CheckpointError, match=r"'a' at byte 0 .*data.pkl"):
        DcpSource.open(megatron)
    chunk = read_metadata(megatron / ".metadata").tensors["b"].chunks[0]
    file.write_bytes(data[: chunk.offset] + bytes(chunk.length))
    with pytest.raises(CheckpointError, match=f"'b' at byte {chunk.offset} "):
        DcpSource.open(megatron)


def change(directory: Path, function) -> None:
    """Change a ``.metadata`` with torch's own classes."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    function(metadata)
    path.write_bytes(pickle.dumps(metadata))


def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        DcpSource.open(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("relative_path", "../megatron/__0_0.distcp", "'a' is in '../megatron/__0_0.distcp'; only files of the same"),
        ("relative_path", "/etc/passwd", "only files of the same directory are allowed"),
        ("relative_path", "..", "only files of the same directory are allowed"),
        ("offset", -1, "not what torch writes: sizes or offsets"),
        ("length", 1 << 40, "__0_0.distcp is truncated"),
        ("length", 500, "the chunk of 'a' at byte 0 is damaged or not of torch's format"),
        ("transform_descriptors", ["zstd"], "is stored with .*zstd.*, which we cannot undo"),
    ],
)
def test_places_that_cannot_be(megatron, field, value, message):
    def spoil(metadata):
        setattr(metadata.storage_data[MetadataIndex("a", [0, 0])], field, value)

    change(megatron, spoil)
    refused(megatron, message)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((0, 0), (40, 49))], "the chunks of tensor 'a' hold 1960 of its 2000 elements"),
        ([((0, 0), (30, 50)), ((20, 0), (20, 50))], "the chunks of tensor 'a' overlap"),
        ([((0, 0), (20, 50)), ((10, 0), (20, 50))], "the chunks of tensor 'a' overlap, or do not lie side by side"),
        ([((0, 0), (40, 20)), ((0, 20), (20, 30)), ((20, 20), (20, 30))], "do not lie side by side"),
        ([((0, 0), (41, 50))], r"a chunk of tensor 'a', \[41, 50\] at \[0, 0\], that is not inside \[40, 50\]"),
        ([((0,), (40,))], "that has not as many axes as the tensor"),
        ([((0, 0), (40, 25)), ((0, 25), (40, 25))], "holds F32 .40, 50.; .metadata says F32 .40, 25."),
    ],
)
def test_boxes_that_do_not_make_up_a_tensor(megatron, boxes, message):
    def spoil(metadata):
        metadata.state_dict_metadata["a"].chunks = [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes
        ]
        place = metadata.storage_data.pop(MetadataIndex("a", [0, 0]))
        for offsets, _ in boxes:
            metadata.storage_data[MetadataIndex("a", offsets)] = place

    change(megatron, spoil)
    refused(megatron, message)


def test_metadata_that_contradicts_itself(megatron):
    original = (megatron / ".metadata").read_bytes()

    def shared(metadata):
        metadata.storage_data[MetadataIndex("b", [0])] = metadata.storage_data[MetadataIndex("a", [0, 0])]

    def lost(metadata):
        metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != "b"}

    def other_dtype(metadata):
        metadata.state_dict_metadata["b"].properties.dtype = torch.int32

    def unknown_dtype(metadata):
        metadata.state_dict_metadata["b"].properties.dtype = torch.complex128

    for spoil, message in (
        (shared, "the chunk of 'b' at byte 0 overlaps another"),
        (lost, r"not what torch writes: no place for the chunk of tensor 'b' at \[0\]"),
        (other_dtype, r"the chunk of 'b' at byte \d+ holds F32 \[30\]; .metadata says I32 \[30\]"),
        (unknown_dtype, "tensor 'b' has dtype torch.complex128; supported"),
    ):
        (megatron / ".metadata").write_bytes(original)
        change(megatron, spoil)
        refused(megatron, message)
    (megatron / ".metadata").write_bytes(original[:-100])
    refused(megatron, ".metadata is refused: its pickle needs more than tensors: not a readable pickle")
    (megatron / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    refused(megatron, "not what torch writes: dict where torch.distributed.checkpoint.metadata.Metadata should stand")
    (megatron / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(megatron, "names the format 'zarr'; only torch_dist is read")


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_hostile_pickles_are_refused_and_not_run(megatron, tmp_path):
    ran = tmp_path / "ran"
    original = (megatron / ".metadata").read_bytes()
    change(megatron, lambda metadata: setattr(metadata, "planner_data", Hostile(f"touch {ran}")))
    refused(megatron, ".metadata is refused: its pickle needs more than tensors: posix.system")
    assert not ran.exists()
    (megatron / ".metadata").write_bytes(original)
    place = read_metadata(megatron / ".metadata").tensors["b"].chunks[0]
    torch.save(Hostile(f"touch {ran}"), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    data = (megatron / "__0_0.distcp").read_bytes()[: place.offset]
    (megatron / "__0_0.distcp").write_bytes(data + evil)
    change(megatron, lambda metadata: setattr(metadata.storage_data[MetadataIndex("b", [0])], "length", len(evil)))
    refused(megatron, rf"'b' at byte {place.offset} .*: posix.system")
    assert not ran.exists()


def test_what_cannot_be_written(tmp_path):
    infos = [TensorInfo(name="w", shape=(2,), dtype="F8_E4M3")]
    with pytest.raises(CheckpointError, match=r"'w' .* float8_e4m3fn"):
        lay_out([infos], 100)
    with pytest.raises(CheckpointError, match=r"'w' .* twice"):
        lay_out([[replace(infos[0], dtype="F32")]] * 2, 100)
    tensors = write_model(tmp_path, GROUPED)
    source, config = SafetensorsSource(tmp_path), config_from_dict(GROUPED)

    def jobs(**changed):
        return [TensorJob(info=info_of(n, t), source=None) for n, t in {**tensors, **changed}.items() if t is not None]

    for changed, message in (
        ({"backbone.norm_f.weight": None}, "'backbone.norm_f.weight' is missing"),
        ({"backbone.layers.0.extra": torch.zeros(1)}, "'backbone.layers.0.extra'.*mamba2"),
        ({"backbone.layers.0.mixer.in_proj.weight": torch.zeros(9, 16)}, r"\[9, 16\].*96 rows"),
    ):
        with pytest.raises(CheckpointError, match=message):
            DcpTarget.plan_target(request_of(source, jobs(**changed), None, config, 100))

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.safetensors_io import SafetensorsSink, SafetensorsSource, assign_shards
from checkpoints_tools.tensor_io import TensorInfo
from statex_dist.errors import CheckpointError
from tests.checkpoints_tools.builders import GLA, load_all, write_model


def raw_file(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "b": torch.randn(3, 5).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "ids": torch.arange(7),
    "f": torch.randn(4, 3, dtype=torch.float64),
}


@pytest.mark.parametrize("limit", [10, 60, 10**9])
def test_write_and_read_agree_with_the_safetensors_library(tmp_path, limit):
    infos = [TensorInfo(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in TENSORS.items()]
    sink = SafetensorsSink(tmp_path, infos, max_shard_size=limit)
    for name in reversed(TENSORS):
        sink.write(name, TENSORS[name])
    files = sink.finish()
    assert (tmp_path / "model.safetensors").exists() == (limit == 10**9) == (len(files) == 1)
    theirs, ours = load_all(tmp_path), SafetensorsSource(tmp_path)
    assert set(theirs) == set(ours.keys()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(ours.read(name), tensor)
        assert ours.read(name).dtype == tensor.dtype


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


def test_shards_are_filled_in_order():
    infos = [TensorInfo(name=str(i), shape=(n,), dtype=torch.uint8) for i, n in enumerate([4, 4, 20, 1, 9, 1])]
    assert [[i.name for i in shard] for shard in assign_shards(infos, 10)] == [["0", "1"], ["2"], ["3", "4"], ["5"]]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, "truncated: tensor 'b'"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "4 bytes before tensor 'b'"),
        ({"a": entry(0, 8)}, 9, "1 bytes at the end"),
        ({"a": entry(0, 4)}, 4, "needs 8 bytes"),
        ({"a": entry(0, 8, shape=(-2,))}, 8, "bad shape"),
        ({"a": entry(0, 8, dtype="F99")}, 8, "'F99'"),
        ({"a": {"dtype": "F32"}}, 8, "lacks dtype"),
        ([1], 0, "not a JSON object"),
        (b"{not json", 0, "not valid JSON"),
        (b'{"a":' * 100_000, 0, "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', 1, "occurs twice"),
    ],
)
def test_bad_headers_are_named(tmp_path, header, data, message):
    raw_file(tmp_path / "model.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(tmp_path)


def test_truncated_and_oversized_files(tmp_path):
    path = tmp_path / "model.safetensors"
    for content, message in (
        (b"", "truncated"),
        (struct.pack("<Q", 50) + b"{}", "truncated"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            SafetensorsSource(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "sub/x.safetensors", "..", ""])
def test_index_may_not_leave_the_directory(tmp_path, name):
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only files of the same directory"):
        SafetensorsSource(tmp_path)


def test_missing_shard_and_missing_tensor_are_named(tmp_path):
    write_model(tmp_path, GLA, shards=3)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks tensor 'ghost'"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        SafetensorsSource(tmp_path)


def test_sink_refuses_another_shape(tmp_path):
    sink = SafetensorsSink(tmp_path, [TensorInfo(name="a", shape=(2,), dtype=torch.float32)], max_shard_size=100)
    with pytest.raises(CheckpointError, match="declared"):
        sink.write("a", torch.zeros(3))
    sink.write("a", torch.ones(2))
    sink.finish()
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]

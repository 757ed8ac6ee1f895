import json
import re
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints_tools.formats.safetensors import index_of, lay_out
from statex_dist.checkpoint.formats.piece_io import PieceReader
from statex_dist.checkpoint.formats.safetensors import SafetensorsSource
from statex_dist.checkpoint.formats.tensor_io import TensorInfo
from statex_dist.errors import CheckpointError
from tests.checkpoints_tools.builders import GLA, info_of, load_all, read_tensor, write_model
from tests.raising import raises


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
    shards = lay_out([info_of(name, tensor) for name, tensor in TENSORS.items()], limit, {"note": "kept"})
    for shard in shards:
        values = b"".join(TENSORS[i.name].reshape(-1).view(torch.uint8).numpy().tobytes() for i in shard.tensors)
        (tmp_path / shard.file).write_bytes(shard.header + values)
        assert (tmp_path / shard.file).stat().st_size == shard.size
        with safe_open(tmp_path / shard.file, "pt") as file:
            assert file.metadata() == {"format": "pt", "note": "kept"}
    if len(shards) > 1:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))
    assert (tmp_path / "model.safetensors").exists() == (limit == 10**9) == (len(shards) == 1)
    theirs, ours = load_all(tmp_path), SafetensorsSource(tmp_path)
    assert set(theirs) == set(ours.keys()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(read_tensor(ours, name), tensor)
        assert read_tensor(ours, name).dtype == tensor.dtype
    assert ours.metadata == {"format": "pt", "note": "kept"}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path)
    assert all(torch.equal(read_tensor(source, name), tensor) for name, tensor in TENSORS.items())


def test_shards_are_filled_in_order():
    infos = [TensorInfo(name=str(i), shape=(n,), dtype="U8") for i, n in enumerate([4, 4, 20, 1, 9, 1])]
    layout = [[i.name for i in shard.tensors] for shard in lay_out(infos, 10)]
    assert layout == [["0", "1"], ["2"], ["3", "4"], ["5"]]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 12, "truncated: tensor 'b'"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "4 bytes.*'b'"),
        ({"a": entry(0, 8)}, 9, "1 bytes"),
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
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        SafetensorsSource(tmp_path)


def test_missing_shard_and_missing_tensor_are_named(tmp_path):
    write_model(tmp_path, GLA, shards=3)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'ghost'"):
        SafetensorsSource(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_range_of_a_tensor_is_read(tmp_path, start):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source, view = SafetensorsSource(tmp_path), np.empty(16, dtype=np.uint8)
    PieceReader(source.opened).read(source.pieces("ids"), source.info("ids"), start, view)
    assert view.tobytes() == TENSORS["ids"].numpy().tobytes()[8 * start : 8 * start + 16]


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes())
    with raises(CheckpointError, path, "changed while"):
        read_tensor(source, "ids")

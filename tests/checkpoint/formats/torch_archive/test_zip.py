"""``torch.save`` files: ours read by torch, torch's read by us, and what must be refused."""

import argparse
import os
import pickle
import random
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.planner import WriteItemType

from checkpoints_tools.formats.torch_archive import ArchiveLayout, archive_bytes, dumps
from statex_dist.checkpoint.formats.crc import check_crcs
from statex_dist.checkpoint.formats.piece_io import blocks
from statex_dist.checkpoint.formats.raw_io import read_bytes
from statex_dist.checkpoint.formats.tensor_io import SourceFacts
from statex_dist.checkpoint.formats.torch_archive.pickle import (
    ENUMS,
    MAX_PICKLE_BYTES,
    UnsafePickleError,
    loads,
    named,
    new_tensor,
)
from statex_dist.checkpoint.formats.torch_archive.reader import StateDictSource
from statex_dist.checkpoint.formats.torch_archive.zip import open_archive
from statex_dist.errors import CheckpointError
from tests.raising import raises

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.uint32),
]

CONTENT = {
    "numbers": [0, 1, 255, 256, -1, 2**31, -(2**31) - 1, 2**100, -(2**2100), 1.5, float("inf"), True, False, None],
    "texts": ("", "ü\n\0", b"\x00\xff", "x" * 300),
    "nested": OrderedDict(a={1: (2, [3, {"k": ()}])}, size=torch.Size([3, 4])),
    "set": {1, 2},
    "dtype": torch.bfloat16,
    "args": argparse.Namespace(lr=0.1, name="x"),
    "numpy": np.arange(5),
    "random": random.Random(3).getstate(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def facts(path: Path) -> SourceFacts:
    return SourceFacts(kind="torch", path=path.parent, model_dir=None, verified=False)


def moved(path: Path, target: Path) -> None:
    """Write a copy of a torch file with our writer alone."""
    archive = open_archive(path)
    storages = {
        name.removeprefix("data/"): read_bytes(path, entry.offset, entry.size)
        for name, entry in archive.entries.items()
        if name.startswith("data/")
    }
    target.write_bytes(archive_bytes(target.stem, archive.content, storages))


def test_what_torch_saved_comes_back_after_our_reader_and_writer(tmp_path):
    torch.save(CONTENT, tmp_path / "theirs.pt")
    moved(tmp_path / "theirs.pt", tmp_path / "ours.pt")
    check_crcs(tmp_path / "ours.pt")
    found = torch.load(tmp_path / "ours.pt", weights_only=False)
    assert found.keys() == CONTENT.keys()
    assert np.array_equal(found.pop("numpy"), CONTENT["numpy"])
    assert torch.equal(found.pop("parameter"), CONTENT["parameter"])
    assert found == {key: value for key, value in CONTENT.items() if key in found}
    assert type(found["nested"]) is OrderedDict
    assert type(found["nested"]["size"]) is torch.Size


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype(tmp_path, dtype):
    values = torch.randint(0, 2, (3, 4)).to(dtype)
    torch.save({"a": values, "transposed": values.T, "part": values[1:, :2], "none": values[:0]}, tmp_path / "x.bin")
    source = StateDictSource([tmp_path / "x.bin"], facts=facts(tmp_path / "x.bin"))
    for name, expected in (("a", values), ("transposed", values.T), ("part", values[1:, :2]), ("none", values[:0])):
        assert source.info(name).shape == tuple(expected.shape)
        assert (
            b"".join(map(bytes, blocks(source, name, 1 << 20)))
            == expected.contiguous().view(torch.uint8).numpy().tobytes()
        )


def test_storages_written_by_others_in_any_order(tmp_path):
    content = {
        "x": new_tensor("0", "F32", (1000,)),
        "y": new_tensor("1", "BF16", (3, 5)),
        "e": new_tensor("2", "I64", ()),
    }
    layout = ArchiveLayout.build("name", dumps(content), {"0": 4000, "1": 30, "2": 8})
    x, y, e = torch.randn(1000), torch.randn(3, 5).bfloat16(), torch.tensor(7)
    data = {k: t.reshape(-1).view(torch.uint8).numpy().tobytes() for k, t in (("0", x), ("1", y), ("2", e))}
    path = tmp_path / "name.pt"
    with path.open("wb") as file:
        for offset, part in [
            *((layout.storages[key][0], data[key]) for key in ("1", "0", "2")),
            *layout.closing({key: zlib.crc32(value) for key, value in data.items()}),
            *layout.fixed[::-1],
            *layout.closing({key: zlib.crc32(value) for key, value in data.items()}),
        ]:
            file.seek(offset)
            file.write(part)
    assert path.stat().st_size == layout.size
    assert all(offset % 64 == 0 for offset, _ in layout.storages.values())
    check_crcs(path)
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert torch.equal(found["x"], x)
        assert torch.equal(found["y"], y)
        assert torch.equal(found["e"], e)


def test_files_beyond_four_gigabytes(tmp_path):
    """Storages and offsets that do not fit in 32 bits: a sparse file takes no space."""
    large = (1 << 30) + 5
    content = {"big": new_tensor("0", "F32", (large,)), "far": new_tensor("1", "F32", (3,))}
    layout = ArchiveLayout.build("big", dumps(content), {"0": 4 * large, "1": 12})
    path = tmp_path / "big.pt"
    with path.open("wb") as file:
        for offset, part in (*layout.fixed, (layout.storages["1"][0], np.arange(3, dtype="f4").tobytes())):
            file.seek(offset)
            file.write(part)
        for offset, part in layout.closing({"0": 0, "1": 0}):
            file.seek(offset)
            file.write(part)
    assert path.stat().st_size == layout.size > 1 << 32
    found = torch.load(path, weights_only=True, mmap=True)
    assert found["big"].shape == (large,)
    assert found["far"].tolist() == [0, 1, 2]
    archive = open_archive(path)
    assert archive.storage("0").size == 4 * large
    assert archive.storage("1").offset == layout.storages["1"][0]


class Exploit:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return self.code


@pytest.mark.parametrize("function", [os.system, exec, eval, subprocess.call, pickle.loads, getattr, __import__])
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(tmp_path, function):
    mark = tmp_path / "ran"
    argument = f"open({str(mark)!r}, 'w')" if function in (exec, eval) else f"touch {mark}"
    torch.save({"x": torch.ones(2), "evil": Exploit((function, (argument,)))}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=rf"evil\.pt .*\.{function.__name__}"):
        open_archive(tmp_path / "evil.pt")
    assert not mark.exists()
    if function is os.system:  # the exploit is a real one
        torch.load(tmp_path / "evil.pt", weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02c__builtin__\neval\n.",
        b"garbage",
        b"(" * 100_000,
        # setting an attribute on what stands for a function, on a class, on an instance
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ctorch\nFloatStorage\nN}X\x04\x00\x00\x00NAMEX\x01\x00\x00\x00xs\x86b.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",
    ],
)
def test_pickles_that_are_not_what_torch_writes(data):
    with pytest.raises(UnsafePickleError):
        loads(data)


REAL_ENUMS = {
    f"{enum.__module__}.{enum.__qualname__}": enum for enum in (ZeroStageEnum, _MEM_FORMAT_ENCODING, WriteItemType)
}


def test_the_known_enums_are_those_of_their_libraries():
    assert {name: {member.name: member.value for member in enum} for name, enum in REAL_ENUMS.items()} == ENUMS


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ENUMS)
def test_a_member_of_an_enum_is_read_by_name_as_by_value(name, protocol):
    """Python 3.11.0 to 3.11.4 pickle it by name, through ``getattr``; what is written again is by value."""
    for member in REAL_ENUMS[name]:
        by_name, by_value = (
            pickle.dumps([Exploit(call)], protocol=protocol)
            for call in ((getattr, (type(member), member.name)), (type(member), (member.value,)))
        )
        assert loads(by_name)[0] == loads(by_value)[0] == [named(name)(member.value)]
        assert pickle.loads(dumps(loads(by_name)[0])) == [member]


@pytest.mark.parametrize(
    "call",
    [
        (ZeroStageEnum, "__subclasses__"),
        (ZeroStageEnum, "mro"),
        (ZeroStageEnum, "none"),
        (ZeroStageEnum.weights, "name"),
        (torch.Size, "index"),
        ("text", "format"),
        (getattr, "__self__"),
        (ZeroStageEnum, ("weights",) * 3),
        (ZeroStageEnum, "weights", 1),
        (ZeroStageEnum,),
    ],
)
def test_getattr_of_anything_else_is_refused(call):
    with pytest.raises(UnsafePickleError):
        loads(pickle.dumps(Exploit((getattr, call)), protocol=2))


def test_a_shared_value_repeated_without_end_is_refused():
    data: list = ["x" * 1000]
    for _ in range(40):
        data = [data, data]
    with pytest.raises(UnsafePickleError, match="nested without end"):
        dumps(data)
    itself: list = [1]
    itself.append(itself)
    for bomb in (data, itself):
        with pytest.raises(UnsafePickleError, match="nested without end"):
            loads(pickle.dumps(bomb, protocol=2))
    with pytest.raises(UnsafePickleError, match=f"{MAX_PICKLE_BYTES + 1} .*{MAX_PICKLE_BYTES}"):
        loads(bytes(MAX_PICKLE_BYTES + 1))


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    for storages in ({"0": bytes(16)}, {"1": bytes(20)}):
        content = {"a": new_tensor("0", "F32", (5,))}
        (tmp_path / "x.pt").write_bytes(archive_bytes("x", content, storages))
        with pytest.raises(CheckpointError, match=r"x.pt .* storage 0 "):
            open_archive(tmp_path / "x.pt")


def test_every_byte_of_a_directory_that_torch_minds_is_minded(tmp_path):
    """What torch cannot open is not called sound, and no damage gives anything but one line."""
    torch.save({"a": torch.arange(3), "b": torch.empty(0)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        start = archive.start_dir
    path = tmp_path / "x.pt"
    for position in range(start, len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            torch.load(path, weights_only=True)
            theirs = True
        except Exception:
            theirs = False
        ours = complaint(path)
        assert theirs or ours, f"byte {position - start} of the directory"
        assert "\n" not in (ours or "")


def complaint(path: Path) -> str | None:
    try:
        open_archive(path)
        check_crcs(path)
    except CheckpointError as error:
        return str(error)
    return None


def rewrite(path: Path, change) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_damage_is_found(tmp_path):
    torch.save({"a": torch.arange(100)}, tmp_path / "x.pt")
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path) as archive:
        stored = archive.getinfo("x/data/0")
    pickled = open_archive(path).entries["data.pkl"].offset
    whole = path.read_bytes()

    def flip(position):
        def change(data):
            data[position] ^= 1

        return change

    start = open_archive(path).storage("0").offset
    rewrite(path, flip(start + 17))
    open_archive(path)
    with pytest.raises(CheckpointError, match=r"CRC-32.*'x/data/0'"):
        check_crcs(path)
    for position, message in (
        (pickled + 5, "CRC .*data.pkl"),
        (stored.header_offset, "'data/0'"),
        (len(whole) - 22, "truncated or not a torch.save file"),
    ):
        path.write_bytes(whole)
        rewrite(path, flip(position))
        with pytest.raises(CheckpointError, match=message):
            open_archive(path)
    path.write_bytes(whole[:-50])
    with raises(CheckpointError, path, "torch.save"):
        open_archive(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_archive(path)


def test_other_zip_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for names, compression, message in (
        (["x/data.pkl", "y/data.pkl"], zipfile.ZIP_STORED, "2 folders"),
        (["x/data.pkl"], zipfile.ZIP_DEFLATED, "compressed entries"),
        (["x/other"], zipfile.ZIP_STORED, "it has no data.pkl"),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name in names:
                archive.writestr(name, b"\x80\x02N." * 100)
        with pytest.raises(CheckpointError, match=message):
            open_archive(path)


def test_reading_imports_neither_torch_nor_deepspeed(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    program = (
        "import sys; from statex_dist.models.source import open_source; open_source(sys.argv[1]); "
        "assert not {'torch', 'deepspeed', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_an_archive_of_a_large_directory_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(520):
            archive.writestr(f"x/{number:04d}" + "y" * 65_000, b"")
    assert complaint(path) is not None
    with pytest.raises(CheckpointError, match=r"directory of \d+ bytes"):
        open_archive(path)


def test_compressed_entries_are_not_unpacked_for_their_checksums(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1000))
    with pytest.raises(CheckpointError, match="compressed"):
        check_crcs(path)

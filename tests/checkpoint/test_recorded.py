"""Digests that are computed while a file is written, and compared while it is read."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from statex_dist.checkpoint.manifest import FileRecord, record_file
from statex_dist.checkpoint.recorded import BytesView, RecordedWriter, read_recorded
from statex_dist.errors import CheckpointError


def written(path: Path, value: object) -> FileRecord:
    with RecordedWriter(path) as file:
        torch.save(value, file)
        return file.finish()


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.arange(1000.0), "b": torch.empty(0)},
        # values that begin as the directory of an archive does
        {"a": torch.frombuffer(bytearray(b"PK\x01\x02" * 4000), dtype=torch.uint8)},
        {str(number): torch.full((), number) for number in range(3000)},
    ],
    ids=["tensors", "like a directory", "many"],
)
def test_the_record_is_that_of_the_finished_file(tmp_path: Path, value: object):
    record = written(tmp_path / "states.pt", value)
    assert record == record_file(tmp_path / "states.pt")
    assert record.directory_xxh3_128 is not None
    data = read_recorded(tmp_path / "states.pt", record)
    assert data == (tmp_path / "states.pt").read_bytes()
    with zipfile.ZipFile(BytesView(data)) as archive:
        assert archive.testzip() is None
    by_crcs = replace(record, xxh3_128=None)
    assert read_recorded(tmp_path / "states.pt", by_crcs) == data


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("place", [70, 5000, -30])
def test_a_flipped_bit_is_found_on_the_way(tmp_path: Path, whole: bool, place: int):
    record = written(tmp_path / "states.pt", {"a": torch.ones(5000)})
    data = bytearray((tmp_path / "states.pt").read_bytes())
    data[place] ^= 1
    (tmp_path / "states.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"states\.pt is damaged"):
        read_recorded(tmp_path / "states.pt", record if whole else replace(record, xxh3_128=None))


def test_a_missing_or_shorter_file_is_named(tmp_path: Path):
    record = written(tmp_path / "states.pt", {"a": torch.ones(50)})
    with pytest.raises(CheckpointError, match="missing"):
        read_recorded(tmp_path / "other.pt", record)
    (tmp_path / "states.pt").write_bytes((tmp_path / "states.pt").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes"):
        read_recorded(tmp_path / "states.pt", record)


def test_what_is_no_archive_has_the_digest_of_the_whole(tmp_path: Path):
    with RecordedWriter(tmp_path / "notes.txt") as file:
        file.write(b"PK\x01\x02 some notes")
        record = file.finish()
    assert record == record_file(tmp_path / "notes.txt")
    assert record.directory_xxh3_128 is None

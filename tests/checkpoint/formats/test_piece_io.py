"""Windows of tensors out of any pieces, against numpy."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.checkpoint.formats.piece_io import PieceReader, overlapping
from statex_dist.checkpoint.formats.tensor_io import Held, Piece, TensorInfo
from statex_dist.errors import CheckpointError

DTYPES = {"F32": "<f4", "BF16": "<u2", "U8": "u1", "F64": "<f8"}


def cut(data, total: int, most: int) -> list[tuple[int, int]]:
    borders = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=most))})
    return [(a, b) for a, b in itertools.pairwise(borders) if a < b]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.sampled_from(sorted(DTYPES)), st.booleans())
def test_pieces_put_together_are_the_tensor(tmp_path_factory, data, rows, width, dtype, by_columns):
    """Runs or column blocks in files of their own, some in memory, read in windows of any size."""
    root = tmp_path_factory.mktemp("pieces")
    values = np.random.default_rng(rows * 10 + width).integers(0, 250, (rows, width)).astype(DTYPES[dtype])
    info = TensorInfo(name="t", shape=(rows, width), dtype=dtype)
    pieces, replicas = [], []
    if by_columns:
        for top, bottom in cut(data, rows, 2):
            for first, last in cut(data, width, 3):
                path = root / f"{top}-{first}"
                path.write_bytes(b"head" + values[top:bottom, first:last].tobytes() + b"tail")
                pieces.append(Piece(path, 4, top, bottom, width, first, last))
    else:
        flat = values.reshape(-1)
        for index, (start, stop) in enumerate(cut(data, rows * width, 5)):
            if data.draw(st.booleans()):
                pieces.append(Held(start, flat[start:stop].tobytes()))
                continue
            path = root / str(index)
            path.write_bytes(b"xy" + flat[start:stop].tobytes())
            pieces.append(Piece(path, 2, start, stop))
            replicas.append(pieces[-1])
    step = data.draw(st.integers(1, rows)) * width if by_columns else data.draw(st.integers(1, rows * width))
    reader, found = PieceReader({}), b""
    for start in range(0, rows * width, step):
        window = np.zeros((min(start + step, rows * width) - start) * info.item_bytes, dtype=np.uint8)
        reader.read(pieces, info, start, window, replicas)
        found += window.tobytes()
        others = [Held(0, bytes(byte ^ 1 for byte in values.tobytes()))]
        for piece in replicas:
            touched = piece.start < start + len(window) // info.item_bytes and piece.stop > start
            with pytest.raises(CheckpointError, match=str(piece.path)) if touched else nullcontext():
                reader.read(others, info, start, window, [piece])
    reader.close()
    assert found == values.tobytes()


@given(st.data(), st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
def test_overlapping_finds_all_and_no_others(tmp_path_factory, data, total, start, count):
    path = tmp_path_factory.getbasetemp()
    pieces = [Piece(path, 0, a, b) for a, b in cut(data, total, 8)]
    found = list(overlapping(pieces, start, start + count)) if count else []
    assert found == [p for p in pieces if p.start < start + count and p.stop > start and count]


def test_more_files_than_are_kept_open(tmp_path):
    pieces = []
    for index in range(100):
        (tmp_path / str(index)).write_bytes(bytes([index]))
        pieces.append(Piece(tmp_path / str(index), 0, index, index + 1))
    window, reader = np.zeros(100, dtype=np.uint8), PieceReader({})
    for _ in range(2):
        reader.read(pieces, TensorInfo(name="t", shape=(100,), dtype="U8"), 0, window)
        assert window.tolist() == list(range(100))
    reader.close()


def test_files_that_end_or_vanish(tmp_path):
    info, window = TensorInfo(name="t", shape=(4,), dtype="F32"), np.zeros(16, dtype=np.uint8)
    (tmp_path / "short").write_bytes(bytes(12))
    with pytest.raises(CheckpointError, match=r"short .* byte 12"):
        PieceReader({}).read([Piece(tmp_path / "short", 0, 0, 4)], info, 0, window)
    with pytest.raises(CheckpointError, match="gone "):
        PieceReader({}).read([Piece(tmp_path / "gone", 0, 0, 4)], info, 0, window)

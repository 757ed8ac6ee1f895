"""The settings of a checkpoint's steps: spans joined, written, read back, refused."""

import json
from pathlib import Path

import pytest

from statex_dist.checkpoint.history import Span, extended, history_text, read_history
from statex_dist.errors import CheckpointError
from tests.raising import raises

A, B = {"lr": 0.1}, {"lr": 0.2}


def spans(history: list[Span]) -> list[tuple[int, int, float]]:
    return [(span.first_step, span.last_step, span.settings["lr"]) for span in history]


def test_a_history_grows_by_starts_and_merges_equal_ones():
    history = extended([], A, after=0, step=4)
    assert spans(history) == [(1, 4, 0.1)]
    assert spans(extended(history, A, after=4, step=7)) == [(1, 7, 0.1)]
    assert spans(extended(history, B, after=4, step=7)) == [(1, 4, 0.1), (5, 7, 0.2)]
    assert spans(extended(history, B, after=4, step=4)) == [(1, 4, 0.1)], "no step of its own"
    assert spans(extended(history, A, after=6, step=8)) == [(1, 4, 0.1), (7, 8, 0.1)], "what is between is not known"
    assert spans(extended([], A, after=6, step=8)) == [(7, 8, 0.1)]


def test_what_is_written_is_read(tmp_path: Path):
    assert read_history(tmp_path) == []
    history = extended(extended([], A, after=0, step=4), B, after=4, step=7)
    (tmp_path / "training.json").write_text(history_text(history))
    assert read_history(tmp_path) == history


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "spans": []}',
        '{"version": 1, "spans": 3}',
        *(
            json.dumps({"version": 1, "spans": values})
            for values in (
                [{"first_step": 1}],
                [{"first_step": 0, "last_step": 1, "settings": {}}],
                [{"first_step": 2, "last_step": 1, "settings": {}}],
                [{"first_step": True, "last_step": 1, "settings": {}}],
                [{"first_step": 1, "last_step": 1, "settings": []}],
                [{"first_step": 1, "last_step": 2, "settings": {}}, {"first_step": 2, "last_step": 3, "settings": {}}],
            )
        ),
    ],
)
def test_a_damaged_history_is_refused(tmp_path: Path, content: str):
    (tmp_path / "training.json").write_text(content)
    with raises(CheckpointError, "training.json", "cannot be read"):
        read_history(tmp_path)

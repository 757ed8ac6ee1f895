"""Error messages are one bounded line, whatever the input held."""

import errno
import json
import pickle
from collections import OrderedDict

import pytest

from statex_dist.errors import (
    LINE_LENGTH,
    SHOWN_LENGTH,
    CheckpointError,
    StateXError,
    bounded_line,
    os_error_text,
    reason,
    shown,
    writing,
)
from tests.raising import raises


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    text = str(CheckpointError("model.bin is damaged: " + "x" * 10_000_000 + "; download it again"))
    assert len(text) == LINE_LENGTH
    assert text.startswith("model.bin is damaged: xxx")
    assert text.endswith("xxx; download it again")


def test_control_characters_are_escaped_and_lines_joined():
    line = bounded_line("a\nb\x1b[31m\x00\ud800\u202e é\t\r c")
    assert line == "a b\\x1b[31m\\x00\\ud800\\u202e é c"
    assert bounded_line(line) == line


def test_a_message_survives_a_process_border():
    error = CheckpointError("é" * 1000)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        list(range(1_000_000)),
        dict.fromkeys(range(1_000_000)),
        OrderedDict.fromkeys(range(1_000_000)),
        set(range(1_000_000)),
        1 << 100_000,
        b"\xff" * 10_000_000,
    ],
    ids=["str", "list", "dict", "OrderedDict", "set", "int", "bytes"],
)
def test_a_large_value_is_shown_in_few_characters(value):
    assert 0 < len(shown(value)) <= SHOWN_LENGTH


def test_small_values_are_shown_as_they_are():
    for value in ("a", 1, None, [1, "b"], {"a": 1.5}, ("x",)):
        assert shown(value) == repr(value)


def test_a_value_that_repeats_itself_is_shown():
    value: list = ["x"]
    for _ in range(60):
        value = [value, value]
    value.append(value)
    assert len(shown(value)) <= SHOWN_LENGTH


def test_another_librarys_error_does_not_carry_its_document():
    document = b"{" + b"a" * 1_000_000 + b"\xff"
    with pytest.raises(UnicodeDecodeError) as caught:
        document.decode()
    assert len(repr(caught.value)) > 1_000_000
    assert reason(caught.value).startswith("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff")
    with pytest.raises(json.JSONDecodeError) as damaged:
        json.loads("[1, " * 3)
    assert reason(damaged.value).startswith("JSONDecodeError: Expecting value")


def test_what_the_system_refuses_names_path_and_remedy(tmp_path):
    with (
        raises(StateXError, "out.html") as full,
        writing(tmp_path / "out.html"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.exit_code == 1
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "no" / "file").open()
    assert os_error_text(missing.value) == f"{tmp_path}/no/file: No such file or directory"

"""The wording lint: it finds the glossary's patterns in prose, and in nothing else."""

import importlib.util

import pytest

from tests.runs import REPOSITORY

_spec = importlib.util.spec_from_file_location("check_wording", REPOSITORY / "docs" / "check_wording.py")
assert _spec is not None
assert _spec.loader is not None
check_wording = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_wording)


def listed(path) -> list[int]:
    return [int(line.split(":")[1]) for line in check_wording.findings(path, check_wording.advice())]


@pytest.mark.parametrize(
    "source",
    [
        '"""Draw the rows anew."""\n',
        'class A:\n    x: int = 0\n    """The run goes on."""\n',
        'def f():\n    """Return the remedy."""\n',
        "x = 1  # the ranks that hang together\n",
        '"""Title.\n\nWhat is kept is copied.\n"""\n',
    ],
)
def test_prose_of_a_module_is_read(tmp_path, source):
    path = tmp_path / "a.py"
    path.write_text(source)
    assert len(listed(path)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'message = "the run goes on"\nanew = 1\n',
        'def f():\n    """Return as many rows as the source has."""\n',
        "x = 1  # the authors say 'goes on'  wording: quoted\n",
    ],
)
def test_code_and_quotations_are_not(tmp_path, source):
    path = tmp_path / "a.py"
    path.write_text(source)
    assert listed(path) == []


def test_markdown_is_read_outside_code(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("It goes on.\n\n```\nit goes on\n```\n\n    it goes on\n\ndrawn anew\n")
    assert listed(path) == [1, 9]


def test_the_exit_code_says_whether_lines_were_listed(tmp_path, capsys):
    (tmp_path / "a.md").write_text("plain\n")
    assert check_wording.main([str(tmp_path)]) == 0
    (tmp_path / "b.md").write_text("anew\n")
    assert check_wording.main([str(tmp_path)]) == 1
    assert "b.md:1: 'anew'" in capsys.readouterr().out

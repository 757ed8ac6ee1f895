"""The documents match the code: every package is described, and every shown command parses."""

import re
import shlex
from pathlib import Path

import pytest

from launch.cli import build_parser
from tests.runs import REPOSITORY

ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


@pytest.mark.parametrize("package", ["statex_dist", "checkpoints_tools", "launch", "benchmarks"])
def test_every_package_is_described(package: str):
    for init in sorted((REPOSITORY / package).rglob("__init__.py")):
        folder = init.parent.relative_to(REPOSITORY).as_posix()
        assert re.search(rf"^{re.escape(folder)}/ +\S", ARCHITECTURE, flags=re.MULTILINE), folder


def shown_commands(path: Path) -> list[str]:
    """Return the complete ``statex`` commands in a document's code, without those that are cut short."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"`(statex [^`\n]+)`", text) + re.findall(r"^\$ (statex .+)$", text, flags=re.MULTILINE)
    return [command for command in blocks if not re.search(r"\.\.\.|…|\||[A-Z]{3}|\s-\s|\[", command)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_shown_commands_parse(path: Path):
    for command in shown_commands(path):
        arguments = shlex.split(command, comments=True)[1:]
        if len(arguments) > 1:
            build_parser().parse_args(arguments)


def test_enough_commands_are_checked():
    assert sum(len(shown_commands(path)) for path in DOCUMENTS) >= 10

"""List wording that docs/glossary.md advises against: in docstrings, comments and Markdown.

    python docs/check_wording.py [PATH ...]

The patterns and their replacements are the rows of the section "Wording" of the glossary, so that the lint and the page
that a writer reads cannot differ. A line that ends in ``wording: quoted`` (a comment, or an HTML comment in Markdown)
quotes such a wording and is not listed. Exit code 1 if a line is listed.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
QUOTED = "wording: quoted"
FOLDERS = ("statex_dist", "checkpoints_tools", "launch", "benchmarks", "tests", "docs", "configs", "docker", "examples")
HISTORY = ("CHANGELOG.md", "glossary.md")
"""Markdown files that are not read: one reports the past, the other lists the patterns."""


def advice() -> dict[re.Pattern[str], str]:
    """Return the glossary's patterns with what to write in their place.

    Raises:
        SystemExit: The glossary has no such table.
    """
    section = GLOSSARY.read_text(encoding="utf-8").partition("\n## Wording\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `` (.+?) `` \| (.+?) \|$", section, flags=re.MULTILINE)
    if not rows:
        sys.exit(f"error: {GLOSSARY} has no rows in its section 'Wording'")
    # A bar inside a cell of a Markdown table is escaped.
    return {re.compile(pattern.replace("\\|", "|"), re.IGNORECASE): instead for pattern, instead in rows}


def python_text(source: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines of a module's docstrings and comments."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body[: None if isinstance(node, ast.Module | ast.ClassDef) else 1]:
                # A bare string documents the module, class, function, or the name that stands before it.
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                        yield line, lines[line - 1]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def markdown_text(source: str) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines of Markdown outside code blocks."""
    in_code = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith("    "):
            yield number, line


def findings(path: Path, patterns: dict[re.Pattern[str], str]) -> Iterator[str]:
    """Yield one line for each place of a file that the glossary advises against."""
    source = path.read_text(encoding="utf-8")
    for number, line in (markdown_text if path.suffix == ".md" else python_text)(source):
        if line.rstrip(" ->").endswith(QUOTED):
            continue
        for pattern, instead in patterns.items():
            if found := pattern.search(line):
                yield f"{path}:{number}: {found[0].strip()!r}: {instead}"


def main(arguments: list[str]) -> int:
    """Check files, by default all of the repository's, and return the exit code."""
    given = [Path(argument) for argument in arguments] or [*ROOT.glob("*.md"), *(ROOT / name for name in FOLDERS)]
    files = [file for path in given for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    patterns, count = advice(), 0
    for file in files:
        if file.suffix in (".py", ".md") and file.name not in HISTORY:
            for line in findings(file, patterns):
                sys.stdout.write(f"{line}\n")
                count += 1
    if count:
        sys.stdout.write(f"{count} lines; see docs/glossary.md\n")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The text of a program from its statements: what was read as it was written, comments included, the rest from trees.

A statement keeps the text that it was read from (:class:`SourceText`), which is written again if its tree is the same.
"""

from __future__ import annotations

import ast
import copy
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence

WIDTH = 120
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")


class SourceText:
    """The text that a statement was read from; unchanged as long as its tree is."""

    def __init__(self, node: ast.stmt, lines: list[str]):
        self.lines, self.tree = lines, ast.dump(node)
        self.header = _header_dump(node)


def _header_dump(node: ast.stmt) -> str:
    bare = copy.copy(node)
    for name in ("body", "orelse"):
        if hasattr(bare, name):
            setattr(bare, name, [])
    return ast.dump(bare)


def without_roles(text: str) -> str:
    """Return a text with names in place of Sphinx's references to them."""
    return _ROLE.sub(r"``\1``", text)


def import_lines(found: Mapping[str, tuple[str, str | None]]) -> str:
    """Return import statements: future, standard library, then the others; each module once."""
    lines: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for name, (module, attribute) in sorted(found.items()):
        if attribute is None:
            lines[f"import {module}" + (f" as {name}" if name != module else "")] = module
        else:
            names.setdefault(module, []).append(attribute + (f" as {name}" if name != attribute else ""))
    lines = {line: lines[line] for line in sorted(lines)}
    lines |= {f"from {module} import {', '.join(sorted(parts))}": module for module, parts in sorted(names.items())}
    sections: list[list[str]] = [["from __future__ import annotations"], [], []]
    for line, module in lines.items():
        if module != "__future__":
            sections[1 if module.split(".")[0] in sys.stdlib_module_names else 2].append(line)
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


class Writer:
    """Writes statements: those that are as they were read from their text, others from their tree."""

    def __init__(self, *, short: bool):
        self.short = short

    def statement(self, node: ast.stmt, indent: int) -> list[str]:
        """Return the lines of a statement, comments above it included."""
        origin: SourceText | None = getattr(node, "origin", None)
        lead = _lead(node, origin, indent) if origin else []
        if self.short and isinstance(node, ast.FunctionDef | ast.ClassDef):
            _shorten_docstring(node)
        if origin and ast.dump(node) == origin.tree:
            return lead + _reindented(origin.lines[_first_line(node) - 1 : node.end_lineno], indent)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If | ast.For | ast.While | ast.With):
            lines = lead + self._header(node, origin, indent)
            inner = self.block(node.body, indent + 4)
            if isinstance(node, ast.ClassDef) and ast.get_docstring(node) and len(node.body) > 1:
                count = len(self.statement(node.body[0], indent + 4))
                inner = [*inner[:count], "", *_without_blank(inner[count:])]
            lines += inner
            if orelse := getattr(node, "orelse", []):
                lines += [" " * indent + "else:", *self.block(orelse, indent + 4)]
            return lines
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return _docstring_lines(node.value.value, indent)
        return lead + wrapped(_unparsed(node), indent)

    def _header(self, node: ast.stmt, origin: SourceText | None, indent: int) -> list[str]:
        if origin and _header_dump(node) == origin.header:
            first = ast.parse("\n".join(_reindented(origin.lines[_first_line(node) - 1 : node.end_lineno], 0))).body[0]
            start = _first_line(first.body[0])  # type: ignore[attr-defined]
            lines = origin.lines[_first_line(node) - 1 : _first_line(node) + start - 2]
            while lines and (not lines[-1].strip() or lines[-1].strip().startswith("#")):
                lines = lines[:-1]
            return _reindented(lines, indent)
        if isinstance(node, ast.FunctionDef):
            decorators = [line for d in node.decorator_list for line in wrapped(f"@{ast.unparse(d)}", indent)]
            return decorators + wrapped(_signature(node), indent)
        bare = copy.copy(node)
        bare.body = [ast.Pass()]  # type: ignore[attr-defined]
        if hasattr(bare, "orelse"):
            bare.orelse = []
        return [part for line in ast.unparse(bare).splitlines()[:-1] for part in wrapped(line, indent)]

    def block(self, body: Sequence[ast.stmt], indent: int) -> list[str]:
        """Return the lines of the statements of a block; members of a class are apart."""
        lines: list[str] = []
        apart = False
        for node in body:
            found = _without_blank(lines_of := self.statement(node, indent))
            blank = bool(lines) and (apart or found != lines_of)
            lines += [*([""] if blank else []), *found]
            apart = isinstance(node, ast.FunctionDef | ast.ClassDef)
        return lines


def _unparsed(node: ast.stmt) -> str:
    """Return the text of a simple statement, tuples without parentheses where none are needed."""
    if isinstance(node, ast.Return) and node.value is not None:
        return f"return {_bare_tuple(node.value)}"
    if isinstance(node, ast.Assign):
        return " = ".join(map(_bare_tuple, [*node.targets, node.value]))
    return ast.unparse(node)


def _bare_tuple(node: ast.expr) -> str:
    if isinstance(node, ast.Tuple) and len(node.elts) > 1:
        return ", ".join(map(ast.unparse, node.elts))
    return ast.unparse(node)


def _signature(node: ast.FunctionDef) -> str:
    """Return the head of a function on one line, defaults written as they are in source."""
    found, parts = node.args, []
    plain = [*found.posonlyargs, *found.args]
    defaults = [*[None] * (len(plain) - len(found.defaults)), *found.defaults]
    for argument, default in zip(plain, defaults, strict=True):
        parts.append(_parameter(argument, default))
    if found.vararg is not None:
        parts.append("*" + ast.unparse(found.vararg))
    elif found.kwonlyargs:
        parts.append("*")
    for argument, default in zip(found.kwonlyargs, found.kw_defaults, strict=True):
        parts.append(_parameter(argument, default))
    if found.kwarg is not None:
        parts.append("**" + ast.unparse(found.kwarg))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"def {node.name}({', '.join(parts)}){returns}:"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    return ast.unparse(argument) + (" = " if argument.annotation is not None else "=") + ast.unparse(default)


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def _lead(node: ast.stmt, origin: SourceText, indent: int) -> list[str]:
    """Return the comments above a statement, and a blank line where there is one above them."""
    stop = start = _first_line(node) - 1
    while start > 0 and origin.lines[start - 1].strip().startswith("#"):
        start -= 1
    blank = [""] if start > 0 and not origin.lines[start - 1].strip() else []
    return blank + _reindented(origin.lines[start:stop], indent)


def _without_blank(lines: list[str]) -> list[str]:
    return lines[1:] if lines and not lines[0] else lines


def _reindented(lines: Sequence[str], indent: int) -> list[str]:
    text = textwrap.dedent("\n".join(lines))
    return [" " * indent + line if line.strip() else "" for line in text.splitlines()]


def _shorten_docstring(node: ast.FunctionDef | ast.ClassDef) -> None:
    """Cut a docstring after its first paragraph, and those inside."""
    for found in ast.walk(node):
        if isinstance(found, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(found, clean=False) is not None:
            text: ast.Constant = found.body[0].value  # type: ignore[attr-defined]
            written = str(text.value)
            first = " ".join(written.strip().split("\n\n")[0].split())
            text.value = _ROLE.sub(r"``\1``", first) if "\n" in written or _ROLE.search(first) else written


def _docstring_lines(text: str, indent: int) -> list[str]:
    if "\n" in text:
        lines = text.splitlines()
        return _reindented([f'"""{lines[0]}', *_reindented(lines[1:], 0)], indent)
    quote = 'r"""' if "\\" in text else '"""'
    if indent + len(quote) + len(text) + 3 <= WIDTH:
        return [f'{" " * indent}{quote}{text}"""']
    return [" " * indent + line for line in [*textwrap.wrap(quote + text, WIDTH - indent), '"""']]


def wrapped(code: str, indent: int) -> list[str]:
    """Return one statement as lines of at most :data:`WIDTH` characters, broken at its commas; strings in ``"``."""
    code = _in_double_quotes(code)
    margin = " " * indent
    if indent + len(code) <= WIDTH or "\n" in code:
        return [margin + line for line in code.splitlines()]
    brackets = _outer_brackets(code)
    if not brackets:
        return [margin + code]
    start, stop = max(brackets, key=lambda pair: pair[1] - pair[0])
    inner = code[start + 1 : stop]
    head, tail = code[: start + 1], code[stop:]
    if indent + 4 + len(inner) <= WIDTH:
        return [margin + head, f"{margin}    {inner}", margin + tail]
    parts = _parts(inner)
    if len(parts) == 1 or _is_comprehension(code[start : stop + 1]):
        return [margin + head, *wrapped(inner, indent + 4), margin + tail]
    lines = [margin + head]
    for part in parts:
        found = wrapped(part, indent + 4)
        lines += [*found[:-1], found[-1] + ","]
    return [*lines, margin + tail]


def _is_comprehension(code: str) -> bool:
    try:
        found = ast.parse(code, mode="eval").body
    except SyntaxError:  # the parameters of a function
        return False
    return isinstance(found, ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp)


def _in_double_quotes(code: str) -> str:
    """Return code whose strings are in double quotes where they hold neither quotes nor escapes."""
    lines = code.splitlines()
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except tokenize.TokenError:  # a part of a statement, which has been here already
        return code
    for token in tokens:
        (row, start), (_, stop) = token.start, token.end
        if token.type == tokenize.STRING and re.fullmatch(r"f?'[^'\"\\]*'", token.string):
            prefix, text = token.string.split("'")[:2]
            lines[row - 1] = f'{lines[row - 1][:start]}{prefix}"{text}"{lines[row - 1][stop:]}'
    return "\n".join(lines)


def _outer_brackets(code: str) -> list[tuple[int, int]]:
    found, opened = [], []
    for i, character in _outside_strings(code):
        if character in "([{":
            opened.append(i)
        elif character in ")]}":
            start = opened.pop()
            if not opened and i - start > 1:
                found.append((start, i))
    return found


def _parts(code: str) -> list[str]:
    """Return what the commas outside of brackets separate."""
    parts, depth, start = [], 0, 0
    for i, character in _outside_strings(code):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(code[start:i].strip())
            start = i + 1
    return [part for part in (*parts, code[start:].strip()) if part]


def _outside_strings(code: str) -> Iterator[tuple[int, str]]:
    quote = ""
    for i, character in enumerate(code):
        if quote:
            quote = "" if character == quote and code[i - 1] != "\\" else quote
        elif character in "'\"":
            quote = character
        else:
            yield i, character

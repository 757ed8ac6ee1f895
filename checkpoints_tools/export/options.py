"""Dictionaries that hold the options of calls: written out as arguments, which shows the values that are known."""

from __future__ import annotations

import ast
import copy
import itertools
from collections import Counter
from collections.abc import Iterator

from checkpoints_tools.export.syntax import bindings, dotted, is_constant, names


def inline_options(node: ast.FunctionDef) -> None:
    """Put a dictionary that is written out in place of a variable that holds the options of calls alone.

    Either one call in the statement behind it uses the variable, or its values are parameters, attributes and constants
    that no statement binds again.
    """
    for body in _blocks(node):
        for first, then in itertools.pairwise([*body, ast.Pass()]):
            target = _target(first)
            if target is None or not isinstance(options := first.value, ast.Dict):  # type: ignore[attr-defined]
                continue
            entry = then.targets[0] if isinstance(then, ast.Assign) else None
            if isinstance(entry, ast.Subscript) and dotted(entry.value) == target and is_constant(entry.slice):
                options.keys.append(entry.slice)
                options.values.append(then.value)  # type: ignore[attr-defined]
                body.remove(then)
                inline_options(node)
                return
            used = _spread(node, target)
            if not used or list(names(node)).count(target) != 1 + len(used):
                continue
            if len(used) > 1 or not _spread(then, target):
                bound = Counter(name for name, _ in bindings(node))
                if not all(_is_fixed(value, bound) for value in options.values):
                    continue
            for keyword in used:
                keyword.value = copy.deepcopy(options)
            body.remove(first)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Yield the lists of statements in a function."""
    for found in list(ast.walk(node)):
        for field in ("body", "orelse"):
            block = getattr(found, field, None)
            if isinstance(block, list) and block:
                yield block


def _target(node: ast.stmt) -> str | None:
    """Return the variable that a statement assigns a value to, if it is one."""
    found = (
        node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
    )
    return found.id if isinstance(found, ast.Name) else None


def _spread(node: ast.AST, name: str) -> list[ast.keyword]:
    """Return where calls are given the entries of a dictionary as arguments."""
    used = [found for found in ast.walk(node) if isinstance(found, ast.keyword)]
    return [keyword for keyword in used if keyword.arg is None and dotted(keyword.value) == name]


def _is_fixed(node: ast.expr, bound: Counter[str]) -> bool:
    """Return whether an expression is a constant, or a variable that is bound once or an attribute of one."""
    return is_constant(node) or (dotted(node) != "" and all(bound[name] <= 1 for name in names(node)))

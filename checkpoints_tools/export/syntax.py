"""What parts of a Python program say by themselves: constants, names, parameters, and the variables that they bind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def is_constant(node: ast.expr | None) -> bool:
    """Return whether a value is known."""
    return isinstance(node, ast.Constant)


def dotted(node: ast.expr) -> str:
    """Return the text of a name or of an attribute of one, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    return (
        f"{node.value.id}.{node.attr}" if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
    )


def value_of(node: ast.expr) -> Any:
    """Return the value of a constant."""
    assert isinstance(node, ast.Constant), ast.dump(node)
    return node.value


def names(node: ast.AST) -> Iterator[str]:
    """Yield the names of variables in a part of a program."""
    return (found.id for found in ast.walk(node) if isinstance(found, ast.Name))


def annotated(argument: ast.arg) -> str:
    """Return the first name in a parameter's annotation."""
    assert argument.annotation is not None
    return next(names(argument.annotation), "")


def all_arguments(node: FunctionNode) -> list[ast.arg]:
    """Return the parameters of a function, of every kind."""
    found = node.args
    extra = [argument for argument in (found.vararg, found.kwarg) if argument is not None]
    return [*found.posonlyargs, *found.args, *found.kwonlyargs, *extra]


def bindings(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Yield every variable that a function binds, at any depth, with its value where that is one assignment's."""
    simple: set[int] = set()
    for found in ast.walk(node):
        if isinstance(found, ast.Assign) and len(found.targets) == 1 and isinstance(found.targets[0], ast.Name):
            simple.add(id(found.targets[0]))
            yield found.targets[0].id, found.value
        elif isinstance(found, FunctionNode):
            yield from ((argument.arg, None) for argument in all_arguments(found))
    for found in ast.walk(node):
        if isinstance(found, ast.Name) and not isinstance(found.ctx, ast.Load) and id(found) not in simple:
            yield found.id, None
        elif isinstance(found, ast.Nonlocal | ast.Global):
            yield from ((name, None) for name in found.names)


def as_keywords(node: ast.expr) -> list[ast.keyword] | None:
    """Return the entries of a dictionary that is written out as keyword arguments, or None if they are not all."""
    assert isinstance(node, ast.Dict)
    pairs = list(zip(node.keys, node.values, strict=True))
    if not all(isinstance(key, ast.Constant) and str(key.value).isidentifier() for key, _ in pairs):
        return None
    return [ast.keyword(str(value_of(key)), value) for key, value in pairs if key is not None]

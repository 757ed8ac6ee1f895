"""What all uses of a definition tell of it: parameters that are constant, fields that nothing reads."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from typing import Any

from checkpoints_tools.export.syntax import bindings, dotted, is_constant, value_of


def has_decorator(node: ast.ClassDef, name: str) -> bool:
    """Return whether a class has a decorator, with arguments or without."""
    return any(
        isinstance(found, ast.Name) and found.id == name
        for decorator in node.decorator_list
        for found in [decorator.func if isinstance(decorator, ast.Call) else decorator]
    )


def result_of(node: ast.FunctionDef) -> ast.expr | None:
    """Return what a function returns if it does nothing else."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None


def known_properties(node: ast.ClassDef) -> dict[str, Any]:
    """Return the properties of a class that are constant, and those that are a dictionary that is written out."""
    found: dict[str, Any] = {}
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and [dotted(d) for d in member.decorator_list] == ["property"]:
            value = result_of(member)
            if isinstance(value, ast.Constant):
                found[member.name] = value.value
            elif isinstance(value, ast.Dict):
                found[member.name] = value
    return found


class Uses:
    """Where a program uses the names of its definitions.

    Attributes:
        count: How often a name occurs.
        calls: The calls of it.
    """

    def __init__(self, program: Iterable[ast.AST]):
        self.count: Counter[str] = Counter()
        self.calls: dict[str, list[ast.Call]] = {}
        for part in program:
            for node in ast.walk(part):
                if isinstance(node, ast.Name):
                    self.count[node.id] += 1
                elif isinstance(node, ast.Attribute):
                    self.count[dotted(node)] += 1
                elif isinstance(node, ast.Call):
                    self.calls.setdefault(dotted(node.func), []).append(node)


def fix_parameters(function: ast.FunctionDef, uses: Uses, name: str) -> dict[str, Any]:
    """Take parameters that every call gives the same constant out of a function and its calls; return their values.

    A function that is used other than by calling it, or called with ``*`` or ``**``, stays as it is.

    Args:
        function: The function.
        uses: Of the program.
        name: As which it is called; ``Class.method`` of a class method.
    """
    found = uses.calls.get(name, [])
    starred = any(isinstance(a, ast.Starred) for call in found for a in call.args)
    if uses.count[name] != len(found) or not found or starred or any(map(_takes_mapping, found)):
        return {}
    values = {}
    bound = [name for name, _ in bindings(function)]
    first = "." in name
    for argument in (*function.args.args[first:], *function.args.kwonlyargs):
        if bound.count(argument.arg) > 1:  # it has another value later
            continue
        given = [_given(call, function, argument, first) for call in found]
        constants = {repr(value_of(value)) if is_constant(value) else None for value in given if value is not None}
        if len(constants) == 1 and None not in constants and None not in given:
            assert given[0] is not None
            values[argument.arg] = value_of(given[0])
    for parameter in values:
        for call in found:
            _drop_argument(call, function, parameter, first)
        _drop_parameter(function, parameter)
    return values


def _given(call: ast.Call, function: ast.FunctionDef, argument: ast.arg, first: int) -> ast.expr | None:
    """Return what a call, whose arguments begin with the parameter ``first``, gives one, or its default."""
    for keyword in call.keywords:
        if keyword.arg == argument.arg:
            return keyword.value
    arguments = function.args
    if argument in arguments.kwonlyargs:
        return arguments.kw_defaults[arguments.kwonlyargs.index(argument)]
    place = arguments.args.index(argument)
    if place - first < len(call.args):
        return call.args[place - first]
    default = place - (len(arguments.args) - len(arguments.defaults))
    return arguments.defaults[default] if default >= 0 else None


def _drop_argument(call: ast.Call, function: ast.FunctionDef, name: str, first: int) -> None:
    positions = [argument.arg for argument in function.args.args[first:]]
    if name in positions and positions.index(name) < len(call.args):
        del call.args[positions.index(name)]
    call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]


def _drop_parameter(function: ast.FunctionDef, name: str) -> None:
    arguments = function.args
    for i, argument in enumerate(arguments.args):
        if argument.arg == name:
            default = i - (len(arguments.args) - len(arguments.defaults))
            if default >= 0:
                del arguments.defaults[default]
            del arguments.args[i]
            return
    place = [argument.arg for argument in arguments.kwonlyargs].index(name)
    del arguments.kwonlyargs[place], arguments.kw_defaults[place]


def _takes_mapping(call: ast.Call) -> bool:
    return any(keyword.arg is None for keyword in call.keywords)


def drop_unread_fields(node: ast.ClassDef, read: set[str], uses: Uses) -> None:
    """Take fields that nothing reads out of a data class and its calls.

    Args:
        node: The class; one that is made by position stays as it is.
        read: Names of all attributes that the program reads.
        uses: Of the program.
    """
    if not (has_decorator(node, "dataclass") or "NamedTuple" in {ast.unparse(base) for base in node.bases}):
        return
    fields = {m.target.id: m for m in node.body if isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name)}
    unread = fields.keys() - read
    made = uses.calls.get(node.name, []) + Uses([node]).calls.get("cls", [])
    if any(call.args or _takes_mapping(call) for call in made):
        return
    for call in made:
        call.keywords = [keyword for keyword in call.keywords if keyword.arg not in unread]
    dropped = [fields[name] for name in unread]
    node.body = [member for member in node.body if member not in dropped] or [ast.Pass()]

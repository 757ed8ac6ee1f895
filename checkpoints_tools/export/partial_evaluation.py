"""Partial evaluation of Python source: values that are known in an export are put in, and branches without use go.

It is what makes one implementation serve both sides: mixers and scans ask for kernels, context parallelism and
mitigations in ordinary ``if`` statements, which an export answers once, when it is written. Tests of these statements
and values of local variables are taken to have no side effects.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints_tools.export.options import inline_options
from checkpoints_tools.export.syntax import (
    all_arguments,
    annotated,
    as_keywords,
    bindings,
    dotted,
    is_constant,
    names,
    value_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Facts about a program that are known before it runs.

    Attributes:
        calls: Results of calls, by the name of the function (``has_fla``, ``Class.method``).
        attributes: Values of attributes, whatever their owner.
        fields: Values of attributes of the parameters that are annotated with a class, by class and attribute.
    """

    calls: Mapping[str, Any]
    attributes: Mapping[str, Any]
    fields: Mapping[str, Mapping[str, Any]]


class PartialEvaluator(ast.NodeTransformer):
    """Evaluates one definition in place: expressions, ``if`` statements, and variables that hold a constant."""

    def __init__(self, known: Known):
        self.known = known
        self.typed: dict[str, str] = {}
        self.values: dict[str, Any] = {}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Put a known value in place of a variable."""
        if isinstance(node.ctx, ast.Load) and node.id in self.values:
            return ast.Constant(self.values[node.id])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Put a known value in place of an attribute that is read."""
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        owner = self.typed.get(node.value.id) if isinstance(node.value, ast.Name) else None
        for values in (self.known.fields.get(owner or "", {}), self.known.attributes):
            if node.attr in values:
                found = values[node.attr]
                return _of(node.value, found) if isinstance(found, ast.expr) else ast.Constant(found)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Put a known result in place of a call."""
        self.generic_visit(node)
        called = dotted(node.func)
        for keyword in [k for k in node.keywords if k.arg is None and isinstance(k.value, ast.Dict)]:
            if keyword.value.keys == [None]:  # type: ignore[attr-defined]
                keyword.value = keyword.value.values[0]  # type: ignore[attr-defined]
                continue
            given = as_keywords(keyword.value)
            if given is not None:
                at = node.keywords.index(keyword)
                node.keywords[at : at + 1] = given
        if called in self.known.calls:
            return ast.Constant(self.known.calls[called])
        if called == "isinstance" and is_constant(node.args[0]) and value_of(node.args[0]) is None:
            return ast.Constant(False)
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.expr:
        """Put the entries of a dictionary that is written out in place of ``**`` and it."""
        self.generic_visit(node)
        pairs: list[tuple[ast.expr | None, ast.expr]] = []
        for key, value in zip(node.keys, node.values, strict=True):
            inner = key is None and isinstance(value, ast.Dict)
            pairs += zip(value.keys, value.values, strict=True) if inner else [(key, value)]  # type: ignore[attr-defined]
        node.keys, node.values = [key for key, _ in pairs], [value for _, value in pairs]
        return node

    def visit_DictComp(self, node: ast.DictComp) -> ast.expr:
        """Leave entries out of a dictionary that is written out, where a comprehension does so by their names."""
        self.generic_visit(node)
        match node:
            case ast.DictComp(
                key=ast.Name(id=key),
                value=ast.Name(id=value),
                generators=[
                    ast.comprehension(
                        target=ast.Tuple(elts=[ast.Name(id=first), ast.Name(id=second)]),
                        iter=ast.Call(func=ast.Attribute(value=ast.Dict() as entries, attr="items"), args=[]),
                        ifs=[
                            ast.Compare(
                                left=ast.Name(id=tested), ops=[ast.NotEq()], comparators=[ast.Constant(dropped)]
                            )
                        ],
                    )
                ],
            ) if (key, value) == (first, second) and tested == key and as_keywords(entries) is not None:
                kept = [
                    (k, v) for k, v in zip(entries.keys, entries.values, strict=True) if k and value_of(k) != dropped
                ]
                return ast.Dict([k for k, _ in kept], [v for _, v in kept])
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        """Write known values into a text."""
        self.generic_visit(node)
        parts: list[ast.expr] = []
        for part in node.values:
            plain = isinstance(part, ast.FormattedValue) and part.conversion == -1 and part.format_spec is None
            if plain and is_constant(part.value):  # type: ignore[attr-defined]
                part = ast.Constant(str(value_of(part.value)))  # type: ignore[attr-defined]
            if parts and is_constant(part) and is_constant(parts[-1]):
                part = ast.Constant(value_of(parts.pop()) + value_of(part))
            parts.append(part)
        node.values = parts
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        """Evaluate ``not``."""
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and is_constant(node.operand):
            return ast.Constant(not value_of(node.operand))
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """Evaluate a comparison of two known values."""
        self.generic_visit(node)
        if len(node.ops) > 1 or not is_constant(node.left) or not is_constant(node.comparators[0]):
            return node
        left, right = value_of(node.left), value_of(node.comparators[0])
        match node.ops[0]:
            case ast.Is() | ast.Eq():
                return ast.Constant((type(left), left) == (type(right), right))
            case ast.IsNot() | ast.NotEq():
                return ast.Constant((type(left), left) != (type(right), right))
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """Leave known operands out, as far as the value allows it."""
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        kept = []
        for value in node.values:
            known = is_constant(value) and isinstance(value_of(value), bool)
            if known and value_of(value) is decides:  # where a truth value is known, the others are truth values too
                return value
            if not known:
                kept.append(value)
        if not kept:
            return node.values[-1]
        if len(kept) > 1 and is_constant(kept[0]):
            return kept[0] if bool(value_of(kept[0])) is decides else _with_values(node, kept[1:])
        return _with_values(node, kept)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """Choose a branch."""
        self.generic_visit(node)
        if is_constant(node.test):
            return node.body if value_of(node.test) else node.orelse
        return node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        """Choose a branch, and leave out a statement without any."""
        self.generic_visit(node)
        if is_constant(node.test):
            return node.body if value_of(node.test) else node.orelse
        return without_empty_branch(node) or []

    def visit_Assert(self, node: ast.Assert) -> ast.stmt | None:
        """Leave out an assertion that holds."""
        self.generic_visit(node)
        return None if is_constant(node.test) and value_of(node.test) else node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        """Leave out a statement that does nothing."""
        constant = is_constant(node.value)  # a docstring
        self.generic_visit(node)
        return None if is_constant(node.value) and not constant else node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        """Part the assignment of a tuple where a value in it is known."""
        self.generic_visit(node)
        target = node.targets[0]
        if not (isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(node.targets) == 1):
            return node
        pairs = list(zip(target.elts, node.value.elts, strict=False))
        if len(target.elts) != len(node.value.elts) or not any(is_constant(value) for _, value in pairs):
            return node
        stored = [set(names(part)) for part, _ in pairs]
        if any(stored[i] & set(names(value)) for j, (_, value) in enumerate(pairs) for i in range(j)):
            return node
        return [ast.Assign([part], value, lineno=node.lineno) for part, value in pairs]

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:
        """Evaluate a class; ``self`` has its fields."""
        before, self.typed = self.typed, {**self.typed, "self": node.name}
        self.generic_visit(node)
        self.typed = before
        node.body = node.body or [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        """Evaluate a function, and take out what is behind a return and variables that are not read."""
        before = self.typed, self.values
        arguments = all_arguments(node)
        self.typed = {**self.typed, **{a.arg: annotated(a) for a in arguments if a.annotation is not None}}
        self.values = {name: value for name, value in self.values.items() if name not in {a.arg for a in arguments}}
        self.generic_visit(node)
        inline_options(node)
        self.values = {**self.values, **constant_variables(node)}
        if self.values:
            self.generic_visit(node)
        self.typed, self.values = before
        node.body = without_unread(node, reachable(node.body)) or [ast.Pass()]
        return node


def _with_values(node: ast.BoolOp, values: list[ast.expr]) -> ast.expr:
    node.values = values
    return node if len(values) > 1 else values[0]


def reachable(body: list[ast.stmt]) -> list[ast.stmt]:
    """Return statements up to the first that leaves their block, there and in every block inside."""
    kept: list[ast.stmt] = []
    for statement in body:
        for field in ("body", "orelse"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list) and inner and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                setattr(statement, field, reachable(inner))
        kept.append(statement)
        if isinstance(statement, ast.Return | ast.Raise):
            break
    return kept


def constant_variables(node: ast.FunctionDef) -> dict[str, Any]:
    """Return the variables of a function that are bound once, to a constant, or before a parameter's value is read.

    A variable that is bound to None, and again only where it is not None, is None throughout.
    """
    found: dict[str, list[ast.expr | None]] = {}
    for name, value in bindings(node):
        found.setdefault(name, []).append(value)
    constants = {name: [v for v in values if v is not None and is_constant(v)] for name, values in found.items()}
    overwritten = set()
    read: set[str] = {argument.arg for argument in all_arguments(node)}
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            overwritten |= {statement.targets[0].id} & read
        read -= set(names(statement))
    never = _bound_where_not_none(node)
    single = {name: value_of(values[0]) for name, values in constants.items() if len(values) == 1}
    return {
        name: value
        for name, value in single.items()
        if len(found[name]) - (name in overwritten) - (never[name] if value is None else 0) == 1
    }


def _bound_where_not_none(node: ast.FunctionDef) -> Counter[str]:
    """Return how often variables are bound in branches that ask whether they are not None."""
    counts: Counter[str] = Counter()
    for found in ast.walk(node):
        match found:
            case ast.If(
                test=ast.Compare(left=ast.Name(id=name), ops=[ast.IsNot()], comparators=[ast.Constant(value=None)])
            ):
                counts[name] += sum(bound == name for part in found.body for bound, _ in bindings(part))
    return counts


def without_unread(node: ast.FunctionDef, body: list[ast.stmt]) -> list[ast.stmt]:
    """Return statements without assignments to variables that the function does not read."""
    read = {found.id for found in ast.walk(node) if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Load)}
    kept: list[ast.stmt] = []
    for statement in body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        unread = isinstance(target, ast.Name) and target.id not in read
        if unread and isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        for field in ("body", "orelse"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list) and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                left = without_unread(node, inner)
                needs_one = field == "body" and not isinstance(statement, ast.If)
                setattr(statement, field, left or ([ast.Pass()] if needs_one else []))
        if not isinstance(statement, ast.If):
            kept.append(statement)
        elif (remaining := without_empty_branch(statement)) is not None:
            kept.append(remaining)
    return kept


def without_empty_branch(node: ast.If) -> ast.If | None:
    """Return an ``if`` statement whose first branch has statements, or None where neither has."""
    if not node.body and node.orelse:
        node.test, node.body, node.orelse = ast.UnaryOp(ast.Not(), node.test), node.orelse, []
    return node if node.body else None


def _of(owner: ast.expr, value: ast.expr) -> ast.expr:
    """Return the value of a property of a variable from an expression of ``self``."""
    found = copy.deepcopy(value)
    for node in ast.walk(found):
        if isinstance(node, ast.Name) and node.id == "self":
            node.id = dotted(owner)
    return found

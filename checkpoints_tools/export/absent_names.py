"""A part of a program that is left out by name: variables, parameters and fields that hold None in an export.

Layers hand an option such as ``features`` from function to function under one name. An export that does not have the
option needs neither the parameters nor the branches.
"""

from __future__ import annotations

import ast
from collections.abc import Set


class AbsentNames(ast.NodeTransformer):
    """Takes names out of a definition: what reads one reads None, and parameters, arguments and fields go.

    Args:
        absent: Names that hold None wherever the program has them.
    """

    def __init__(self, absent: Set[str]):
        self.absent = absent

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Put None in place of a variable."""
        return ast.Constant(None) if node.id in self.absent and isinstance(node.ctx, ast.Load) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """Put None in place of an attribute."""
        self.generic_visit(node)
        return ast.Constant(None) if node.attr in self.absent and isinstance(node.ctx, ast.Load) else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Leave the argument out; one that is given by its place has the name of its parameter."""
        node.args = [argument for argument in node.args if not self._is_absent(argument)]
        self.generic_visit(node)
        node.keywords = [keyword for keyword in node.keywords if keyword.arg not in self.absent]
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.expr:
        """Leave the entry of a dictionary of options out."""
        self.generic_visit(node)
        pairs = [(k, v) for k, v in zip(node.keys, node.values, strict=True) if not self._is_key(k)]
        node.keys, node.values = [key for key, _ in pairs], [value for _, value in pairs]
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | None:
        """Leave the variable out."""
        self.generic_visit(node)
        return None if self._is_absent(node.targets[0]) else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        """Leave the variable or the field out."""
        self.generic_visit(node)
        return None if self._is_absent(node.target) else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt | None:
        """Leave the parameter out, or the property of this name."""
        if node.name in self.absent:
            return None
        arguments = node.args
        defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
        kept = [pair for pair in zip(arguments.args, defaults, strict=True) if pair[0].arg not in self.absent]
        arguments.args, arguments.defaults = [a for a, _ in kept], [d for _, d in kept if d is not None]
        by_name = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        named = [pair for pair in by_name if pair[0].arg not in self.absent]
        arguments.kwonlyargs, arguments.kw_defaults = [a for a, _ in named], [d for _, d in named]
        self.generic_visit(node)
        return node

    def _is_key(self, node: ast.expr | None) -> bool:
        return isinstance(node, ast.Constant) and node.value in self.absent

    def _is_absent(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.absent

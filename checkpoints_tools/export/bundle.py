"""One file from the parts of several modules that a few names need: the code of an export.

Modules are read as text and never imported. From the wanted names the definitions are followed through imports of our
own packages. Of a class only the members remain whose names the program uses. What is known before (:class:`Known`) is
evaluated, so that branches without use, and what only they need, are left out. A statement that stays as it is keeps
its text and comments; docstrings keep their first paragraph.
"""

from __future__ import annotations

import ast
import builtins
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints_tools.export.absent_names import AbsentNames
from checkpoints_tools.export.interprocedural import (
    Uses,
    drop_unread_fields,
    fix_parameters,
    known_properties,
    result_of,
)
from checkpoints_tools.export.partial_evaluation import Known, PartialEvaluator
from checkpoints_tools.export.source_text import SourceText, Writer, import_lines, without_roles
from checkpoints_tools.export.syntax import bindings, dotted

_ROOT = Path(__file__).parents[2]
_CALLED_BY_TORCH = {"forward", "backward"}
_FOR_OUR_CHECKS = re.compile(r"  # (?:type: ignore|noqa).*")


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleSpec:
    """Modules and changes that make up a bundle.

    Attributes:
        root: Dotted name of the module that has the wanted names.
        names: The wanted names.
        packages: Our own packages; other imports are kept.
        edits: Texts of modules that are replaced before they are read, by module.
        replaced: Replacement of a definition, by name: another definition, as ``module:name``, or a builtin.
        optional: Source of a definition if the module that it is imported from lacks it, by name.
        whole: Prefix of the modules whose classes keep all members and docstrings.
        dropped: Members that are removed from all other classes.
        bare: Classes whose subclasses are no data classes here: they lose fields and decorators.
        known: Facts that are known before the program runs.
        absent: Names of options, such as parameters and fields, that are None throughout: they are left out.
    """

    root: str
    names: Sequence[str]
    packages: Sequence[str]
    edits: Mapping[str, Sequence[tuple[str, str]]]
    replaced: Mapping[str, str]
    optional: Mapping[str, str]
    whole: str
    dropped: frozenset[str]
    bare: frozenset[str]
    known: Known
    absent: frozenset[str] = frozenset()


class BundleError(Exception):
    """The parts do not make a program: a programming error in the table of the export or in a module."""


@dataclass
class _Module:
    """A module's definitions and imports, by name; each import as ``(module, name or None)``."""

    name: str
    heading: str
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)


@dataclass
class _Definition:
    """Statements of one name in the program: a function, a class, or an assignment and the text about it."""

    module: _Module
    nodes: list[ast.stmt]

    @property
    def main(self) -> ast.stmt:
        return self.nodes[0]


def bundle(spec: BundleSpec) -> str:
    """Return the source of the program, without a docstring.

    Raises:
        BundleError: A wanted name or module is missing, or two definitions or imports have one name.
    """
    return _Bundle(spec).source()


class _Bundle:
    def __init__(self, spec: BundleSpec):
        self.spec = spec
        known = spec.known
        self.known_calls, self.known_fields = dict(known.calls), {name: dict(f) for name, f in known.fields.items()}
        self.known = Known(calls=self.known_calls, attributes=known.attributes, fields=self.known_fields)
        self.modules: dict[str, _Module] = {}
        self.program: dict[str, _Definition] = {}
        self.emitted: dict[tuple[str, str], str] = {}
        self.external: dict[str, tuple[str, str | None]] = {}
        self.missing: dict[str, str] = {}
        for name in spec.names:
            self._include(spec.root, name)
        self._simplify()

    # Reading

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            path = _path(name)
            if not path.is_file():
                raise BundleError(f"there is no module {name}")
            text = path.read_text(encoding="utf-8")
            for old, new in self.spec.edits.get(name, ()):
                if old not in text:
                    raise BundleError(f"{name} does not hold {old!r}, which is to be replaced")
                text = text.replace(old, new)
            self.modules[name] = self._read(name, _FOR_OUR_CHECKS.sub("", text), is_package=path.stem == "__init__")
        return self.modules[name]

    def _read(self, name: str, text: str, *, is_package: bool) -> _Module:
        tree, lines = ast.parse(text), text.splitlines()
        module = _Module(name, (ast.get_docstring(tree) or name).splitlines()[0].rstrip("."))
        last: list[ast.stmt] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt):
                node.origin = SourceText(node, lines)  # type: ignore[attr-defined]
        for node in _top_level(tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module.imports |= _imported(node, name, is_package=is_package)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                module.definitions[node.name] = last = [node]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                last = [node]
                module.definitions |= {t.id: last for t in targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.Expr) and last and isinstance(node.value, ast.Constant):
                last.append(node)
        return module

    def _is_ours(self, module: str) -> bool:
        return module.split(".")[0] in self.spec.packages

    def _find(self, module: str, name: str) -> tuple[str, str] | None:
        """Return where a name of one of our modules is defined, after replacements; None for a builtin."""
        if name in self.spec.replaced:
            place, _, instead = self.spec.replaced[name].rpartition(":")
            return (place, instead) if place else None
        found = self._module(module)
        if name in found.definitions:
            return module, name
        if name in found.imports:
            target, attribute = found.imports[name]
            if self._is_ours(target) and attribute is not None:
                return self._find(target, attribute)
        if name in self.spec.optional:
            place, _, instead = self.spec.optional[name].rpartition(":")
            return place, instead
        raise BundleError(f"{module} has no definition of {name}")

    # Following names

    def _include(self, module: str, name: str) -> str:
        """Bring a definition and all that it needs into the program; return its name there."""
        found = self._find(module, name)
        if found is None:
            return self.spec.replaced[name]
        if found in self.emitted:
            return self.emitted[found]
        place, name = found
        emitted = name
        if emitted in self.program or emitted in self.external:
            emitted = f"_{place.rpartition('.')[2]}_{name.lstrip('_')}"
        self.emitted[found] = emitted
        source = self._module(place)
        definition = _Definition(source, copy.deepcopy(source.definitions[name]))
        if self.spec.absent:
            definition.nodes = [AbsentNames(self.spec.absent).visit(node) for node in definition.nodes]
        self._evaluate(definition)
        self.program[emitted] = definition
        try:
            self._follow(definition, name, emitted)
        except BundleError as error:
            self.missing[emitted] = str(error)
            raise
        return emitted

    def _follow(self, definition: _Definition, name: str, emitted: str) -> None:
        """Bring what a definition needs into the program, and give all of it the names there."""
        source = definition.module
        renamed = {name: emitted} if name != emitted else {}
        known = {*dir(builtins), *(bound for node in definition.nodes for bound in _bound(node)), "__name__"}
        attributes = _OfModules(source.imports, self._is_ours)
        definition.nodes = [attributes.visit(node) for node in definition.nodes]
        for used in dict.fromkeys(self._used_names(definition)):
            target, attribute = attributes.imports.get(used, (None, None))
            if used == name:
                continue
            if used in source.definitions or (target and self._is_ours(target)):
                place = (source.name, used) if target is None else (target, attribute or used)
                mine = self._include_if_there(*place)
                renamed |= {used: mine} if mine != used else {}
            elif target:
                self._import(used, target, attribute, source.name)
            elif used not in known:
                raise BundleError(f"{source.name}, {name}: {used} is not defined")
        _rename(definition, renamed)

    def _order(self) -> list[str]:
        """Return the modules of the program, each after those that it uses."""
        order: dict[str, None] = {}
        started: set[str] = set()

        def visit(place: str) -> None:
            if place in started:
                return
            started.add(place)
            for definition in self.program.values():
                if definition.module.name == place:
                    for name in self._used_names(definition):
                        if name in self.program:
                            visit(self.program[name].module.name)
            order[place] = None

        for definition in self.program.values():
            visit(definition.module.name)
        return list(order)

    def _include_if_there(self, module: str, name: str) -> str:
        """Return the name of :meth:`_include`, or one that nothing may use when all is left out that can be."""
        try:
            return self._include(module, name)
        except BundleError as error:
            self.missing[f"_missing_{name}"] = str(error)
            return f"_missing_{name}"

    def _import(self, name: str, module: str, attribute: str | None, place: str) -> None:
        if self.external.setdefault(name, (module, attribute)) != (module, attribute) or name in self.program:
            raise BundleError(f"{place} imports another {name} than the modules before it")

    def _used_names(self, definition: _Definition) -> Iterator[str]:
        for node in definition.nodes:
            for found in ast.walk(node):
                if isinstance(found, ast.Name):
                    yield found.id

    # Leaving out

    def _evaluate(self, definition: _Definition, values: Mapping[str, object] | None = None) -> None:
        main = definition.main
        if isinstance(main, ast.ClassDef) and not self._is_whole(definition):
            if {main.name, *map(ast.unparse, main.bases)} & self._bare_classes():
                main.decorator_list = []
                main.body = [m for m in main.body if not isinstance(m, ast.AnnAssign) and not _is_text(m, main)]
            main.body = [m for m in main.body if getattr(m, "name", None) not in self.spec.dropped] or [ast.Pass()]
        if isinstance(main, ast.FunctionDef | ast.ClassDef):
            evaluation = PartialEvaluator(self.known)
            evaluation.values = dict(values or {})
            evaluation.visit(main)
            if isinstance(main, ast.ClassDef) and main.name in self.known_fields:
                self.known_fields[main.name].update(known_properties(main))

    def _bare_classes(self) -> set[str]:
        found = set(self.spec.bare)
        for name, definition in self.program.items():
            main = definition.main
            if isinstance(main, ast.ClassDef) and {ast.unparse(base) for base in main.bases} & found:
                found.add(name)
        return found

    def _is_whole(self, definition: _Definition) -> bool:
        return definition.module.name.startswith(self.spec.whole)

    def _simplify(self) -> None:
        """Evaluate and leave out until nothing changes."""
        state: list[str] = []
        while (now := [ast.dump(node) for d in self.program.values() for node in d.nodes]) != state:
            state = now
            read = self._keep_reached()
            uses = Uses(node for d in self.program.values() for node in d.nodes)
            for definition in self.program.values():
                main, values = definition.main, {}
                if isinstance(main, ast.FunctionDef) and not main.decorator_list:
                    values = fix_parameters(main, uses, main.name)
                    if isinstance(result := result_of(main), ast.Constant):
                        self.known_calls[main.name] = result.value
                elif isinstance(main, ast.ClassDef):
                    drop_unread_fields(main, read, uses)
                    self._fix_class_methods(main, uses)
                self._evaluate(definition, values)

    def _fix_class_methods(self, node: ast.ClassDef, uses: Uses) -> None:
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and [ast.unparse(d) for d in member.decorator_list] == [
                "classmethod"
            ]:
                evaluation = PartialEvaluator(self.known)
                evaluation.values = fix_parameters(member, uses, f"{node.name}.{member.name}")
                evaluation.visit(member)

    def _keep_reached(self) -> set[str]:
        """Leave out definitions and members that the wanted names do not reach; return the attributes in use."""
        reached, attributes = set(self.spec.names), set(_CALLED_BY_TORCH)
        read: dict[int, tuple[set[str], set[str]]] = {}
        size = -1
        while size != (size := len(reached) + len(attributes)):
            for name in [name for name in self.program if name in reached]:
                for part in self._live_parts(self.program[name], attributes):
                    if id(part) not in read:
                        read[id(part)] = _read_names(part)
                    reached |= read[id(part)][0]
                    attributes |= read[id(part)][1]
        self.program = {name: d for name, d in self.program.items() if name in reached}
        for definition in self.program.values():
            if isinstance(main := definition.main, ast.ClassDef) and not self._is_whole(definition):
                live = self._live_parts(definition, attributes)
                main.body = [member for member in main.body if member in live] or [ast.Pass()]
        return attributes

    def _live_parts(self, definition: _Definition, attributes: set[str]) -> list[ast.AST]:
        main = definition.main
        if not isinstance(main, ast.ClassDef) or self._is_whole(definition):
            return [*definition.nodes]
        parts: list[ast.AST] = [*main.bases, *main.decorator_list, *main.keywords]
        for member in main.body:
            name = member.name if isinstance(member, ast.FunctionDef) else None
            if name is None or name in attributes or (name.startswith("__") and name.endswith("__")):
                parts.append(member)
        return parts

    # Writing

    def source(self) -> str:
        """Return the text: imports, then the definitions of each module below its heading."""
        back: dict[str, str] = {}
        for (place, original), name in self.emitted.items():
            if name in self.program and name != original:
                if original not in {*self.program, *back.values()}:
                    back[name] = original
                elif not original.startswith("_"):
                    raise BundleError(f"{original} is in {place} and in another module")
        self.program = {back.get(name, name): d for name, d in self.program.items()}
        for definition in self.program.values():
            _rename(definition, back)
        used = {name for d in self.program.values() for name in self._used_names(d)}
        external = {
            name: self.external[name]
            for d in self.program.values()
            for name in self._used_names(d)
            if name in self.external and d.module.imports.get(name) == self.external[name]
        }
        if missing := sorted((used | self.program.keys()) & self.missing.keys()):
            raise BundleError(self.missing[missing[0]])
        for definition in self.program.values():
            inside = [node for part in definition.nodes for node in ast.walk(part)]
            if any(isinstance(node, ast.Import | ast.ImportFrom) for node in inside):
                raise BundleError(f"{definition.module.name} imports inside of a function, which the export would need")
            if left := self.spec.absent & {name for part in definition.nodes for name in _bound(part)}:
                raise BundleError(f"{definition.module.name} still sets {sorted(left)[0]}, which the export has not")
        parts = [import_lines(external)]
        for place in self._order():
            found = [d for d in self.program.values() if d.module.name == place]
            found = sorted({id(d.main): d for d in found}.values(), key=lambda d: _line(d.main))
            if not found:
                continue
            writer = Writer(short=not place.startswith(self.spec.whole))
            texts = ["\n".join(writer.block(d.nodes, 0)) for d in found]
            separated = texts[0]
            for before, definition, text in zip(found, found[1:], texts[1:], strict=False):
                close = all(isinstance(d.main, ast.Assign | ast.AnnAssign) for d in (before, definition))
                separated += ("\n" if close else "\n\n\n") + text
            first = "\n" if isinstance(found[0].main, ast.Assign | ast.AnnAssign) else "\n\n"
            heading = without_roles(found[0].module.heading)
            parts.append(f"\n\n# {heading}{first}{separated.strip()}\n")
        return "".join(parts)


def _path(module: str) -> Path:
    """Return where the text of a module is, if there is one."""
    path = _ROOT / (module.replace(".", "/") + ".py")
    return path if path.is_file() else path.with_suffix("") / "__init__.py"


class _OfModules(ast.NodeTransformer):
    """Replaces attributes of our modules by names, and adds an import for each."""

    def __init__(self, imports: Mapping[str, tuple[str, str | None]], is_ours: Callable[[str], bool]):
        self.imports, self.is_ours = dict(imports), is_ours

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        target, attribute = self.imports.get(owner, ("", None))
        module = f"{target}.{attribute}" if attribute else target
        if not self.is_ours(module) or not _path(module).is_file():
            return node
        self.imports[dotted(node)] = module, node.attr
        return ast.Name(dotted(node), node.ctx)


def _top_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those for type checkers too, and assignments of tuples name by name."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from node.body
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert isinstance(node.value, ast.Tuple), ast.unparse(node)
            for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                yield ast.copy_location(ast.Assign([target], value), node)
        else:
            yield node


def _imported(node: ast.Import | ast.ImportFrom, module: str, *, is_package: bool) -> dict[str, tuple[str, str | None]]:
    if isinstance(node, ast.Import):
        return {
            alias.asname or alias.name.split(".")[0]: (alias.name if alias.asname else alias.name.split(".")[0], None)
            for alias in node.names
        }
    base = node.module or ""
    if node.level:
        above = module.split(".")[: None if is_package and node.level == 1 else -node.level + is_package]
        base = ".".join([*above, *([node.module] if node.module else [])])
    return {alias.asname or alias.name: (base, alias.name) for alias in node.names}


def _read_names(part: ast.AST) -> tuple[set[str], set[str]]:
    """Return the names and the attributes that a part of a program reads or sets."""
    found, attributes = set(), set()
    for node in ast.walk(part):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr"):
            attributes.add(ast.unparse(node.args[1]).strip("'"))
    return found, attributes


def _is_text(member: ast.stmt, owner: ast.ClassDef) -> bool:
    """Return whether a member of a class is a text about a field, not the class's docstring."""
    return isinstance(member, ast.Expr) and member is not owner.body[0]


def _bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that a definition binds in itself."""
    yield from (name for name, _ in bindings(node))
    for found in ast.walk(node):
        if isinstance(found, ast.alias):
            yield (found.asname or found.name).split(".")[0]
        elif name := getattr(found, "name", None):  # nested definitions, exceptions, patterns
            yield name


def _rename(definition: _Definition, renamed: Mapping[str, str]) -> None:
    if not renamed:
        return
    for node in definition.nodes:
        for found in ast.walk(node):
            if isinstance(found, ast.arg) and found.arg in renamed:
                raise BundleError(
                    f"{definition.module.name}: a parameter hides {found.arg}, which has another name here"
                )
            if isinstance(found, ast.Name) and found.id in renamed:
                found.id = renamed[found.id]
    main = definition.main
    if isinstance(main, ast.FunctionDef | ast.ClassDef):
        main.name = renamed.get(main.name, main.name)


def _line(node: ast.stmt) -> int:
    return node.lineno

"""``modeling_statex.py``: a model's own code, with which transformers opens it where nothing of ours is installed.

The file is put together from the modules of :mod:`checkpoints_tools.export.remote_code` that the family needs, read as
text: their docstrings become headings, imports of each other are dropped, and all other imports go to the top.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from statex_dist import __version__
from statex_dist.models.plan_keys import OUR_CODE_PREFIX

FAMILY_MODULES = {
    "gla": "gla",
    "retnet": "retnet",
    "hgrn2": "hgrn2",
    "minimax": "lightning",
    "gated_deltanet": "gated_deltanet",
    "kda": "kda",
    "mamba2": "mamba2",
    "mamba2_state_spaces": "state_spaces",
}
"""The module of each family that has such code, by ``MODEL_TYPE``."""

_FOLDER = Path(__file__).with_name("remote_code")
_HEAD, _EXAMPLE = "head", "gla"
"""The module that comes last, and the family that it imports; any other takes that one's place."""

_MODEL_TYPE = re.compile(rf'^(    model_type = ")(?!{OUR_CODE_PREFIX})(?=\w+"$)', flags=re.MULTILINE)
_FOR_OUR_CHECKS = re.compile(r"  # (?:type: ignore|noqa).*")

_INTRODUCTION = '''"""{title}

Written by statex-dist {version}; torch and transformers are all it needs:

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

The expansion plan under "statex" in config.json says which layers have a larger state, and how it was made.
"""
'''


def remote_code(model_type: str, *, ours_alone: bool) -> str:
    """Return the contents of ``modeling_statex.py`` for a family.

    Args:
        model_type: One of :data:`FAMILY_MODULES`.
        ours_alone: Whether no other software computes the same: the ``model_type`` then has our prefix.
    """
    family = FAMILY_MODULES[model_type]
    imports: list[ast.stmt] = []
    bodies = []
    title = ""
    for name, source in _needed(family).items():
        tree = ast.parse(source)
        heading = ast.get_docstring(tree) or ""
        title = heading if name == family else title
        first_line = heading.splitlines()[0].rstrip(".")
        found = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports += [node for node in found if not _relative(node)]
        body = _FOR_OUR_CHECKS.sub("", "".join(source.splitlines(keepends=True)[found[-1].end_lineno :]))
        body = with_our_type(body) if ours_alone else body
        bodies.append(f"\n\n# {first_line}\n{body.rstrip()}\n")
    return _INTRODUCTION.format(title=title, version=__version__) + _merged(imports) + "".join(bodies)


def with_our_type(code: str) -> str:
    """Return a family's code with our prefix in its ``model_type``; code that has it already stays as it is."""
    return _MODEL_TYPE.sub(rf"\1{OUR_CODE_PREFIX}", code)


def _needed(family: str) -> dict[str, str]:
    """Return the sources of the modules that a family needs, each after those that it imports."""
    sources: dict[str, str] = {}

    def visit(name: str) -> None:
        if name in sources:
            return
        source = (_FOLDER / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if _relative(node):
                assert isinstance(node, ast.ImportFrom)
                assert node.module is not None
                visit(family if (name, node.module) == (_HEAD, _EXAMPLE) else node.module)
        sources[name] = source

    visit(_HEAD)
    return sources


def _relative(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.level > 0


def _merged(imports: list[ast.stmt]) -> str:
    """Return the lines of many import statements, each name once: future, standard library, then the others."""
    modules: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in imports:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
        elif isinstance(node, ast.Import):
            modules.update(ast.unparse(alias) for alias in node.names)
    lines = {f"import {module}": module.split(" ")[0] for module in sorted(modules)}
    lines |= {f"from {m} import {', '.join(sorted(found))}": m for m, found in sorted(names.items())}
    sections: list[list[str]] = [[], [], []]
    for line, module in lines.items():
        root = module.split(".")[0]
        sections[0 if root == "__future__" else 1 if root in sys.stdlib_module_names else 2].append(line)
    return "\n" + "\n\n".join("\n".join(section) for section in sections if section) + "\n"

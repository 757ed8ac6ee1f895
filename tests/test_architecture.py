"""Who may import whom: docs/architecture.md as a table, and a walk over every import that holds the code to it.

The walk reads source with ``ast``, so that imports inside functions and under ``TYPE_CHECKING`` count too. New files in
a known folder need no change here; a new folder or a new top-level module needs a row.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("statex_dist", "checkpoints_tools", "launch")

LAYERS = {
    # (first pattern that fits decides)
    "statex_dist": 0,
    "statex_dist.errors": 0,
    "statex_dist.log": 0,
    "statex_dist.rank_log": -1,
    "statex_dist.redact": -1,
    "statex_dist.bare_package": 0,
    "statex_dist.durable*": 0,
    "statex_dist.config": 1,
    "statex_dist.registry": 1,
    "statex_dist.work_part": 1,
    "statex_dist.state*": 1,
    "statex_dist.checkpoint*": 2,
    "statex_dist.ops*": 2,
    "statex_dist.batch": 1,
    "statex_dist.distributed*": 1,
    "statex_dist.data*": 3,
    "statex_dist.models*": 3,
    "statex_dist.optim*": 3,
    "statex_dist.engine*": 4,
    "statex_dist.train*": 5,
    "statex_dist.inference*": 5,
    "statex_dist.evaluation*": 6,
    "statex_dist.run_config": 6,
    "statex_dist.run_parts": 7,
    "statex_dist.run": 8,
}

TOOL_LAYERS = {
    "checkpoints_tools.io": 0,
    "checkpoints_tools.plan": 0,
    "checkpoints_tools.formats": 1,
    "checkpoints_tools.export": 1,
    "checkpoints_tools.expand": 2,
    "checkpoints_tools.verify": 3,
    "checkpoints_tools.reshard": 3,
}
"""The packages of the offline tools: each imports lower ones alone."""

APART = ("data", "models", "optim", "engine")
"""Folders that do not know each other,"""
SHARED = {"statex_dist.models.lm": ("statex_dist.batch",), "statex_dist.engine.*": ("statex_dist.batch",)}
"""but for these."""

TOOLS_MAY_READ = (
    "statex_dist",
    "statex_dist.errors",
    "statex_dist.log",
    "statex_dist.redact",
    "statex_dist.config",
    "statex_dist.durable*",
    "statex_dist.work_part",
    "statex_dist.state*",
    "statex_dist.work_part",
    "statex_dist.checkpoint",
    "statex_dist.checkpoint.json_file",
    "statex_dist.checkpoint.dtypes",
    "statex_dist.checkpoint.formats*",
    "statex_dist.checkpoint.history",
    "statex_dist.checkpoint.layout",
    "statex_dist.checkpoint.manifest",
    "statex_dist.evaluation.suites.registry",
    "statex_dist.models",
    "statex_dist.models.config",
    "statex_dist.models.layout",
    "statex_dist.models.config_keys",
    "statex_dist.models.flops",
    "statex_dist.models.hybrid.host_tensors",
    "statex_dist.models.registry",
    "statex_dist.models.sequence_memory",
    "statex_dist.models.fla",
    "statex_dist.models.megatron",
    "statex_dist.models.model_check",
    "statex_dist.models.row_mapping",
    "statex_dist.models.source",
    "statex_dist.models.*.config",
    "statex_dist.models.*.tensors",
    "checkpoints_tools*",
)

EXPORTED = "checkpoints_tools.export.remote_code"
"""Modules that exports take along, as text, with the models that they belong to."""

ENGINES = {
    "deepspeed": ("statex_dist.engine.zero.*",),
    "streaming": ("statex_dist.data.storage.mds",),
    "webdataset": ("statex_dist.data.storage.tar",),
    "fla": ("statex_dist.ops.fla_api",),
    "mamba_ssm": ("statex_dist.ops.ssd.mamba_api",),
    "causal_conv1d": ("statex_dist.ops.conv.causal_conv1d_api",),
    "megatron": ("statex_dist.models.tensor_parallel.model", "statex_dist.models.tensor_parallel.share"),
    "wandb": ("statex_dist.train.wandb_run",),
    "lm_eval": ("statex_dist.evaluation.lm_eval_api",),
}
"""The only importers of each external engine."""

TORCH_FORMS = (
    "statex_dist.ops.chunk_groups",
    "statex_dist.ops.cu_seqlens",
    "statex_dist.ops.features",
    "statex_dist.ops.head_mixing",
    "statex_dist.ops.mitigations",
    "statex_dist.ops.token_steps",
    "statex_dist.ops.*.torch_forms",
)
"""The operators that an export includes: no kernel, no dispatch."""

IMPORTING_CALLS = ("import_module", "find_spec", "__import__", "import_from_bare")


def modules(root: Path) -> dict[str, Path]:
    """Every module of the three packages below ``root``, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Dotted names that a module imports, at any depth; ``from a import b`` gives ``a.b`` where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in known else base
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in IMPORTING_CALLS and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def graph(root: Path) -> dict[str, set[str]]:
    """Each module's imports."""
    found = modules(root)
    return {name: set(imports(name, path, set(found))) - {name} for name, path in found.items()}


def fits(name: str, patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer_of(name: str) -> int | None:
    return next((level for pattern, level in LAYERS.items() if fnmatchcase(name, pattern)), None)


def folder(name: str) -> str:
    """``data`` for ``statex_dist.data.storage.mds``; the module itself where it lies at the top."""
    return ".".join(name.split(".")[:2])


def breaches(root: Path) -> list[str]:
    """Every broken rule as one readable line."""
    found = graph(root)
    lines = []
    for name, targets in found.items():
        inside = name.split(".")[0] == "statex_dist"
        if inside and layer_of(name) is None:
            lines.append(f"{name} has no layer")
            continue
        for target in sorted(targets):
            top = target.split(".")[0]
            if top in ENGINES and not fits(name, ENGINES[top]):
                lines.append(f"{name} imports {top}, which belongs to {' and '.join(ENGINES[top])}")
            if top not in PACKAGES:
                continue
            if inside and top != "statex_dist":
                lines.append(f"{name} imports {target}")
                continue
            part = name.startswith(f"{EXPORTED}.") and target.startswith("statex_dist.models.")
            if name.startswith("checkpoints_tools") and not fits(target, TOOLS_MAY_READ) and not part:
                lines.append(f"{name} imports {target}, which offline tools do not read")
            if folder(target) in TOOL_LAYERS and folder(name) in TOOL_LAYERS and folder(name) != folder(target):
                levels = TOOL_LAYERS[folder(name)], TOOL_LAYERS[folder(target)]
                if levels[1] >= levels[0]:
                    lines.append(f"{name} (layer {levels[0]}) imports {target} (layer {levels[1]})")
            if not inside or folder(name) == folder(target):
                continue
            if layer_of(target) is None or layer_of(target) >= layer_of(name):
                lines.append(f"{name} (layer {layer_of(name)}) imports {target} (layer {layer_of(target)})")
            apart = [f"statex_dist.{part}" for part in APART]
            allowed = [t for pattern, ts in SHARED.items() if fnmatchcase(name, pattern) for t in ts]
            if folder(name) in apart and folder(target) in apart and target not in allowed:
                lines.append(f"{name} imports {target}: {', '.join(APART)} do not know each other")
    return lines


def cycle(edges: dict[str, set[str]]) -> list[str] | None:
    """One import cycle among modules, or None."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for target in sorted(edges.get(name, ())):
            if target in edges and (found := visit(target, [*trail, name])):
                return found
        done.add(name)
        return None

    return next((found for name in edges if (found := visit(name, []))), None)


def test_every_import_imports_lower_layers_alone():
    assert breaches(ROOT) == []


def test_no_module_cycle():
    assert cycle(graph(ROOT)) is None


def test_torch_forms_import_torch_and_each_other_alone():
    edges = {name: targets for name, targets in graph(ROOT).items() if fits(name, TORCH_FORMS)}
    assert len(edges) == 10
    known = {*edges, "statex_dist.errors", "statex_dist.state.geometry"}  # the geometry has the map of features
    foreign = {
        (name, target)
        for name, targets in edges.items()
        for target in targets - known
        if target.split(".")[0] not in {*sys.stdlib_module_names, "torch", "numpy"}
    }
    assert foreign == set()


def test_the_walk_sees_the_code():
    """A walk that finds no import would pass every other test."""
    edges = graph(ROOT)
    assert len(edges) > 40
    assert "statex_dist.ops.gla.torch_forms" in edges["statex_dist.ops.gla.dispatch"]
    assert "fla.ops.gla" in edges["statex_dist.ops.fla_api"], "an import inside a function"
    assert "mamba_ssm" in edges["statex_dist.ops.ssd.mamba_api"] or any(
        target.startswith("mamba_ssm") for target in edges["statex_dist.ops.ssd.mamba_api"]
    )
    assert "statex_dist.batch" in edges["statex_dist.models.lm"]


@pytest.mark.parametrize(
    ("file", "source", "words"),
    [
        (
            "statex_dist/state/a.py",
            "from statex_dist.ops.cu_seqlens import x",
            "(layer 1) imports statex_dist.ops.cu_seqlens (layer 2)",
        ),
        ("statex_dist/errors.py", "import statex_dist.config", "(layer 0) imports statex_dist.config (layer 1)"),
        ("statex_dist/data/a.py", "def f():\n    from statex_dist.models import lm", "do not know each other"),
        ("statex_dist/engine/a.py", "from statex_dist.data import loader", "do not know each other"),
        ("statex_dist/engine/a.py", "from statex_dist.batch import x\nfrom ..optim import groups", "do not know"),
        ("statex_dist/models/lm.py", "from statex_dist.data.loader import x", "do not know each other"),
        (
            "statex_dist/models/hf.py",
            "import checkpoints_tools.expand.expand",
            "statex_dist.models.hf imports checkpoints_tools.expand.expand",
        ),
        ("statex_dist/run.py", "import launch", "statex_dist.run imports launch"),
        ("statex_dist/models/hf.py", "from statex_dist.run import x", "(layer 3) imports statex_dist.run (layer 8)"),
        (
            "statex_dist/train/loop.py",
            "import deepspeed.ops",
            "imports deepspeed, which belongs to statex_dist.engine.zero.",
        ),
        ("launch/a.py", "class A:\n    def f(self):\n        import streaming", "imports streaming"),
        ("checkpoints_tools/a.py", "from megatron.core import x", "imports megatron"),
        ("statex_dist/ops/a.py", "import importlib\nimportlib.import_module('fla.ops')", "imports fla"),
        ("checkpoints_tools/a.py", "from statex_dist.models.lm import x", "which offline tools do not read"),
        ("checkpoints_tools/a.py", "from statex_dist.models.gla import mixer", "which offline tools do not read"),
        ("checkpoints_tools/a.py", "from statex_dist.checkpoint import writer", "which offline tools do not read"),
        (
            "checkpoints_tools/formats/a.py",
            "from checkpoints_tools.expand import expand",
            "(layer 1) imports checkpoints_tools.expand (layer 2)",
        ),
        (
            "checkpoints_tools/io/a.py",
            "import checkpoints_tools.plan",
            "(layer 0) imports checkpoints_tools.plan (layer 0)",
        ),
        ("statex_dist/garage/a.py", "", "statex_dist.garage.a has no layer"),
    ],
)
def test_the_walk_catches_a_breach(tmp_path, file, source, words):
    names = [
        *("errors", "config", "run", "ops.cu_seqlens", "batch", "data.loader", "optim.groups", "models.hf"),
        *("models.lm", "models.gla.mixer", "checkpoint.writer"),
    ]
    for name in names:
        path = tmp_path / "statex_dist" / (name.replace(".", "/") + ".py")
        for parent in (path.parent, *path.parent.parents):
            if parent == tmp_path:
                break
            parent.mkdir(parents=True, exist_ok=True)
            (parent / "__init__.py").touch()
        path.touch()
    assert breaches(tmp_path) == []
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    lines = breaches(tmp_path)
    assert any(words in line for line in lines), lines


def test_no_class_name_exists_in_two_packages():
    found: dict[str, set[str]] = {}
    for name, path in modules(ROOT).items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(folder(name))
    twice = {name: packages for name, packages in found.items() if len(packages) > 1}
    # Exports carry a tokenizer under the name that its users see.
    assert twice == {"BytesTokenizer": {"checkpoints_tools.export", "statex_dist.data"}}


def test_every_folder_of_the_tools_has_a_layer():
    packages = {folder(name) for name in modules(ROOT) if name.startswith("checkpoints_tools.")}
    assert packages == set(TOOL_LAYERS)


def test_a_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c", "os"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_offline_tools_load_no_engine_and_no_kernel():
    """They run on a machine without a GPU and without the training stack, torch included.

    The parts of an export's code are text to them, and the one folder that may import torch.
    """
    tools = [
        name for name in modules(ROOT) if name.startswith("checkpoints_tools") and not name.startswith(f"{EXPORTED}.")
    ]
    assert EXPORTED in tools
    script = (
        "import importlib, sys\n"
        f"for name in {[*tools, 'statex_dist.models.registry', 'statex_dist.checkpoint.layout']!r}:\n"
        "    importlib.import_module(name)\n"
        f"print(sorted(set({[*ENGINES, 'triton', 'torch', 'safetensors']!r}) & set(sys.modules)))\n"
        "print([m for m in sys.modules if m.startswith('statex_dist.ops')])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split("\n")[:2] == ["[]", "[]"]


def test_a_run_imports_no_compiler():
    """torch's compiler takes a second to import; every rank and command would wait for it."""
    program = "import sys, statex_dist.run, statex_dist.inference.generate\nprint('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "False"

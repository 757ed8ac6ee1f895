"""A package imported without its ``__init__``, and the process afterwards."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from statex_dist.bare_package import import_from_bare

ROOT = Path(__file__).parents[1]
NAME = "package_with_a_broken_init"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose ``__init__`` raises, with a submodule that imports another by its full name."""
    (tmp_path / NAME / "inner").mkdir(parents=True)
    (tmp_path / NAME / "__init__.py").write_text("raise ImportError('the init ran')\n")
    (tmp_path / NAME / "inner/__init__.py").write_text("")
    (tmp_path / NAME / "inner/used.py").write_text(f"from {NAME}.inner.needed import VALUE\n")
    (tmp_path / NAME / "inner/needed.py").write_text("VALUE = 7\n")
    (tmp_path / NAME / "inner/broken.py").write_text(f"import {NAME}.inner.needed\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / NAME
    for name in left():
        del sys.modules[name]


def left() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == NAME]


def test_a_submodule_is_imported_and_the_package_does_not_stay(package):
    module = import_from_bare(f"{NAME}.inner.used")
    assert module.VALUE == 7
    assert NAME not in sys.modules
    assert import_from_bare(f"{NAME}.inner.used") is module
    with pytest.raises(ImportError, match="the init ran"):
        importlib.import_module(NAME)
    (package / "__init__.py").write_text(f"from {NAME}.inner.needed import VALUE\n")
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).VALUE == 7


def test_the_package_does_not_stay_after_an_error(package):
    with pytest.raises(ZeroDivisionError):
        import_from_bare(f"{NAME}.inner.broken")
    assert NAME not in sys.modules


def test_a_package_that_is_imported_already_is_used(package):
    (package / "__init__.py").write_text("MARK = 1\n")
    importlib.invalidate_caches()
    real = importlib.import_module(NAME)
    used = import_from_bare(f"{NAME}.inner.used")
    assert sys.modules[NAME] is real
    assert sys.modules[f"{NAME}.inner.used"] is used


@pytest.mark.parametrize("module", ["no_such_package.part", f"{NAME}.no_such_part"])
def test_what_is_not_installed(package, module):
    with pytest.raises(ModuleNotFoundError) as caught:
        import_from_bare(module)
    assert caught.value.name == (module if module.startswith(NAME) else "no_such_package")
    assert NAME not in sys.modules


def test_a_bare_start_of_python_runs_nothing_of_ours():
    """The environment has no ``.pth`` file or hook that imports the product."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import sys; print(sys.meta_path)"],
        capture_output=True,
        text=True,
        check=True,
    )
    packages = ("statex_dist", "checkpoints_tools", "launch", "streaming")
    imported = [line.rpartition("|")[2].strip() for line in run.stderr.splitlines()]
    assert "site" in imported
    assert [name for name in imported if name.partition(".")[0] in packages] == []
    assert "statex" not in run.stdout
    for path in Path(sysconfig.get_paths()["purelib"]).glob("*.pth"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line.startswith("import ") and "statex" in line] == []


@pytest.fixture
def checkout(tmp_path):
    """A second checkout: its packages print where they are, and its own ``launch/rank.py``."""
    for name in ("statex_dist", "launch", "checkpoints_tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "launch/rank.py").write_bytes((ROOT / "launch/rank.py").read_bytes())
    (tmp_path / "launch/said.py").write_text(
        "import statex_dist, launch, checkpoints_tools as c\nprint(statex_dist.__file__, launch.__file__, c.__file__)\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [["-m", "launch.said"], ["-P", "launch/rank.py", "PARENT", "launch.said"]],
    ids=["a command", "a rank of --tp"],
)
def test_another_checkout_imports_its_own_code(checkout, command):
    """The product is installed from this checkout, and another one is the current directory."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(os.getpid()) if word == "PARENT" else word for word in command]
    run = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True, check=True
    )
    assert [Path(file).parents[1] for file in run.stdout.split()] == [checkout] * 3

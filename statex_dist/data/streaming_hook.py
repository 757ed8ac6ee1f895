"""Lets ``import streaming`` work without torchvision, on CPU-only and on GPU machines.

mosaicml-streaming's package ``__init__`` imports its vision datasets and so torchvision, which we do not install: its
CUDA build beside a CPU torch breaks transformers. Everything that reads and writes shards is in ``streaming.base`` and
needs none of it. The hook imports the package without running that ``__init__``; its names are then looked up in
``streaming.base`` on first use, and submodules such as ``streaming.text`` import as ever.

``make setup`` puts the hook into the environment (``python -m statex_dist.data.streaming_hook``), so that it holds for
every ``import streaming``; the library installs it for itself where that was not done.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PTH_NAME = "statex_streaming.pth"


class _BaseOnly(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def lookup(name: str) -> Any:
            return getattr(importlib.import_module("streaming.base"), name)

        module.__getattr__ = lookup  # type: ignore[method-assign]


class _StreamingFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "streaming":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None:
            spec.loader = _BaseOnly()
        return spec


def install() -> None:
    """Make this process import ``streaming`` without its ``__init__``."""
    if not any(isinstance(finder, _StreamingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _StreamingFinder())


def install_into_environment() -> Path:
    """Install the hook for every process of this environment and return the file that does it."""
    path = Path(sysconfig.get_paths()["purelib"]) / PTH_NAME
    path.write_text("import statex_dist.data.streaming_hook as hook; hook.install()\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    install_into_environment()

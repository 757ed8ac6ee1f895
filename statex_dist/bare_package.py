"""Import submodules of a package whose ``__init__`` cannot run here, without an import hook.

Two packages need it. ``streaming/__init__`` imports its vision datasets and so torchvision, which is not a dependency
of ours. ``mamba_ssm/__init__`` imports the CUDA extension of Mamba1, which a build without a compiler lacks. What we
use of both (``streaming.base``, ``mamba_ssm.ops.triton``) needs neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from types import ModuleType

_LOCK = threading.RLock()


def import_from_bare(module: str) -> ModuleType:
    """Import ``package.sub.module`` without running the ``__init__`` of ``package``.

    For the length of the import, ``sys.modules`` holds an empty module in place of the package. Afterwards it is
    removed, so that a later ``import package`` by anyone runs the real ``__init__``. The submodules stay: streaming
    looks itself up in ``sys.modules``. A package that was already imported is used as it is.

    Args:
        module: Dotted name of the module; its package must be installed.

    Raises:
        ModuleNotFoundError: The package or the module is not installed.
    """
    package = module.partition(".")[0]
    with _LOCK:
        if package in sys.modules or module in sys.modules:
            return importlib.import_module(module)
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec
        sys.modules[package] = bare
        try:
            return importlib.import_module(module)
        finally:
            del sys.modules[package]

"""The process of a rank that :func:`launch.tensor_parallel.start_ranks` starts; it runs a module of this installation.

    python -P launch/rank.py PARENT MODULE [ARGUMENT ...]

It is started by its path, so that a package ``launch`` in the current directory cannot replace it. The option ``-P``
keeps the modules of its directory from hiding others. The rank ends with its parent, even if the parent was killed and
sent no signal.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from pathlib import Path

_LOOK_SECONDS = 1.0


def end_with(parent: int) -> None:
    """End this process once ``parent`` has ended, so that its parent is another process."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _, parent, module, *arguments = sys.argv
    end_with(int(parent))
    # A source tree need not be installed; if another one is, this one comes first, as in the parent.
    root = str(Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

"""The command line within limits of memory and time: run as a program, it runs each command of a JSON file.

The file holds a list of lists of arguments. A line of JSON is printed for each: exit code, stdout, stderr, seconds of
CPU time. A command that takes more than its memory or time ends the process.
"""

import contextlib
import importlib
import io
import json
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRACEBACK = 99


def run_limited(
    commands: Sequence[Sequence[object]],
    directory: Path,
    *,
    memory: int = 512 << 20,
    seconds: int = 10,
    files: int = 0,
    imports: str = "statex_dist.models.registry",
) -> list[dict[str, Any]]:
    """Run commands one after the other in a process of their own.

    Args:
        commands: Arguments of each command.
        directory: For the list of commands.
        memory: Bytes of address space beyond those of the imports.
        seconds: CPU time of a command.
        files: Open files; 0 for no limit.
        imports: Module that the commands import, which counts as used before.
    """
    path = directory / "commands.json"
    path.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    arguments = [str(path), imports, str(memory), str(seconds), str(files)]
    result = subprocess.run([sys.executable, "-m", "tests.launch.limited", *arguments], capture_output=True, text=True)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"{commands[len(found)]}: {result.returncode} {result.stderr[-2000:]}"
    return found


def _main(path: str, imports: str, memory: int, seconds: int, files: int) -> None:
    from launch.cli import main

    importlib.import_module(imports)
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + memory, base + memory))
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    for command in json.loads(Path(path).read_text()):
        used = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 1 + seconds, -1))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(command)
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
                code = TRACEBACK
        line = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.process_time() - used}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(*sys.argv[1:3], *map(int, sys.argv[3:6]))

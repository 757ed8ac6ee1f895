"""How far apart the code of one task lies: files of the project that it touches, and switches between them.

A profiler hook (``sys.setprofile``) sees every call of a Python function. *Files* are those of the project in which a
function ran; what ran because a module was imported (the module itself, its class bodies, decorators and tables) does
not count. A *switch* is a call or a return that goes from one of these files to another; other packages between them do
not count. *Loaded* are the project's modules that the task imported.

    python -m benchmarks.reading_distance            # this tree; --files lists the files, --switches the pairs
    cd OTHER_TREE && python /path/to/benchmarks/reading_distance.py   # another one with the same task

Tasks: one optimizer step of the training loop (plain engine, tiny GLA model), ``statex expand``, ``statex reshard`` and
one completion request in the server's process (from its socket to its answer).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path.cwd()
PACKAGES = ("statex_dist", "checkpoints_tools", "launch")


class Distance:
    """Counts files and switches while it is on.

    Args:
        threads: Whether threads that start later are counted too, each on its own.
    """

    def __init__(self, *, threads: bool = False):
        self.calls: Counter[str] = Counter()
        self.switches: Counter[str] = Counter()
        self._threads = threads
        self._names: dict[str, str | None] = {}
        self._last: dict[int, str] = {}
        self._importing: Counter[int] = Counter()

    def __enter__(self) -> Distance:
        if self._threads:
            threading.setprofile(self._see)
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        if self._threads:
            threading.setprofile(None)

    def _name(self, file: str) -> str | None:
        """Return a file's path in the project, or None."""
        if file not in self._names:
            inside = file.startswith(f"{ROOT}/") and file[len(str(ROOT)) + 1 :].startswith(PACKAGES)
            self._names[file] = file[len(str(ROOT)) + 1 :] if inside else None
        return self._names[file]

    def _see(self, frame: Any, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        thread, code = threading.get_ident(), frame.f_code
        if code.co_name == "<module>":
            self._importing[thread] += 1 if event == "call" else -1
        if self._importing[thread] or code.co_name == "<module>":
            return
        at = frame if event == "call" else frame.f_back
        here = None if at is None or at.f_code.co_name == "<module>" else self._name(at.f_code.co_filename)
        if here is None:
            return
        if event == "call":
            self.calls[here] += 1
        if (last := self._last.get(thread, here)) != here:
            self.switches[f"{last} -> {here}"] += 1
        self._last[thread] = here

    def result(self) -> dict[str, Any]:
        """Return what was counted."""
        return {"files": dict(self.calls), "switches": dict(self.switches), "loaded": loaded()}


def loaded() -> list[str]:
    """Return the project's modules that are imported."""
    return sorted(name for name in sys.modules if name.split(".")[0] in PACKAGES)


# ---- tasks, each in a process of its own


def step(folder: Path) -> dict[str, Any]:
    """One optimizer step inside the loop: from a batch to the step's record."""
    from statex_dist.config import parse_config
    from statex_dist.engine.plain import PlainEngine
    from statex_dist.run import train
    from statex_dist.run_config import RunConfig
    from tests.runs import GLA, make_shards, write_run

    file = write_run(
        folder / "run.yaml",
        model={"config": GLA},
        data={"path": str(make_shards(folder / "data")), "packs_per_step": 1},
        engine={"name": "plain"},
        train={"num_steps": 4},
        metrics={"log_every": 100, "states_every": 0},
    )
    found: list[Distance] = []
    forward, update = PlainEngine.forward_backward, PlainEngine.step
    calls: list[int] = []

    def begin(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            found.append(Distance().__enter__())
        return forward(self, *arguments, **options)

    def end(self: Any, *arguments: Any, **options: Any) -> Any:
        result = update(self, *arguments, **options)
        if len(calls) == 3:
            found[0].__exit__()
        return result

    PlainEngine.forward_backward, PlainEngine.step = begin, end  # type: ignore[method-assign]
    assert train(parse_config(RunConfig, ["--config", str(file)], prog="train.py"))
    return found[0].result()


def _command(*arguments: str) -> dict[str, Any]:
    with Distance(threads=True) as distance:
        from launch.cli import main

        code = main(list(arguments))
    assert not code, code
    return distance.result()


def expand(folder: Path) -> dict[str, Any]:
    """``statex expand`` of a tiny GLA model."""
    source = _model_in_another_process(folder)
    return _command("expand", "--source", str(source), "--target", str(folder / "x"), "--factor", "2", "--layers", "1")


def reshard(folder: Path) -> dict[str, Any]:
    """``statex reshard`` of a tiny GLA model to ZeRO-3 files of two ranks."""
    source = _model_in_another_process(folder)
    return _command(
        "reshard", "--source", str(source), "--target", str(folder / "out"), "--to", "zero3", "--world-size", "2"
    )


def _model_in_another_process(folder: Path) -> Path:
    code = (
        "import sys; from pathlib import Path; from tests.runs import *; "
        "from statex_dist.data.tokenizer import BytesTokenizer; "
        "BytesTokenizer().save(save_model(config_from_dict(GLA), Path(sys.argv[1])))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "model")], check=True, cwd=ROOT)
    return folder / "model"


def request(folder: Path) -> dict[str, Any]:
    """One completion request of 8 tokens, in the server's process; the server has answered another before."""
    model = _model_in_another_process(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", "serve", "--model", str(model), *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        for attempt in range(600):
            try:
                _complete(port)
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                assert attempt < 599, "the server does not answer"
                time.sleep(0.2)
        server.send_signal(signal.SIGUSR1)
        assert "on\n" in server.stdout, "it says so once the handler has run"
        _complete(port)
        time.sleep(0.5)  # the server's work after its answer
        server.send_signal(signal.SIGUSR2)
        line = next(line for line in server.stdout if line.startswith("RESULT "))
    finally:
        server.kill()
        server.wait()
    return json.loads(line.removeprefix("RESULT "))


def _complete(port: int) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a river", "max_tokens": 8, "ignore_eos": True}).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    urllib.request.urlopen(asked, timeout=60).read()


def serve(arguments: list[str]) -> None:
    """Run ``statex serve``; SIGUSR1 begins to count in all threads, SIGUSR2 prints what was counted."""
    distance = Distance()
    see, counting = distance._see, threading.Event()
    threading.setprofile(lambda *event: see(*event) if counting.is_set() else None)
    sys.setprofile(lambda *event: see(*event) if counting.is_set() else None)

    def tell(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def begin(*_: Any) -> None:
        counting.set()
        tell("on")

    def end(*_: Any) -> None:
        counting.clear()
        tell("RESULT " + json.dumps(distance.result()))

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    from launch.cli import main as statex

    sys.exit(statex(arguments))


TASKS = {"step": step, "expand": expand, "reshard": reshard, "request": request}


def main() -> None:
    """Measure each task in a process of its own and print a table."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--files", action="store_true", help="List the files of each task with their calls.")
    parser.add_argument("--switches", action="store_true", help="List the pairs of files with their switches.")
    args = parser.parse_args()
    if args.task is not None:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write("\nRESULT " + json.dumps(TASKS[args.task](Path(folder))) + "\n")
        return
    rows = []
    for task in TASKS:
        done = subprocess.run(
            [sys.executable, __file__, "--task", task],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            rows.append((task, "failed", done.stderr.strip().splitlines()[-1:], ""))
            continue
        result = json.loads(line.removeprefix("RESULT "))
        rows.append((task, len(result["files"]), sum(result["switches"].values()), len(result["loaded"])))
        for listed, counts, unit in (
            (args.files, result["files"], "calls"),
            (args.switches, result["switches"], "times"),
        ):
            for what, count in sorted(counts.items(), key=lambda item: -item[1]) if listed else ():
                sys.stdout.write(f"  {task}: {count:6} {unit}  {what}\n")
    sys.stdout.write("| task | files | switches | modules loaded |\n|---|---|---|---|\n")
    for row in rows:
        sys.stdout.write(f"| {' | '.join(map(str, row))} |\n")


if __name__ == "__main__":
    main()

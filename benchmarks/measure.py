"""Helpers of the benchmarks of scans and models: clocks, peak memory, the machine's ceilings, tables.

Times on a CPU are the CPU time of one thread, so that other jobs on the machine have little effect. Times on a GPU are
between CUDA events around each call, after calls that compile and tune. Both are reported as the median and the least
of several calls.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
_CUDA_PRODUCT, _CPU_PRODUCT = 8192, 1024
_CUDA_COPY_BYTES, _CPU_COPY_BYTES = GIB, 2**27
_MOST_RUNS = 50
_STANDARD_ERROR = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median and the least of ``runs``."""

    median: float
    least: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Return the summary of single runs."""
        return cls(statistics.median(seconds), min(seconds), len(seconds))


def time_cpu(call: Callable[[], object], *, budget: float = 5.0, most: int = 5) -> Timing:
    """Time a call in this process's CPU time.

    Args:
        call: What to time. It runs once beforehand: the first touch of its memory costs more than the arithmetic.
        budget: Seconds to spend on timed runs; there is one at least.
        most: Timed runs at most.
    """
    first = _cpu_seconds(call)
    runs = max(1, min(most, int(budget / max(first, 1e-9))))
    return Timing.of([_cpu_seconds(call) for _ in range(runs)])


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def time_call(call: Callable[[], object], device: torch.device, *, budget: float = 1.0, least: int = 3) -> Timing:
    """Time a call on its device: with CUDA events, or in CPU time.

    Args:
        call: What to time; its first two runs compile, tune and warm up.
        device: Where it runs.
        budget: Seconds to spend on timed runs.
        least: Timed runs on a GPU at least, whatever they take.
    """
    if device.type != "cuda":
        return time_cpu(call, budget=budget)
    call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    runs = max(least, min(_MOST_RUNS, int(budget / (time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return Timing.of([begin.elapsed_time(end) / 1e3 for begin, end in events])


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Return what one call allocates at most, beside what is held already; None where there is no such count (CPU)."""
    if device.type != "cuda":
        return None
    free(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def free(device: torch.device) -> None:
    """Give back what earlier calls left in the allocator, for example after one ran out of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def resident_peak() -> int:
    """Return the largest resident set that this process has had, in bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)`` of a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_limited(command: Sequence[str], limit: float, *, log: Path | None = None, env: Any = None) -> str | None:
    """Run a command with everything that it starts for at most ``limit`` seconds.

    Args:
        command: What to run. Its output goes to this process's standard error, or to ``log``.
        limit: Seconds after which it and its children are killed.
        log: File for its output.
        env: Its environment, or None for this process's.

    Returns:
        None where it ended well, else what became of it.
    """
    with log.open("ab") if log is not None else nullcontext(_STANDARD_ERROR) as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own, so that no grandchild stays behind
            process.wait()
            return f"stopped after {limit:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return None if code == 0 else f"exit code {code}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """The highest speeds of the machine, measured in the same run as the benchmark.

    Attributes:
        product_flops: FLOP/s of a large square matrix product, bf16 on a GPU and fp32 on a CPU.
        copy_bytes: Bytes per second that a copy within the device's memory reads and writes together.
    """

    product_flops: float
    copy_bytes: float

    @classmethod
    def measure(cls, device: torch.device) -> Ceilings:
        """Measure both on ``device``, each the best of several runs."""
        cuda = device.type == "cuda"
        size = _CUDA_PRODUCT if cuda else _CPU_PRODUCT
        dtype = torch.bfloat16 if cuda else torch.float32
        # Random values: zeros draw less power, and a GPU then runs at a higher clock than in any real product.
        factors = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
        product = time_call(lambda: torch.mm(*factors), device)
        source = torch.empty(_CUDA_COPY_BYTES if cuda else _CPU_COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = time_call(lambda: target.copy_(source), device)
        return cls(product_flops=2 * size**3 / product.least, copy_bytes=2 * source.numel() / copy.least)


def machine(device: torch.device | None = None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return what figures depend on: date, processors, load, versions (``absent`` where a package is)."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{os.cpu_count()} cores {cpu_name()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    if device is not None and device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {facts.multi_processor_count} SMs"
        found["cuda"] = torch.version.cuda
    return found | {name: _package_version(name) for name in ("torch", *packages)}


def cpu_name() -> str:
    """Return the processor's name, or its architecture where it has none."""
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


@dataclass
class Record:
    """A benchmark's findings, written after every row: a run that is cut off keeps what it has.

    Attributes:
        machine: What the figures depend on.
        ceilings: The machine's, where they were measured.
        settings: What the figures were asked for with.
        rows: One dictionary per measurement.
        out: JSON file to keep, or None.
    """

    machine: dict[str, Any]
    ceilings: Ceilings | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    out: Path | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        if self.out is not None:
            self.out.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """Return what the file holds."""
        ceilings = None if self.ceilings is None else asdict(self.ceilings)
        return {"machine": self.machine, "ceilings": ceilings, "settings": self.settings, "rows": self.rows}


def heading(document: dict[str, Any]) -> str:
    """Return the line under which a document's tables stand: the machine, and its ceilings."""
    line = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    if ceilings := document["ceilings"]:
        line += (
            f"; measured ceilings: product {ceilings['product_flops'] / 1e12:.4g} TFLOP/s, "
            f"copy {ceilings['copy_bytes'] / 1e9:.4g} GB/s"
        )
    return line


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, aligned to be read as it stands; None is an empty cell."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines)


def figure(value: float | None, scale: float = 1.0, digits: int = 3, unit: str = "") -> str | None:
    """Return ``value * scale`` with significant digits, or None for None."""
    if value is None:
        return None
    scaled = value * scale
    return (f"{scaled:.0f}" if abs(scaled) >= 10**digits else f"{scaled:.{digits}g}") + unit

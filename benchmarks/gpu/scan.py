"""Kernels against the PyTorch scans at full size on one GPU: ``python -m benchmarks.gpu.scan [--out FILE.json]``.

For a merged GLA head (1 x 1024 x 2048) and a grown Mamba2 layer (64 heads x 64 x 512), bf16: the relative L2 error of
the output and of every gradient against the float64 chunked form at a short length, then tokens per second and peak
memory, forward and backward, at the full length. A backend that fails is reported with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from statex_dist.ops.dispatch import gla, ssd
from statex_dist.ops.fla_api import has_fla
from statex_dist.ops.mamba_api import has_mamba_ssm

PARITY_TOKENS = 1024

GLA_SHAPES = {"gla 4 x 256 x 512": (4, 256, 512), "gla merged 1 x 1024 x 2048": (1, 1024, 2048)}
SSD_SHAPES = {"ssd 64 x 64 x 128": (64, 64, 128), "ssd 64 x 64 x 512": (64, 64, 512)}

Scan = Callable[..., torch.Tensor]


def gla_tensors(tokens: int, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return bf16 q, k, v and fp32 log decays on the GPU."""
    heads, keys, values = shape
    q, k, v, g = (torch.randn(1, tokens, heads, size, device="cuda") for size in (keys, keys, values, keys))
    return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16(), "g": torch.nn.functional.logsigmoid(g) / 16}


def ssd_tensors(tokens: int, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return bf16 x, B, C and fp32 dt, A on the GPU, one group."""
    heads, head_dim, state = shape
    x = torch.randn(1, tokens, heads, head_dim, device="cuda").bfloat16()
    B, C = (torch.randn(1, tokens, 1, state, device="cuda").bfloat16() for _ in range(2))
    dt = torch.rand(1, tokens, heads, device="cuda") * 0.1
    return {"x": x, "dt": dt, "A": -torch.arange(1.0, heads + 1, device="cuda"), "B": B, "C": C}


def run_gla(backend: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the output of a GLA scan."""
    return gla(**tensors, backend=backend)[0]  # type: ignore[arg-type]


def run_ssd(backend: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the output of a Mamba2 scan."""
    return ssd(**tensors, backend=backend, output_final_state=False)[0]  # type: ignore[arg-type]


def step(scan: Scan, backend: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the output and all gradients under a fixed loss."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = scan(backend, leaves)
    probe = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad((out * probe).sum(), list(leaves.values()))
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def parity(scan: Scan, backend: str, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return relative L2 errors against the chunked form in float64 on the same rounded inputs."""
    expected = step(scan, "chunked", {name: x.double() for name, x in tensors.items()})
    actual = step(scan, backend, tensors)
    return {name: ((actual[name].double() - x).norm() / x.norm()).item() for name, x in expected.items()}


def throughput(scan: Scan, backend: str, tensors: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """Return milliseconds, tokens per second and peak GiB of a forward and backward pass."""
    tokens = next(iter(tensors.values())).shape[1]
    step(scan, backend, tensors)  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(scan, backend, tensors)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - held
    return {"ms": min(times) * 1e3, "tokens_per_s": tokens / min(times), "peak_gib": peak / 2**30}


def package_version(name: str) -> str:
    """Return a package's version, or ``absent``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def main(argv: list[str]) -> int:
    """Run all cases; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536, help="length of the timed sequences")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each case; the shortest counts")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu.scan: no CUDA device found; this benchmark needs one NVIDIA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    names = ("torch", "triton", "fla-core", "mamba-ssm")
    facts = {"device": torch.cuda.get_device_name(), **{name: package_version(name) for name in names}}
    print(json.dumps(facts), flush=True)
    results: list[dict[str, Any]] = []
    cases = [(name, shape, gla_tensors, run_gla, has_fla()) for name, shape in GLA_SHAPES.items()]
    cases += [(name, shape, ssd_tensors, run_ssd, has_mamba_ssm()) for name, shape in SSD_SHAPES.items()]
    for name, shape, make, scan, has_kernel in cases:
        for backend in ("kernel", "chunked") if has_kernel else ("chunked",):
            row: dict[str, Any] = {"case": name, "backend": backend, "tokens": args.tokens}
            try:
                row["error"] = parity(scan, backend, make(PARITY_TOKENS, shape))
                row |= throughput(scan, backend, make(args.tokens, shape), args.repeats)
            except RuntimeError as error:  # out of memory, or a kernel that does not compile: a result, not the end
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()
            print(json.dumps(row), flush=True)
            results.append(row)
    if args.out:
        args.out.write_text(json.dumps({"machine": facts, "rows": results}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The scans that :mod:`benchmarks.gpu.scan` compares: how each is called, what it must agree with, what it costs.

All compute one layer of a 1.3 B model on one sequence. For GLA: our path on a merged head, on mixed heads, on heads
whose keys have grown, and on heads with features that give as large a state; the merged head through fla's
``chunk_gla`` (what StateX's authors run), the same as 16 virtual heads, and the layer as it was before its expansion.
For Mamba2: mamba_ssm's kernel at the original and at the grown ``d_state``, and the PyTorch form that runs where it is
missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid

from benchmarks.gpu.cost import ScanCost, Work, batched_products, chunk_gla, mamba_scan
from statex_dist.ops.backends import Backend
from statex_dist.ops.features import Features
from statex_dist.ops.fla_api import has_fla
from statex_dist.ops.gla import gla
from statex_dist.ops.ssd import ssd
from statex_dist.ops.ssd.mamba_api import has_mamba_ssm
from statex_dist.state.geometry import CHUNK_SIZE, MAX_STATE_BYTES, FeatureMap

Tensors = dict[str, torch.Tensor]
Role = Literal["ours", "authors", "original", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """One layer before its expansion, and the ``d_state`` after.

    Attributes:
        heads: GLA's heads; the merged head joins them all, the mixed layer gives each that many value heads.
        keys: Channels of a GLA head's keys.
        values: Channels of a GLA head's values.
        ssd_heads: Mamba2's heads, in one group.
        head_dim: Channels of a Mamba2 head.
        states: Mamba2's ``d_state`` before and after.
    """

    heads: int
    keys: int
    values: int
    ssd_heads: int
    head_dim: int
    states: tuple[int, int]


FULL = Sizes(heads=4, keys=256, values=512, ssd_heads=64, head_dim=64, states=(128, 512))
"""GLA-1.3B and Mamba2-1.3B."""
TINY = Sizes(heads=2, keys=16, values=32, ssd_heads=4, head_dim=8, states=(16, 64))
"""The same relations, for a machine without a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """One way to compute a layer's scan.

    Attributes:
        name: What tables call it.
        family: ``gla`` or ``ssd``; only paths of one family compare.
        role: ``authors`` and ``original`` are what the others are compared with.
        make: Returns the inputs for a length, by name.
        scan: Returns the output for the inputs.
        exact: The same in PyTorch, for inputs in float64.
        cost: Returns what a length costs, for a number of bytes per element; None where that is not modelled.
        kernel: Package whose CUDA kernels it runs, or None if it runs anywhere.
    """

    name: str
    family: Literal["gla", "ssd"]
    role: Role
    make: Callable[[int, torch.device], Tensors]
    scan: Callable[[Tensors], torch.Tensor]
    exact: Callable[[Tensors], torch.Tensor]
    cost: Callable[[int, int], ScanCost] | None = None
    kernel: Literal["fla-core", "mamba_ssm"] | None = None

    def missing(self, device: torch.device) -> str | None:
        """Return what the path needs and does not find, or None."""
        if self.kernel is None:
            return None
        if device.type != "cuda":
            return "needs CUDA"
        found = has_fla() if self.kernel == "fla-core" else has_mamba_ssm()
        return None if found else f"needs {self.kernel}"


def dtype_on(device: torch.device) -> torch.dtype:
    """Return the precision of queries, keys and values: bf16 on a GPU, fp32 on a CPU, which has no fast bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def gla_tensors(tokens: int, heads: int, keys: int, values: int, device: torch.device, partners: int = 0) -> Tensors:
    """Return q, k, v and fp32 log decays of one sequence, as trained gates have them; with ``partners`` a mix too."""
    dtype = dtype_on(device)
    q, k, v, g = (torch.randn(1, tokens, heads, size, device=device) for size in (keys, keys, values, keys))
    found = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "g": logsigmoid(g) / 16}
    if partners:
        found["mix"] = torch.randn(heads, partners, device=device) * partners**-0.5
    return found


def ssd_tensors(tokens: int, heads: int, head_dim: int, state: int, device: torch.device) -> Tensors:
    """Return x, B, C and fp32 dt, A of one sequence, one group."""
    dtype = dtype_on(device)
    x = torch.randn(1, tokens, heads, head_dim, device=device).to(dtype)
    B, C = (torch.randn(1, tokens, 1, state, device=device).to(dtype) for _ in range(2))
    dt = torch.rand(1, tokens, heads, device=device) * 0.1
    return {"x": x, "dt": dt, "A": -torch.arange(1.0, heads + 1, device=device), "B": B, "C": C}


def virtual_heads(tensors: Tensors, blocks: int, scan: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Compute a merged head as ``blocks x blocks`` heads that share nothing.

    The decay acts on the state's key side, so blocks of keys ``i`` and of values ``j`` have states of their own,
    ``S_ij <- diag(a_i) S_ij + k_i v_j^T``, and ``o_j = sum_i S_ij^T q_i``.

    Args:
        tensors: ``q, k, g [B, T, 1, K]`` and ``v [B, T, 1, V]``; both sizes divide by ``blocks``.
        blocks: Blocks of keys, and of values.
        scan: Called with q, k, v, g of ``blocks^2`` heads and the merged head's ``scale``; returns their outputs.

    Returns:
        The merged head's output ``[B, T, 1, V]``.
    """
    q, k, g = (tensors[name].squeeze(2).unflatten(-1, (blocks, -1)) for name in ("q", "k", "g"))
    q, k, g = (x.repeat_interleave(blocks, dim=2) for x in (q, k, g))
    v = tensors["v"].squeeze(2).unflatten(-1, (blocks, -1)).repeat(1, 1, blocks, 1)
    o = scan(q=q, k=k, v=v, g=g, scale=tensors["q"].shape[-1] ** -0.5)
    return o.unflatten(2, (blocks, blocks)).sum(2).flatten(2).unsqueeze(2)


def batched_path(
    sizes: Sizes, *, mixed: bool = False, chunk_size: int = CHUNK_SIZE, max_state_bytes: int = MAX_STATE_BYTES
) -> Path:
    """Return our path of an expanded GLA layer, merged or mixed."""
    h, keys, values = sizes.heads, sizes.keys, sizes.values
    heads, key, value, partners = (h, keys, values, h) if mixed else (1, h * keys, h * values, 0)
    shape = f"{heads} x {key} x {value}, r = {h}" if mixed else f"{heads} x {key} x {value}"

    def cost(tokens: int, element: int) -> ScanCost:
        work = Work(
            tokens=tokens,
            numbers=heads * key * value * (partners or 1),
            keys=heads * key,
            values=heads * value,
            scores=heads,
            element=element,
        )
        return batched_products(work, chunk_size, max_state_bytes)

    return Path(
        name=f"ours, {'mixed' if mixed else 'merged'} {shape}",
        family="gla",
        role="ours",
        make=lambda tokens, device: gla_tensors(tokens, heads, key, value, device, partners),
        scan=lambda x: gla(
            **x,  # type: ignore[arg-type]
            backend="triton",
            chunk_size=chunk_size,
            max_state_bytes=max_state_bytes,
        )[0],
        exact=_exact_gla,
        cost=cost,
    )


def grown_path(sizes: Sizes, *, features: bool) -> Path:
    """Return our path of a GLA layer whose heads have more keys: projected ones, or products of those that there are.

    The factor is the number of heads, so that the state is as large as that of the merged head.
    """
    heads, keys, values, factor = sizes.heads, sizes.keys, sizes.values, sizes.heads
    products = FeatureMap.of_factor(factor, keys) if features else None

    def make(tokens: int, device: torch.device) -> Tensors:
        found = gla_tensors(tokens, heads, keys if features else factor * keys, values, device)
        if features:
            found["gain"] = torch.randn(heads, (factor - 1) * keys, device=device)
        return found

    def scan(x: Tensors, backend: Backend) -> torch.Tensor:
        gain = x.get("gain")
        options: dict[str, Any] = {name: tensor for name, tensor in x.items() if name != "gain"}
        if products is not None and gain is not None:
            options["features"] = Features(products, gain)
        return gla(**options, backend=backend)[0]

    def cost(tokens: int, element: int) -> ScanCost:
        work = Work(
            tokens=tokens,
            numbers=heads * factor * keys * values,
            keys=heads * factor * keys,
            values=heads * values,
            scores=heads,
            element=element,
            projected=heads * keys if features else None,
        )
        return batched_products(work, CHUNK_SIZE, MAX_STATE_BYTES)

    shape = f"{heads} x {keys} (x {factor}) x {values}" if features else f"{heads} x {factor * keys} x {values}"
    return Path(
        name=f"ours, {'features' if features else 'grown keys'} {shape}",
        family="gla",
        role="other",
        make=make,
        scan=lambda x: scan(x, "triton"),
        exact=lambda x: scan(x, "chunked"),
        cost=cost,
    )


def _exact_gla(x: Tensors) -> torch.Tensor:
    return gla(**x, backend="chunked")[0]  # type: ignore[arg-type]


def _fla_gla(**x: Any) -> torch.Tensor:
    return gla(**x, backend="kernel")[0]


def gla_paths(sizes: Sizes) -> list[Path]:
    """Return the ways to compute an expanded GLA layer, and the layer before."""
    h, keys, values = sizes.heads, sizes.keys, sizes.values

    def fla_cost(heads: int, key: int, value: int) -> Callable[[int, int], ScanCost]:
        numbers, width = heads * key * value, {"keys": heads * key, "values": heads * value, "scores": heads}
        return lambda tokens, element: chunk_gla(Work(tokens=tokens, numbers=numbers, element=element, **width))

    def merged(tokens: int, device: torch.device) -> Tensors:
        return gla_tensors(tokens, 1, h * keys, h * values, device)

    return [
        batched_path(sizes),
        batched_path(sizes, mixed=True),
        grown_path(sizes, features=False),
        grown_path(sizes, features=True),
        Path(
            name=f"chunk_gla, merged 1 x {h * keys} x {h * values}",
            family="gla",
            role="authors",
            make=merged,
            scan=lambda x: _fla_gla(**x),
            exact=_exact_gla,
            cost=fla_cost(1, h * keys, h * values),
            kernel="fla-core",
        ),
        Path(
            name=f"chunk_gla, {h * h} virtual heads {keys} x {values}",
            family="gla",
            role="other",
            make=merged,
            scan=lambda x: virtual_heads(x, h, _fla_gla),
            exact=_exact_gla,
            cost=fla_cost(h * h, keys, values),
            kernel="fla-core",
        ),
        Path(
            name=f"chunk_gla, original {h} x {keys} x {values}",
            family="gla",
            role="original",
            make=lambda tokens, device: gla_tensors(tokens, h, keys, values, device),
            scan=lambda x: _fla_gla(**x),
            exact=_exact_gla,
            cost=fla_cost(h, keys, values),
            kernel="fla-core",
        ),
    ]


def ssd_paths(sizes: Sizes) -> list[Path]:
    """Return the Mamba2 scan at both states on mamba_ssm's kernel, and grown in PyTorch."""
    heads, dim = sizes.ssd_heads, sizes.head_dim

    def path(state: int, backend: str, role: Role) -> Path:
        def cost(tokens: int, element: int) -> ScanCost:
            numbers, values = heads * dim * state, heads * dim
            return mamba_scan(
                Work(tokens=tokens, numbers=numbers, keys=state, values=values, scores=1, element=element)
            )

        kernel = backend == "kernel"
        return Path(
            name=f"{'mamba_ssm' if kernel else 'ours in PyTorch'}, {heads} x {dim} x {state}",
            family="ssd",
            role=role,
            make=lambda tokens, device: ssd_tensors(tokens, heads, dim, state, device),
            scan=lambda x: ssd(**x, backend=backend, output_final_state=False)[0],  # type: ignore[arg-type]
            exact=lambda x: ssd(**x, backend="chunked", output_final_state=False)[0],  # type: ignore[arg-type]
            cost=cost if kernel else None,
            kernel="mamba_ssm" if kernel else None,
        )

    before, after = sizes.states
    return [path(after, "kernel", "authors"), path(before, "kernel", "original"), path(after, "chunked", "other")]

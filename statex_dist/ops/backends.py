"""The one rule by which a recurrence picks its backend, and the scan that mixing and context parallelism go around.

``auto`` takes the GPU kernels for CUDA tensors where they are installed and fit the case, and the chunked PyTorch form
otherwise; ``naive`` is for tests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from statex_dist.distributed.context_group import ContextShare
from statex_dist.errors import ConfigError
from statex_dist.ops.features import Features
from statex_dist.ops.head_mixing import mix_outputs, partner_values, spread_values
from statex_dist.ops.mitigations import Tensors

logger = logging.getLogger(__name__)

Backend = Literal["auto", "kernel", "triton", "chunked", "naive"]
"""``kernel`` is another library's (fla-core, mamba_ssm), ``triton`` our own for large GLA states."""

Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Forms(NamedTuple):
    """The implementations of one recurrence over queries, keys, values and what else it takes.

    Attributes:
        has_kernels: Whether the library of ``kernel`` is installed.
        naive: Token by token.
        kernel: Another library's; the only one that knows no features.
        chunked: In PyTorch; takes ``chunk_size`` too, and values as a list of each partner's.
        across: What carries a state across ranks.
        widened: Returns inputs of ``kernel`` that have the features as further key channels.
        triton: Our own kernels, or None; they take the mixing matrix themselves.
    """

    has_kernels: Callable[[], bool]
    naive: Scan
    kernel: Scan
    chunked: Scan
    across: Scan
    widened: Callable[[Tensors, Features], Tensors]
    triton: Callable[..., tuple[torch.Tensor, Any]] | None = None


def takes_kernels(x: torch.Tensor, has_kernels: Callable[[], bool]) -> bool:
    """Return whether kernels of another library are to run on ``x``: on a GPU, and never in float64."""
    return x.is_cuda and x.dtype != torch.float64 and has_kernels()


def pick_backend(
    backend: Backend, x: torch.Tensor, has_kernels: Callable[[], bool], *, fits_triton: bool | None = None
) -> Backend:
    """Return the backend that runs, never ``auto``.

    Args:
        backend: The one asked for.
        x: An input of the recurrence.
        has_kernels: Whether the library of ``kernel`` is installed.
        fits_triton: Whether ``auto`` prefers our own kernels here; None where the recurrence has none.

    Raises:
        ConfigError: The backend is unknown.
    """
    allowed = [name for name in get_args(Backend) if fits_triton is not None or name != "triton"]
    if backend not in allowed:
        raise ConfigError(f"scan backend {backend!r} is not one of {', '.join(allowed)}")
    if backend != "auto":
        return backend
    if fits_triton:
        return "triton"
    return "kernel" if takes_kernels(x, has_kernels) else "chunked"


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time that it is given."""
    logger.warning(message)


def mixed_scan(
    backend: Backend,
    forms: Forms,
    inputs: tuple[torch.Tensor, ...],
    *,
    mix: torch.Tensor | None,
    features: Features | None,
    chunk_size: int | None,
    context: ContextShare | None,
    initial_state: torch.Tensor | None,
    fits_triton: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one form of a recurrence, plain or mixed, over a whole sequence or a rank's share of it.

    Only the chunked form keeps the values of a head's partners apart. Of a context share the scan starts from zero, and
    the contribution of the state before the share is added.

    Args:
        backend: The one asked for.
        forms: The implementations of the recurrence.
        inputs: ``q, k, v`` and the rest.
        mix: ``[H, r]`` mixing matrix or None.
        features: Products that are key channels of the state too, or None.
        chunk_size: Of the chunked form.
        context: This rank's share or None.
        initial_state: ``[S, H, K, r V]`` or None for zero.
        fits_triton: As for :func:`pick_backend`.
        options: Further options of the forms, ``scale`` among them.
    """
    backend = pick_backend(backend, inputs[0], forms.has_kernels, fits_triton=fits_triton)
    narrow = inputs
    if backend == "kernel" and features is not None:
        inputs = forms.widened(inputs, features)
    if backend != "kernel" and features is not None:
        options["features"] = features
    q, k, v, *rest = inputs
    options["initial_state"] = initial_state if context is None else None
    if backend == "triton":
        assert forms.triton is not None
        o, state = forms.triton(q, k, v, *rest, mix=mix, chunk_size=chunk_size, **options)
    elif backend == "chunked":
        values = v if mix is None else partner_values(v, mix.shape[1])
        o, state = forms.chunked(q, k, values, *rest, chunk_size=chunk_size, **options)
    else:
        scan = forms.naive if backend == "naive" else forms.kernel
        o, state = scan(q, k, v if mix is None else spread_values(v, mix.shape[1]), *rest, **options)
    if context is not None:
        added, state = forms.across(
            context, narrow, state[-1:], initial_state, scale=options["scale"], features=features
        )
        if backend == "triton" and mix is not None:
            added = mix_outputs(added, mix)
        o = add_to_first(o, added)
    return (o if mix is None or backend == "triton" else mix_outputs(o, mix)), state


def add_to_first(o: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Return ``o [1, T, ...]`` with ``added [1, L, ...]`` on its first tokens."""
    count = added.shape[1]
    first = o[:, :count] + added.to(o.dtype)
    return first if count == o.shape[1] else torch.cat([first, o[:, count:]], dim=1)

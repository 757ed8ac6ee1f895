"""The scans as models call them: the best backend for the tensors at hand behind one signature.

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
from statex_dist.ops.chunked import chunked_gla, chunked_ssd
from statex_dist.ops.context_parallel import add_to_first, delta_across, gla_across, ssd_across
from statex_dist.ops.decode import delta_step_, gla_step_, ssd_step_
from statex_dist.ops.delta import chunked_delta_rule, delta_step, naive_delta_rule
from statex_dist.ops.fla_api import delta_backward_obstacle, fla_delta_rule, fla_gla, has_fla
from statex_dist.ops.head_mixing import mix_outputs, partner_values, spread_values
from statex_dist.ops.mamba_api import has_mamba_ssm, mamba_ssd
from statex_dist.ops.naive import gla_step, naive_gla, naive_ssd, ssd_step
from statex_dist.ops.triton.gla import SMALLEST_CHUNK, expanded_gla
from statex_dist.state.geometry import LARGEST_PLAIN_HEAD

logger = logging.getLogger(__name__)

Backend = Literal["auto", "kernel", "triton", "chunked", "naive"]
"""``kernel`` is another library's (fla-core, mamba_ssm), ``triton`` our own for large GLA states."""


def _check_backend(backend: str, *, has_triton: bool = False) -> None:
    allowed = [name for name in get_args(Backend) if has_triton or name != "triton"]
    if backend not in allowed:
        raise ConfigError(f"scan backend {backend!r} is not one of {', '.join(allowed)}")


def _takes_kernel(backend: str, q: torch.Tensor) -> bool:
    """Return whether flash-linear-attention's kernels are to run."""
    return backend == "kernel" or (backend == "auto" and q.is_cuda and q.dtype != torch.float64 and has_fla())


def _trained_delta_backend(backend: Backend) -> Backend:
    """Return the backend of a gated delta rule that needs gradients, for which fla's kernel was chosen.

    Raises:
        ConfigError: ``kernel`` was asked for and cannot run backward here.
    """
    obstacle = delta_backward_obstacle()
    if obstacle is None:
        return backend
    if backend == "kernel":
        raise ConfigError(f"scan backend 'kernel' cannot train this model: {obstacle}")
    _warn_once(f"the gated delta rule is trained with the slower PyTorch form: {obstacle}")
    return "chunked"


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _is_expanded(q: torch.Tensor, v: torch.Tensor, mix: torch.Tensor | None) -> bool:
    """Return whether a head's state is larger than those that fla's kernels are quick and lean for."""
    numbers = q.shape[-1] * v.shape[-1] * (1 if mix is None else mix.shape[1])
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float32) and q.shape[1] >= SMALLEST_CHUNK
    return fits and numbers > LARGEST_PLAIN_HEAD


class _Forms(NamedTuple):
    """The implementations of one recurrence over queries, keys, values and what else it takes."""

    naive: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    chunked: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    across: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _mixed_scan(
    forms: _Forms,
    inputs: tuple[torch.Tensor, ...],
    *,
    mix: torch.Tensor | None,
    backend: Backend,
    chunk_size: int | None,
    context: ContextShare | None,
    initial_state: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the form that fits; only the chunked one keeps the values of a head's partners apart.

    Of a context share the scan starts from zero, and what the state before the share adds is added.
    """
    q, k, v, *rest = inputs
    options["initial_state"] = initial_state if context is None else None
    partners = 1 if mix is None else mix.shape[1]
    if backend == "naive" or _takes_kernel(backend, q):
        scan = forms.naive if backend == "naive" else forms.kernel
        o, state = scan(q, k, v if mix is None else spread_values(v, partners), *rest, **options)
    else:
        o, state = forms.chunked(q, k, partner_values(v, partners), *rest, chunk_size=chunk_size, **options)
    if context is not None:
        added, state = forms.across(context, inputs, state[-1:], initial_state, scale=options["scale"])
        o = add_to_first(o, added)
    return (o if mix is None else mix_outputs(o, mix)), state


def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    mix: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    max_state_bytes: int | None = None,
    output_final_state: bool = True,
    context: ContextShare | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated linear attention, plain, merged (one wide head) or mixed.

    On a GPU, heads of the size of public checkpoints run on fla's kernels and larger ones on
    :func:`statex_dist.ops.triton.gla.expanded_gla`.

    Args:
        q: ``[B, T, H, K]`` queries.
        k: ``[B, T, H, K]`` keys.
        v: ``[B, T, H, V]`` values.
        g: ``[B, T, H, K]`` log decays, at most 0.
        scale: Factor of the queries, ``K ** -0.5`` where None.
        mix: ``[H, r]`` mixing matrix; the state then holds ``r`` value heads per key head.
        initial_state: ``[S, H, K, r V]`` or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.
        backend: Which implementation runs.
        chunk_size: Tokens per chunk of the forms ``triton`` and ``chunked``; None picks one.
        max_state_bytes: Bound of the chunk states that ``triton`` holds at once; None for its default.
        output_final_state: Whether the final states are needed.
        context: How the tokens hang together with those of other ranks, or None. States are then those before and
            after the whole pack, of one sequence.

    Returns:
        Output ``[B, T, H, V]`` and final states ``[S, H, K, r V]`` (None unless asked for).

    Raises:
        ConfigError: The backend is unknown, or ``chunk_size`` or ``max_state_bytes`` not allowed.
    """
    _check_backend(backend, has_triton=True)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "triton" or (backend == "auto" and _is_expanded(q, v, mix)):
        o, state = expanded_gla(
            q,
            k,
            v,
            g,
            scale=scale,
            mix=mix,
            initial_state=initial_state if context is None else None,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            max_state_bytes=max_state_bytes,
            output_final_state=output_final_state or context is not None,
        )
        if context is not None:
            assert state is not None
            added, state = gla_across(context, (q, k, v, g), state[-1:], initial_state, scale=scale)
            o = add_to_first(o, added if mix is None else mix_outputs(added, mix))
        return o, state if output_final_state else None
    o, state = _mixed_scan(
        _Forms(naive=naive_gla, kernel=fla_gla, chunked=chunked_gla, across=gla_across),
        (q, k, v, g),
        mix=mix,
        backend=backend,
        chunk_size=chunk_size,
        context=context,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    return o, state if output_final_state else None


def gla_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    mix: torch.Tensor | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance :func:`gla` by one token: ``q, k, g [B, H, K]``, ``v [B, H, V]``, ``state [B, H, K, r V]``.

    With ``overwrite`` the new state takes the old one's place in memory: without autograd, and if the caller owns it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if overwrite and state.is_contiguous():
        o = gla_step_(q, k, v, g, state, scale=scale)
    else:
        o, state = gla_step(q, k, v, g, state, scale=scale)
    return (o if mix is None else mix_outputs(o, mix)), state


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    mix: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    context: ContextShare | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule, plain or mixed, with one decay per head (Gated DeltaNet) or per key channel (KDA).

    Args:
        q: ``[B, T, H, K]`` queries, normalised; their factor is ``K ** -0.5``.
        k: ``[B, T, H, K]`` keys, normalised.
        v: ``[B, T, HV, V]`` values, ``HV`` a multiple of ``H``.
        g: ``[B, T, HV, 1]`` or ``[B, T, HV, K]`` log decays, at most 0.
        beta: ``[B, T, HV]`` strengths of the writes.
        mix: ``[HV, r]`` mixing matrix; the state then holds ``r`` value heads per recurrence.
        initial_state: ``[S, HV, K, r V]`` or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.
        backend: Which implementation runs.
        chunk_size: Tokens per chunk of the chunked form; None picks one.
        context: How the tokens hang together with those of other ranks, or None. States are then those before and
            after the whole pack, of one sequence.

    Returns:
        Output ``[B, T, HV, V]`` and final states ``[S, HV, K, r V]``.

    Raises:
        ConfigError: The backend is unknown, or ``kernel`` cannot compute the gradients on this machine.
    """
    _check_backend(backend)
    inputs = (q, k, v, g, beta)
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if needs_gradients and g.shape[-1] == 1 and _takes_kernel(backend, q):
        backend = _trained_delta_backend(backend)
    return _mixed_scan(
        _Forms(naive=naive_delta_rule, kernel=fla_delta_rule, chunked=chunked_delta_rule, across=delta_across),
        inputs,
        mix=mix,
        backend=backend,
        chunk_size=chunk_size,
        context=context,
        scale=q.shape[-1] ** -0.5,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )


def delta_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    mix: torch.Tensor | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance :func:`delta_rule` by one token: arguments without their ``T``, ``state [B, HV, K, r V]``.

    ``overwrite`` is that of :func:`gla_decode`.
    """
    scale = q.shape[-1] ** -0.5
    if mix is not None:
        v = spread_values(v, mix.shape[1])
    if overwrite and state.is_contiguous():
        o = delta_step_(q, k, v, g, beta, state, scale=scale)
    else:
        o, state = delta_step(q, k, v, g, beta, state, scale=scale)
    return (o if mix is None else mix_outputs(o, mix)), state


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    output_final_state: bool = True,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    context: ContextShare | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The Mamba2 scan for any ``d_state``.

    Args:
        x: ``[B, T, H, P]`` inputs.
        dt: ``[B, T, H]`` step sizes, after softplus.
        A: ``[H]`` negative decay rates.
        B: ``[B, T, G, N]`` input projections.
        C: ``[B, T, G, N]`` output projections.
        D: ``[H]`` skip weights or None.
        initial_state: ``[S, H, P, N]`` or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; the batch must be 1.
        seq_idx: ``[B, T]`` int32, the same borders in mamba_ssm's form, which saves its kernel deriving them.
        output_final_state: Whether the final states are needed.
        backend: Which implementation runs.
        chunk_size: Tokens per chunk of the chunked form; None picks one.
        context: How the tokens hang together with those of other ranks, or None. States are then those before and
            after the whole pack, of one sequence.

    Returns:
        Output ``[B, T, H, P]`` and final states ``[S, H, P, N]`` (None unless asked for).
    """
    _check_backend(backend)
    if context is not None:
        y, _ = ssd(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
            output_final_state=False,
            backend=backend,
            chunk_size=chunk_size,
        )
        added, after = ssd_across(context, x, dt, A, B, C, cu_seqlens, initial_state)
        return add_to_first(y, added), after if output_final_state else None
    state: torch.Tensor | None
    if backend == "naive":
        y, state = naive_ssd(x, dt, A, B, C, initial_state=initial_state, cu_seqlens=cu_seqlens)
    elif backend == "kernel" or (backend == "auto" and x.is_cuda and x.dtype != torch.float64 and has_mamba_ssm()):
        y, state = mamba_ssd(
            x,
            dt,
            A,
            B,
            C,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            seq_idx=seq_idx,
            output_final_state=output_final_state,
        )
    else:
        y, state = chunked_ssd(
            x, dt, A, B, C, initial_state=initial_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size
        )
    if D is not None:
        y = y + x * D.to(x.dtype).unsqueeze(-1)
    return y, state if output_final_state else None


def ssd_decode(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advance :func:`ssd` by one token: ``x [B, H, P]``, ``dt [B, H]``, ``B, C [B, G, N]``, ``state [B, H, P, N]``.

    ``overwrite`` is that of :func:`gla_decode`.
    """
    if overwrite and state.is_contiguous():
        y = ssd_step_(x, dt, A, B, C, state)
    else:
        y, state = ssd_step(x, dt, A, B, C, state)
    if D is not None:
        y = y + x * D.to(x.dtype).unsqueeze(-1)
    return y, state

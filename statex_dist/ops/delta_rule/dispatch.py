"""The gated delta rule as models call it: the choice of a backend, and states carried across ranks."""

from __future__ import annotations

import torch

from statex_dist.distributed.context_group import ContextShare
from statex_dist.errors import ConfigError
from statex_dist.ops.backends import Backend, Forms, mixed_scan, pick_backend, warn_once
from statex_dist.ops.delta_rule.torch_forms import chunked_delta_rule, delta_transition, naive_delta_rule
from statex_dist.ops.features import Features, state_blocks, widened_delta
from statex_dist.ops.fla_api import delta_backward_obstacle, fla_delta_rule, has_fla
from statex_dist.state.geometry import LARGEST_DELTA_KERNEL_KEYS


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    mix: torch.Tensor | None = None,
    features: Features | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    context: ContextShare | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule, plain or mixed, with one decay per head (Gated DeltaNet) or per key channel (KDA).

    Args:
        q: ``[B, T, H, K]`` queries, normalised.
        k: ``[B, T, H, K]`` keys, normalised.
        v: ``[B, T, HV, V]`` values, ``HV`` a multiple of ``H``.
        g: ``[B, T, HV, 1]`` or ``[B, T, HV, K]`` log decays, at most 0.
        beta: ``[B, T, HV]`` strengths of the writes.
        scale: Factor of the queries, ``K ** -0.5`` where None.
        mix: ``[HV, r]`` mixing matrix; the state then holds ``r`` value heads per recurrence.
        features: Products of the keys and queries as further key channels, or None. ``K`` of the states is then
            ``(1 + n)`` times that of the inputs.
        initial_state: ``[S, HV, K, r V]`` or None for zero.
        cu_seqlens: ``[S + 1]`` borders of packed sequences; ``B`` must be 1.
        backend: Which implementation runs.
        chunk_size: Tokens per chunk of the chunked form; None picks one.
        context: This rank's share of a pack that ranks share, or None. States are then those before and after the whole
            pack, of one sequence.

    Returns:
        Output ``[B, T, HV, V]`` and final states ``[S, HV, K, r V]``.

    Raises:
        ConfigError: The backend is unknown, or ``kernel`` cannot compute the gradients on this machine, or has more key
            channels than it can take (:data:`statex_dist.state.geometry.LARGEST_DELTA_KERNEL_KEYS`).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, g, beta)
    return mixed_scan(
        _fitting(backend, inputs, features),
        Forms(
            has_kernels=has_fla,
            naive=naive_delta_rule,
            kernel=fla_delta_rule,
            chunked=chunked_delta_rule,
            across=delta_across,
            widened=widened_delta,
        ),
        inputs,
        mix=mix,
        features=features,
        chunk_size=chunk_size,
        context=context,
        initial_state=initial_state,
        scale=scale,
        cu_seqlens=cu_seqlens,
    )


def _fitting(asked: Backend, inputs: tuple[torch.Tensor, ...], features: Features | None) -> Backend:
    """Return the backend asked for, or ``chunked`` where the kernel cannot run or compute gradients that are needed.

    Raises:
        ConfigError: The kernel was asked for by name and cannot.
    """
    if pick_backend(asked, inputs[0], has_fla) != "kernel":
        return asked
    keys = sum(state_blocks(inputs[0].shape[-1], features))
    if keys > LARGEST_DELTA_KERNEL_KEYS:
        limit = f"fla-core's kernels take at most {LARGEST_DELTA_KERNEL_KEYS} key channels a head, not {keys}"
        if asked == "kernel":
            raise ConfigError(f"scan backend 'kernel' cannot run this model: {limit}; use auto or chunked")
        warn_once(f"the delta rule runs in the slower PyTorch form: {limit}")
        return "chunked"
    if inputs[3].shape[-1] > 1:  # KDA: another backward pass
        return asked
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    obstacle = delta_backward_obstacle() if needs_gradients else None
    if obstacle is None:
        return asked
    if asked == "kernel":
        raise ConfigError(f"scan backend 'kernel' cannot train this model: {obstacle}")
    warn_once(f"the gated delta rule is trained with the slower PyTorch form: {obstacle}")
    return "chunked"


def delta_across(
    context: ContextShare,
    inputs: tuple[torch.Tensor, ...],
    final: torch.Tensor,
    initial: torch.Tensor | None,
    *,
    scale: float,
    features: Features | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do for the delta rule what :func:`statex_dist.ops.gla.dispatch.gla_across` does for GLA, with its arguments.

    Its transition is a matrix per head, which the scan itself computes: run from the identity and without values. With
    features the outputs of that scan would be wide, so a second scan reads the state before the share.
    """
    q, k, _, g, beta = (x[:, : context.first_tokens] for x in inputs)
    if features is not None:
        before, after = context.exchange(final, delta_transition(k, g, beta, features, final.dtype), initial)
        nothing = q.new_zeros(*beta.shape, final.shape[-1])
        added, _ = chunked_delta_rule(q, k, nothing, g, beta, scale=scale, features=features, initial_state=before)
        return added, after
    keys = q.shape[-1]
    identity = torch.eye(keys, dtype=final.dtype, device=q.device).expand(1, beta.shape[2], keys, keys)
    nothing = q.new_zeros(*beta.shape, keys)
    reads, transition = chunked_delta_rule(q, k, nothing, g, beta, scale=scale, initial_state=identity)
    before, after = context.exchange(final, transition, initial)
    return torch.einsum("bthk,bhkv->bthv", reads, before.to(reads.dtype)), after

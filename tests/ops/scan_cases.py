"""Random inputs of the two scans and a comparison that covers every gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch

GLA_LEAVES = ("q", "k", "v", "g")
SSD_LEAVES = ("x", "dt", "A", "B", "C")


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def gla_inputs(
    *, batch: int = 1, tokens: int, heads: int = 2, keys: int = 6, values: int = 10, seed: int = 0, gate: str = "soft"
) -> dict[str, torch.Tensor]:
    """float64 inputs; ``gate`` is soft, constant:G or bursty."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k, v, g = (draw(batch, tokens, heads, size) for size in (keys, keys, values, keys))
    if gate == "soft":
        g = torch.nn.functional.logsigmoid(g) / 4
    elif gate == "bursty":
        g = torch.where(torch.rand(g.shape, generator=rng) < 0.125, -60.0 * g.abs(), -1e-3 * g.abs())
    else:
        g = torch.full_like(g, float(gate.removeprefix("constant:")))
    return {"q": q, "k": k, "v": v, "g": g}


def delta_inputs(
    *, tokens: int, heads: int = 2, value_heads: int = 2, keys: int = 16, values: int = 16, channels: int = 1
) -> dict[str, torch.Tensor]:
    """float64 inputs of the gated delta rule; ``channels`` log decays a head: 1, or one per key."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(draw(1, tokens, heads, keys), dim=-1) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": draw(1, tokens, value_heads, values),
        "g": torch.nn.functional.logsigmoid(draw(1, tokens, value_heads, channels)) / 4,
        "beta": draw(1, tokens, value_heads).sigmoid(),
    }


def ssd_inputs(
    *, batch: int = 1, tokens: int, heads: int = 4, head_dim: int = 3, groups: int = 2, state: int = 5, seed: int = 0
) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return {
        "x": draw(batch, tokens, heads, head_dim),
        "dt": torch.nn.functional.softplus(draw(batch, tokens, heads)),
        "A": -draw(heads).exp(),
        "B": draw(batch, tokens, groups, state),
        "C": draw(batch, tokens, groups, state),
    }


def run_with_gradients(
    scan: Callable[..., tuple[torch.Tensor, torch.Tensor]], inputs: dict[str, torch.Tensor], **options
) -> dict[str, torch.Tensor]:
    """Outputs, final states and the gradient of every tensor argument under one fixed random loss."""
    tensors = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    for name in ("initial_state", "mix"):
        if options.get(name) is not None:
            tensors[name] = options.pop(name).detach().clone().requires_grad_()
    out, final = scan(**tensors, **options)
    rng = torch.Generator().manual_seed(99)
    loss = sum(
        (y.double() * torch.randn(y.shape, generator=rng, dtype=torch.float64).to(y.device)).sum() for y in (out, final)
    )
    names = list(tensors)
    grads = torch.autograd.grad(loss, [tensors[name] for name in names])
    result = {"out": out.detach(), "final": final.detach()}
    result.update({f"d{name}": grad for name, grad in zip(names, grads, strict=True)})
    return result


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare relative to the largest value of each tensor; NaN and inf fail."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name].to(want.dtype)
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), f"{name} is not finite"
        if want.numel() == 0:
            continue
        error = (got - want).abs().max().item()
        bound = tolerance * max(1.0, want.abs().max().item())
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"

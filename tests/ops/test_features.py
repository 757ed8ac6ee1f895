"""Products as key channels: gains of zero to the last bit, and every form against the recurrence of wide inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from statex_dist.distributed.context_group import ContextGroup, ContextShare
from statex_dist.errors import ConfigError
from statex_dist.ops import backends, chunk_groups
from statex_dist.ops.delta_rule import delta_decode, delta_rule, dispatch
from statex_dist.ops.features import Features, products, widened_delta
from statex_dist.ops.gla import gla, gla_decode
from statex_dist.ops.ssd import ssd, ssd_decode
from statex_dist.state.geometry import FeatureMap
from tests.ops.scan_cases import assert_close, borders, delta_inputs, gla_inputs, ssd_inputs
from tests.raising import raises

KEYS, VALUES = 8, 5
KINDS = ("gla", "ssd", "delta", "kda")
MAPS = {
    "rolls": FeatureMap(rolls=[1, 2, 3]),
    "squares": FeatureMap(rolls=[0, 2]),
    "relu": FeatureMap(rolls=[1, 3], relu=True),
    "norm": FeatureMap(rolls=[1, 2, 3], match_norm=True),
    "relu, norm": FeatureMap(rolls=[0, 1], relu=True, match_norm=True),
}
LENGTHS = (5, 0, 40, 1, 19)
SCANS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gla": (gla, gla_decode),
    "ssd": (ssd, ssd_decode),
    "delta": (delta_rule, delta_decode),
    "kda": (delta_rule, delta_decode),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, tokens: int = sum(LENGTHS), dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Inputs of a scan; decays and strengths are at least fp32."""
    if kind == "gla":
        inputs = gla_inputs(tokens=tokens, keys=KEYS, values=VALUES)
    elif kind == "ssd":
        inputs = ssd_inputs(tokens=tokens, head_dim=VALUES, state=KEYS)
    else:
        channels = KEYS if kind == "kda" else 1
        inputs = delta_inputs(tokens=tokens, value_heads=4, keys=KEYS, values=VALUES, channels=channels)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x.to(wide if name in ("g", "beta", "dt", "A") else dtype) for name, x in inputs.items()}


def gain(features: FeatureMap, value: float | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Gains of two groups of heads: all ``value``, or random."""
    shape = 2, len(features.rolls) * KEYS
    rng = torch.Generator().manual_seed(8)
    return torch.full(shape, value, dtype=dtype) if value is not None else torch.randn(shape, generator=rng).to(dtype)


def first_state(kind: str, factor: int, sequences: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rows = factor * KEYS
    shape = (4, VALUES, rows) if kind == "ssd" else (2 if kind == "gla" else 4, rows, VALUES)
    return torch.randn(sequences, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def old_rows(kind: str, state: torch.Tensor) -> torch.Tensor:
    return state[..., :KEYS] if kind == "ssd" else state[..., :KEYS, :]


def gradients(scan: Callable[..., Any], features: FeatureMap, tensors: dict[str, torch.Tensor], **options: Any):
    """Outputs, states and the gradients of every input and of the gains under a fixed random loss."""
    tensors = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    gains = tensors.pop("gain")
    out, final = scan(**tensors, features=Features(features, gains), **options)
    rng = torch.Generator().manual_seed(99)
    loss = sum((y.double() * torch.randn(y.shape, generator=rng, dtype=torch.float64)).sum() for y in (out, final))
    names = [*tensors, "gain"]
    grads = torch.autograd.grad(loss, [*tensors.values(), gains])
    return {"out": out.detach(), "final": final.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


@every_kind
@pytest.mark.parametrize(("name", "group_bytes"), [("rolls", 1 << 25), *((name, 1) for name in MAPS)])
def test_chunked_equals_the_recurrence_with_every_gradient(kind, name, group_bytes, monkeypatch):
    """In one group of chunks, and in groups that are as small as they can be."""
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", group_bytes)
    features = MAPS[name]
    tensors = make(kind) | {"gain": gain(features)}
    tensors["initial_state"] = first_state(kind, features.factor, len(LENGTHS))
    options = {"cu_seqlens": borders(list(LENGTHS))}
    fast = gradients(SCANS[kind][0], features, tensors, backend="chunked", chunk_size=8, **options)
    slow = gradients(SCANS[kind][0], features, tensors, backend="naive", **options)
    assert slow["dgain"].abs().min() > 0
    assert_close(fast, slow, 1e-11)


@every_kind
@pytest.mark.parametrize(
    ("dtype", "group_bytes"), [(torch.float32, 1 << 25), (torch.float32, 1), (torch.float64, 1), (torch.bfloat16, 1)]
)
def test_a_gain_of_zero_changes_no_bit(kind, dtype, group_bytes, monkeypatch):
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", group_bytes)
    scan, decode = SCANS[kind]
    inputs, wide = make(kind, dtype=dtype), torch.promote_types(dtype, torch.float32)
    given = Features(MAPS["rolls"], gain(MAPS["rolls"], 0.0, wide))
    for options in ({}, {"cu_seqlens": borders(list(LENGTHS))}, {"chunk_size": 8}):
        for backend in ("chunked", "naive"):
            out, state = scan(**inputs, backend=backend, **options)
            grown, grown_state = scan(**inputs, backend=backend, features=given, **options)
            assert torch.equal(out, grown)
            assert torch.equal(state, old_rows(kind, grown_state))
    for overwrite in (False, True):
        before, grown_before = state[:1].clone(), grown_state[:1].clone()
        for t in range(3):
            token = {name: x if name == "A" else x[:, t] for name, x in inputs.items()}
            out, before = decode(**token, state=before, overwrite=overwrite)
            grown, grown_before = decode(**token, state=grown_before, features=given, overwrite=overwrite)
            assert torch.equal(out, grown)
            assert torch.equal(before, old_rows(kind, grown_before))


@every_kind
@pytest.mark.parametrize("overwrite", [False, True])
def test_steps_are_the_recurrence(kind, overwrite):
    scan, decode = SCANS[kind]
    inputs, given = make(kind, 9), Features(MAPS["squares"], gain(MAPS["squares"]))
    state = first_state(kind, given.map.factor)
    expected, final = scan(**inputs, features=given, initial_state=state, backend="naive")
    for t in range(9):
        token = {name: x if name == "A" else x[:, t] for name, x in inputs.items()}
        out, state = decode(**token, state=state, features=given, overwrite=overwrite)
        torch.testing.assert_close(out, expected[:, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["gla", "delta", "kda"])
def test_mixed_heads_have_features(kind, monkeypatch):
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 1)
    heads = 2 if kind == "gla" else 4
    features, inputs = MAPS["rolls"], make(kind)
    mix = torch.randn(heads, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tensors = inputs | {"gain": gain(features), "mix": mix}
    fast, slow = (gradients(SCANS[kind][0], features, tensors, backend=name) for name in ("chunked", "naive"))
    assert_close(fast, slow, 1e-11)


@every_kind
@pytest.mark.parametrize("name", ["relu, norm", "norm"])
def test_zero_keys_and_strong_gates_are_finite_in_fp32(kind, name, monkeypatch):
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 1)
    features = MAPS[name]
    tensors = make(kind) | {"gain": gain(features)}
    for key in ("q", "k", "B", "C"):
        if key in tensors:
            tensors[key] = tensors[key].clone()
            tensors[key][:, 3:9] = 0
    if kind == "ssd":
        tensors["A"] = tensors["A"] * 0 - 50
    else:
        tensors["g"] = torch.where(tensors["g"] < tensors["g"].median(), -50.0, tensors["g"])
    slow = gradients(SCANS[kind][0], features, tensors, backend="naive")
    narrow = {key: x.float() for key, x in tensors.items()}
    fast = gradients(SCANS[kind][0], features, narrow, backend="chunked")
    assert_close(fast, slow, 2e-4)


@pytest.mark.parametrize("kind", ["gla", "ssd"])
def test_large_bfloat16_keys_have_products_in_fp32(kind):
    """4e4 squared is beyond fp16; a product that is rounded to bf16 loses 8 of its 16 bits."""
    inputs, features = make(kind, dtype=torch.bfloat16), MAPS["rolls"]
    key, query = ("k", "q") if kind == "gla" else ("B", "C")
    inputs[key] = (inputs[key] * 4e4).bfloat16()
    given = Features(features, gain(features, 1e-5, torch.float32))
    expected, state = SCANS[kind][0](**{n: x.double() for n, x in inputs.items()}, features=given, backend="naive")
    for backend in ("chunked", "naive"):
        out, final = SCANS[kind][0](**inputs, features=given, backend=backend)
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() / expected.norm() < 1e-2
        assert (final.double() - state).norm() / state.norm() < 1e-2
    x = inputs[query]
    assert torch.equal(products(x, features), products(x.float(), features))


def test_keys_of_a_delta_rule_stay_normalised():
    inputs = make("delta")
    for features in MAPS.values():
        for value in (0.0, None, 100.0):
            _, k, *_ = widened_delta(tuple(inputs.values()), Features(features, gain(features, value)))
            torch.testing.assert_close(k.norm(dim=-1), torch.ones_like(k[..., 0]), rtol=0, atol=1e-14)


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_groups_inside_activation_checkpointing(kind, reentrant, monkeypatch):
    features = MAPS["rolls"]
    tensors = make(kind) | {"gain": gain(features)}
    expected = gradients(SCANS[kind][0], features, tensors, backend="chunked", chunk_size=8)
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 1)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}

    def layer(*values: torch.Tensor) -> Any:
        given = dict(zip(leaves, values, strict=True))
        gains = given.pop("gain")
        return SCANS[kind][0](**given, features=Features(features, gains), backend="chunked", chunk_size=8)

    out, final = checkpoint(layer, *leaves.values(), use_reentrant=reentrant)
    rng = torch.Generator().manual_seed(99)
    sum((y * torch.randn(y.shape, generator=rng, dtype=torch.float64)).sum() for y in (out, final)).backward()
    found = {"out": out.detach(), "final": final.detach()} | {f"d{name}": x.grad for name, x in leaves.items()}
    assert_close(found, expected, 1e-11)
    with torch.inference_mode():
        again, _ = layer(*tensors.values())
    assert torch.equal(again, out)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation returns, the backward pass included."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


@every_kind
def test_no_tensor_has_the_wide_channels_of_a_whole_sequence(kind, monkeypatch):
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 1 << 14)
    features, tokens = MAPS["rolls"], 1024
    inputs = {name: x.requires_grad_() for name, x in make(kind, tokens).items()}
    cu_seqlens, alone = borders([tokens]), Together(rank=0, size=1, group=(threading.Barrier(1), [None]))
    share = ContextShare.of(alone, cu_seqlens=cu_seqlens, opens=True)
    state = first_state(kind, features.factor)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "context": share, "initial_state": state, "chunk_size": 32}
    with Largest() as largest:
        given = Features(features, gain(features).requires_grad_())
        SCANS[kind][0](**inputs, features=given, backend="chunked", **options)[0].sum().backward()
    groups = inputs["B" if kind == "ssd" else "k"].shape[2]
    assert tokens * groups * KEYS <= largest.numbers < tokens * groups * features.factor * KEYS


class Together(ContextGroup):
    """Ranks that are threads of this process."""

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        barrier, board = self.group
        board[self.rank] = x.detach().contiguous()
        barrier.wait(60)
        gathered = list(board)
        barrier.wait(60)
        return gathered


@every_kind
@pytest.mark.parametrize("lengths", [(66,), (20, 40, 6)])
def test_shares_of_a_context_group(kind, lengths, monkeypatch):
    """Three ranks: outputs, the state at the end and all gradients are those of one rank."""
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 1 << 12)
    features, ranks, tokens = MAPS["relu"], 3, sum(lengths)
    inputs, gains, scan = make(kind, tokens), gain(features), SCANS[kind][0]
    state = first_state(kind, features.factor)
    starts = first_state(kind, features.factor, len(lengths)) * 0
    starts[:1] = state
    weights = torch.randn(inputs["x" if kind == "ssd" else "v"].shape, dtype=torch.float64)
    whole = {name: x.clone().requires_grad_() for name, x in (inputs | {"gain": gains}).items()}
    out, final = scan(
        **{name: x for name, x in whole.items() if name != "gain"},
        features=Features(features, whole["gain"]),
        initial_state=starts,
        cu_seqlens=borders(list(lengths)),
        backend="chunked",
    )
    (out * weights).sum().backward()
    marks, meeting = borders(list(lengths)), (threading.Barrier(ranks), [None] * ranks)
    found: list[Any] = [None] * ranks

    def work(rank: int) -> None:
        first, last = rank * tokens // ranks, (rank + 1) * tokens // ranks
        inner = [int(m) for m in marks if first < m < last]
        cu_seqlens = torch.tensor([0, *(m - first for m in inner), last - first])
        share = ContextShare.of(
            Together(rank=rank, size=ranks, group=meeting), cu_seqlens=cu_seqlens, opens=rank == 0 or first not in marks
        )
        mine = {name: (x if name == "A" else x[:, first:last]).clone().requires_grad_() for name, x in inputs.items()}
        own = gains.clone().requires_grad_()
        given = Features(features, own)
        y, after = scan(**mine, features=given, initial_state=state, cu_seqlens=cu_seqlens, context=share)
        (y * weights[:, first:last]).sum().backward()
        found[rank] = y.detach(), after, {name: x.grad for name, x in mine.items()} | {"gain": own.grad}

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([y for y, _, _ in found], dim=1), out.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(found[0][1], final[-1:].detach(), rtol=0, atol=1e-11)
    for name, x in whole.items():
        parts = [grads[name] for *_, grads in found]
        together = sum(parts) if name in ("A", "gain") else torch.cat(parts, dim=1)
        torch.testing.assert_close(together, x.grad, rtol=0, atol=1e-10)


class TestKernelsOfTheDeltaRules:
    """fla-core's take at most 256 key channels."""

    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch):
        monkeypatch.setattr(backends, "takes_kernels", lambda x, has_kernels: True)
        monkeypatch.setattr(dispatch, "LARGEST_DELTA_KERNEL_KEYS", 16)
        monkeypatch.setattr(dispatch, "fla_delta_rule", lambda *a, **k: pytest.fail("the kernel was called"))
        backends.warn_once.cache_clear()

    def test_auto_takes_the_chunked_form_with_one_warning(self, caplog):
        given = Features(MAPS["rolls"], gain(MAPS["rolls"]))
        found = [delta_rule(**make("delta"), features=given)[0] for _ in range(2)]
        assert len(caplog.records) == 1
        assert torch.equal(found[0], delta_rule(**make("delta"), features=given, backend="chunked")[0])

    def test_the_kernel_by_name_is_refused(self):
        with raises(ConfigError, "kernel", "at most 16", "not 32", "chunked"):
            delta_rule(**make("delta"), features=Features(MAPS["rolls"], gain(MAPS["rolls"])), backend="kernel")


def test_the_kernel_of_gla_gets_wide_inputs(monkeypatch):
    from statex_dist.ops.gla import dispatch as gla_dispatch
    from statex_dist.ops.gla.torch_forms import naive_gla

    monkeypatch.setattr(gla_dispatch, "fla_gla", naive_gla)
    given = Features(MAPS["rolls"], gain(MAPS["rolls"]))
    out, state = gla(**make("gla"), features=given, backend="kernel")
    expected, expected_state = gla(**make("gla"), features=given, backend="naive")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)

"""The scan of expanded layers: its algorithm in PyTorch, in float64, against the recurrence."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statex_dist.errors import ConfigError
from statex_dist.ops.delta_rule import delta_rule
from statex_dist.ops.features import Features
from statex_dist.ops.gla import gla
from statex_dist.ops.gla.triton.segments import cut_segments
from statex_dist.ops.ssd import ssd
from statex_dist.state.geometry import FeatureMap
from tests.ops.scan_cases import assert_close, borders, delta_inputs, gla_inputs, run_with_gradients, ssd_inputs
from tests.raising import raises

HEADS, KEYS, VALUES = 3, 5, 7
STATE_BYTES = HEADS * KEYS * VALUES * 8


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any),
    partners=st.sampled_from([None, 1, 2, 3]),
    chunk_size=st.sampled_from([16, 32, 64]),
    chunks_per_segment=st.integers(1, 4),
    gate=st.sampled_from(["soft", "bursty", "constant:-50"]),
    has_state=st.booleans(),
)
@example(lengths=[0, 64, 0, 1, 33], partners=3, chunk_size=32, chunks_per_segment=2, gate="bursty", has_state=True)
def test_equals_the_recurrence(lengths, partners, chunk_size, chunks_per_segment, gate, has_state):
    inputs = gla_inputs(tokens=sum(lengths), heads=HEADS, keys=KEYS, values=VALUES, gate=gate)
    rng = torch.Generator().manual_seed(7)
    width = VALUES * (partners or 1)
    options = {
        "scale": 0.3,
        "mix": None if partners is None else torch.randn(HEADS, partners, generator=rng, dtype=torch.float64),
        "cu_seqlens": borders(lengths),
        "initial_state": None,
    }
    if has_state:
        options["initial_state"] = torch.randn(len(lengths), HEADS, KEYS, width, generator=rng, dtype=torch.float64)
    expected = run_with_gradients(gla, inputs, backend="naive", **options)
    actual = run_with_gradients(
        gla,
        inputs,
        backend="triton",
        chunk_size=chunk_size,
        max_state_bytes=2 * chunks_per_segment * STATE_BYTES * (partners or 1),
        **options,
    )
    assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize(
    "products",
    [
        FeatureMap(rolls=[2, 1]),
        FeatureMap(rolls=[1, 0], relu=True),
        FeatureMap(rolls=[1], match_norm=True),
        FeatureMap(rolls=[0, 2], relu=True, match_norm=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [[50], [0, 17, 1, 33]], ids=str)
def test_features_equal_the_recurrence_on_widened_inputs(products, lengths):
    inputs = gla_inputs(tokens=sum(lengths), heads=2, keys=KEYS, values=VALUES)
    inputs["k"][:, 3] = 0
    rng = torch.Generator().manual_seed(7)
    keys = KEYS * products.factor
    inputs["gain"] = torch.randn(2, keys - KEYS, generator=rng, dtype=torch.float64)
    options = {
        "cu_seqlens": borders(lengths),
        "initial_state": torch.randn(len(lengths), 2, keys, VALUES, generator=rng, dtype=torch.float64),
    }

    def scan(gain, **rest):
        return gla(**rest, features=Features(products, gain))

    expected = run_with_gradients(scan, inputs, backend="naive", **options)
    actual = run_with_gradients(scan, inputs, backend="triton", chunk_size=16, max_state_bytes=1, **options)
    assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("keys", "values"), [(37, 21), (32, 16)])
def test_gains_of_zero_change_nothing(keys, values, dtype):
    """Outputs and the old rows of the states equal those without features to the last bit, in equal segments."""
    inputs = gla_inputs(tokens=160, heads=2, keys=keys, values=values)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: x.to(wide if name == "g" else dtype) for name, x in inputs.items()}
    state = torch.randn(2, 2, 3 * keys, values, dtype=wide)
    features = Features(FeatureMap(rolls=[1, 0]), torch.zeros(2, 2 * keys, dtype=wide))
    options = {"cu_seqlens": borders([64, 96]), "chunk_size": 32, "max_state_bytes": 1, "backend": "triton"}
    with torch.no_grad():
        plain, after = gla(**inputs, initial_state=state[:, :, :keys].contiguous(), **options)
        grown, grown_after = gla(**inputs, features=features, initial_state=state, **options)
    assert torch.equal(grown, plain)
    assert torch.equal(grown_after[:, :, :keys], after)


def test_batches_are_sequences():
    inputs = gla_inputs(batch=3, tokens=45, heads=2)
    state = torch.randn(3, 2, 6, 10, dtype=torch.float64)
    expected = run_with_gradients(gla, inputs, backend="naive", initial_state=state)
    assert_close(run_with_gradients(gla, inputs, backend="triton", initial_state=state), expected, 1e-10)


@pytest.mark.parametrize("partners", [2, 4])
def test_identity_mix_is_the_original_layer(partners):
    """M = [1, 0, ...] reads each head's own values alone."""
    inputs = gla_inputs(tokens=70, heads=4)
    mix = torch.zeros(4, partners, dtype=torch.float64)
    mix[:, 0] = 1
    mixed, _ = gla(**inputs, mix=mix, backend="triton")
    plain, _ = gla(**inputs, backend="naive")
    torch.testing.assert_close(mixed, plain, rtol=1e-10, atol=1e-10)


def test_mix_of_ones_is_the_merged_head():
    """M = ones over all heads is StateX's head merge (docs/method.md, section 3)."""
    heads, keys, values = 4, 6, 10
    inputs = gla_inputs(tokens=70, heads=heads, keys=keys, values=values)
    mixed, _ = gla(**inputs, mix=torch.ones(heads, heads, dtype=torch.float64), backend="triton", scale=0.2)
    merged, _ = gla(**{name: x.flatten(2).unsqueeze(2) for name, x in inputs.items()}, backend="triton", scale=0.2)
    torch.testing.assert_close(mixed.flatten(2), merged.flatten(2), rtol=1e-10, atol=1e-10)


def test_gradients_reach_only_what_asks_for_them():
    inputs = gla_inputs(tokens=40)
    inputs["v"].requires_grad_()
    out, _ = gla(**inputs, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), [inputs["v"]])
    assert grad.abs().sum() > 0
    with torch.no_grad():
        out, _ = gla(**inputs, backend="triton")
    assert not out.requires_grad


def test_segments_stay_within_a_grid(monkeypatch):
    """A tiny state would put more chunks into a segment than a grid has programs."""
    counts = []

    def cut(lengths, chunk_size, chunks_per_segment, device):
        counts.append(chunks_per_segment)
        return cut_segments(lengths, chunk_size, chunks_per_segment, device)

    monkeypatch.setattr("statex_dist.ops.gla.triton.expanded.cut_segments", cut)
    inputs = gla_inputs(tokens=70, heads=1, keys=1, values=1)
    whole, _ = gla(**inputs, backend="triton", chunk_size=16)
    assert counts == [65535]
    monkeypatch.setattr("statex_dist.ops.gla.triton.expanded.GRID_PROGRAMS", 2)
    parts, _ = gla(**inputs, backend="triton", chunk_size=16)
    assert counts[1:] == [2]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


class LiveStorages(TorchDispatchMode):
    """The bytes of all tensors made since it began that are still there, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.live:
                self.live[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.live.pop, key, None)
                self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize("rolls", [None, [1, 2, 3]], ids=["plain", "features"])
def test_memory_beside_inputs_and_outputs_does_not_grow_with_the_sequence(rolls):
    """Forward and backward pass hold one segment's tensors, wide or not, and a state per segment."""
    keys, values, chunk = 32, 64, 16
    features = None
    if rolls is not None:
        keys = keys // (1 + len(rolls))
        features = Features(FeatureMap(rolls=rolls), torch.randn(1, len(rolls) * keys, dtype=torch.float64))
    state = 32 * values * 8

    def most(chunks: int, max_states: int) -> int:
        inputs = gla_inputs(tokens=chunks * chunk, heads=1, keys=keys, values=values)
        leaves = [x.requires_grad_() for x in inputs.values()]
        with LiveStorages() as memory:
            out, _ = gla(
                *leaves,
                backend="triton",
                chunk_size=chunk,
                features=features,
                max_state_bytes=max_states * state,
                output_final_state=False,
            )
            torch.autograd.grad(out, leaves, out.detach())
        # views make the mode count the inputs too, and each gradient is as large as its input
        return memory.most - 2 * sum(x.nbytes for x in leaves) - out.nbytes

    # 16 chunks per segment in both: 48 chunks more may cost a state each for three segments more, and their carries
    assert most(64, 32) - most(16, 32) <= 6 * state
    # the whole sequence at once does hold its states and all transients
    assert most(64, 128) > most(64, 32) + 2 * 48 * state


def test_bf16_states_lose_little():
    """Outputs and gradients in bf16 stay near float64's: the states are carried in fp32, whatever they are kept in."""
    wide = gla_inputs(tokens=1024, heads=1, keys=64, values=128)
    rounded = {name: x.bfloat16() if name != "g" else x.float() for name, x in wide.items()}
    expected = run_with_gradients(gla, {name: x.double() for name, x in rounded.items()}, backend="chunked")
    actual = run_with_gradients(gla, rounded, backend="triton", chunk_size=256)
    for name, want in expected.items():
        error = ((actual[name].double() - want).norm() / want.norm()).item()
        assert error < 8e-3, f"{name}: relative error {error:.2g}"


def test_a_second_backward_pass_gives_the_same():
    leaves = [x.requires_grad_() for x in gla_inputs(tokens=100, heads=1).values()]
    out, _ = gla(*leaves, backend="triton", chunk_size=16, max_state_bytes=1)
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_final_states_alone_have_gradients():
    inputs = gla_inputs(tokens=50, heads=2)

    def final_gradients(backend):
        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        _, final = gla(*leaves, backend=backend)
        return torch.autograd.grad(final.square().sum(), leaves[1:])

    for actual, expected in zip(final_gradients("triton"), final_gradients("naive"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_autocast_leaves_the_scan_alone():
    inputs = {name: x.float() for name, x in gla_inputs(tokens=40).items()}
    plain = run_with_gradients(gla, inputs, backend="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run_with_gradients(gla, inputs, backend="triton")
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_states_of_another_shape_are_refused():
    """The kernels would write after the tensors' ends."""
    with raises(ValueError, "initial_state", "(3, 2, 6, 10)", "(1, 2, 6, 10)"):
        gla(
            **gla_inputs(tokens=30),
            backend="triton",
            cu_seqlens=borders([10, 10, 10]),
            initial_state=torch.zeros(1, 2, 6, 10, dtype=torch.float64),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 8}, "chunk_size.*not 8"),
        ({"chunk_size": 48}, "chunk_size.*not 48"),
        ({"max_state_bytes": 0}, "max_state_bytes.*not 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        gla(**gla_inputs(tokens=20), backend="triton", **options)


def test_features_that_do_not_fit_are_refused():
    """The kernels would read after the gains' end; the mixing matrix and features never occur in one layer."""
    inputs, products = gla_inputs(tokens=20, heads=2, keys=5), FeatureMap(rolls=[1])
    with raises(ValueError, "gains", "(2, 5)", "(1, 5)"):
        gla(**inputs, backend="triton", features=Features(products, torch.zeros(1, 5)))
    with raises(ConfigError, "mixed", "features"):
        gla(**inputs, backend="triton", features=Features(products, torch.zeros(2, 5)), mix=torch.ones(2, 2))


def test_other_dtypes_are_refused():
    inputs = {name: x.half() for name, x in gla_inputs(tokens=20).items()}
    with raises(ConfigError, "fp32", "bf16", "float16"):
        gla(**inputs, backend="triton")


def test_other_scans_have_no_such_backend():
    with raises(ConfigError, "triton", "auto", "kernel", "chunked", "naive"):
        ssd(**ssd_inputs(tokens=5), backend="triton")
    with raises(ConfigError, "triton", "auto", "kernel", "chunked", "naive"):
        delta_rule(**delta_inputs(tokens=5), backend="triton")


@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=6).filter(any),
    chunk_size=st.sampled_from([16, 32]),
    per_segment=st.integers(1, 5),
)
def test_segments_cover_every_token_once(lengths, chunk_size, per_segment):
    segments = cut_segments(tuple(lengths), chunk_size, per_segment, torch.device("cpu"))
    x = torch.arange(1.0, sum(lengths) + 1).view(-1, 1, 1)
    out = torch.zeros_like(x)
    for segment in segments:
        assert 1 <= segment.num_chunks <= per_segment
        placed = segment.take(x)
        assert placed.count_nonzero() == segment.tokens[1] == int(segment.length.sum())
        segment.put(placed, out)
    assert torch.equal(out, x)
    firsts = torch.cat([s.sequence[s.is_first.bool()] for s in segments]).tolist()
    lasts = torch.cat([s.sequence[s.is_last.bool()] for s in segments]).tolist()
    assert firsts == lasts == [i for i, length in enumerate(lengths) if length]

"""The guards around mamba_ssm's kernels: on a stand-in with the same blind spots, and on the real ones interpreted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.errors import ConfigError
from statex_dist.ops.fla_api import has_fla
from statex_dist.ops.ssd import mamba_api, ssd
from statex_dist.ops.ssd.mamba_api import has_mamba_ssm, mamba_ssd
from statex_dist.ops.ssd.torch_forms import naive_ssd
from tests.ops.interpreter import assert_script_passes
from tests.ops.scan_cases import assert_close, borders, run_with_gradients, ssd_inputs
from tests.ops.ssd.interpreted_mamba import CASES, CONV_CASES, DISPATCHED
from tests.raising import raises

INSTALL = (
    "mamba_ssm is not installed: MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-deps "
    "--no-build-isolation mamba-ssm==2.3.2.post1 (make setup does it)"
)


@pytest.mark.skipif(not has_mamba_ssm(), reason=INSTALL)
@pytest.mark.skipif(not has_fla(), reason="fla-core or triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/ops/test_gpu_kernels.py runs the compiled kernels")
def test_interpreted_kernels_equal_the_oracles():
    assert_script_passes("tests.ops.ssd.interpreted_mamba", [*CASES, DISPATCHED, *CONV_CASES])


@pytest.mark.skipif(not has_mamba_ssm(), reason=INSTALL)
def test_transformers_does_not_see_the_kernels_that_we_import():
    """It would call them on CPU tensors: it takes whatever ``import mamba_ssm`` and its attributes give."""
    script = (
        "import sys\n"
        "from statex_dist.ops.ssd import mamba_api\n"
        "assert mamba_api._scan_kernel().__module__ == 'mamba_ssm.ops.triton.ssd_combined'\n"
        "assert 'mamba_ssm' not in sys.modules\n"
        "from transformers.models.mamba2 import modeling_mamba2 as theirs\n"
        "print(theirs.mamba2_chunk_scan.__wrapped__.__module__)\n"
        "import torch, transformers\n"
        "config = transformers.Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=6, n_groups=2,"
        " num_hidden_layers=1, vocab_size=40)\n"
        "print(torch.isfinite(transformers.Mamba2ForCausalLM(config)(torch.arange(9)[None]).logits).all().item())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["transformers.models.mamba2.modeling_mamba2", "True"]


class StandIn:
    """mamba_ssm's entry with its documented blind spots, in PyTorch; counts its calls."""

    def __init__(self):
        self.chunks: list[int] = []

    def __call__(self, x, dt, A, B, C, *, chunk_size, initial_states, seq_idx, return_final_states):
        assert return_final_states
        self.chunks.append(x.shape[0] * -(-x.shape[1] // chunk_size))
        if seq_idx is None:
            return naive_ssd(x, dt, A, B, C, initial_state=initial_states)
        assert seq_idx.dtype == torch.int32
        assert seq_idx.shape == x.shape[:2]
        numbers, lengths = seq_idx[0].unique_consecutive(return_counts=True)
        states = x.new_zeros(len(lengths), *x.shape[2:], B.shape[3])
        if initial_states is not None and numbers[0] == 0:
            states = torch.cat([initial_states, states[1:]])
        y, after = naive_ssd(x, dt, A, B, C, initial_state=states, cu_seqlens=borders(lengths.tolist()))
        return y, after[-1:]


@pytest.fixture
def kernel(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(mamba_api, "_scan_kernel", lambda: stand_in)
    monkeypatch.setattr(mamba_api, "has_mamba_ssm", lambda: True)
    return stand_in


def compare(inputs, *, chunk_size=8, final=True, state=None, **options):
    def recurrence(**tensors):
        y, after = naive_ssd(**tensors, **options)
        return y, after if final else y[:0]

    def guarded(**tensors):
        y, after = mamba_ssd(**tensors, **options, chunk_size=chunk_size, output_final_state=final)
        assert final or after is None
        return y, after if final else y[:0]

    expected = run_with_gradients(recurrence, inputs, initial_state=state)
    narrow = {name: x.float() for name, x in inputs.items()}
    actual = run_with_gradients(guarded, narrow, initial_state=None if state is None else state.float())
    assert_close(actual, expected, 2e-5)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    limit=st.integers(1, 6),
    with_state=st.booleans(),
    final=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_packing_with_any_limit(lengths, limit, with_state, final, seed):
    inputs = ssd_inputs(tokens=sum(lengths), heads=2, groups=1, head_dim=2, state=3, seed=seed)
    state = torch.randn(len(lengths), 2, 2, 3, dtype=torch.float64) if with_state else None
    stand_in = StandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba_api, "_scan_kernel", lambda: stand_in)
        patch.setattr(mamba_api, "has_mamba_ssm", lambda: True)
        patch.setattr(mamba_api, "GRID_PROGRAMS", limit)
        compare(inputs, state=state, final=final, cu_seqlens=borders(lengths))
    assert max(stand_in.chunks) <= limit


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_any_batch_with_any_limit(kernel, monkeypatch, batch, limit):
    inputs = ssd_inputs(batch=batch, tokens=21, heads=2, groups=1, head_dim=2, state=3)
    monkeypatch.setattr(mamba_api, "GRID_PROGRAMS", limit)
    compare(inputs, state=torch.randn(batch, 2, 2, 3, dtype=torch.float64))
    assert max(kernel.chunks) <= limit
    assert sum(kernel.chunks) == 3 * batch


def test_packed_sequences_without_states_take_one_call(kernel):
    inputs = ssd_inputs(tokens=100, heads=2, groups=1)
    compare(inputs, cu_seqlens=borders([40, 1, 0, 59]), final=False)
    given_idx = torch.tensor([[0] * 40 + [1] + [3] * 59], dtype=torch.int32)
    mamba_ssd(**{n: x.float() for n, x in inputs.items()}, seq_idx=given_idx, cu_seqlens=borders([40, 1, 0, 59]))
    assert kernel.chunks[0] == 13


def test_many_packed_sequences_with_states_take_few_calls(kernel):
    lengths = [1 + (7 * i) % 30 for i in range(40)]
    inputs = ssd_inputs(tokens=sum(lengths), heads=1, groups=1, head_dim=2, state=3)
    compare(inputs, cu_seqlens=borders(lengths))
    assert len(kernel.chunks) == 4  # sequences of 1, 2, 3 and 4 chunks


class TestLimits:
    """Sizes alone: the tensors have no data."""

    def inputs(self, *, tokens, batch=1, heads=64, head_dim=64, state=512, groups=1):
        """As the mixer has them: slices of one row, in bf16."""
        sizes = [heads * head_dim, groups * state, groups * state, heads]
        row = torch.empty(batch, tokens, sum(sizes), device="meta", dtype=torch.bfloat16)
        x, B, C, dt = row.split(sizes, dim=-1)
        B, C = (y.unflatten(-1, (groups, state)) for y in (B, C))
        return {
            "x": x.unflatten(-1, (heads, head_dim)),
            "dt": dt,
            "A": torch.empty(heads, device="meta"),
            "B": B,
            "C": C,
        }

    @pytest.fixture
    def calls(self, monkeypatch):
        made = []

        def kernel(x, dt, A, B, C, **_):
            made.append((x.shape[0], x.shape[1]))
            return torch.empty_like(x), x.new_empty(x.shape[0], *x.shape[2:], B.shape[3])

        monkeypatch.setattr(mamba_api, "_scan_kernel", lambda: kernel)
        monkeypatch.setattr(mamba_api, "has_mamba_ssm", lambda: True)
        return made

    @pytest.mark.parametrize(
        ("sizes", "calls_made"),
        [
            ({"tokens": 65536, "batch": 3}, [(3, 65536)]),
            # 2^31 / (64 * 64 * 512) = 1024 chunks would hold exactly 2^31 numbers of states: one fewer.
            ({"tokens": 262144}, [(1, 261888), (1, 256)]),
            ({"tokens": 131072, "batch": 3}, [(1, 131072)] * 3),
            ({"tokens": 100_000, "batch": 3}, [(2, 100_000), (1, 100_000)]),
            # d_state 16: the row of 4192 is what counts, 2^31 / 256 / 4192 = 2001.1 chunks.
            ({"tokens": 600_000, "state": 16}, [(1, 512_256), (1, 87_744)]),
            # Eight groups: 65535 programs are 8191 chunks, but C B^T has 8 * 256 * 256 numbers a chunk: 4095.
            ({"tokens": 1_100_000, "heads": 8, "head_dim": 8, "state": 8, "groups": 8}, [(1, 1_048_320), (1, 51_680)]),
            # The sums of one head's log decays, per 32 tokens.
            ({"tokens": 20_000_000, "heads": 1, "head_dim": 1, "state": 1}, [(1, 8_388_352)] * 2 + [(1, 3_223_296)]),
        ],
    )
    def test_cuts(self, calls, sizes, calls_made):
        y, _ = mamba_ssd(**self.inputs(**sizes))
        assert calls == calls_made
        assert y.shape[:2] == (sizes.get("batch", 1), sizes["tokens"])

    def test_rows_far_apart_go_one_by_one(self, calls):
        """A few tokens of long rows: the offset of a row is that of all its tokens."""
        inputs = self.inputs(tokens=300_000, batch=3)
        short = {name: x if name == "A" else x[:, :512] for name, x in inputs.items()}
        mamba_ssd(**short)
        assert calls == [(1, 512)] * 3

    def test_tokens_become_the_slowest_axis(self, calls, monkeypatch):
        """Heads before tokens: no cut along tokens would shorten the offset of a head."""
        inputs = self.inputs(tokens=600, heads=4)
        inputs["x"] = torch.empty(1, 4, 600, 64, device="meta").transpose(1, 2)
        strides = []
        kernel = mamba_api._scan_kernel()

        def looked_at(x, *rest, **options):
            strides.append(x.stride())
            return kernel(x, *rest, **options)

        monkeypatch.setattr(mamba_api, "_scan_kernel", lambda: looked_at)
        mamba_ssd(**inputs)
        assert strides == [(600 * 4 * 64, 4 * 64, 64, 1)]


class TestRefusals:
    inputs = staticmethod(lambda: {name: x.float() for name, x in ssd_inputs(tokens=4).items()})

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(mamba_api, "has_mamba_ssm", lambda: False)
        with raises(ConfigError, "mamba_ssm", "make setup"):
            ssd(**self.inputs(), backend="kernel")

    def test_float64(self, kernel):
        with raises(ConfigError, "float32", "float64", "chunked"):
            ssd(**ssd_inputs(tokens=4), backend="kernel")

    def test_a_chunk_too_large(self, kernel, monkeypatch):
        monkeypatch.setattr(mamba_api, "INT32_NUMBERS", 1000)
        with raises(ConfigError, "chunk of 256", "mamba_ssm", 1000):
            ssd(**self.inputs(), backend="kernel")


def test_the_gradient_reaches_the_kernel_without_gaps(kernel, monkeypatch):
    """It may be a slice of a wider row; the kernel's own offsets do not know of that."""
    inputs = {name: x.float().requires_grad_() for name, x in ssd_inputs(tokens=6).items()}
    seen: list[bool] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.view_as(y)

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.is_contiguous())
            return grad

    def spied(*args, **options):
        y, state = kernel(*args, **options)
        return Spy.apply(y), state

    monkeypatch.setattr(mamba_api, "_scan_kernel", lambda: spied)
    y, _ = mamba_ssd(**inputs)
    torch.cat([y, y.detach()], dim=-1).square().sum().backward()
    assert seen == [True]

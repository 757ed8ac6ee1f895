"""Steps that write over the state against the naive step, whatever the blocks."""

import pytest
import torch

from statex_dist.ops import token_steps
from statex_dist.ops.delta_rule import delta_decode
from statex_dist.ops.gla import gla_decode
from statex_dist.ops.ssd import ssd_decode


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(kind):
    """Arguments without the state, the state, and options."""
    q, k, v = draw(3, 4, 5), draw(3, 4, 5, seed=1), draw(3, 4, 6, seed=2)
    g = -draw(3, 4, 5, seed=3).abs()
    mix = draw(4, 2, seed=4)
    match kind:
        case "gla":
            return gla_decode, (q, k, v, g), draw(3, 4, 5, 6, seed=5), {"scale": 0.3}
        case "gla mixed":
            return gla_decode, (q, k, v, g), draw(3, 4, 5, 12, seed=5), {"mix": mix}
        case "delta":
            return delta_decode, (q[:, :2], k[:, :2], v, g[..., :1], draw(3, 4, seed=6)), draw(3, 4, 5, 6, seed=5), {}
        case "delta mixed":
            return delta_decode, (q, k, v, g, draw(3, 4, seed=6)), draw(3, 4, 5, 12, seed=5), {"mix": mix}
    x, dt, A, B, C = draw(3, 4, 6), draw(3, 4).abs(), -draw(4).abs(), draw(3, 2, 5), draw(3, 2, 5, seed=1)
    return ssd_decode, (x, dt, A, B, C), draw(3, 4, 6, 5, seed=5), {"D": draw(4, seed=7)}


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("kind", ["gla", "gla mixed", "delta", "delta mixed", "ssd"])
def test_output_and_state_are_those_of_the_naive_step(kind, block_bytes, monkeypatch):
    monkeypatch.setattr(token_steps, "_BLOCK_BYTES", block_bytes)
    step, arguments, state, options = inputs(kind)
    before = state.clone()
    wanted, after = step(*arguments, state, **options)
    assert torch.equal(state, before), "the naive step leaves the state as it is"
    output, same = step(*arguments, state, **options, overwrite=True)
    assert same is state
    torch.testing.assert_close(output, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, after, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["gla", "ssd"])
def test_narrow_inputs_give_narrow_outputs_and_wide_states(kind):
    step, arguments, state, options = inputs(kind)
    options = {name: value for name, value in options.items() if name != "D"}
    arguments, state = [y.bfloat16() for y in arguments], state.float()
    wanted, after = step(*arguments, state.clone(), **options)
    output, _ = step(*arguments, state, **options, overwrite=True)
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(output, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state, after)

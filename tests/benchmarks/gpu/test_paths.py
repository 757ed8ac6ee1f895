"""Paths compute what they say: virtual heads are the merged head, and every input of a path gets a gradient."""

import pytest
import torch

from benchmarks.gpu.paths import TINY, batched_path, gla_paths, gla_tensors, ssd_paths, virtual_heads
from statex_dist.errors import ConfigError
from statex_dist.ops.gla import gla
from tests.raising import raises

CPU = torch.device("cpu")


def test_virtual_heads_are_the_merged_head():
    blocks, keys, values = 4, 12, 20
    tensors = {name: x.double() for name, x in gla_tensors(50, 1, keys, values, CPU).items()}
    for x in tensors.values():
        x.requires_grad_()

    def both(out):
        return [out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))]

    shapes = []

    def scan(**x):
        shapes.append((*x["q"].shape, x["v"].shape[-1]))
        return gla(**x, backend="naive")[0]

    expected = both(gla(**tensors, backend="naive")[0])
    for got, want in zip(both(virtual_heads(tensors, blocks, scan)), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert shapes == [(1, 50, blocks * blocks, keys // blocks, values // blocks)]


@pytest.mark.parametrize("path", [*gla_paths(TINY), *ssd_paths(TINY)], ids=lambda path: path.name)
def test_every_path_has_an_exact_form(path):
    leaves = {name: x.double().requires_grad_() for name, x in path.make(40, CPU).items()}
    grads = torch.autograd.grad(path.exact(leaves).square().sum(), list(leaves.values()))
    assert all(torch.isfinite(grad).all() and grad.abs().sum() > 0 for grad in grads)


def test_paths_that_compare_hold_the_same_state():
    costs = {path.name: path.cost(1000, 2) for path in gla_paths(TINY) if path.role in ("ours", "authors", "other")}
    numbers = (TINY.heads * TINY.keys) * (TINY.heads * TINY.values)
    chunks = -(-1000 // 64)
    assert len(costs) == 6
    for name, cost in costs.items():
        if "chunk_gla" in name:
            assert cost.state_bytes == 2 * 4 * numbers * chunks
    ours = [cost for name, cost in costs.items() if name.startswith("ours")]
    assert len(ours) == 4
    assert len({cost.state_bytes for cost in ours}) == 1


def test_kernels_say_what_they_need():
    missing = {path.name: path.missing(CPU) for path in [*gla_paths(TINY), *ssd_paths(TINY)]}
    assert {name: text for name, text in missing.items() if text is None}.keys() == {
        name for name in missing if name.startswith("ours")
    }
    assert {text for text in missing.values() if text} == {"needs CUDA"}


def test_the_options_of_our_path_reach_the_scan():
    leaves = batched_path(TINY).make(64, CPU)
    with raises(ConfigError, "chunk_size", 24):
        batched_path(TINY, chunk_size=24).scan(leaves)
    with raises(ConfigError, "max_state_bytes", 0):
        batched_path(TINY, max_state_bytes=0).scan(leaves)

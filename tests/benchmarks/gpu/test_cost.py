"""The cost model against a count by hand, and against the bytes that were worked out for GLA-1.3B and Mamba2-1.3B."""

import pytest

from benchmarks.gpu.cost import ScanCost, Work, batched_products, chunk_gla, mamba_scan, scan_flops
from benchmarks.measure import GIB, Ceilings

MERGED = {"numbers": 1024 * 2048, "keys": 1024, "values": 2048, "scores": 1}
ORIGINAL = {"numbers": 4 * 256 * 512, "keys": 1024, "values": 2048, "scores": 4}
VIRTUAL = {"numbers": 16 * 256 * 512, "keys": 4096, "values": 8192, "scores": 16}
NO_BOUND = 1 << 60


@pytest.mark.parametrize(
    ("cost", "forward", "backward"),
    [
        (chunk_gla(Work(tokens=1000, **ORIGINAL)), 74, 282),
        (chunk_gla(Work(tokens=1000, **MERGED)), 170, 771),
        (chunk_gla(Work(tokens=1000, **VIRTUAL)), 295, 1126),
        (batched_products(Work(tokens=1000, **MERGED), 256, NO_BOUND), 91, 236),
        (batched_products(Work(tokens=1000, **MERGED), 512, NO_BOUND), 59, 156),
    ],
    ids=["original", "merged", "virtual heads", "ours, 256", "ours, 512"],
)
def test_kilobytes_of_a_token(cost: ScanCost, forward: int, backward: int):
    """The figures of the design study, which counted the kernels' reads and writes one by one."""
    assert [moved / 1000 / 1000 for moved in cost.bytes_moved] == pytest.approx([forward, backward], rel=0.02)


@pytest.mark.parametrize(("state", "kilobytes"), [(512, 131), (128, 53)])
def test_kilobytes_of_a_token_of_mamba2(state: int, kilobytes: int):
    cost = mamba_scan(Work(tokens=1000, numbers=64 * 64 * state, keys=state, values=4096, scores=1))
    assert cost.bytes_moved[0] / 1e6 == pytest.approx(kilobytes, rel=0.03)


def test_flops_are_those_of_the_products():
    """One head, one chunk after another, every multiplication and addition counted."""
    keys, values, chunk, chunks = 3, 5, 8, 4
    causal = chunk * (chunk + 1) // 2
    forward = chunks * 2 * (2 * chunk * keys * values + causal * (keys + values))
    # dq, dk, dv and the state's gradient through the state, the state again; A again, dA, then dv, dq, dk inside
    backward = chunks * 2 * (5 * chunk * keys * values + causal * (keys + values + values + keys + keys))
    work = Work(tokens=chunk * chunks, numbers=keys * values, keys=keys, values=values, scores=1)
    # the model takes half of a square where the triangle has its diagonal too
    diagonal = chunks * chunk
    counted = [flops + diagonal * width for flops, width in zip(scan_flops(work, chunk), (8, 19), strict=True)]
    assert counted == [forward, backward]


def test_chunk_states_at_64k():
    """8 + 8 GiB in fp32 for fla; ours holds what it is allowed to, and the state before each segment."""
    work = Work(tokens=65536, **MERGED)
    assert chunk_gla(work).state_bytes == 16 * GIB
    assert batched_products(work, 256, NO_BOUND).state_bytes == 2 * GIB + 4 * MERGED["numbers"]
    bounded = batched_products(work, 256, GIB // 2).state_bytes
    assert bounded == GIB // 2 + 4 * 4 * MERGED["numbers"]
    assert bounded <= chunk_gla(work).state_bytes / 8
    # a segment has at least 16 chunks, the square root of 256; then there are 16 segments
    assert batched_products(work, 256, 1).state_bytes == 16 * (2 * 2 + 4) * MERGED["numbers"]


def test_the_slower_ceiling_sets_the_time_of_each_pass():
    cost = ScanCost(flops=(4e12, 1e12), bytes_moved=(1e9, 8e9), state_bytes=0)
    assert cost.predicted_seconds(Ceilings(product_flops=1e12, copy_bytes=2e9)) == pytest.approx(4.0 + 4.0)

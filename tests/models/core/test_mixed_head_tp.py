"""A rank's share of a layer's heads: mixed layers in pairs, and the place of each tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statex_dist.models.core.mixed_head_tp import PartnerHeads
from statex_dist.models.layout import HeldHeads, TensorSpec, Units, rows_by_part, shard_ranges
from statex_dist.ops.gla.torch_forms import naive_gla
from statex_dist.ops.head_mixing import mix_outputs, spread_values
from statex_dist.state.geometry import StateGeometry

HEADS, KEYS, VALUES = 4, 3, 8
GEOMETRY = StateGeometry(num_heads=HEADS, key_dim=KEYS, value_dim=VALUES, num_key_groups=HEADS)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("partners", [2, 3, 4])
def test_pairs_of_all_ranks_are_the_mixed_layer(tp, partners):
    rng = torch.Generator().manual_seed(partners)
    q, k, v, g = (
        torch.randn(2, 5, HEADS, size, dtype=torch.float64, generator=rng) for size in (KEYS, KEYS, VALUES, KEYS)
    )
    g, mix = -g.abs(), torch.randn(HEADS, partners, dtype=torch.float64, generator=rng)
    o, state = naive_gla(q, k, spread_values(v, partners), g, scale=0.5)
    wanted = mix_outputs(o, mix).flatten(2)
    found = []
    for rank in range(tp):
        heads = HeldHeads.of(replace(GEOMETRY, values_per_key=partners), tp=tp, rank=rank)
        pairs = PartnerHeads(heads)
        start = rank * HEADS * VALUES // tp
        local = v.flatten(2)[..., start : start + HEADS * VALUES // tp].unflatten(-1, (heads.values, -1))
        o, held = naive_gla(*map(pairs.by_key, (q, k)), pairs.by_value(local), pairs.by_key(g), scale=0.5)
        assert held.numel() * tp == state.numel()
        found.append(pairs.read(o, mix).flatten(2))
    torch.testing.assert_close(torch.cat(found, dim=-1), wanted, rtol=0, atol=1e-12)


@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    share=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2, 4, 8, 16]),
    partners=st.sampled_from([1, 2]),
)
def test_held_heads_are_what_the_table_gives(heads, share, tp, partners):
    """Value heads that share keys, cut or whole: sizes are those of the tensors, and ranks cover all values once."""
    groups = max(heads // share, 1)
    geometry = StateGeometry(
        num_heads=heads, key_dim=KEYS, value_dim=16, num_key_groups=groups, values_per_key=partners
    )
    columns = set()
    for rank in range(tp):
        held = HeldHeads.of(geometry, tp=tp, rank=rank)
        assert held.values * held.value_dim * tp == heads * 16
        assert held.values % (held.keys if partners == 1 else 1) == 0
        start, stop = held.key_range
        assert stop - start == held.keys * KEYS
        if partners == 1:
            assert start // KEYS == held.first * groups // heads, "the keys are those of the values"
        else:
            assert (held.keys, held.decays) == (groups, heads)
        piece = rank % held.ranks_per_head
        columns |= {held.first * 16 + piece * held.value_dim + i for i in range(held.values * held.value_dim)}
        assert held.whole_states == (tp == 1 or (partners == 1 and held.value_dim == 16))
    assert columns == set(range(heads * 16))


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_rows_of_blocks_are_sorted_by_part(tp):
    """Values of a merged head are cut, its keys are not: some blocks of a rank have no values at all."""
    parts, blocks = (("k", 2), ("v", 4)), 4
    spec = TensorSpec(shape=(24, 1), parts=parts, blocks=blocks, units=(Units(1), Units(1, divisible=True)))
    labels = [(name, block, row) for block in range(blocks) for name, rows in parts for row in range(rows)]
    for rank in range(tp):
        held = [labels[i] for start, stop in shard_ranges(spec, "qkv", tp, rank) for i in range(start, stop)]
        ordered = [held[row] for row in rows_by_part(spec, tp, rank)]
        assert sorted(ordered) == sorted(held)
        assert [name for name, _, _ in ordered] == ["k"] * 8 + ["v"] * (16 // tp)
        assert ordered == sorted(ordered)

"""The layout tables: the order of a model's tensors, and how tensor-parallel ranks share them."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statex_dist.errors import ConfigError
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.layout import TensorSpec, Units, shard_ranges
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import FAMILIES, config_from_dict, family_of, make_plan
from tests.models.tiny import (
    CONFIGS,
    HYBRIDS,
    expanded,
    gated_deltanet_config,
    gla_config,
    hgrn2_config,
    kda_config,
    mamba2_config,
    minimax_config,
    retnet_config,
)

# --- the order of tensors -------------------------------------------------------------------------------------------

FURTHER = {
    "gla, three layers of which one is mixed": expanded(
        gla_config(num_hidden_layers=3, use_short_conv=True), "lossless", layers="1"
    ),
    "hgrn2 mixed": expanded(hgrn2_config(use_short_conv=True), "lossless", op="mix_heads"),
    "hgrn2, no lower bound": hgrn2_config(use_lower_bound=False, tie_word_embeddings=True),
    "retnet mixed": expanded(retnet_config(use_short_conv=True), "lossless", op="mix_heads"),
    "minimax merged": expanded(minimax_config(), "inherit", factor=4),
    "minimax grown": expanded(minimax_config(tie_word_embeddings=True), "inherit", op="grow_state"),
    "gated_deltanet, no gate": gated_deltanet_config(use_gate=False),
    "gated_deltanet mixed, no convolution": expanded(gated_deltanet_config(use_short_conv=False), "lossless"),
    "kda mixed": expanded(kda_config(), "lossless"),
    "mamba2, every bias": mamba2_config(use_bias=True, num_hidden_layers=3),
    "state_spaces": config_from_dict(
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 40,
            "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 6, "bias": True},
            "tie_embeddings": False,
        }
    ),
}
ALL = CONFIGS | FURTHER
ORDERED = ALL | {f"{name} with attention": config for name, config in HYBRIDS.items()}


@pytest.mark.parametrize("case", ORDERED)
def test_the_table_has_the_order_of_the_built_model(case):
    """A ZeRO-3 checkpoint is flat in this order, and the tools read and write it without building a model."""
    config = ORDERED[case]
    table = family_of(config.MODEL_TYPE).tensors(config)
    built = {name: tuple(parameter.shape) for name, parameter in RecurrentLM(config).named_parameters()}
    assert list(table) == list(built)
    assert {name: spec.shape for name, spec in table.items()} == built


def test_no_family_is_left_out_of_the_order():
    """A hosted model has further tensors between ours."""
    hosted = {kind for kind in FAMILIES if family_of(kind).block is None}
    assert {config.MODEL_TYPE for config in ALL.values()} | hosted == set(FAMILIES)


# --- what a rank holds ----------------------------------------------------------------------------------------------


def indices(spec, tp, rank):
    return [i for start, stop in shard_ranges(spec, "tensor", tp, rank) for i in range(start, stop)]


def part_of_each_row(spec):
    sizes = spec.parts or (("", spec.shape[spec.axis]),)
    return [part for _ in range(spec.blocks) for part, (_, rows) in enumerate(sizes) for _ in range(rows)]


@st.composite
def shared_tensors(draw):
    """A tensor that some number of ranks can share, and that number."""
    tp = draw(st.integers(1, 12))
    blocks = draw(st.sampled_from([1, 1, 2, 4]))
    parts, units = [], []
    for index in range(draw(st.integers(1, 4))):
        count = draw(st.sampled_from([n for n in range(1, 49) if n % tp == 0 or tp % n == 0]))
        divisible = draw(st.booleans())
        pieces = max(tp // count, 1) if divisible else 1
        size = math.lcm(count * pieces, blocks) * draw(st.integers(1, 3))
        parts.append((f"part {index}", size // blocks))
        units.append(Units(count, divisible=divisible))
    rows = blocks * sum(rows for _, rows in parts)
    return TensorSpec(shape=(rows, 3), parts=tuple(parts), blocks=blocks, units=tuple(units)), tp


@given(shared_tensors())
def test_ranks_tile_every_part(case):
    spec, tp = case
    part = part_of_each_row(spec)
    held = [indices(spec, tp, rank) for rank in range(tp)]
    copies = Counter(i for rank in held for i in rank)
    for index, units in enumerate(spec.units):
        wanted = 1 if units.divisible or units.count % tp == 0 else tp // units.count
        assert {copies[row] for row, p in enumerate(part) if p == index} == {wanted}
        shares = [[row for row in rank if part[row] == index] for rank in held]
        assert len({len(share) for share in shares}) == 1, "every rank holds as much as any other"
        assert sorted(shares) == shares, "ranks follow each other"
    for rank in range(tp):
        assert held[rank] == sorted(set(held[rank])), "rows keep their order, none comes twice"
        ranges = shard_ranges(spec, "tensor", tp, rank)
        assert all(a[1] < b[0] for a, b in pairwise(ranges)), "neighbours are joined"


@given(heads=st.integers(1, 8), ranks=st.integers(1, 6), pieces=st.integers(1, 3))
def test_a_norm_that_heads_share_is_cut_as_their_values_are(heads, ranks, pieces):
    tp, size = heads * ranks, ranks * pieces
    values = TensorSpec(shape=(heads * size,), units=(Units(heads, divisible=True),))
    norm = TensorSpec(shape=(size,), units=(Units(heads, divisible=True, shared=True),))
    for rank in range(tp):
        assert indices(norm, tp, rank) == [i % size for i in indices(values, tp, rank)]
    for tp in (n for n in range(1, heads + 1) if heads % n == 0):
        assert shard_ranges(norm, "norm", tp, tp - 1) == ((0, size),)


@pytest.mark.parametrize(
    ("spec", "tp", "rank", "ranges"),
    [
        (TensorSpec(shape=(5, 2)), 3, 1, ((0, 5),)),
        (TensorSpec(shape=(8, 2), units=(Units(4),)), 2, 1, ((4, 8),)),
        (TensorSpec(shape=(8, 2), units=(Units(2),)), 4, 1, ((0, 4),)),
        (TensorSpec(shape=(8, 2), units=(Units(2, divisible=True),)), 4, 1, ((2, 4),)),
        (TensorSpec(shape=(2, 8), axis=1, units=(Units(8),)), 4, 3, ((6, 8),)),
        (TensorSpec(shape=(8, 2), units=(Units(8, optional=True),)), 4, 0, ((0, 2),)),
        (TensorSpec(shape=(9, 2), units=(Units(9, optional=True),)), 4, 2, ((0, 9),)),
        # z of one rank lies apart from its x, and B is whole on both
        (
            TensorSpec(shape=(11,), parts=(("z", 4), ("x", 4), ("B", 3)), units=(Units(2), Units(2), Units(1))),
            2,
            1,
            ((2, 4), (6, 11)),
        ),
        # head by head q, k, v: keys of both heads, values of the second
        (
            TensorSpec(shape=(12,), parts=(("k", 2), ("v", 4)), blocks=2, units=(Units(1), Units(2))),
            2,
            1,
            ((0, 2), (6, 12)),
        ),
    ],
)
def test_ranges(spec, tp, rank, ranges):
    assert shard_ranges(spec, "tensor", tp, rank) == ranges


@pytest.mark.parametrize(
    ("spec", "tp", "possible"),
    [
        (TensorSpec(shape=(6, 2), units=(Units(3),)), 2, "1, 3"),
        (TensorSpec(shape=(6, 2), units=(Units(3, divisible=True),)), 4, "1, 3, 6"),
        # heads may be on several ranks, but not where outputs are added up
        (TensorSpec(shape=(8, 2), units=(Units(4),)), 6, "1, 2, 4, 8, 12"),
        (TensorSpec(shape=(2, 8), axis=1, units=(Units(4),)), 8, "1, 2, 4"),
    ],
)
def test_ranks_that_cannot_share_a_tensor_are_refused_in_one_line(spec, tp, possible):
    with pytest.raises(ConfigError) as error:
        shard_ranges(spec, "model.layers.0.w", tp, 0)
    line = str(error.value)
    assert line.startswith(f"model.layers.0.w: {tp} tensor-parallel ranks")
    assert f" {spec.units[0].count} heads" in line
    assert line.endswith(f": {possible}")
    assert "\n" not in line


# --- the families' tables -------------------------------------------------------------------------------------------


def shapes(config, tp, rank):
    """Shape of each tensor on a rank."""
    local = {}
    for name, spec in family_of(config.MODEL_TYPE).tensors(config).items():
        held = sum(stop - start for start, stop in shard_ranges(spec, name, tp, rank))
        local[name] = tuple(held if axis == spec.axis else size for axis, size in enumerate(spec.shape))
    return local


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_table_can_be_shared(case, tp):
    config = ALL[case]
    if tp == 8 and config.MODEL_TYPE.startswith("mamba2"):
        with pytest.raises(ConfigError, match=r"mixer.out_proj.weight: 8 .* 4 heads.*: 1, 2, 4$"):
            shapes(config, tp, 0)
        return
    assert len({tuple(shapes(config, tp, rank).items()) for rank in range(tp)}) == 1
    for name, spec in family_of(config.MODEL_TYPE).tensors(config).items():
        copies = Counter(i for rank in range(tp) for i in indices(spec, tp, rank))
        assert set(copies) == set(range(spec.shape[spec.axis])), name
        assert len(set(copies.values())) == 1 or spec.parts, name
        assert spec.axis == 0 or set(copies.values()) == {1}, name


@pytest.mark.parametrize(
    ("config", "tp", "words"),
    [
        (gla_config(num_heads=2), 3, r"attn.q_proj.weight: 3 .* 2 heads.*: 1, 2, 4, 6"),
        (gla_config(), 6, r"attn.q_proj.weight: 6 .* 4 heads.*: 1, 2, 4, 8, 12"),
        (expanded(gla_config(), "inherit", factor=2, op="mix_heads"), 6, "layers.0.attn.v_proj.weight: 6 "),
        (gated_deltanet_config(intermediate_size=32), 16, "attn.v_proj.weight: 16 .* 4 heads"),
        (gated_deltanet_config(num_heads=3, num_v_heads=6), 2, "attn.q_proj.weight: 2 .* 3 heads"),
        (mamba2_config(), 3, "mixer.dt_bias: 3 .* 4 heads"),
        (mamba2_config(), 8, "mixer.out_proj.weight: 8 .*: 1, 2, 4"),
        (gla_config(intermediate_size=25), 2, "mlp.gate_proj.weight: 2 .* 25 "),
    ],
)
def test_a_model_that_cannot_be_shared_names_the_tensor(config, tp, words):
    with pytest.raises(ConfigError, match=words):
        shapes(config, tp, 0)


def test_vocabulary_is_cut_where_it_divides():
    local = shapes(gla_config(vocab_size=40), 4, 1)
    assert local["model.embeddings.weight"] == local["lm_head.weight"] == (10, 16)
    assert shapes(gla_config(vocab_size=41), 4, 1)["lm_head.weight"] == (41, 16)


def test_bamba_shares_its_mamba2_layers():
    values = {"model_type": "bamba", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "mamba_n_heads": 4}
    config = config_from_dict({**values, "mamba_d_state": 6})
    assert shapes(config, 4, 1)["model.layers.1.mamba.in_proj.weight"] == (8 + 8 + 6 + 6 + 1, 16)


# --- published shapes -----------------------------------------------------------------------------------------------

GLA = GLAConfig(vocab_size=32000, hidden_size=2048, num_hidden_layers=24, num_heads=4)
MERGED = make_plan(GLA, layers="every:6", factor=None, init="reinit", op="merge_heads")
MAMBA2 = Mamba2Config(vocab_size=50288, hidden_size=2048, num_hidden_layers=48, num_heads=64, head_dim=64, n_groups=1)
GROWN = make_plan(MAMBA2, layers="all", factor=4, init="lossless")


@pytest.mark.parametrize(
    ("config", "mixer", "millions"),
    [
        # per rank for 1, 2, 4, 8 ranks; of the plain layer's four heads, 8 ranks hold the keys twice
        (GLA, "model.layers.1.attn.", (16.83, 8.43, 4.23, 2.66)),
        (MERGED, "model.layers.0.attn.", (16.83, 10.54, 7.39, 5.82)),
        (MAMBA2, "backbone.layers.0.mixer.", (25.8, 13.18, 6.85, 3.69)),
        (GROWN, "backbone.layers.0.mixer.", (27.4, 14.76, 8.43, 5.27)),
    ],
    ids=["gla", "gla merged", "mamba2", "mamba2 grown"],
)
def test_parameters_per_rank_of_published_models(config, mixer, millions):
    for tp, wanted in zip((1, 2, 4, 8), millions, strict=True):
        local = [shapes(config, tp, rank) for rank in range(tp)]
        assert all(other == local[0] for other in local)
        count = sum(math.prod(shape) for name, shape in local[0].items() if name.startswith(mixer))
        assert count / 1e6 == pytest.approx(wanted, rel=3e-3)


def test_a_head_that_ranks_share_has_its_norm_cut():
    name = "attn.g_norm_swish_gate.weight"
    plain, merged = f"model.layers.1.{name}", f"model.layers.0.{name}"
    assert [shapes(MERGED, tp, 0)[plain] for tp in (1, 4, 8)] == [(512,), (512,), (256,)]
    assert [shapes(MERGED, tp, 0)[merged] for tp in (1, 4, 8)] == [(2048,), (512,), (256,)]

"""Recipes and distributions: the arithmetic of rows, and draws that depend on nothing but seed and name."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.models.row_mapping import (
    Constant,
    FirstColumn,
    Fresh,
    Keep,
    LogCount,
    LogUniform,
    Normal,
    RowMapping,
    TensorMapping,
    TimeStep,
    Uniform,
    added,
    describe,
    from_blocks,
    generator_for,
    grown_groups,
    redrawn,
    repeated,
)

DISTRIBUTIONS = [
    Constant(0.5),
    Normal(0.3),
    Uniform(0.2),
    LogUniform(1.0, 16.0),
    LogCount(),
    TimeStep(0.001, 0.1, 1e-4),
    FirstColumn(3),
]


def tensor_mapping(*blocks, columns=3, seed=1, name="a"):
    rows = sum(block.rows for block in blocks)
    mapping = RowMapping(shape=(rows, columns), blocks=blocks, source_rows=100)
    return TensorMapping(name=name, layer=0, rows=mapping, seed=seed)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
@settings(deadline=None)  # a busy machine
@given(sizes=st.integers(1, 70))
def test_values_do_not_depend_on_the_size_of_the_pieces(distribution, sizes):
    change = tensor_mapping(Keep(0, 2), Fresh(20, distribution))
    whole = np.concatenate([*change.draw(1, size=1000)])
    pieces = [*change.draw(1, size=sizes)]
    assert max(len(piece) for piece in pieces) <= sizes
    assert whole.shape == (60,)
    assert whole.dtype == np.float32
    assert np.array_equal(whole, np.concatenate(pieces))
    assert np.isfinite(whole).all()


def test_seed_name_and_block_decide():
    def first(seed=1, name="a", block=0):
        return next(tensor_mapping(Fresh(4, Normal(1)), Fresh(4, Normal(1)), seed=seed, name=name).draw(block, size=12))

    assert np.array_equal(first(), first())
    for other in (first(seed=2), first(name="b"), first(block=1)):
        assert not np.array_equal(first(), other)


def test_moments_and_ranges():
    rng = generator_for(0, "x")
    normal = Normal(0.3).draw(rng, 0, 200_000)
    assert abs(normal.mean()) < 0.003
    assert normal.std() == pytest.approx(0.3, rel=0.01)
    uniform = Uniform(0.2).draw(rng, 0, 200_000)
    assert -0.2 <= uniform.min() < -0.199
    assert 0.199 < uniform.max() < 0.2
    assert uniform.std() == pytest.approx(0.2 / math.sqrt(3), rel=0.01)
    rates = np.exp(LogUniform(1.0, 16.0).draw(rng, 0, 10_000))
    assert 1 <= rates.min() < 1.05 < 15.9 < rates.max() <= 16.001
    steps = np.logaddexp(0, TimeStep(0.001, 0.1, 1e-4).draw(rng, 0, 10_000).astype(np.float64))
    assert 0.000999 < steps.min() < 0.0011 < 0.095 < steps.max() < 0.1001
    assert np.exp(LogCount().draw(rng, 2, 3)) == pytest.approx([3, 4, 5])
    assert FirstColumn(3).draw(rng, 1, 6).tolist() == [0, 0, 1, 0, 0, 1]


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)
def test_grown_groups_keep_every_old_row_once_in_order(groups, rows, factor, before, copies):
    source = np.arange(before + groups * rows)
    blocks = [
        Keep(0, before),
        *grown_groups(before, groups=groups, rows=rows, factor=factor, new=None if copies else Constant(-1)),
    ]
    mapping = from_blocks(source.shape, blocks)
    assert mapping.shape == (before + groups * rows * factor,)
    result = np.concatenate(
        [source[b.start : b.stop] if isinstance(b, Keep) else np.full(b.rows, -1) for b in mapping.blocks]
    )
    old = source[before:].reshape(groups, rows)
    new = np.tile(old, (1, factor)) if copies else np.pad(old, ((0, 0), (0, rows * (factor - 1))), constant_values=-1)
    assert result.tolist() == [*source[:before], *new.reshape(-1)]


def test_neighbouring_blocks_are_joined():
    mapping = from_blocks(
        (9, 2), [Keep(0, 2), Keep(2, 4), Keep(4, 4), Fresh(1, Normal(1)), Fresh(2, Normal(1)), Keep(4, 9)]
    )
    assert mapping.blocks == (Keep(0, 4), Fresh(3, Normal(1)), Keep(4, 9))
    assert mapping.shape == (12, 2)


@pytest.mark.parametrize(
    ("mapping", "change"),
    [
        (from_blocks((4, 2), [Keep(0, 4)]), "kept"),
        (repeated((4,), 3), "grown"),
        (redrawn((4, 2), Normal(1), source_rows=4), "reinitialised"),
        (added((4, 2), Constant(1)), "new"),
        (from_blocks((4,), [Keep(0, 4), Fresh(1, Constant(0))]), "grown"),
    ],
)
def test_the_word_for_a_change(mapping, change):
    assert mapping.change == change


def test_the_report_says_rows_and_distributions():
    mapping = from_blocks((4, 2), [Keep(1, 4), Fresh(2, Uniform(0.5))])
    assert mapping.to_list() == [{"rows": 3, "from": [1, 4]}, {"rows": 2, "distribution": "Uniform", "bound": 0.5}]
    assert describe(TimeStep(1, 2, 3)) == {"distribution": "TimeStep", "low": 1, "high": 2, "floor": 3}


@pytest.mark.parametrize("blocks", [(Keep(0, 3),), (Keep(0, 5),), (Keep(2, 6),)])
def test_a_recipe_that_does_not_add_up_is_a_programming_error(blocks):
    with pytest.raises(AssertionError):
        RowMapping(shape=(4,), blocks=blocks, source_rows=5)

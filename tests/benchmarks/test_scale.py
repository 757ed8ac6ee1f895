"""The growth exponents of :mod:`benchmarks.growth`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.growth import exponent, lines_of


@given(growth=st.floats(-3, 3), factor=st.floats(0.01, 100), ranks=st.sets(st.integers(1, 4096), min_size=2))
def test_the_exponent_of_a_power_is_its_own(growth, factor, ranks):
    assert exponent([(count, factor * count**growth) for count in ranks]) == pytest.approx(growth, abs=1e-6)


def test_what_has_no_exponent_says_none():
    assert exponent([(4, 2.0)]) is None
    assert exponent([(1, 0.0), (2, 0.0)]) is None
    rows = [("stat calls", 1024, 4.0, ""), ("stat calls", 4096, 4.0, ""), ("broadcasts", 4, 0.0, "")]
    assert [line[-1] for line in lines_of(rows)] == ["0.00", ""]

"""Fits of length over state size: against the paper's numbers, closed forms and made-up laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.errors import ConfigError
from statex_dist.state.laws import PAPER_FORGET, Law, fit_exponential, fit_line, read_forget_law, student_t
from tests.raising import raises

PAPER_POINTS = ((0, 0), (1.1, 1), (1.6, 2), (2.4, 8), (4.8, 16), (12.9, 64))
"""Read off figure 11 of arXiv 2410.07145: million state elements, thousand tokens."""

FEW = settings(max_examples=25, deadline=None)


def test_the_papers_points_give_the_papers_law():
    law = fit_line(*zip(*PAPER_POINTS, strict=True))
    # The points are rounded: the slope comes out within 0.2 %, the intercept within 0.4 %, R^2 lower than published.
    assert law.parameters[0] == pytest.approx(5.172, rel=2e-3)
    assert law.parameters[1] == pytest.approx(-4.469, rel=4e-3)
    assert law.r_squared > 0.98
    assert law.tokens(12_900_000) == pytest.approx(PAPER_FORGET.tokens(12_900_000), rel=2e-3)
    assert PAPER_FORGET.tokens(10_000_000) == pytest.approx((51.72 - 4.469) * 1024)
    assert PAPER_FORGET.tokens(100) < 0
    assert PAPER_FORGET.interval(5.0) is None, "the paper gives no error"


def test_student_t_has_the_table():
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 5: 2.57058, 10: 2.22814, 30: 2.04227, 1000: 1.96234}
    for degrees, quantile in table.items():
        assert student_t(degrees) == pytest.approx(quantile, rel=1e-4)


def test_a_lines_error_is_the_textbooks():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.5, 5.5, 8.0])
    law = fit_line(x, y)
    sxx = np.square(x - x.mean()).sum()
    slope = ((x - x.mean()) * y).sum() / sxx
    rest = y - y.mean() - slope * (x - x.mean())
    s = math.sqrt((rest**2).sum() / 2)
    assert law.parameters == pytest.approx((slope, y.mean() - slope * x.mean()))
    assert law.residual_std == pytest.approx(s)
    t = 4.30265
    assert law.errors[0] == pytest.approx(t * s / math.sqrt(sxx), rel=1e-4)
    assert law.errors[1] == pytest.approx(t * s * math.sqrt(1 / 4 + x.mean() ** 2 / sxx), rel=1e-4)
    low, high = law.interval(6.0)
    half = t * s * math.sqrt(1 + 1 / 4 + (6 - x.mean()) ** 2 / sxx)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4)
    assert (high + low) / 2 == pytest.approx(law.at(6.0))


sizes = st.lists(st.integers(1, 130), min_size=5, max_size=9, unique=True).map(lambda xs: [x / 10 for x in sorted(xs)])


@FEW
@given(x=sizes, slope=st.floats(0.1, 20), intercept=st.floats(-20, 20))
def test_a_line_is_found_again(x, slope, intercept):
    law = fit_line(x, [slope * value + intercept for value in x])
    assert law.parameters == pytest.approx((slope, intercept), rel=1e-6, abs=1e-6)
    assert law.residual_std == pytest.approx(0, abs=1e-6)


@FEW
@given(
    x=sizes.filter(lambda xs: xs[-1] - xs[0] > 2),
    a=st.floats(0.2, 10),
    bend=st.floats(0.5, 12),
    c=st.floats(-5, 5),
)
def test_an_exponential_is_found_again(x, a, bend, c):
    rate = bend / (x[-1] - x[0])
    truth = Law(form="exponential", parameters=(a, rate, c))
    y = [truth.at(value) for value in x]
    law = fit_exponential(x, y)
    scale = max(y) - min(y)
    assert [law.at(value) for value in x] == pytest.approx(y, abs=1e-6 * scale)
    assert law.parameters[1] == pytest.approx(rate, rel=1e-3, abs=1e-3)
    assert 1 - law.r_squared < 1e-9


def test_noise_widens_the_interval_and_the_truth_lies_within():
    truth = Law(form="exponential", parameters=(4.756, math.log(1.365), -0.742))
    assert truth.base == pytest.approx(1.365)
    assert truth.at(12.9) == pytest.approx(258, rel=0.02), "the paper: 256K for 370M parameters"
    x = np.linspace(1, 13, 9)
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
        law = fit_exponential(x, [truth.at(v) for v in x] + rng.normal(0, 3.0, len(x)))
        low, high = law.interval(8.0)
        inside += low < truth.at(8.0) + rng.normal(0, 3.0) < high
    assert inside >= 34, "95 % of 40 are 38"


@pytest.mark.parametrize(
    ("fit", "x", "y", "message"),
    [
        (fit_line, [1, 1, 2], [1, 2, 3], "2 .*sizes.*linear.* 2"),
        (fit_exponential, [1, 2, 3], [1, 2, 4], "3 .*sizes.*exponential.* 3"),
        (fit_exponential, [1, 2, 3, 4], [1, 2, 3, 4], "do not bend upwards"),
        (fit_exponential, [1, 2, 3, 4], [4, 7, 8, 8.5], "do not bend upwards"),
        (fit_exponential, [1, 2, 3, 4], [1, 1, 1, 4], "largest state"),
        (fit_exponential, [1, 2, 3, 4], [-1, -2, -4, -8], "fall with"),
        (fit_exponential, [20, 20.1, 20.2, 20.3], [1, 2, 9, 80], "too steeply"),
    ],
)
def test_what_cannot_be_fitted_is_refused(fit, x, y, message):
    with pytest.raises(ConfigError, match=message):
        fit(x, y)


@pytest.mark.parametrize("unit", [1e-2, 1e-5, 1e3])
def test_the_law_of_small_models_is_that_of_large_ones_in_another_unit(unit):
    x, y = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), [1.0, 2.5, 9.0, 33.0, 130.0]
    one, law = fit_exponential(x, y), fit_exponential(unit * x, y)
    assert law.parameters == pytest.approx((one.parameters[0], one.parameters[1] / unit, one.parameters[2]), rel=1e-4)
    assert law.errors == pytest.approx((one.errors[0], one.errors[1] / unit, one.errors[2]), rel=1e-3)
    assert law.interval(2.5 * unit) == pytest.approx(one.interval(2.5), rel=1e-4)
    values = json.loads(json.dumps(law.to_dict(), allow_nan=False))
    assert values["b"] == (None if unit == 1e-5 else pytest.approx(one.base ** (1 / unit), rel=1e-2))
    assert Law.from_dict(values) == law


def _file(path: Path, forget, **more) -> Path:
    path.write_text(json.dumps({"suite": "laws", "forget": forget, **more}))
    return path


def test_a_law_survives_its_file(tmp_path: Path):
    law = fit_line(*zip(*PAPER_POINTS, strict=True))
    assert read_forget_law(_file(tmp_path / "laws.json", law.to_dict())) == law
    assert read_forget_law(tmp_path) == law, "the directory will do"
    curve = fit_exponential([1, 2, 3, 4, 5], [1, 2.1, 4, 8, 16])
    assert Law.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve


def test_files_that_are_no_law(tmp_path: Path):
    law = fit_line(*zip(*PAPER_POINTS, strict=True)).to_dict()
    falling = {**law, "parameters": {"slope": -1, "intercept": 3}}
    bent = {**law, "covariance": [[1.0]]}
    for content, message in (
        (
            {"suite": "laws", "forget": None, "forget_refused": "2 are too few"},
            r"forget threshold \(2",
        ),
        ({"suite": "recall"}, "fit; .*laws.json"),
        ({"suite": "laws", "forget": falling}, r"slope -1"),
        ({"suite": "laws", "forget": bent}, "sizes.*each other"),
        ({"suite": "laws", "forget": {"form": "cubic"}}, "form 'cubic'"),
    ):
        (tmp_path / "laws.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            read_forget_law(tmp_path)
    with raises(ConfigError, tmp_path / "missing.json", "No such file"):
        read_forget_law(tmp_path / "missing.json")

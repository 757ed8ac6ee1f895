import json

import numpy as np
import pytest

from statex_dist.errors import ConfigError
from statex_dist.evaluation.report import Estimate, bootstrap, open_target, plot_curve, plot_heat_map, write_results

PNG = b"\x89PNG\r\n\x1a\n"


def test_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)
    assert estimate == bootstrap(values)
    assert estimate.samples == 400


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        estimate = bootstrap(rng.random(60) < 0.4)
        hits += estimate.low <= 0.4 <= estimate.high
    assert 0.90 <= hits / 200 <= 0.98


def test_weights_are_those_of_a_ratio_of_sums():
    estimate = bootstrap([1.0, 2.0, 5.0], weights=[1, 1, 2])
    assert estimate.mean == pytest.approx(13 / 4)
    assert bootstrap([1.0, 1.0, 9.0], weights=[1, 1, 0]) == Estimate(mean=1.0, low=1.0, high=1.0, samples=3)


def test_one_sample_has_no_interval():
    assert bootstrap([0.5], weights=[7]) == Estimate(mean=0.5, low=None, high=None, samples=1)
    assert bootstrap([1.0, 9.0], weights=[1, 0]) == Estimate(mean=1.0, low=None, high=None, samples=2)
    assert bootstrap([0.5]).to_dict() == {"accuracy": 0.5, "low": None, "high": None, "samples": 1}
    text = {"title": "t", "x_label": "x", "y_label": "y"}
    assert plot_curve([1, 2], [bootstrap([0.5]), bootstrap([0.5, 0.7])], **text).startswith(PNG)


def test_plots_are_png_and_reproducible():
    estimates = [Estimate(mean=m, low=m - 0.1, high=m + 0.1, samples=4) for m in (0.9, 0.4)]
    text = {"title": "t", "x_label": "x", "y_label": "y"}
    curve = plot_curve([8, 64], estimates, reference=([0.1, 0.2], "guess"), **text)
    heat = plot_heat_map([[0.0, 1.0]], columns=["1", "2"], rows=["r"], **text)
    assert curve.startswith(PNG)
    assert heat.startswith(PNG)
    assert curve == plot_curve([8, 64], estimates, reference=([0.1, 0.2], "guess"), **text)


def test_an_interrupted_write_leaves_no_summary_of_other_samples(tmp_path):
    write_results(tmp_path, "s", {"run": 1}, [{"i": 1}], {"s.png": PNG})
    assert json.loads((tmp_path / "s.json").read_text()) == {"version": 2, "suite": "s", "run": 1, "plots": ["s.png"]}

    def rows():
        yield {"i": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_results(tmp_path, "s", {"run": 2}, rows(), {})
    assert not (tmp_path / "s.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl", "s.png"]


def test_targets(tmp_path):
    open_target(tmp_path / "new" / "deep", overwrite=False)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="--overwrite"):
        open_target(tmp_path, overwrite=False)
    with pytest.raises(ConfigError, match="directory"):
        open_target(tmp_path / "file", overwrite=True)
    open_target(tmp_path, overwrite=True)
    assert (tmp_path / "file").read_text() == "kept"

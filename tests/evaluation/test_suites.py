"""A suite that is registered is a subcommand, a section of the report and a part of a model card."""

import json

import pytest

from checkpoints_tools.export.card_evaluation import read_evaluations
from launch.cli import main
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import ConfigError
from statex_dist.evaluation.suites import registry
from statex_dist.models.hf import save_pretrained
from tests.evaluation.stand_ins import tiny_model
from tests.evaluation.toy_suite import ToySuite


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "_SUITES", dict(registry._SUITES))
    registry.register(ToySuite())


def test_a_registered_suite_is_run_reported_and_told_on_a_card(toy, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    save_pretrained(tiny_model(), model)
    BytesTokenizer().save(model)
    assert main(["eval", "toy", "--model", str(model), "--out", str(out), "--count", "5", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["settings"]["count"] == summary["even"]["samples"] == 5
    assert main(["eval", "toy", "--model", str(model), "--out", str(out), "--overwrite"]) == 0
    even = json.loads((out / "toy.json").read_text())["even"]["accuracy"]
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert "toy: even bytes" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert all(text in page for text in ("A toy</h2>", "Share of even bytes.", "Each byte: ", " &lt;&amp;&gt;"))
    (told,) = read_evaluations([out], state_numbers=summary["model"]["state_numbers"])
    assert told.suite == "toy"
    assert [name for name, _ in told.figures] == ["even bytes"]
    assert told.figures[0][1].startswith(f"{even:.3f}")


def test_a_name_is_registered_once(toy):
    with pytest.raises(ConfigError, match="'toy'"):
        registry.register(ToySuite())
    assert registry.suite_names()[-1] == "toy"
    assert [registry.find_suite(name).name for name in registry.suite_names()] == list(registry.suite_names())

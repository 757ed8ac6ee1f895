import pytest

from checkpoints_tools.plan_options import PlanOptions, plan_model
from checkpoints_tools.plan_report import forget_threshold, report_plan
from statex_dist.errors import ConfigError
from statex_dist.models.kinds import config_from_dict
from tests.checkpoints_tools.builders import GLA, MAMBA2

GLA_1B = {
    "model_type": "gla",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 4,
    "tie_word_embeddings": False,
}


def test_the_papers_gla():
    before = config_from_dict(GLA_1B)
    report = report_plan(before, plan_model(before), world_size=8)
    assert report.before.state_numbers == 24 * 4 * 256 * 512
    assert report.after.state_numbers == report.before.state_numbers * 3 // 2
    assert [row.layer for row in report.layers if row.expansion] == [0, 6, 12, 18]
    # The paper's table: no new parameter but the norms of the merged values.
    assert report.after.parameters - report.before.parameters == 4 * (2048 - 512)
    assert report.before.memory.states == 16 * report.before.parameters // 8
    assert 91 < report.after.forget_tokens / 1024 < 94
    assert report.warning is not None
    assert "Mamba-2" in report.warning
    assert report_plan(before, plan_model(before), seq_len=131072).warning is None
    # 2 FLOPs a parameter and token, embeddings not counted, and the scan on top.
    assert report.before.flops_per_token > 2 * (report.before.parameters - 32000 * 2048 - 24 * 10000)
    assert report.to_dict()["after"]["memory"]["total"] == report.after.memory.total


@pytest.mark.parametrize("values", [GLA, MAMBA2])
def test_small_models_have_no_threshold(values):
    before = config_from_dict(values)
    report = report_plan(before, plan_model(before, PlanOptions(factor=2)), seq_len=128)
    assert report.after.forget_tokens is None
    assert report.warning is None
    assert report.after.state_numbers > report.before.state_numbers


def test_threshold_is_the_fitted_law():
    assert forget_threshold(10_000_000) == int((51.72 - 4.469) * 1024)
    assert forget_threshold(100) is None


@pytest.mark.parametrize("options", [{"world_size": 0}, {"seq_len": 0}])
def test_refuses_nonsense(options):
    config = config_from_dict(GLA)
    with pytest.raises(ConfigError, match="1 or more"):
        report_plan(config, plan_model(config), **options)

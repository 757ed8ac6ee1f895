import math

import pytest

from checkpoints_tools.plan.memory import TrainingSettings, parameter_shapes, training_memory
from checkpoints_tools.plan.options import PlanOptions, plan_model
from checkpoints_tools.plan.report import report_plan
from statex_dist.errors import ConfigError
from statex_dist.models.registry import config_from_dict
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
    report = report_plan(before, plan_model(before), TrainingSettings(world_size=8))
    assert report.before.state_numbers == 24 * 4 * 256 * 512
    assert report.after.state_numbers == report.before.state_numbers * 3 // 2
    assert [row.layer for row in report.layers if row.expansion] == [0, 6, 12, 18]
    # The paper's table: no new parameter but the norms of the merged values.
    assert report.after.parameters - report.before.parameters == 4 * (2048 - 512)
    parts = report.before.memory.parts
    states = sum(parts[name].device for name in ("master weights", "moments", "gradients"))
    assert states == pytest.approx(14 * report.before.parameters / 8, rel=1e-6)
    assert 91 < report.after.forget_tokens / 1024 < 94
    assert report.warning is not None
    assert "Mamba-2" in report.warning
    assert report.to_dict()["warning"] == report.warning
    assert report.to_dict()["forgetting"]["proposals"]["seq_len"] == 96256
    assert report_plan(before, plan_model(before), TrainingSettings(seq_len=131072)).warning is None
    # 2 FLOPs a parameter and token, embeddings not counted, and the scan on top.
    assert report.before.flops_per_token > 2 * (report.before.parameters - 32000 * 2048 - 24 * 10000)
    assert report.to_dict()["after"]["memory"]["peak"]["device"] == report.after.memory.peak.device


@pytest.mark.parametrize("values", [GLA, MAMBA2])
def test_small_models_have_no_threshold(values):
    before = config_from_dict(values)
    report = report_plan(before, plan_model(before, PlanOptions(factor=2)), TrainingSettings(seq_len=128))
    assert report.after.forget_tokens is None
    assert report.warning is None
    assert report.after.state_numbers > report.before.state_numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "--world-size.*not 0"),
        ({"seq_len": 0}, "--seq-len must"),
        ({"segment_tokens": -1}, "--segment-tokens must"),
        ({"precision": "fp16"}, "--precision.*bf16, fp32, not 'fp16'"),
        ({"world_size": 4, "context": 3}, "--context 3.*--world-size 4"),
    ],
)
def test_refuses_nonsense(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings(**options)


def test_features_add_gains_alone_and_name_the_limit_of_kernels():
    before = config_from_dict(GLA_1B)
    settings = TrainingSettings(world_size=8)
    report = report_plan(before, plan_model(before, PlanOptions(op="grow_features", relu=True)), settings)
    assert report.after.state_numbers == report.before.state_numbers * 3 // 2
    assert report.after.parameters - report.before.parameters == 4 * 4 * 3 * 256
    assert report.layers[0].expansion == "grow_features x4 lossless (rolls 1-3 relu)"
    keys = plan_model(before, PlanOptions(op="grow_state", init="lossless"))
    # One fp32 state more for the backward pass of each of the layers, as key growth has it; no wider projections.
    grown = report_plan(before, keys, settings).after.memory.passing["activations"].device
    assert (
        report.before.memory.passing["activations"].device < report.after.memory.passing["activations"].device < grown
    )
    assert report.notes == ()
    assert report.to_dict()["forgetting"]["proposals"]["smaller"][0]["options"].endswith("--relu")
    small = plan_model(config_from_dict({**GLA_1B, "num_heads": 16}), PlanOptions(op="grow_features", factor=2))
    bounded = [
        training_memory(small, TrainingSettings(max_state_bytes=bound)).passing["activations"].device
        for bound in (2**20, 2**30)
    ]
    assert bounded[0] != bounded[1], "our own scan, which the bound is for, runs small heads with features too"
    delta = config_from_dict({**GLA_1B, "model_type": "kda", "head_dim": 128, "num_heads": 16})
    reports = [report_plan(delta, plan_model(delta, PlanOptions(op="grow_features", factor=f))) for f in (2, 3)]
    assert reports[0].notes == ()
    assert "384 key channels" in reports[1].notes[0]
    assert "a factor of at most 2" in reports[1].notes[0]


def test_a_start_takes_the_part_of_a_rank_and_one_parameter():
    config = config_from_dict(GLA_1B)
    sizes = [math.prod(shape) for shape in parameter_shapes(config).values()]

    def start(world_size, **options):
        settings = TrainingSettings(world_size=world_size, param_persistence_threshold=0, **options)
        return training_memory(config, settings).phases["start"]

    for ranks in (1, 8, 1024):
        assert start(ranks).host == 0
        assert start(ranks).device == pytest.approx(2 * sum(sizes) / ranks + 2 * max(sizes), rel=1e-3)
    offloaded = start(8, offload_optimizer="cpu", offload_parameters="cpu")
    assert (offloaded.host, offloaded.device) == (start(8).device - 2 * max(sizes), 2 * max(sizes))
    assert start(8, offload_optimizer="cpu", offload_parameters="nvme").device == 2 * sum(sizes)


def test_what_each_setting_saves():
    config = config_from_dict(GLA_1B)

    def memory(**options):
        return training_memory(config, TrainingSettings(world_size=8, **options))

    plain = memory()
    assert memory(offload_optimizer="cpu").peak.device < plain.peak.device
    held = memory(offload_optimizer="cpu", offload_parameters="cpu").parts
    assert all(held[name].device == 0 for name in ("master weights", "moments", "gradients"))
    assert held["moments"].host == plain.parts["moments"].device
    block, chunks = memory(activation_checkpointing="block").passing, memory(loss_chunk_tokens=1024).passing
    assert block["activations"].device < plain.passing["activations"].device / 4
    assert chunks["logits"].device * 8 == plain.passing["logits"].device
    merged = plan_model(config, PlanOptions())
    bounds = [
        training_memory(merged, TrainingSettings(max_state_bytes=bound)).passing["activations"].device
        for bound in (2**20, 2**30, 2**40)
    ]
    # bf16 states of 256 chunks of a merged head never weigh more than fla's of a layer as it was; what four layers keep
    # does: an fp32 state for each of 16 segments (the square root), of 2, of 1
    assert bounds[0] - bounds[2] == 4 * 4 * 1024 * 2048 * (16 - 1)
    assert bounds[1] - bounds[2] == 4 * 4 * 1024 * 2048 * (2 - 1)
    assert memory(segment_tokens=8192).passing["activations"].device * 8 == plain.passing["activations"].device
    assert memory(context=8).passing["activations"].device * 8 == plain.passing["activations"].device
    assert memory(accumulation=2).parts["gradients"].device == 2 * plain.parts["gradients"].device
    saved = memory(save_async=True).phases["update"]
    assert saved.host == pytest.approx(12 * 1.4e9 / 8, rel=0.1)
    cpu = memory(device="cpu", precision="fp32")
    assert cpu.peak.device == 0
    assert cpu.parts["master weights"].host == 0

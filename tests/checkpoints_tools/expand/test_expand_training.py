"""A run that grows in the middle of its training: the optimizer's states row by row, and the continued run."""

import json

import pytest
import torch

from benchmarks.synthetic_zero3 import write_zero3
from checkpoints_tools.expand.expand import expand, prepare_expansion
from checkpoints_tools.plan.options import PlanOptions
from checkpoints_tools.verify.verify import verify_expansion
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.config import read_config_dict
from statex_dist.models.registry import config_from_dict
from statex_dist.models.row_mapping import Keep
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import GLA, MAMBA2, random_tensors, read_tensor, write_model
from tests.raising import raises
from tests.runs import GLA as RUN_GLA
from tests.runs import losses, make_shards, run_training, save_model, write_run


@pytest.fixture
def run(tmp_path):
    def make(values, world_size=2, **options):
        tag = tmp_path / "run/checkpoints/global_step7"
        tensors = random_tensors(values)
        write_zero3(tag, tensors, world_size, **options)
        (tag / "model").mkdir()
        (tag / "model/config.json").write_text(json.dumps(values))
        return tensors

    return make


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (GLA, {"factor": 2, "layers": "0,2", "init": "inherit", "op": "grow_state"}),
        (GLA, {"factor": 4, "layers": "1", "init": "reinit"}),
        (GLA, {"factor": 2, "layers": "1", "init": "lossless"}),
        (MAMBA2, {"factor": 4, "layers": "all", "init": "lossless"}),
        (MAMBA2, {"op": "grow_features", "rolls": "1,2", "layers": "0,1"}),
    ],
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_states_are_kept_where_rows_are_and_zero_where_they_are_new(run, tmp_path, values, options, world_size):
    tensors = run(values, sub_group_size=3000)
    expansion = prepare_expansion(tmp_path / "run", PlanOptions(**options))
    expand(expansion, tmp_path / "out", to="zero3", world_size=world_size)
    grown = open_source(tmp_path / "out")
    assert grown.facts.info["world_size"] == world_size
    assert grown.facts.info["plan"] == expansion.after.statex.to_dict()
    changed = 0
    for state, remembered in (("exp_avg", lambda t: t * 0.5), ("exp_avg_sq", lambda t: t * t)):
        held = grown.states()[state]
        for job in expansion.jobs:
            found = read_tensor(held, job.info.name)
            if job.mapping is None:
                assert torch.equal(found, remembered(tensors[job.info.name]))
                continue
            rows, changed = 0, changed + 1
            for block in job.mapping.rows.blocks:
                part = found[rows : rows + block.rows]
                kept = isinstance(block, Keep)
                expected = (
                    remembered(tensors[job.info.name][block.start : block.stop]) if kept else torch.zeros_like(part)
                )
                assert torch.equal(part, expected), (state, job.info.name)
                rows += block.rows
    assert changed
    assert verify_expansion(tmp_path / "run", tmp_path / "out").tensors.total() == len(expansion.jobs)


def test_what_cannot_grow_in_training(run, tmp_path):
    write_model(tmp_path / "hf", GLA)
    plan = PlanOptions(factor=2, layers="1")
    with pytest.raises(ConfigError, match=r"--to zero3 .* layout hf$"):
        expand(prepare_expansion(tmp_path / "hf", plan), tmp_path / "out", to="zero3")
    run(GLA)
    with pytest.raises(ConfigError, match="--dtype"):
        expand(prepare_expansion(tmp_path / "run", plan, dtype="bf16"), tmp_path / "out", to="zero3")
    with raises(ConfigError, "--to", "tp", "zero3"):
        expand(prepare_expansion(tmp_path / "run", plan), tmp_path / "out", to="tp")
    with pytest.raises(ConfigError, match="--world-size 2 is for --to zero3"):
        expand(prepare_expansion(tmp_path / "run", plan), tmp_path / "out", world_size=2)


def test_a_new_parameter_needs_a_place_in_the_optimizer(tmp_path):
    """The parameters in alphabetical order, as another framework may have them: nothing says where a new one goes."""
    tag = tmp_path / "run/checkpoints/global_step1"
    tensors = random_tensors(GLA)
    write_zero3(tag, {name: tensors[name] for name in sorted(tensors)}, 2)
    (tag / "model").mkdir()
    (tag / "model/config.json").write_text(json.dumps(GLA))
    lossless = prepare_expansion(tmp_path / "run", PlanOptions(factor=2, layers="1", init="lossless"))
    with pytest.raises(CheckpointError, match=r"another order .* gla "):
        expand(lossless, tmp_path / "out", to="zero3")
    # Without new parameters the order does not matter.
    merged = prepare_expansion(tmp_path / "run", PlanOptions(factor=2, layers="1", init="inherit"))
    expand(merged, tmp_path / "out", to="zero3")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_grew_without_loss_goes_on_where_it_was(tmp_path):
    """Real training on 2 ranks, a lossless expansion with new parameters, and on on 4: the next loss is the same."""
    model = save_model(config_from_dict(RUN_GLA), tmp_path / "model")
    shards = make_shards(tmp_path / "data")
    common = {"data": {"path": str(shards)}, "schedule": {"name": "constant", "warmup_steps": 0}}

    def train(name: str, ranks: int, steps: int, source: dict):
        file = write_run(tmp_path / f"{name}.yaml", model=source, train={"num_steps": steps, "save_every": 3}, **common)
        done = run_training(ranks, "--config", str(file))
        assert done.returncode == 0, done.stderr[-2000:]
        return losses(tmp_path / name)

    whole = train("whole", 2, 5, {"path": str(model)})
    # From the tag in the middle, by name.
    middle = tmp_path / "whole/checkpoints/global_step3"
    expansion = prepare_expansion(middle, PlanOptions(layers="0,2", factor=4, init="lossless"))
    expand(expansion, tmp_path / "grown/checkpoints", to="zero3", world_size=4)
    config = read_config_dict(tmp_path / "grown/checkpoints/global_step3/model")
    grown = train("grown", 4, 5, {"config": config})
    assert len(grown) == 2
    assert grown[0] == whole[3], "the same model, the same data, the same loss"
    assert grown[1] == pytest.approx(whole[4], rel=1e-2)
    assert grown[1] != whole[4], "the new parameters have begun to learn"

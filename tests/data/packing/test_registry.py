"""A strategy of one's own: registered by one call, then planned, trained and compared like the others."""

from pathlib import Path

import numpy as np
import pytest

from statex_dist.config import parse_config
from statex_dist.data.packing import registry
from statex_dist.data.packing.registry import PackingStrategy, register
from statex_dist.data.stats import packing_stats
from statex_dist.errors import ConfigError
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from tests.data.options import make_plan
from tests.data.synthetic import memory_store
from tests.data.toy.pairs import PAIRS
from tests.runs import GLA, make_shards, write_run

LENGTHS = [3, 40, 7, 5, 12, 8, 2, 33]


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_STRATEGIES", dict(registry._STRATEGIES))


def test_a_toy_strategy_is_planned_and_compared():
    with pytest.raises(ConfigError, match="'pairs'"):
        make_plan(memory_store(LENGTHS), packing="pairs")
    register(PAIRS)
    register(PAIRS)  # the same one again changes nothing
    plan = make_plan(memory_store(LENGTHS), packing="pairs")
    assert plan.settings["packing"] == "pairs"
    window = plan.window(0, 0, 16)
    packs = [window.pieces(pack) for pack in range(len(window))]
    assert sum(stop - start for pieces in packs for _, _, start, stop, _ in pieces) == sum(LENGTHS)
    assert max(map(len, packs)) == 2
    assert [stats.mode.title for stats in packing_stats(memory_store(LENGTHS), [16])][-1] == "pairs"


def test_a_run_trains_with_it(tmp_path: Path):
    register(PAIRS)
    shards = make_shards(tmp_path / "data", num_documents=20)
    data = {"path": str(shards), "seq_len": 64, "packs_per_step": 2, "packing": "pairs"}
    model = {"config": {**GLA, "num_hidden_layers": 1}}
    file = write_run(
        tmp_path / "run.yaml",
        engine={"name": "plain"},
        model=model,
        data=data,
        train={"num_steps": 2},
        schedule={"warmup_steps": 0},
    )
    config = parse_config(RunConfig, ["--config", str(file)], prog="train.py")
    assert train(config)
    with pytest.raises(ConfigError, match=r"data\.tail 'split'.* 'best_fit'.* 'pairs'"):
        parse_config(RunConfig, ["--config", str(file), "--data.tail", "split"], prog="train.py")
    with pytest.raises(ConfigError, match=r"data\.packing.* 'best'.* best_fit, concat, one_document, pairs"):
        parse_config(RunConfig, ["--config", str(file), "--data.packing", "best"], prog="train.py")


@pytest.mark.parametrize("wrong", ["loses", "overfills"])
def test_a_strategy_that_loses_tokens_or_overfills_packs_is_refused(wrong: str):
    def lay_out(length, seq_len, *, split_tails, chained):
        pieces = PAIRS.lay_out(length, seq_len, split_tails=split_tails, chained=chained)
        if wrong == "overfills":
            return pieces._replace(pack=np.zeros_like(pieces.pack))
        return pieces._replace(stop=np.maximum(pieces.stop - 1, pieces.start))

    register(PackingStrategy(name=wrong, lay_out=lay_out))
    with pytest.raises(ConfigError, match=wrong):
        make_plan(memory_store(LENGTHS), packing=wrong).window(0, 0, 16)


def test_two_strategies_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="'best_fit'"):
        register(PackingStrategy(name="best_fit", lay_out=PAIRS.lay_out))
    with pytest.raises(ConfigError, match=r"'x'.*pad"):
        register(PackingStrategy(name="x", lay_out=PAIRS.lay_out, tails=("split",)))

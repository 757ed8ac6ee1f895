"""Validation in training: the same value for any number of ranks, and a training that does not notice it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.config import parse_config
from statex_dist.data.formats import open_store
from statex_dist.data.held_out import HeldOut
from statex_dist.distributed.env import read_env
from statex_dist.engine.place import CheckpointPlace
from statex_dist.errors import ConfigError, DataError
from statex_dist.evaluation.page.runs import read_runs, summarise
from statex_dist.models.source import find_model
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model, open_values
from statex_dist.train.callback import CallbackError, Callbacks, RunContext
from statex_dist.train.metrics import read_metrics
from statex_dist.train.validation import EvalConfig, Validation, first_packs
from tests.raising import raises
from tests.runs import GLA, expanded, make_shards, save_model, write_run
from tests.train.toy import Failing

ONE_LAYER = {**GLA, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("validation")
    make_shards(directory / "data")
    make_shards(directory / "other", num_documents=25)
    save_model(expanded(GLA), directory / "model")
    return directory


def load(directory: Path, run_dir: Path, *arguments: str, **sections: Any) -> RunConfig:
    data = {"path": str(directory / "data" / "shards"), **sections.pop("data", {})}
    sections = {"engine": {"name": "plain"}, "model": {"config": ONE_LAYER}, **sections}
    # A file for each process: ranks that differ in a setting are refused.
    file = write_run(
        run_dir.with_name(f"{run_dir.name}{os.getpid()}.yaml"), run_dir=str(run_dir), data=data, **sections
    )
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def other(directory: Path) -> str:
    return str(directory / "other" / "shards")


# ---- the training does not notice

VARIANTS: dict[str, dict[str, Any]] = {
    "carried states": {"data": {"long_documents": "carry", "seq_len": 64}},
    "passed states and segments": {"train": {"state_passing": 0.5}, "engine": {"name": "plain", "segment_tokens": 50}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_with_validation_has_the_same_bits(tmp_path: Path, directory: Path, variant: str, caplog):
    sections = VARIANTS[variant]
    sections = {**sections, "train": {"save_every": 2, "keep_last": 9, "num_steps": 5, **sections.get("train", {})}}
    assert train(load(directory, tmp_path / "without", **sections))
    section = {"data": other(directory), "every": 2, "tokens": 300}
    with caplog.at_level("INFO"):
        assert train(load(directory, tmp_path / "with", eval=section, **sections))
    records, without = read_metrics(tmp_path / "with"), read_metrics(tmp_path / "without")
    assert [(r["loss"], r["grad_norms"]) for r in records] == [(r["loss"], r["grad_norms"]) for r in without]
    assert [r["step"] for r in records if "eval" in r] == [2, 4, 5], "and after the last step"
    assert all(r["eval"]["targets"] > 0 and r["time"]["eval"] > 0 for r in records if "eval" in r)
    losses = [r["eval"]["loss"] for r in records if "eval" in r]
    assert losses == sorted(losses, reverse=True), "the texts are alike: it learns"
    assert sum("eval loss" in message for message in caplog.messages) == 3
    for step in (2, 4, 5):
        ours, reference = (
            torch.load(tmp_path / name / f"checkpoints/global_step{step}/plain_state.pt", weights_only=True)
            for name in ("with", "without")
        )
        assert same(ours["module"], reference["module"])
        assert same(ours["optimizer"], reference["optimizer"])
        client = {k: v for k, v in ours["client_state"].items() if k not in ("rng", "callbacks")}
        assert same(client, {k: v for k, v in reference["client_state"].items() if k != "rng"})
        assert ours["client_state"]["callbacks"]["validation"]["best"] == records[step - 1]["eval"]["loss"]
    summary = summarise(read_runs([tmp_path / "with"])[0])
    assert (summary.validation_loss, summary.best_validation_loss) == (losses[-1], min(losses))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_the_random_generators_are_left_as_they_were(tmp_path: Path, directory: Path):
    _, validation = built(load(directory, tmp_path / "run", eval={"data": other(directory), "tokens": 300}))
    model = validation.run.engine.model
    modes: list[bool] = []

    def draw(*_: Any) -> None:
        torch.rand(1)
        np.random.rand()
        modes.append(model.training)

    inside = model.register_forward_hook(draw)
    before = torch.get_rng_state(), np.random.get_state()[2]
    assert validation.evaluate(1) == validation.evaluate(1)
    inside.remove()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[2] == before[1]
    assert set(modes) == {False}
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# ---- any number of ranks


def built(config: RunConfig) -> tuple[Any, Validation]:
    """Return engine and validation of a run on this rank."""
    env = read_env()
    stores = config.eval.divide(config.data.open_stores(), config.data.open_stores)[1]
    values = open_values(config)
    model = build_model(config, values)
    (validation,) = config.eval.build(stores, model.config, None, seq_len=config.data.seq_len)
    engine = build_engine(config, model, env, values)
    callbacks = Callbacks([validation], rank=env.rank)
    callbacks.attach(RunContext(run_dir=Path(config.run_dir), engine=engine, num_steps=9, callbacks=callbacks))
    return engine, validation


RANK_VARIANTS: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "without validation": {},
    "context": {"parallel": {"context": 2}},
}


def steps(config: RunConfig, *, evaluate: bool = True) -> dict[str, Any]:
    """Make three steps, with an evaluation before the first and after each."""
    engine, validation = built(config)
    loader = build_loader(config, config.data.open_stores(), expanded(GLA), read_env())
    batches, found = iter(loader), {"eval": [], "loss": [], "norms": []}
    for number in range(3):
        if evaluate:
            found["eval"].append(validation.evaluate(number))
        found["loss"].append(engine.forward_backward(next(batches)))
        found["norms"].append(engine.grad_norms())
        engine.step()
    batches.close()
    if engine.kind != "plain" and not evaluate:
        found["failures"] = engine.gather(failures(engine))
    if engine.kind != "plain":
        engine.engine.destroy()  # the process group stays: DeepSpeed remembers its groups
    return found


class FailingOnRank0(Failing):
    rank_0_only = True


def failures(engine: Any) -> list[str]:
    """Return what this rank raises where a callback of rank 1 fails, and where one that is on rank 0 alone does."""
    texts = []
    for callback in (Failing(rank=1), FailingOnRank0()):
        callbacks = Callbacks([callback], rank=engine.rank)
        callbacks.attach(RunContext(run_dir=Path(), engine=engine, num_steps=9, callbacks=callbacks))
        with pytest.raises(CallbackError) as caught:
            callbacks.call("post_step", {"step": 3})
        assert caught.value.agreed == (engine.rank > 0)
        texts.append(str(caught.value))
    return texts


def configure(directory: Path, **sections: Any) -> RunConfig:
    return load(
        directory,
        directory / "ranks",
        model={"path": str(directory / "model")},
        eval={"data": other(directory), "tokens": 700},  # 5 packs: some ranks have one more than others
        schedule={"warmup_steps": 0},
        **sections,
    )


def work(rank: int, ranks: int, directory: str, port: int) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"},
    }
    torch.set_num_threads(1)
    found = {}
    for name, sections in RANK_VARIANTS.items():
        if ranks == 2 or name == "data parallel":
            sections = {"engine": {"name": "zero3"}, **sections}
            found[name] = steps(configure(Path(directory), **sections), evaluate=name != "without validation")
    found["failures"] = found.get("without validation", {}).pop("failures", None)
    if rank == 0:
        torch.save(found, f"{directory}/found{ranks}.pt")
    torch.distributed.destroy_process_group()


def launch(ranks: int, directory: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(ranks, str(directory), port), nprocs=ranks)
    return torch.load(directory / f"found{ranks}.pt")


@pytest.fixture(scope="module")
def by_ranks(directory: Path) -> dict[int, dict[str, Any]]:
    plain = {"data parallel": {"name": "plain"}, "segments": {"name": "plain", "segment_tokens": 50}}
    return {
        1: {name: steps(configure(directory, engine=engine)) for name, engine in plain.items()},
        2: launch(2, directory),
    }


@pytest.mark.distributed
def test_the_same_weights_have_the_same_loss_on_any_number_of_ranks(by_ranks):
    first = {ranks: found["data parallel"]["eval"][0] for ranks, found in by_ranks.items()}
    assert first[1] == first[2], "the same bits"
    assert first[1]["targets"] > 300
    for ranks, name in ((2, "context"), (1, "segments")):
        assert by_ranks[ranks][name]["eval"][0] == pytest.approx(first[1], rel=1e-6), "but for rounding"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_same_weights_have_the_same_loss_on_four_ranks(by_ranks, directory: Path):
    assert launch(4, directory)["data parallel"]["eval"][0] == by_ranks[1]["data parallel"]["eval"][0], "the same bits"


@pytest.mark.distributed
def test_a_callback_that_fails_on_one_rank_fails_on_both(by_ranks):
    first, second = by_ranks[2]["failures"]
    assert first == second
    for text, name in zip(first, ("tests.train.toy:Failing", f"{__name__}:FailingOnRank0"), strict=True):
        assert text.startswith(f"callback {name} failed in post_step: ZeroDivisionError: on purpose")


@pytest.mark.distributed
def test_zero3_trains_with_the_same_bits(by_ranks):
    with_it, without = by_ranks[2]["data parallel"], by_ranks[2]["without validation"]
    assert with_it["loss"] == without["loss"]
    assert with_it["norms"] == without["norms"]
    assert len({results["loss"] for results in with_it["eval"]}) == 3, "it evaluates the weights of the step"


# ---- held-out documents


def test_a_held_out_share_is_exactly_what_training_leaves_out(directory: Path):
    store = open_store(directory / "data" / "shards")
    held, rest = (HeldOut(store, 0.25, held=side) for side in (True, False))
    for shard in range(store.num_shards):
        lengths = np.stack([held.lengths(shard), rest.lengths(shard)])
        assert (lengths.sum(0) == store.lengths(shard)).all()
        assert (lengths.min(0) == 0).all()
    read = {
        side: {
            (shard, document)
            for spec in first_packs("data", store_of_side, 10**6, 128)
            for shard, document, *_ in spec.pieces
        }
        for side, store_of_side in (("held", held), ("rest", rest))
    }
    assert not read["held"] & read["rest"]
    assert len(read["held"]) + len(read["rest"]) == sum(len(store.lengths(s)) for s in range(store.num_shards))
    assert 5 < len(read["held"]) < 25
    more = HeldOut(store, 0.5, held=True)
    assert all((more.lengths(s) >= held.lengths(s)).all() for s in range(store.num_shards)), "a larger share adds"


def test_a_run_with_a_held_out_share_resumes_with_the_same_one(tmp_path: Path, directory: Path):
    section = {"held_out": 0.25, "every": 2, "tokens": 512}
    assert train(load(directory, tmp_path / "whole", eval=section, train={"num_steps": 4}))
    for steps_done in (2, 4):
        assert train(load(directory, tmp_path / "parts", eval=section, train={"num_steps": steps_done}, **FIXED))
    whole, parts = ([(r["loss"], r.get("eval")) for r in read_metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert [loss for loss, _ in parts][:1] == [loss for loss, _ in whole][:1]
    assert parts[1][1]["targets"] == whole[1][1]["targets"]
    for changed in ({"held_out": 0.3}, {}):
        with pytest.raises(ConfigError, match=r"held_out=0\.25"):
            train(load(directory, tmp_path / "parts", eval=changed, train={"num_steps": 6}, **FIXED))


FIXED = {"schedule": {"num_steps": 4}}


def test_a_mixture_has_a_loss_for_each_source(tmp_path: Path, directory: Path):
    sources = {"a": {"path": str(directory / "data" / "shards")}, "b": {"path": other(directory)}}
    file = write_run(
        tmp_path / "mixture.yaml",
        data={"sources": sources},
        engine={"name": "plain"},
        model={"config": ONE_LAYER},
        eval={"held_out": 0.3, "tokens": 256},
        train={"num_steps": 2},
    )
    assert train(parse_config(RunConfig, ["--config", str(file)], prog="train.py"))
    results = read_metrics(tmp_path / "mixture")[-1]["eval"]
    assert set(results["losses"]) == {"a", "b"}
    assert min(results["losses"].values()) < results["loss"] < max(results["losses"].values())


# ---- the best checkpoint


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_the_best_checkpoint_stays_and_is_found(tmp_path: Path, directory: Path, monkeypatch, asynchronous: str):
    losses = dict(zip(range(1, 9), (5.0, 3.0, 4.0, float("nan"), 2.0, 6.0, 7.0, 8.0), strict=True))
    monkeypatch.setattr(Validation, "evaluate", lambda self, step: {"loss": losses[step], "targets": 1})
    section = {"data": other(directory), "every": 1, "keep_best": True}
    settings = {"save_every": 2, "keep_last": 1}
    checkpoints = tmp_path / "run" / "checkpoints"

    def run(num_steps: int) -> list[str]:
        section_of_train = {**settings, "num_steps": num_steps}
        arguments = ("--train.save_async", asynchronous)
        assert train(load(directory, tmp_path / "run", *arguments, eval=section, train=section_of_train))
        return complete_tags(checkpoints)

    assert run(4) == ["global_step4", "global_step2"]
    assert (checkpoints / "best").readlink() == Path("global_step2")
    assert run(8) == ["global_step8", "global_step5"], "a resumed run knows the best loss so far"
    assert find_model(str(checkpoints / "best")).resolve() == checkpoints / "global_step5" / "model"
    continued = load(directory, tmp_path / "from best", model={"path": str(checkpoints / "best")})
    assert build_model(continued).config.num_hidden_layers == 1


@pytest.mark.parametrize("fault", ["a kill before the link", "a failed save", "a damaged best", "no link, no flag"])
def test_best_leads_to_the_best_checkpoint_that_is_there(tmp_path: Path, directory: Path, monkeypatch, fault: str):
    losses = dict(zip(range(1, 9), (5.0, 4.0, 2.0, 3.0, 3.5, 6.0, 7.0, 8.0), strict=True))
    monkeypatch.setattr(Validation, "evaluate", lambda self, step: {"loss": losses[step], "targets": 1})
    checkpoints = tmp_path / "run" / "checkpoints"

    def run(num_steps: int, **settings: Any) -> str:
        section = {"data": other(directory), "every": 1, "keep_best": True}
        assert train(load(directory, tmp_path / "run", eval=section, train={"num_steps": num_steps, **settings}))
        return str((checkpoints / "best").readlink())

    if fault == "a kill before the link":
        with monkeypatch.context() as patch:
            patch.setattr("statex_dist.engine.checkpoints.mark_best", lambda *_: None)
            with pytest.raises(FileNotFoundError):
                run(3)
        assert run(4) == "global_step3"
    elif fault == "a failed save":
        open_place = CheckpointPlace.open
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointPlace, "open", lambda *a: "full" if "step3" in str(a[1]) else open_place(*a))
            assert run(4) == "global_step4", "the best of those that were saved"
        assert run(6) == "global_step4"
    elif fault == "a damaged best":
        assert run(3) == "global_step3"
        next((checkpoints / "global_step3").glob("*.pt")).write_bytes(b"damaged")
        losses[3] = 4.5  # other hardware, perhaps
        assert run(3) == "global_step2"
    else:
        assert run(3) == "global_step3"
        (checkpoints / "best").unlink()
        manifest = checkpoints / "global_step3" / "MANIFEST.json"
        manifest.write_text(manifest.read_text().replace('"best": true', '"other": 1'))
        assert run(4) == "global_step4", "a best that is nowhere is no best"


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "eval.every must"),
        ({"held_out": 0.6}, "eval.held_out is a share"),
        ({"held_out": 0.1, "data": "x"}, "either eval.data or eval.held_out"),
        ({"keep_best": True}, "eval.keep_best needs"),
        ({"data": ""}, "eval.data is empty"),
        ({"data": {"books": ""}}, "eval.data is empty"),
        ({"tokens": 0}, "eval.tokens must"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(**settings)


def test_data_that_is_trained_on_is_refused(tmp_path: Path, directory: Path):
    with raises(ConfigError, directory / "data" / "shards", "eval.held_out"):
        load(directory, tmp_path / "run", eval={"data": str(directory / "data" / "shards")})
    (tmp_path / "link").symlink_to(directory / "data" / "shards")
    config = load(directory, tmp_path / "run", eval={"data": str(tmp_path / "link")})
    with raises(ConfigError, "eval.data data", "source data", "eval.held_out"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, directory: Path):
    shutil.copytree(directory / "other" / "shards", tmp_path / "shards")
    manifest = tmp_path / "shards" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "tokenizer": "gpt2", "tokenizer_hash": "0" * 32}))
    config = load(directory, tmp_path / "run", eval={"data": str(tmp_path / "shards")})
    with pytest.raises(DataError, match=r"another tokenizer \(gpt2\)"):  # a new model has none of its own
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_share_that_holds_nothing_is_refused(tmp_path: Path, directory: Path):
    with raises(DataError, "eval.held_out", "one side"):
        train(load(directory, tmp_path / "run", eval={"held_out": 1e-9}))


def test_data_that_cannot_be_read_ends_the_run_and_is_named(tmp_path: Path, caplog, directory: Path):
    damaged = make_shards(tmp_path / "damaged", num_documents=5)
    for shard in damaged.glob("*.mds"):
        shard.unlink()
    with caplog.at_level(logging.INFO), raises(DataError, "validation after step 2", "cannot read"):
        train(load(directory, tmp_path / "run", eval={"data": str(damaged), "every": 2}))
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]

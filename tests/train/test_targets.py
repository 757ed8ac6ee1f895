"""Steps without a target: nothing is updated, data and schedule continue."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from statex_dist.checkpoint.layout import complete_tags
from statex_dist.config import parse_config
from statex_dist.data.storage.mds import load_streaming
from statex_dist.errors import ConfigError
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.guard import BadStepsError, Guard, GuardConfig, NoTargetsError
from statex_dist.train.metrics import read_metrics
from statex_dist.train.status import read_status
from tests.raising import raises
from tests.runs import GLA, expanded, make_shards, save_model, write_run

SEQ_LEN = 32


def write_documents(directory: Path, documents: list[tuple[int, slice]]) -> Path:
    """Write documents, given by length and masked slice, with streaming's own writer; one a shard."""
    writer = load_streaming().MDSWriter
    generator = np.random.default_rng(0)
    columns = {"tokens": "ndarray:uint16", "loss_mask": "ndarray:uint8"}
    with writer(out=str(directory), columns=columns, size_limit=1) as out:
        for length, masked in documents:
            mask = np.ones(length, np.uint8)
            mask[masked] = 0
            out.write({"tokens": generator.integers(97, 123, length).astype(np.uint16), "loss_mask": mask})
    return directory


def configure(directory: Path, data: Path, *arguments: str, name: str = "run", **sections) -> RunConfig:
    data_section = {"path": str(data), "seq_len": SEQ_LEN, "packs_per_step": 1}
    sections.setdefault("model", {"config": GLA})
    sections.setdefault("optimizer", {"lr": 0.01, "weight_decay": 0.5})
    file = write_run(directory / f"{name}.yaml", data=data_section, engine={"name": "plain"}, **sections)
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def state(config: RunConfig, step: int) -> dict:
    path = Path(config.run_dir) / "checkpoints" / f"global_step{step}" / "plain_state.pt"
    return torch.load(path, weights_only=True)


def moments(saved: dict) -> list[torch.Tensor]:
    return [value for entry in saved["optimizer"]["state"].values() for value in entry.values()]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of eight packs, of which packs 3 to 6 have no target."""
    return write_documents(
        tmp_path_factory.mktemp("data") / "shards", [(8 * SEQ_LEN, slice(2 * SEQ_LEN, 6 * SEQ_LEN + 1))]
    )


KEPT = {"num_steps": 8, "save_every": 1, "keep_last": 8}


@pytest.mark.parametrize(
    ("engine", "passing"), [({}, 0.0), ({"segment_tokens": 10}, 0.0), ({}, 0.7)], ids=["whole", "segments", "passing"]
)
def test_a_masked_stretch_updates_nothing_and_the_run_goes_on(tmp_path: Path, masked: Path, caplog, engine, passing):
    config = configure(
        tmp_path,
        masked,
        "--data.long_documents",
        "carry",
        "--guard.max_skipped",
        "0",
        train={**KEPT, "state_passing": passing},
    )
    config.engine.segment_tokens = engine.get("segment_tokens", 0)
    assert train(config)
    records = read_metrics(Path(config.run_dir))
    empty = [record["targets"] == 0 for record in records]
    assert empty.count(True) in (3, 4), "a pack may begin anywhere in the document"
    assert [record["loss"] is None for record in records] == empty
    assert [record["grad_norm"] == 0 for record in records] == empty
    assert [record["without_targets"] for record in records] == np.cumsum(empty).tolist()
    assert [record["skipped"] for record in records] == np.cumsum(empty).tolist()
    rates = [record["lr"] for record in records]
    assert len(set(rates)) > len(rates) - 2, "the schedule is a function of the step"
    for number, nothing in enumerate(empty[1:], 2):
        before, after = state(config, number - 1), state(config, number)
        same = all(torch.equal(before["module"][name], tensor) for name, tensor in after["module"].items())
        assert same == nothing, number
        assert all(map(torch.equal, moments(before), moments(after))) == nothing, number
        assert before["client_state"]["loader"] != after["client_state"]["loader"], "the data advances"
    assert not (Path(config.run_dir) / "bad_batches").exists()
    said = [record.message for record in caplog.records if "updates nothing" in record.message]
    assert len(said) == 3, "at the first, second and fourth in a row"
    first = empty.index(True) + 1
    assert f"step {first} updates nothing" in said[0]
    assert "source data, shard" in said[0]
    assert "document 0, tokens" in said[0]


def test_states_are_carried_through_a_masked_stretch(tmp_path: Path, masked: Path):
    """Behind the stretch the loss is that of the whole document in one pack, with the targets of its end alone."""
    model = {"path": str(save_model(expanded(GLA), tmp_path / "model"))}
    frozen = {"model": model, "optimizer": {"lr": 1e-30, "weight_decay": 0.0}, "train": {"num_steps": 8}}
    arguments = ("--data.long_documents", "carry", "--data.packing", "one_document")
    parted = configure(tmp_path, masked, *arguments, name="parted", **frozen)
    assert train(parted)
    frozen["train"] = {"num_steps": 2}
    whole = configure(tmp_path, masked, *arguments, "--data.seq_len", str(8 * SEQ_LEN), name="whole", **frozen)
    assert train(whole)
    records = read_metrics(Path(parted.run_dir))
    total = sum(record["loss"] * record["targets"] for record in records if record["targets"])
    reference = read_metrics(Path(whole.run_dir))[0]
    assert sum(record["targets"] for record in records) == reference["targets"]
    assert total == pytest.approx(reference["loss"] * reference["targets"], rel=1e-5)


def test_a_run_resumed_inside_a_masked_stretch_equals_the_undisturbed_one(tmp_path: Path, masked: Path):
    carry = ("--data.long_documents", "carry")
    whole = configure(tmp_path, masked, *carry, name="whole", train={"num_steps": 8})
    assert train(whole)
    parted = configure(tmp_path, masked, *carry, "--schedule.num_steps", "8", name="parted", train={"num_steps": 4})
    assert train(parted)
    again = configure(tmp_path, masked, *carry, name="parted", train={"num_steps": 8})
    assert train(again)
    theirs, ours = (state(config, 8)["module"] for config in (whole, again))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    kept = ("step", "loss", "lr", "grad_norm", "skipped", "without_targets", "epochs")
    lines = [[{key: record[key] for key in kept} for record in read_metrics(Path(c.run_dir))] for c in (whole, again)]
    assert lines[0] == lines[1]


def test_data_without_any_target_ends_the_run_after_one_pass_with_its_place(tmp_path: Path):
    data = write_documents(tmp_path / "shards", [(40, slice(None)), (50, slice(None)), (40, slice(None))])
    config = configure(tmp_path, data, train={"num_steps": 100})
    with pytest.raises(NoTargetsError, match=r"whole pass.*shard .*shard\.0000") as caught:
        train(config)
    assert len(str(caught.value)) <= 400
    run = Path(config.run_dir)
    status = read_status(run)
    assert (status.state, status.exit_code, status.restart) == ("failed", 2, False)
    assert 5 <= status.step <= 10
    assert complete_tags(run / "checkpoints") == [f"global_step{status.step}"], "saved before the end"
    assert len(read_metrics(run)) == status.step
    with pytest.raises(NoTargetsError, match="had a target"):
        train(config)
    assert read_status(run).step > status.step, "a new start ends with the same error"


def test_a_run_that_ends_before_a_step_had_a_target_is_not_complete(tmp_path: Path):
    data = write_documents(tmp_path / "shards", [(400, slice(None))])
    config = configure(tmp_path, data, train={"num_steps": 2})
    for _ in range(2):  # a new start finds all steps done
        with raises(NoTargetsError, "none of the 2 steps"):
            train(config)
        status = read_status(Path(config.run_dir))
        assert (status.state, status.exit_code, status.restart) == ("failed", 2, False)


def test_the_number_of_steps_without_targets_is_bounded(tmp_path: Path, masked: Path):
    arguments = ("--data.long_documents", "carry", "--guard.max_without_targets", "1")
    config = configure(tmp_path, masked, *arguments, train={"num_steps": 8})
    with raises(NoTargetsError, "last 2 steps", "guard.max_without_targets=1"):
        train(config)


def test_all_shards_damaged_is_a_run_without_targets(tmp_path: Path):
    shards = make_shards(tmp_path / "data", num_documents=5)
    for shard in shards.glob("*.mds"):
        shard.unlink()
    with raises(NoTargetsError, "damaged shards", "skipped"):
        train(configure(tmp_path, shards, "--data.skip_corrupt", "true", train={"num_steps": 50}))


def test_steps_without_targets_neither_count_as_bad_nor_end_a_row_of_bad_ones(tmp_path: Path):
    guard = Guard(GuardConfig(max_skipped=1), tmp_path, rank=0)
    assert guard.judge(float("nan"), 0.0, targets=0) == "no token of its batch is a target"
    assert guard.judge(float("nan"), 0.0, targets=3) == "the loss is nan"
    assert guard.judge(float("nan"), float("inf"), targets=0) == "the gradient norm is inf", "states that overflow"
    with raises(ConfigError, "guard.max_without_targets", "0", "-1"):
        GuardConfig(max_without_targets=-1)


def test_a_bad_batch_says_where_it_comes_from(tmp_path: Path, masked: Path, caplog):
    arguments = ("--optimizer.lr", "1e30", "--guard.max_skipped", "0", "--data.long_documents", "carry")
    config = configure(tmp_path, masked, *arguments)
    with raises(BadStepsError, "source data, shard", "document 0, tokens"):
        train(config)
    kept = sorted((Path(config.run_dir) / "bad_batches").iterdir())
    content = torch.load(kept[0], weights_only=True)
    (origin,) = content["packs"][0]["origins"]
    assert origin["source"] == "data"
    assert origin["document"] == 0
    assert origin["stop"] - origin["start"] <= SEQ_LEN
    assert json.dumps(origin)
    assert any(origin["shard"] in r.message and "is skipped" in r.message for r in caplog.records)

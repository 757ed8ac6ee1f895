"""The loop with the plain engine in one process: saving, resuming, stopping, pruning."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from statex_dist.batch import PackedBatch
from statex_dist.checkpoint.layout import complete_tags
from statex_dist.checkpoint.manifest import FileRecord, Manifest
from statex_dist.config import parse_config
from statex_dist.data.forecast import TrainedLength
from statex_dist.data.formats import open_store
from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.engine.plain import PlainEngine
from statex_dist.engine.segment_states import CarriedStates
from statex_dist.engine.snapshot import FileWriter
from statex_dist.errors import CheckpointError, ConfigError, DataError, StateXError
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict, read_config
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.guard import BadStepsError
from statex_dist.train.metrics import MetricsFile, read_metrics
from statex_dist.train.run_lock import claim
from statex_dist.train.status import StopRequest, read_status
from tests.raising import raises
from tests.runs import GLA, MAMBA2, expanded, losses, make_shards, save_model, write_run
from tests.train.observed import Observed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _restore_signal_handlers():
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def load(directory: Path, shards: Path, *arguments: str, name: str = "run", **sections) -> RunConfig:
    sections.setdefault("model", {"config": GLA})
    data = {"path": str(shards), **sections.pop("data", {})}
    file = write_run(directory / f"{name}.yaml", data=data, engine={"name": "plain"}, **sections)
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def final_state(config: RunConfig) -> dict[str, torch.Tensor]:
    checkpoints = Path(config.run_dir) / "checkpoints"
    path = checkpoints / complete_tags(checkpoints)[0] / "plain_state.pt"
    return torch.load(path, weights_only=True)["module"]


@pytest.mark.parametrize(("values", "passing"), [(GLA, 0.0), (MAMBA2, 0.5)], ids=["gla", "mamba2 with states passed"])
def test_interrupted_training_equals_uninterrupted_training(tmp_path: Path, shards: Path, values, passing, monkeypatch):
    model = {"path": str(save_model(expanded(values), tmp_path / "model"))}
    passed = ("--train.state_passing", str(passing))
    whole = load(tmp_path, shards, *passed, name="whole", model=model)
    assert train(whole)
    parted = load(tmp_path, shards, *passed, name="parted", model=model, train={"save_every": 2})
    step, calls = PlainEngine.step, []

    def stop_in_third_step(self, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, **kwargs)

    monkeypatch.setattr(PlainEngine, "step", stop_in_third_step)
    assert not train(parted), "a run that is told to stop is not complete"
    assert len(calls) == 3
    assert complete_tags(Path(parted.run_dir) / "checkpoints") == ["global_step3", "global_step2"]
    monkeypatch.setattr(PlainEngine, "step", step)
    assert train(parted)
    assert losses(Path(parted.run_dir)) == losses(Path(whole.run_dir))
    reference = final_state(whole)
    assert all(torch.equal(tensor, reference[name]) for name, tensor in final_state(parted).items())


def test_a_complete_run_is_left_alone(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards)
    assert train(config)
    before = sorted((p, p.stat().st_mtime_ns) for p in (Path(config.run_dir) / "checkpoints").rglob("*"))
    assert train(config)
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (Path(config.run_dir) / "checkpoints").rglob("*"))


def test_old_checkpoints_are_pruned_and_leftovers_removed(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards, train={"save_every": 1, "keep_last": 2})
    leftover = Path(config.run_dir) / "checkpoints" / ".tmp-global_step1"
    leftover.mkdir(parents=True)
    (leftover / "half.pt").write_bytes(b"half")
    assert train(config)
    assert sorted(p.name for p in leftover.parent.iterdir()) == ["global_step5", "global_step6", "latest"]
    assert (leftover.parent / "latest").read_text() == "global_step6"


def test_records_of_a_lost_life_are_dropped(tmp_path: Path):
    lines = [{"step": s, "loss": 1.0} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"step": 4, "lo')
    Observed(tmp_path, [MetricsFile()], start_step=2).close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards)
    assert train(config)
    path = Path(config.run_dir) / "checkpoints" / "global_step6" / "plain_state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with raises(CheckpointError, "plain_state.pt", "digest differs"):
        train(config)


def test_latest_without_a_complete_checkpoint_never_restarts_silently(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards)
    assert train(config)
    (Path(config.run_dir) / "checkpoints" / "global_step6" / "MANIFEST.json").unlink()
    with raises(CheckpointError, Path(config.run_dir) / "checkpoints", "no checkpoint"):
        train(config)


def test_another_data_order_is_refused_on_resume(tmp_path: Path, shards: Path):
    assert train(load(tmp_path, shards))
    other = load(tmp_path, shards, "--data.window_tokens", "500", "--train.num_steps", "8")
    with raises(ConfigError, "window_tokens", "2000", "500"):
        train(other)


def test_another_sequence_length_on_resume_goes_on_with_what_is_left(tmp_path: Path, shards: Path, caplog):
    assert train(load(tmp_path, shards))
    other = load(tmp_path, shards, "--data.seq_len", "64", "--train.num_steps", "8")
    with caplog.at_level("INFO"):
        assert train(other)
    assert any("from 128 to 64" in record.message for record in caplog.records)
    assert len(losses(Path(other.run_dir))) == 8


def test_checkpointing_activations_changes_nothing(tmp_path: Path, shards: Path):
    plain = load(tmp_path, shards, name="a")
    recomputed = load(tmp_path, shards, "--engine.activation_checkpointing", "block", name="b")
    assert train(plain)
    assert train(recomputed)
    assert losses(Path(plain.run_dir)) == losses(Path(recomputed.run_dir))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--data.path", "nowhere"], DataError, "nowhere"),
        (["--data.packs_per_step", "0"], ConfigError, "data.packs_per_step.*not 0"),
        (["--data.seq_len", "0"], ConfigError, "data.seq_len.*not 0"),
        (["--train.num_steps", "0"], ConfigError, "train.num_steps.*not 0"),
        (["--optimizer.lr", "much"], ConfigError, "optimizer.lr"),
        (["--optimizer.rate", "1"], ConfigError, "optimizer.rate"),
        (["--train.num_step", "1"], ConfigError, "train.num_step"),
        (["--model.path", "x"], ConfigError, "give either model.path"),
        (["--engine.precision", "bf16"], ConfigError, "plain trains in fp32"),
        (["--model.config.vocab_size", "100"], DataError, "vocabulary of 258 .* 100"),
        (["--optimizer.lr", "1e30"], StateXError, r"(nan|inf) at"),
        (["--metrics.log_every", "0"], ConfigError, "metrics.log_every.*not 0"),
        (["--train.hang_minutes", ".inf"], ConfigError, "train.hang_minutes.*not inf"),
        (["--optimizer.lr", ".nan"], ConfigError, "optimizer.lr.*not nan"),
        (["--train.save_retries", "40"], ConfigError, "train.save_retries.*not 40"),
        (["--train.keep_every", "3"], ConfigError, "keep_every=3.*train.save_every=0"),
        (["--guard.spike_factor", "0.5"], ConfigError, "guard.spike_factor.*not 0.5"),
        (["--parallel.context", "2"], ConfigError, "parallel.context=2.*1 ranks"),
        (["--parallel.context", "32"], ConfigError, "parallel.context=32.*4 tokens.* 8"),
        (["--train.state_passing", "1.5"], ConfigError, "train.state_passing.*not 1.5"),
        (
            ["--train.state_passing", "0.5", "--parallel.context", "2"],
            ConfigError,
            "train.state_passing needs parallel.context 1",
        ),
        (["--run_dir", ""], ConfigError, "run_dir.*empty"),
        (["--run_dir", "/proc/none"], ConfigError, "run_dir /proc/none cannot be written"),
        (["--model.config.num_headz", "4"], ConfigError, "model.config.num_headz.*model.config"),
        (["--model.config.pad_token_id", "999"], ConfigError, "pad_token_id=999"),
    ],
)
def test_bad_runs_are_refused_with_their_reason(tmp_path: Path, shards: Path, arguments, error, message):
    with pytest.raises(error, match=message):
        train(load(tmp_path, shards, *arguments))


def test_each_rank_needs_a_pack(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards, "--data.packs_per_step", "6")
    assert [config.accumulation_steps(ranks) for ranks in (1, 3, 4, 5, 6)] == [6, 2, 2, 2, 1]
    with raises(ConfigError, "packs_per_step=6", "7 ranks", "at most 6"):
        config.accumulation_steps(7)
    config = load(tmp_path, shards, "--data.packs_per_step", "6", "--parallel.context", "2")
    assert config.accumulation_steps(8) == 2
    with raises(ConfigError, "parallel.context=2", "5 ranks"):
        config.accumulation_steps(5)


def test_a_resumed_run_takes_the_learning_rate_that_it_is_given(tmp_path: Path, shards: Path):
    sections = {"schedule": {"name": "constant", "warmup_steps": 0}, "train": {"num_steps": 2}}
    assert train(load(tmp_path, shards, **sections))
    again = load(tmp_path, shards, "--train.num_steps", "4", "--optimizer.lr", "1e-5", **sections)
    assert train(again)
    assert [record["lr"] for record in read_metrics(Path(again.run_dir))] == [0.01, 0.01, 1e-5, 1e-5]


def explode_in(monkeypatch, steps: set[int], value: float) -> None:
    """Have the gradients of these calls filled with ``value``."""
    norms, calls = PlainEngine.grad_norms, []

    def explode(self):
        calls.append(self)
        if len(calls) in steps:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(value)
        return norms(self)

    monkeypatch.setattr(PlainEngine, "grad_norms", explode)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e6])
def test_a_bad_step_is_skipped_and_its_batch_kept(tmp_path: Path, shards: Path, monkeypatch, value: float):
    steps = {"num_steps": 12, "save_every": 1, "keep_every": 1}
    config = load(tmp_path, shards, "--guard.spike_factor", "50", train=steps)
    explode_in(monkeypatch, {10}, value)
    assert train(config)
    run = Path(config.run_dir)
    records = read_metrics(run)
    assert [record["skipped"] for record in records] == [0] * 9 + [1] * 3
    before, after = (torch.load(run / f"checkpoints/global_step{n}/plain_state.pt") for n in (9, 10))
    assert all(torch.equal(tensor, after["module"][name]) for name, tensor in before["module"].items())
    assert before["client_state"]["loader"] != after["client_state"]["loader"], "the batch counts as done"
    kept = torch.load(run / "bad_batches" / "step10-rank0.pt")
    assert len(kept["packs"]) == 4
    assert kept["packs"][0]["input_ids"].shape == (1, 128)
    assert "gradient norm" in kept["reason"]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path, shards: Path, monkeypatch):
    steps = {"num_steps": 8, "save_every": 1, "keep_every": 1}
    config = load(tmp_path, shards, "--guard.max_skipped", "2", train=steps)
    explode_in(monkeypatch, {2, 4, 5, 6}, float("nan"))
    with raises(BadStepsError, "gradient norm", "nan", "step 6", "2 step(s)"):
        train(config)
    run = Path(config.run_dir)
    assert not read_status(run).restart, "a supervisor would restart it without end"
    assert complete_tags(run / "checkpoints")[0] == "global_step6", "with the weights of the last good step"
    assert [record["skipped"] for record in read_metrics(run)] == [0, 1, 1, 2, 3, 4]
    assert len(list((run / "bad_batches").iterdir())) == 4
    before, after = (torch.load(run / f"checkpoints/global_step{n}/plain_state.pt")["module"] for n in (5, 6))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    monkeypatch.undo()
    explode_in(monkeypatch, {1}, float("nan"))
    assert train(config), "a new start counts from 0"
    assert [record["skipped"] for record in read_metrics(run)] == [0, 1, 1, 2, 3, 4, 5, 5]


def test_a_damaged_newest_checkpoint_is_set_aside_for_an_older_one(tmp_path: Path, shards: Path, caplog):
    caplog.set_level("INFO")
    schedule = {"name": "constant"}
    whole = load(tmp_path, shards, name="whole", train={"num_steps": 9}, schedule=schedule)
    assert train(whole)
    config = load(tmp_path, shards, train={"save_every": 2}, schedule=schedule)
    assert train(config)
    checkpoints = Path(config.run_dir) / "checkpoints"
    path = checkpoints / "global_step6" / "plain_state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    caplog.clear()
    assert train(load(tmp_path, shards, "--train.num_steps", "9", train={"save_every": 2}, schedule=schedule))
    messages = [record.message for record in caplog.records]
    assert any("plain_state.pt is damaged" in text and "going back to an older checkpoint" in text for text in messages)
    assert any(text.endswith("global_step4") and text.startswith("resuming from") for text in messages)
    assert (checkpoints / "damaged-global_step6" / "plain_state.pt").is_file()
    assert losses(Path(config.run_dir)) == losses(Path(whole.run_dir))


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_milestones_are_kept(tmp_path: Path, shards: Path, asynchronous: str):
    config = load(
        *(tmp_path, shards, "--train.save_async", asynchronous),
        train={"num_steps": 9, "save_every": 1, "keep_last": 2, "keep_every": 4},
    )
    assert train(config)
    names = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert names == ["global_step4", "global_step8", "global_step9", "latest"]


def test_another_model_in_the_same_run_is_refused(tmp_path: Path, shards: Path):
    assert train(load(tmp_path, shards))
    other = load(tmp_path, shards, "--train.num_steps", "8", model={"config": {**GLA, "num_heads": 2}})
    with raises(CheckpointError, "config.json", "num_heads"):
        train(other)


def test_checkpoints_say_what_length_they_were_trained_at(tmp_path: Path, shards: Path):
    curriculum = "[{from_step: 2, seq_len: 256}]"
    config = load(tmp_path, shards, "--data.seq_len", "64", "--data.curriculum", curriculum)
    assert train(config)
    checkpoints = Path(config.run_dir) / "checkpoints"
    model = checkpoints / complete_tags(checkpoints)[0] / "model"
    longest = max(
        int(store.lengths(shard).max()) for store in [open_store(shards)] for shard in range(store.num_shards)
    )
    assert read_config(model).extra == {"train_length": min(256, longest)}
    stages, stores = config.data.stages(), config.data.open_stores()
    length = TrainedLength.of(stages, stores, carry=False)
    assert [length(0, 2), length(0, 3), length(2, 3), length(3, 3)] == [64, min(256, longest), min(256, longest), 0]
    assert TrainedLength.of(stages, stores, carry=True)(0, 1) == longest


def test_two_processes_cannot_train_into_one_run(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards)
    with claim(Path(config.run_dir)), raises(ConfigError, config.run_dir, "another process"):
        train(config)
    assert train(config), "the lock must go when its holder does"


def test_a_refused_start_leaves_nothing_behind(tmp_path: Path, shards: Path):
    with raises(CheckpointError, tmp_path / "none", "not found"):
        train(load(tmp_path, shards, model={"path": str(tmp_path / "none")}))
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, shards: Path):
    model = save_model(config_from_dict(GLA), tmp_path / "model")
    BytesTokenizer().save(model)
    assert train(load(tmp_path, shards, name="same", model={"path": str(model)}))
    manifest = json.loads((shards / "manifest.json").read_text())
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    (copy / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_hash": "0" * 32}))
    with raises(DataError, copy, "another tokenizer"):
        train(load(tmp_path, copy, name="other", model={"path": str(model)}))


@pytest.mark.parametrize("change", [["--optimizer.lr_factors", "{mix: 2.0}"], ["--optimizer.freeze", "[lm_head]"]])
def test_other_parameter_groups_are_refused_on_resume(tmp_path: Path, shards: Path, change: list[str]):
    model = {"path": str(save_model(expanded(GLA), tmp_path / "model"))}
    assert train(load(tmp_path, shards, model=model))
    with raises(CheckpointError, "optimizer.train", "optimizer.freeze"):
        train(load(tmp_path, shards, "--train.num_steps", "8", *change, model=model))


def test_the_state_of_a_run_can_be_read_while_and_after_it_runs(tmp_path: Path, shards: Path, monkeypatch):
    config = load(tmp_path, shards)
    run, step, seen = Path(config.run_dir), PlainEngine.step, []

    def look(self, **kwargs):
        seen.append(read_status(run))
        return step(self, **kwargs)

    monkeypatch.setattr(PlainEngine, "step", look)
    assert train(config)
    assert {(status.state, status.step) for status in seen} == {("running", 0)}
    assert read_status(run).state == "complete"
    explode_in(monkeypatch, set(range(1, 20)), float("nan"))
    with pytest.raises(StateXError):
        train(load(tmp_path, shards, "--train.num_steps", "12"))
    failed = read_status(run)
    assert (failed.state, failed.exit_code, failed.step) == ("failed", 1, 10)
    assert "nan at step 10" in failed.message


def test_random_states_go_on(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards)
    torch.manual_seed(5)
    assert train(config)
    expected = torch.rand(3)
    torch.manual_seed(6)
    assert train(load(tmp_path, shards))
    assert torch.equal(torch.rand(3), expected)


def test_a_copy_for_this_number_of_ranks_comes_first_and_a_damaged_one_is_set_aside(tmp_path: Path, shards: Path):
    config = load(tmp_path, shards, train={"save_every": 3})
    assert train(config)
    checkpoints = Path(config.run_dir) / "checkpoints"
    original, copy = checkpoints / "global_step6", checkpoints / "global_step6-ranks1"
    shutil.copytree(original, copy)
    (copy / "plain_state.pt").write_bytes(b"x" * (copy / "plain_state.pt").stat().st_size)
    manifest = Manifest.read(original)
    dataclasses.replace(manifest, info={**manifest.info, "world_size": 2}).write(original)
    assert train(load(tmp_path, shards, "--train.num_steps", "7", train={"save_every": 3}))
    assert len(losses(Path(config.run_dir))) == 7
    assert (checkpoints / "damaged-global_step6-ranks1").is_dir()


def test_a_file_system_that_is_away_costs_no_checkpoint(tmp_path: Path, shards: Path, monkeypatch):
    config = load(tmp_path, shards, train={"save_every": 3})
    assert train(config)
    monkeypatch.setattr("statex_dist.engine.checkpoints._READ_PAUSE_SECONDS", 0)
    check, calls = FileRecord.check, []

    def away(self, path: Path) -> None:
        calls.append(path)
        if len(calls) <= failures:
            raise OSError(116, "Stale file handle")
        check(self, path)

    monkeypatch.setattr(FileRecord, "check", away)
    failures = 100
    with raises(CheckpointError, "cannot be read", "Stale file handle"):
        train(load(tmp_path, shards, "--train.num_steps", "7"))
    assert complete_tags(Path(config.run_dir) / "checkpoints") == ["global_step6", "global_step3"]
    failures = len(calls) + 1
    assert train(load(tmp_path, shards, "--train.num_steps", "7"))


def test_a_save_that_is_being_written_is_finished_when_the_run_ends_badly(tmp_path: Path, shards: Path, monkeypatch):
    arguments = ["--guard.max_skipped", "0", "--train.save_async", "true"]
    config = load(tmp_path, shards, *arguments, train={"save_every": 1})
    explode_in(monkeypatch, {4}, float("nan"))
    with pytest.raises(StateXError, match="at step 4"):
        train(config)
    tags = complete_tags(Path(config.run_dir) / "checkpoints")
    assert tags == ["global_step4", "global_step3", "global_step2"], "keep_last of 2, beside the one after a bad step"


def test_figures_that_cannot_be_written_do_not_end_the_run(tmp_path: Path, shards: Path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("statex_dist.train.metrics.os.write", full)
    assert train(load(tmp_path, shards))
    warnings = [record.message for record in caplog.records if "has gaps from here on" in record.message]
    assert len(warnings) == 1, "said once"


def test_the_observed_state_is_that_of_the_last_document_not_of_padding():
    model = RecurrentLM(expanded(GLA))
    model.init_parameters(0)
    found = []
    for padding in (0, 3):
        ids = torch.arange(20).remainder(250).unsqueeze(0)
        labels = torch.cat([ids[:, 1:], ids.new_full((1, 1), -100)], dim=1)
        borders = [0, 8, 20] + ([20 + padding] if padding else [])
        batch = PackedBatch(
            input_ids=torch.nn.functional.pad(ids, (0, padding)),
            labels=torch.nn.functional.pad(labels, (0, padding), value=-100),
            position_ids=torch.zeros(1, 20 + padding, dtype=torch.long),
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            seq_idx=torch.repeat_interleave(torch.arange(len(borders) - 1), torch.tensor(borders).diff())[None].int(),
        )
        carried = CarriedStates()
        carried.forward_loss(model, batch, 0, torch.device("cpu"), observe=True)
        found.append(torch.stack(carried.observed))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_save_after_bad_steps_does_not_replace_the_last_sound_one(
    tmp_path: Path, shards: Path, monkeypatch, asynchronous: str
):
    """The weights of the last good step may be what makes every later one bad."""
    arguments = ["--guard.max_skipped", "1", "--train.save_async", asynchronous]
    config = load(tmp_path, shards, *arguments, train={"save_every": 1, "keep_last": 1, "num_steps": 10})
    checkpoints = Path(config.run_dir) / "checkpoints"
    with monkeypatch.context() as patch:
        explode_in(patch, set(range(4, 10)), float("nan"))
        for step in (5, 7, 9):  # the same command again and again, as a shell's loop would
            with pytest.raises(StateXError, match=f"at step {step}"):
                train(config)
            assert complete_tags(checkpoints) == [f"global_step{step}", "global_step3"]
            status = read_status(Path(config.run_dir))
            assert status is not None
            assert (status.state, status.step, status.restart) == ("failed", step, False)
    assert train(config)
    assert complete_tags(checkpoints) == ["global_step10"]
    assert [record["step"] for record in read_metrics(Path(config.run_dir))] == list(range(1, 11))


def test_a_write_that_fails_names_path_and_remedy(tmp_path: Path):
    """torch says ``unexpected pos`` of a full disk."""
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    path.symlink_to("/dev/full")
    writer = FileWriter([(path, {"x": torch.zeros(1 << 16)})], tmp_path, rank=0, retries=0)
    writer.run()
    assert writer.problem == (
        f"checkpoint file of rank 0 cannot be written: {path}: No space left on device; free space there, or choose "
        "another place"
    )
    assert Path("/dev/full").exists()
    assert not path.is_symlink()


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_looks_at_its_own_files_only_however_many_ranks_there_are(tmp_path: Path, monkeypatch, rank: int):
    names = [
        f"zero_pp_rank_{other}_mp_rank_00_{kind}_states.pt" for other in range(4096) for kind in ("model", "optim")
    ]
    for name in names:
        (tmp_path / name).touch()
    looked, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: looked.append(self.name) or is_file(self))
    mine = [(tmp_path / name, {"x": 1}) for name in names if f"rank_{rank}_mp" in name]
    writer = FileWriter(mine, tmp_path, rank=rank, retries=0)
    writer.run()
    assert writer.problem is None
    assert sorted(writer.records) == [path.name for path, _ in mine]
    assert len(looked) <= 2 * len(mine)

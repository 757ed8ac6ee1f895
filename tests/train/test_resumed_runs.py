"""A run's files after kills and resumes: records, checkpoints, training length, settings of its steps."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint.history import read_history
from statex_dist.checkpoint.layout import complete_tags
from statex_dist.checkpoint.manifest import Manifest
from statex_dist.config import parse_config
from statex_dist.data.forecast import TrainedLength
from statex_dist.data.mixture import Stage
from statex_dist.distributed.ranks import Ranks
from statex_dist.engine import checkpoints as saving
from statex_dist.engine.plain import PlainEngine
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.registry import config_from_dict, read_config
from statex_dist.run import train
from statex_dist.run_config import RunConfig
from statex_dist.train.metrics import MetricsFile, read_metrics
from statex_dist.train.shared_dir import require_shared
from tests.raising import raises
from tests.runs import GLA, losses, make_shards, save_model, write_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def load(directory: Path, shards: Path, *arguments: str, name: str = "run", **sections) -> RunConfig:
    sections.setdefault("model", {"config": {**GLA, "num_hidden_layers": 1}})
    file = write_run(directory / f"{name}.yaml", data={"path": str(shards)}, engine={"name": "plain"}, **sections)
    return parse_config(RunConfig, ["--config", str(file), *arguments], prog="train.py")


def newest(run: Path) -> Path:
    return run / "checkpoints" / complete_tags(run / "checkpoints")[0]


class _Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize(
    ("point", "asynchronous"),
    [("prune", "false"), ("prune", "true"), ("commit_directory", "true"), ("post_step", "false")],
)
def test_a_saved_step_has_its_record_whenever_the_run_ends(
    tmp_path: Path, shards: Path, monkeypatch, point: str, asynchronous: str
):
    section = {"num_steps": 8, "save_every": 1, "keep_last": 2}
    whole = load(tmp_path, shards, name="whole", train=section)
    assert train(whole)
    config = load(tmp_path, shards, "--train.save_async", asynchronous, train=section)
    run, calls = Path(config.run_dir), []

    def die(*_):
        calls.append(1)
        if len(calls) == 4:
            raise _Killed

    if point == "post_step":
        report = MetricsFile.post_step
        monkeypatch.setattr(MetricsFile, "post_step", lambda *args: (report(*args), die()))
    else:
        act = getattr(saving, point)
        monkeypatch.setattr(saving, point, lambda *args: (act(*args), die()))
    with pytest.raises(_Killed):
        train(config)
    monkeypatch.undo()
    saved = int(newest(run).name.removeprefix("global_step"))
    assert [record["step"] for record in read_metrics(run)][:saved] == list(range(1, saved + 1))
    assert train(config)
    assert losses(run) == losses(Path(whole.run_dir))
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 9))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["global_step7", "global_step8", "latest"]


def test_what_a_save_costs_is_in_the_next_record_and_the_seconds_are_those_of_the_run(
    tmp_path: Path, shards: Path, monkeypatch
):
    save = saving.Checkpoints.save
    clock = iter(range(10_000))
    for module in ("loop", "mfu"):
        patched = SimpleNamespace(perf_counter=lambda: float(next(clock)))
        monkeypatch.setattr(f"statex_dist.train.{module}.time", patched)

    def slow(self, *args, **options):
        save(self, *args, **options)
        for _ in range(100):
            next(clock)

    monkeypatch.setattr(saving.Checkpoints, "save", slow)
    config = load(tmp_path, shards, train={"num_steps": 5, "save_every": 2})
    assert train(config)
    records = read_metrics(Path(config.run_dir))
    assert [record["time"]["save"] > 100 for record in records] == [False, False, True, False, True]
    assert [record["seconds"] > 100 for record in records] == [False, False, True, False, True]


@pytest.mark.parametrize("num_steps", [6, 7])
def test_as_many_checkpoints_are_kept_as_said_also_after_a_kill_before_the_older_ones_go(
    tmp_path: Path, shards: Path, num_steps: int
):
    assert train(load(tmp_path, shards, train={"save_every": 1, "keep_last": 6}))
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    for leftover in (".tmp-global_step7", ".tmp-delete-global_step1", ".probe-0123"):
        (checkpoints / leftover).mkdir()
        (checkpoints / leftover / "half.pt").write_bytes(b"half")
    for leftover in (checkpoints / ".tmp-latest", run / ".tmp-metrics.jsonl", run / ".tmp-config.yaml"):
        leftover.write_text("half")
    again = load(tmp_path, shards, train={"save_every": 1, "keep_last": 2, "num_steps": num_steps})
    assert train(again)
    kept = [f"global_step{step}" for step in (num_steps - 1, num_steps)]
    assert sorted(path.name for path in checkpoints.iterdir()) == [*kept, "latest"]
    assert not list(run.glob(".tmp-*"))


def test_milestones_stay_when_a_start_prunes(tmp_path: Path, shards: Path):
    section = {"save_every": 1, "keep_last": 6, "keep_every": 3}
    assert train(load(tmp_path, shards, train=section))
    assert train(load(tmp_path, shards, train={**section, "keep_last": 1}))
    assert complete_tags(tmp_path / "run" / "checkpoints") == ["global_step6", "global_step3"]


def test_the_training_length_never_shrinks_without_a_word(tmp_path: Path, shards: Path, caplog):
    caplog.set_level(logging.INFO)
    assert train(load(tmp_path, shards, "--data.seq_len", "128"))
    run = tmp_path / "run"
    assert read_config(newest(run) / "model").extra["train_length"] == 128
    assert train(load(tmp_path, shards, "--data.seq_len", "64", "--train.num_steps", "7"))
    assert read_config(newest(run) / "model").extra["train_length"] == 128
    assert "train_length stays 128" in caplog.text
    assert "at most 64" in caplog.text
    # A new run from that checkpoint, and from a model directory.
    for name, source in (("tag", newest(run)), ("model", tmp_path / "exported")):
        if name == "model":
            reshard(newest(run), source)
        model = {"path": str(source)}
        assert train(load(tmp_path, shards, "--data.seq_len", "64", name=name, model=model, train={"num_steps": 2}))
        assert read_config(newest(tmp_path / name) / "model").extra["train_length"] == 128
    assert train(load(tmp_path, shards, "--data.seq_len", "140", "--train.num_steps", "8"))
    assert read_config(newest(run) / "model").extra["train_length"] == 140


def test_a_stage_that_was_not_reached_is_no_training_length(tmp_path: Path, shards: Path):
    stages = "[{from_step: 2, seq_len: 64}, {from_step: 5, seq_len: 128}]"
    arguments = ["--data.seq_len", "32", "--data.curriculum", stages]
    assert train(load(tmp_path, shards, *arguments, train={"save_every": 1, "keep_last": 9}))
    lengths = {
        path.name: json.loads((path / "model" / "config.json").read_text())["train_length"]
        for path in (tmp_path / "run" / "checkpoints").glob("global_step*")
    }
    assert lengths == {f"global_step{n}": length for n, length in enumerate((32, 32, 64, 64, 64, 128), start=1)}


def test_trained_lengths_are_those_of_the_sources_and_stages_in_between():
    stages = [
        Stage(seq_len=100, weights={"a": 1.0, "b": 0.0}),
        Stage(from_step=3, seq_len=200, weights={"b": 1.0}),
        Stage(from_step=5, seq_len=300),
    ]
    length = TrainedLength(stages=stages, longest={"a": 50, "b": 1000}, carry=False)
    expected = {(0, 0): 0, (0, 3): 50, (0, 4): 200, (3, 4): 200, (4, 5): 200, (4, 6): 300, (5, 5): 0, (6, 9): 300}
    assert {steps: length(*steps) for steps in expected} == expected
    carried = TrainedLength(stages=stages, longest={"a": 50, "b": 1000}, carry=True)
    assert [carried(0, 1), carried(0, 4)] == [50, 1000]


@pytest.mark.parametrize("value", ["128", True, -1, 1.5])
def test_a_training_length_that_is_none_is_named(tmp_path: Path, shards: Path, caplog, value):
    model = save_model(config_from_dict({**GLA, "num_hidden_layers": 1}), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "train_length": value}))
    assert train(load(tmp_path, shards, "--model.check_digests", "false", model={"path": str(model)}))
    assert f"train_length is {value!r} in config.json" in caplog.text
    assert read_config(newest(tmp_path / "run") / "model").extra["train_length"] == 128


def card(source: Path, target: Path) -> str:
    reshard(source, target)
    return (target / "README.md").read_text()


def test_a_card_tells_the_settings_of_the_checkpoints_own_steps(tmp_path: Path, shards: Path, caplog):
    caplog.set_level(logging.INFO)
    model = save_model(config_from_dict({**GLA, "num_hidden_layers": 1}), tmp_path / "first-model")
    section = {"save_every": 3, "keep_last": 9}
    assert train(load(tmp_path, shards, model={"path": str(model)}, train=section))
    run = tmp_path / "run"
    shutil.copytree(model, tmp_path / "second-model")
    changed = ["--optimizer.lr", "0.001", "--data.seq_len", "64", "--train.num_steps", "9"]
    other = {"path": str(tmp_path / "second-model")}
    assert train(load(tmp_path, shards, *changed, model=other, train=section))
    assert "settings differ" in caplog.text
    assert "optimizer.lr 0.01 -> 0.001" in caplog.text
    kept = yaml.safe_load((run / "config-until-step6.yaml").read_text())
    now = yaml.safe_load((run / "config.yaml").read_text())
    assert [values["optimizer"]["lr"] for values in (kept, now)] == [0.01, 0.001]

    old, new = (run / "checkpoints" / f"global_step{step}" for step in (6, 9))
    spans = [(span.first_step, span.last_step, span.settings["optimizer"]["lr"]) for span in read_history(new)]
    assert spans == [(1, 6, 0.01), (7, 9, 0.001)]
    assert [span.last_step for span in read_history(old)] == [6]
    told = card(old, tmp_path / "old")
    assert "| peak learning rate (AdamW) | 0.01 |" in told
    assert "| tokens of a packed sequence | 128 |" in told
    assert "| optimizer steps | 6 |" in told
    told = card(new, tmp_path / "new")
    assert "| peak learning rate (AdamW) | 0.01 (steps 1 to 6), 0.001 (steps 7 to 9) |" in told
    assert "| tokens of a packed sequence | 128 (steps 1 to 6), 64 (steps 7 to 9) |" in told
    assert "| seed | 0 |" in told
    base = re.search(r"Base model: `(.*)`", told)
    assert base is not None
    assert base[1].endswith("first-model")

    # A checkpoint that was copied out of its run knows its steps, one of an earlier release does not.
    copied = shutil.copytree(new, tmp_path / "copied")
    told = card(copied, tmp_path / "from-copy")
    assert "| peak learning rate (AdamW) | 0.01 (steps 1 to 6), 0.001 (steps 7 to 9) |" in told
    assert ", step 9 of a training run" in told
    (new / "training.json").unlink()
    manifest = Manifest.read(new)
    files = {name: record for name, record in manifest.files.items() if name != "training.json"}
    dataclasses.replace(manifest, files=files).write(new)
    told = card(new, tmp_path / "early")
    assert "| peak learning rate (AdamW) | 0.001 |" in told
    assert "| these settings | of the run's last start" in told


def test_equal_settings_lengthen_the_last_span(tmp_path: Path, shards: Path, monkeypatch):
    config = load(tmp_path, shards, train={"save_every": 2, "keep_last": 9})
    step, calls = PlainEngine.step, []

    def die(self, **options):
        calls.append(1)
        if len(calls) == 4:
            raise _Killed
        return step(self, **options)

    monkeypatch.setattr(PlainEngine, "step", die)
    with pytest.raises(_Killed):
        train(config)
    assert train(config)
    assert [(span.first_step, span.last_step) for span in read_history(newest(tmp_path / "run"))] == [(1, 6)]
    assert not list((tmp_path / "run").glob("config-until-*"))


def test_another_directory_under_the_runs_name_is_not_saved_into(tmp_path: Path, shards: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    config = load(tmp_path, shards, train={"save_every": 1, "keep_last": 3, "num_steps": 9})
    run, away, step, calls = tmp_path / "run", tmp_path / "away", PlainEngine.step, []

    def unmount(self, **options):
        calls.append(1)
        if len(calls) == 3:
            run.rename(away)
            (run / "checkpoints").mkdir(parents=True)
        return step(self, **options)

    monkeypatch.setattr(PlainEngine, "step", unmount)
    with raises(CheckpointError, run, "run began"):
        train(config)
    assert "global_step3" not in " ".join(line for line in caplog.text.splitlines() if " saved " in line)
    assert not list((run / "checkpoints").iterdir())
    assert complete_tags(away / "checkpoints") == ["global_step2", "global_step1"]
    shutil.rmtree(run)
    away.rename(run)
    monkeypatch.undo()
    assert train(config)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 10))


def test_a_copy_on_a_neighbour_needs_disks_of_the_hosts_own(tmp_path: Path, shards: Path):
    with raises(ConfigError, "train.neighbor_copy", "train.shared_run_dir"):
        load(tmp_path, shards, "--train.neighbor_copy", "true")


def test_one_process_resumes_on_its_own_disk_and_does_not_take_a_part_for_the_whole(tmp_path: Path, shards: Path):
    own = ["--train.shared_run_dir", "false"]
    config = load(tmp_path, shards, *own)
    assert train(config)
    assert train(load(tmp_path, shards, "--train.num_steps", "8", *own))
    checkpoints = Path(config.run_dir) / "checkpoints"
    newest = checkpoints / complete_tags(checkpoints)[0]
    manifest = Manifest.read(newest)
    assert manifest.info["disk"]["ranks"] == [0]
    dataclasses.replace(manifest, info={**manifest.info, "world_size": 2}).write(newest)
    with raises(CheckpointError, newest, "train.shared_run_dir false"):
        train(load(tmp_path, shards, "--train.num_steps", "9"))


def test_the_probe_leaves_nothing_and_says_what_is_in_the_way(tmp_path: Path):
    require_shared(tmp_path / "a" / "b", Ranks(0, 1))
    assert not list(tmp_path.iterdir())
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    require_shared(tmp_path / "run", Ranks(0, 1))
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "checkpoints"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir .*file .*: (File exists|Not a directory)"):
        require_shared(tmp_path / "file", Ranks(0, 1))

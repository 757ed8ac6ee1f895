"""Torch distributed checkpoints as other trainers save them (written by torch): the model in them, and nothing else."""

import json
import pickle
import shutil
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from transformers import Mamba2Config, Mamba2ForCausalLM

from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.inspect import inspect
from checkpoints_tools.verify.verify import verify_expansion
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import load_all, run_expand
from tests.raising import raises

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

CONFIG = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 6},
    **{"n_groups": 1, "chunk_size": 8, "tie_word_embeddings": False},
}


class Run:
    """A model after one step of AdamW, and its training state in the forms in which trainers save it."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Mamba2ForCausalLM(Mamba2Config(**CONFIG))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        ids = torch.arange(18).view(2, 9)
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def flat_optimizer(self) -> dict[str, object]:
        """``state.NAME.exp_avg``: torchtitan's, which torch itself flattens for it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def rest(self) -> dict[str, object]:
        """What torchtitan and flame save beside model and optimizer (flame/components/checkpoint.py)."""
        losses = BytesIO()
        torch.save([1.5], losses)
        return {
            "train_state": {
                **{"step": torch.tensor(3, dtype=torch.int32), "token": torch.tensor(300), "elapsed": timedelta(1)},
                "global_avg_losses": losses,
            },
            "dataloader": {"rank_0": pickle.dumps({"epoch": 1})},
            "lr_scheduler": {"last_epoch": 3, "lr_lambdas": [{}]},
        }


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


FORMS = {
    "flame": lambda r: {"model": r.tensors, "optimizer": r.flat_optimizer(), **r.rest()},
    "torchtitan": lambda r: {**r.tensors, "optimizer": r.flat_optimizer(), **r.rest()},
    "nested optimizer": lambda r: {"model": r.tensors, "optimizer": r.optimizer.state_dict(), **r.rest()},
    "by name": lambda r: {"model": r.tensors, "optim": get_optimizer_state_dict(r.model, r.optimizer)},
    "application": lambda r: {"app": {"model": r.tensors, "optim": r.optimizer.state_dict()}},
    "one level": lambda r: {**r.tensors, **r.optimizer.state_dict()},
    "joined": lambda r: (
        {f"model.{n}": t for n, t in r.tensors.items()} | {f"optimizer.{n}": v for n, v in r.flat_optimizer().items()}
    ),
    "lightning": lambda r: {
        "state_dict": {f"model.{n}": t for n, t in r.tensors.items()},
        **{"optimizer_0": r.optimizer.state_dict(), "epoch": 1, "global_step": 3, "callbacks": {"x": {"best": 1.0}}},
    },
    "seed": lambda r: {"model": r.tensors},
}


def save(run: Run, form: str, directory: Path) -> Path:
    dcp.save(FORMS[form](run), checkpoint_id=directory, no_dist=True)
    return directory


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "bare"])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_alone_is_read(run, tmp_path, form, with_config):
    directory = save(run, form, tmp_path / "run/checkpoint/step-3")
    if with_config:
        run.model.config.save_pretrained(directory)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    facts = inspect(directory)
    assert (facts.kind, facts.step, facts.parameters, facts.complete) == ("megatron", 3, parameters, True)
    assert facts.tensors == len(run.tensors)
    summary = reshard(directory, tmp_path / "out")
    assert summary.parameters == parameters
    assert same(load_all(tmp_path / "out"), run.tensors)
    entries = len(dcp.FileSystemReader(directory).read_metadata().state_dict_metadata)
    left_out = entries - len(run.tensors)
    notes = [f"{left_out:,} entries that are not the model's"] if left_out else []
    assert [note[: len(text)] for note, text in zip(summary.source_notes, notes, strict=True)] == notes
    assert summary.source_notes == facts.notes
    assert all("optimizer" in note for note in facts.notes)
    if with_config:
        ids = torch.arange(15)[None]
        written = Mamba2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(written(input_ids=ids).logits, run.model(input_ids=ids).logits)


@pytest.mark.parametrize("given", ["", "checkpoint", "checkpoint/step-3"])
def test_flames_run_directory(run, tmp_path, given):
    """``train.sh`` copies its repository into the run; the conversion at the end adds config and tokenizer."""
    root = tmp_path / "run"
    save(run, "seed", root / "checkpoint/step-1")
    save(run, "flame", root / "checkpoint/step-3")
    (root / "checkpoint/step-4").mkdir()  # killed while it was written
    run.model.config.save_pretrained(root)
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "BytesTokenizer"}')
    for name in ("setup.py", "LICENSE", "train.sh"):
        (root / name).write_text("flame's own")
    assert inspect(root / given).model_type == "mamba2"
    source = open_source(root / given)
    assert source.facts.path == root / "checkpoint/step-3"
    assert source.facts.model_dir == root
    reshard(root / given, tmp_path / "out")
    assert same(load_all(tmp_path / "out"), run.tensors)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer_config.json"} <= names
    assert not {"setup.py", "LICENSE", "train.sh"} & names
    run_expand(root / given, tmp_path / "expanded", layers="0", factor=2, init="lossless")
    assert verify_expansion(root / given, tmp_path / "expanded").differences == []


def flames_configs(run: Run, root: Path, **changes) -> None:
    """Write ``RUN/configs`` as train.sh leaves it: configs of many models, one of which was trained."""
    values = json.loads(run.model.config.to_json_string(use_diff=False))
    (root / "configs").mkdir()
    for name, change in (
        ("mamba2_tiny", changes),
        ("mamba2_large", {"hidden_size": 32}),
        ("llama", {"model_type": "llama"}),
    ):
        (root / f"configs/{name}.json").write_text(json.dumps({**values, **change}))
    (root / "configs/notes.json").write_text("[1, 2")


@pytest.mark.parametrize("vocab_size", [40, 30])
def test_the_config_of_a_run_that_was_not_converted(run, tmp_path, vocab_size):
    """flame enlarges the vocabulary to that of the tokenizer, so the file may have a smaller one."""
    root = tmp_path / "run"
    save(run, "flame", root / "checkpoint/step-3")
    flames_configs(run, root, vocab_size=vocab_size)
    facts = inspect(root)
    assert (facts.model_type, facts.complete) == ("mamba2", True)
    assert any("configs/mamba2_tiny.json" in note for note in facts.notes)
    assert any("vocab_size" in note for note in facts.notes) == (vocab_size != 40)
    reshard(root, tmp_path / "out")
    ids = torch.arange(15)[None]
    written = Mamba2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(written(input_ids=ids).logits, run.model(input_ids=ids).logits)
    run_expand(root, tmp_path / "expanded", layers="0", factor=2, init="lossless")
    assert verify_expansion(root, tmp_path / "expanded").differences == []


def test_two_configs_that_fit_are_named(run, tmp_path):
    root = tmp_path / "run"
    save(run, "flame", root / "checkpoint/step-3")
    flames_configs(run, root)
    values = json.loads((root / "configs/mamba2_tiny.json").read_text())
    (root / "configs/same.json").write_text(json.dumps(values))
    assert inspect(root).model_type == "mamba2"
    (root / "configs/other.json").write_text(json.dumps({**values, "layer_norm_epsilon": 0.1}))
    with pytest.raises(CheckpointError, match=r"mamba2_tiny\.json.*other\.json.*config\.json") as error:
        reshard(root, tmp_path / "out")
    assert len(str(error.value).replace(str(tmp_path), "")) <= 300


def test_a_converted_model_in_the_run_directory_is_read_itself(run, tmp_path):
    save(run, "flame", tmp_path / "run/checkpoint/step-3")
    run.model.save_pretrained(tmp_path / "run")
    assert open_source(tmp_path / "run").facts.kind == "hf"
    assert open_source(tmp_path / "run/checkpoint/step-3").facts.kind == "megatron"


@pytest.mark.parametrize("form", ["optimizer", "bare"])
def test_an_optimizer_alone_is_no_model(run, tmp_path, form):
    states = run.optimizer.state_dict() if form == "bare" else {"optimizer": run.flat_optimizer()}
    dcp.save(states, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    with raises(CheckpointError, tmp_path / "optimizer_0", "no tensor"):
        reshard(tmp_path / "optimizer_0", tmp_path / "out")
    assert not inspect(tmp_path / "optimizer_0").complete


def test_sharded_fsdp_of_trainer(run, tmp_path):
    """accelerate writes model and optimizer to directories of their own, with one key each."""
    checkpoint = tmp_path / "run/checkpoint-2"
    dcp.save({"model": run.tensors}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": run.flat_optimizer()}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    run.model.config.save_pretrained(checkpoint)
    for given in (tmp_path / "run", checkpoint, checkpoint / "pytorch_model_fsdp_0"):
        assert inspect(given).model_type == "mamba2"
    reshard(tmp_path / "run", tmp_path / "out")
    assert same(load_all(tmp_path / "out"), run.tensors)


def test_damaged_optimizer_entries_do_not_matter_but_weights_do(run, tmp_path):
    directory = save(run, "flame", tmp_path / "dcp")
    places = dcp.FileSystemReader(directory).read_metadata().storage_data
    file = directory / "__0_0.distcp"

    def zero(name: str) -> None:
        place = next(place for index, place in places.items() if index.fqn == name)
        content = bytearray(file.read_bytes())
        content[place.offset : place.offset + place.length] = bytes(place.length)
        file.write_bytes(content)

    name = "backbone.norm_f.weight"
    zero(f"optimizer.state.{name}.exp_avg")
    reshard(directory, tmp_path / "out")
    zero(f"model.{name}")
    with pytest.raises(CheckpointError, match=name):
        reshard(directory, tmp_path / "other")


@pytest.mark.parametrize("given", ["", "iter_0000010"])
@pytest.mark.parametrize("beside", ["", "iter_0000010"])
def test_megatrons_run_directory(run, tmp_path, given, beside):
    """Megatron-LM keeps the number of the last iteration in a file; config.json may lie at either level."""
    run.model.save_pretrained(tmp_path / "hf")
    root = tmp_path / "run"
    reshard(tmp_path / "hf", root / "iter_0000010", to="megatron")
    shutil.copytree(root / "iter_0000010", root / "iter_0000020")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    config = json.loads((root / "iter_0000010/config.json").read_text())
    (root / "iter_0000010/config.json").unlink()
    (root / "iter_0000010/MANIFEST.json").unlink()
    (root / beside / "config.json").write_text(json.dumps(config))
    assert inspect(root / given).path == str(root / "iter_0000010")
    reshard(root / given, tmp_path / "out")
    assert same(load_all(tmp_path / "out"), run.tensors)


def test_a_flat_optimizer_of_megatron_without_a_config(run, tmp_path):
    """The distributed optimizer's entries begin with ``optimizer.`` or ``chained_0.``, beside the model's."""
    weights = {"embedding.word_embeddings.weight": torch.randn(4, 3), "decoder.final_norm.weight": torch.ones(3)}
    states = {
        f"{prefix}.state.{value}.{name}": torch.ones_like(tensor)
        for prefix in ("optimizer", "chained_0.optimizer")
        for value in ("exp_avg", "exp_avg_sq", "fp32_param")
        for name, tensor in weights.items()
    }
    dcp.save({**weights, **states}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert reshard(tmp_path / "dcp", tmp_path / "out").parameters == 15
    assert same(load_all(tmp_path / "out"), weights)

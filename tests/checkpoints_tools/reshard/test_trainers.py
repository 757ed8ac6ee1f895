"""Checkpoints of Trainer with DeepSpeed, real ones of transformers' own Mamba2: what is read, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Mamba2ForCausalLM

from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.inspect import inspect
from statex_dist.errors import CheckpointError
from statex_dist.models.source import open_source
from tests.checkpoints_tools.builders import load_all, read_tensor
from tests.raising import raises

pytestmark = pytest.mark.distributed

TRAINED = {"backbone.norm_f.weight", "backbone.layers.1.mixer.out_proj.weight"}
"""What train_trainers.py does not freeze in the run of that name."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Real runs of two ranks: ``gathered/``, ``stage2/`` and ``frozen/``, each with ``checkpoint-2``."""
    directory = tmp_path_factory.mktemp("trainers")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("train_trainers.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(directory)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.fixture
def copy(runs, tmp_path):
    """Return a copy of a run's checkpoint, to change."""

    def make(name: str) -> Path:
        shutil.copytree(runs / name / "checkpoint-2", tmp_path / "checkpoint-2")
        return tmp_path / "checkpoint-2"

    return make


def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 weights as DeepSpeed's own converter gives them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))


def logits(model: Mamba2ForCausalLM) -> torch.Tensor:
    ids = torch.arange(20)[None] % 40
    with torch.no_grad():
        return model.eval().float()(input_ids=ids).logits


@pytest.mark.parametrize("given", ["", "checkpoint-2", "checkpoint-2/global_step2"])
def test_the_tag_wins_over_its_rounded_copy(runs, tmp_path, given):
    checkpoint = runs / "gathered/checkpoint-2"
    facts = inspect(runs / "gathered" / given)
    assert (facts.kind, facts.model_type, facts.step, facts.complete) == ("zero3", "mamba2", 2, True)
    expected = masters(checkpoint)
    model = Mamba2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    summary = reshard(runs / "gathered" / given, tmp_path / "out")
    assert summary.parameters == facts.parameters
    assert any("model.safetensors" in note and "global_step2" in note for note in summary.source_notes)
    for name, tensor in load_all(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name]), name
    model.load_state_dict(expected)
    written = Mamba2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(written), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("w3") == ["w3"]
    assert not list((tmp_path / "out").glob("*.py"))


def test_optimizer_states_and_step_go_to_another_number_of_ranks(runs, tmp_path):
    checkpoint = runs / "gathered/checkpoint-2"
    summary = reshard(checkpoint, tmp_path / "out", to="zero3", world_size=3)
    assert summary.states == ["exp_avg", "exp_avg_sq"]
    assert any("trainer_state.json" in note for note in summary.notes)
    before, after = open_source(checkpoint), open_source(tmp_path / "out")
    assert (after.facts.info["step"], after.facts.info["world_size"]) == (2, 3)
    assert after.facts.model_dir is not None
    for state in (None, "exp_avg", "exp_avg_sq"):
        first, second = before.of_state(state), after.of_state(state)
        for name in first.owned():
            assert torch.equal(read_tensor(first, name), read_tensor(second, name)), (state, name)
    assert any(read_tensor(after.of_state("exp_avg"), name).any() for name in after.of_state("exp_avg").owned())
    expected = masters(checkpoint)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in masters(tmp_path / "out").items())


def test_empty_placeholders(copy, tmp_path):
    checkpoint = copy("gathered")
    path = checkpoint / "model.safetensors"
    empty = {name: torch.empty(0, dtype=t.dtype) if t.ndim > 1 else t for name, t in load_file(path).items()}
    save_file(empty, path, metadata={"format": "pt"})
    summary = reshard(checkpoint, tmp_path / "out", to="zero3", world_size=1)
    assert summary.states
    assert any("empty placeholders" in note for note in summary.source_notes)
    reshard(checkpoint, tmp_path / "hf")
    expected = masters(checkpoint)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_all(tmp_path / "hf").items())


def test_a_state_dict_of_torch_beside_the_tag(copy, tmp_path):
    checkpoint = copy("gathered")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    summary = reshard(checkpoint, tmp_path / "out", to="zero3", world_size=2)
    assert summary.kind == "zero3"
    assert any("pytorch_model.bin" in note for note in summary.source_notes)


def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "backbone.norm_f.weight"
    values = tensors[name].clone()
    values[-1] += 0.5
    return {**tensors, name: values}


def more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "extra.weight": torch.ones(3)}


def reshaped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "backbone.norm_f.weight": torch.ones(15)}


@pytest.mark.parametrize(("change", "name"), [(changed, "norm_f"), (more, "extra.weight"), (reshaped, "norm_f")])
@pytest.mark.parametrize("to", ["hf", "zero3"])
def test_another_model_beside_the_tag_is_refused(copy, tmp_path, change, name, to):
    checkpoint = copy("gathered")
    path = checkpoint / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    for given in (checkpoint, checkpoint / "global_step2"):
        with pytest.raises(CheckpointError) as error:
            reshard(given, tmp_path / "out", to=to)
        text = str(error.value).replace(str(checkpoint), "")
        assert all(word in text for word in ("model.safetensors", "global_step2", name))
        assert len(text) <= 300
    assert not (tmp_path / "out").exists()


def test_weights_beside_another_tag_are_not_compared(copy, tmp_path):
    checkpoint = copy("gathered")
    path = checkpoint / "model.safetensors"
    save_file(changed(load_file(path)), path, metadata={"format": "pt"})
    shutil.copytree(checkpoint / "global_step2", checkpoint / "global_step4")
    (checkpoint / "latest").write_text("global_step4")
    assert reshard(checkpoint / "global_step2", tmp_path / "out").kind == "zero3"
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* global_step4"):
        reshard(checkpoint, tmp_path / "other")


def test_a_pipe_in_a_tag_is_refused(copy):
    path = copy("gathered") / "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=path.name):
        open_source(path.parent.parent)


@pytest.mark.parametrize("latest", [None, "global_step9"])
@pytest.mark.parametrize("to", ["hf", "zero3"])
def test_a_tag_that_latest_does_not_name_is_not_dropped(copy, tmp_path, latest, to):
    checkpoint = copy("gathered")
    (checkpoint / "latest").unlink() if latest is None else (checkpoint / "latest").write_text(latest)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* global_step2"):
        reshard(checkpoint, tmp_path / "out", to=to, world_size=1 if to == "zero3" else None)
    assert reshard(checkpoint / "global_step2", tmp_path / "out", to=to).kind == "zero3"


def test_weights_without_their_tag(copy, tmp_path):
    checkpoint = copy("gathered")
    shutil.rmtree(checkpoint / "global_step2")
    summary = reshard(checkpoint, tmp_path / "out")
    assert (summary.kind, summary.parameters) == ("hf", 4800)


def test_stage_2(runs, tmp_path):
    """The tag is read, as of stage 3: the weights beside it are rounded."""
    checkpoint = runs / "stage2/checkpoint-2"
    summary = reshard(checkpoint, tmp_path / "out")
    assert (summary.kind, summary.parameters) == ("zero2", 4800)
    assert any("model.safetensors beside global_step2 is a copy" in note for note in summary.source_notes)
    assert reshard(checkpoint / "global_step2", tmp_path / "tag").kind == "zero2"
    with raises(CheckpointError, "ZeRO stage 2", "optimizer states"):
        reshard(checkpoint, tmp_path / "zero3", to="zero3", world_size=2)
    facts = inspect(checkpoint / "global_step2")
    assert facts.complete
    assert facts.kind == "zero2"


def test_a_stored_tied_head_is_no_parameter(copy):
    checkpoint = copy("stage2")
    tensors = load_file(checkpoint / "model.safetensors")
    head = tensors["backbone.embeddings.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert inspect(checkpoint).parameters == 4800
    assert reshard(checkpoint, checkpoint.with_name("out")).parameters == 4800


def test_frozen_parameters_are_filled_from_the_weights_beside(runs, tmp_path):
    checkpoint = runs / "frozen/checkpoint-2"
    facts = inspect(checkpoint)
    assert (facts.complete, facts.tensors, facts.parameters) == (True, 20, 4800)
    assert any("2 of 20 tensors" in note for note in facts.notes)
    reshard(checkpoint, tmp_path / "out")
    written, gathered = load_all(tmp_path / "out"), load_file(checkpoint / "model.safetensors")
    assert set(written) == set(gathered)
    for name, tensor in gathered.items():
        assert torch.equal(written[name].to(tensor.dtype), tensor), name
        assert written[name].dtype == (torch.float32 if name in TRAINED else tensor.dtype)
    reshard(checkpoint, tmp_path / "zero3", to="zero3", world_size=3)
    again = masters(tmp_path / "zero3")
    assert set(again) == {*gathered, "lm_head.weight"}
    assert all(torch.equal(again[name], written[name].float()) for name in written)


def test_an_incomplete_model_is_not_written(copy, tmp_path):
    checkpoint = copy("frozen")
    (checkpoint / "model.safetensors").unlink()
    facts = inspect(checkpoint)
    assert not facts.complete
    assert facts.problem is not None
    assert "2 of 20" in facts.problem
    assert "backbone.embeddings.weight" in facts.problem
    for to in ("hf", "megatron"):
        with raises(CheckpointError, "backbone.embeddings.weight", "2 of 20"):
            reshard(checkpoint, tmp_path / "out", to=to)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"exclude_frozen_parameters.* 2 tensors"):
        reshard(checkpoint, tmp_path / "out")
    assert not inspect(checkpoint).complete


def test_without_frozen_parameters_to_other_ranks(copy, tmp_path):
    """The target lacks them like the source, and DeepSpeed's mark for that is kept."""
    checkpoint = copy("frozen")
    (checkpoint / "model.safetensors").unlink()
    summary = reshard(checkpoint, tmp_path / "out", to="zero3", world_size=3)
    assert (summary.tensors, summary.states) == (2, ["exp_avg", "exp_avg_sq"])
    assert any("exclude_frozen_parameters" in note for note in summary.source_notes)
    states = torch.load(tmp_path / "out/global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=True)
    assert states["frozen_param_shapes"] is None
    assert states["frozen_param_fragments"] is None
    assert json.loads((tmp_path / "out/global_step2/model/config.json").read_text())["model_type"] == "mamba2"


@pytest.mark.parametrize("name", ["x" * 300, "../evil", "a\0b", "", "."])
def test_a_latest_that_names_no_tag(copy, tmp_path, name):
    checkpoint = copy("gathered")
    (checkpoint / "latest").write_text(name)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="latest names"):
        open_source(checkpoint)

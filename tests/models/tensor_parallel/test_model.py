"""Tensor parallelism on real gloo ranks: logits are those of one process, and parts have the promised size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoints_tools.reshard.reshard import reshard
from statex_dist.checkpoint.formats.tensor_parallel import LAYOUT_NAME, file_name
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.errors import ConfigError, StateXError
from statex_dist.models.hf import save_pretrained
from statex_dist.models.layout import shard_ranges
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.mitigation import parse_mitigation
from statex_dist.models.registry import config_from_dict, family_of
from statex_dist.models.tensor_parallel.model import TensorParallelLM, load_tensor_parallel
from statex_dist.models.tensor_parallel.norms import SplitGatedRMSNorm
from statex_dist.models.tensor_parallel.share import TensorShare
from tests.distributed_test import run_distributed_test
from tests.models.hybrid.hosts import save_host
from tests.models.test_tensor_parallel_needs import ALL
from tests.models.tiny import HYBRIDS, build, gla_config, mamba2_config, tokens
from tests.raising import raises

RANKS = 4
STATE_SPACES = {
    **{"d_model": 16, "n_layer": 2, "vocab_size": 40, "tie_embeddings": True},
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8},
}
# Where a plan is for some layers, the others are as they were.
PLAIN = ("gla", "mamba2", "hgrn2", "retnet", "minimax", "minimax-merged-to-two", "gated_deltanet", "kda-two-key-heads")
CASES = {
    **{name: config for name, config in ALL.items() if name not in PLAIN},
    "gla-odd-vocabulary": gla_config(vocab_size=37, tie_word_embeddings=True),
    "mamba2-four-groups": mamba2_config(n_groups=4, use_bias=True),
    "state_spaces": config_from_dict(STATE_SPACES),
    "gla-attention": HYBRIDS["gla"],
    "state_spaces-attention": config_from_dict(
        {**HYBRIDS["state_spaces"].original, "d_intermediate": 20, "tie_embeddings": False}
    ),
}
MITIGATIONS = {
    "gla-merged": ("forget-more", "sliding-window:tokens=5"),
    "gla-mixed": ("sliding-window:tokens=5",),
    "mamba2-grown": ("sliding-window:tokens=5", "state-norm:limit=0.5,every=2"),
    "gated_deltanet-mixed": ("forget-more",),
    "kda": ("state-norm:learn=4,every=2",),
}
CUT_NORMS, WHOLE_NORM = ("gla-merged", "gla-two-heads", "mamba2-grown"), "gla-conv"
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}


@torch.no_grad()
def read_and_decode(model: RecurrentLM) -> tuple[torch.Tensor, Any]:
    """Return logits of a text, read in two segments and then decoded as in generation, and the states after it."""
    ids = tokens(2, 14, vocab=model.config.vocab_size)
    logits, states = [], None
    for segment, kept in ((ids[:, :6], None), (ids[:, 6:12], 2), (ids[:, 12:13], None), (ids[:, 13:], None)):
        output = model(segment, states=states, output_states=True, overwrite_states=True, logits_to_keep=kept)
        logits.append(output.logits)
        states = output.states
    return torch.cat(logits, dim=1), states


def largest_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), (found.shape, wanted.shape, found.dtype)
    return float((found - wanted).abs().max() / wanted.abs().max())


def measure(directory: Path, share: TensorShare, wanted: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the measurements of one model on one rank."""
    mitigations, local_norm = MITIGATIONS.get(name, ()), name in (*CUT_NORMS, WHOLE_NORM) and share.size == RANKS
    found: dict[str, Any] = {}
    for dtype in BOUNDS:
        model = load_tensor_parallel(directory, share, dtype=dtype)
        logits, states = read_and_decode(model)
        found[str(dtype)] = largest_error(logits, wanted[str(dtype)])
        if dtype == torch.float64:
            found["states"] = [[part.numel() for part in layer] for layer in states]
            found["parameters"] = {name: parameter.numel() for name, parameter in model.named_parameters()}
            found["same bits"] = all(torch.equal(logits, other) for other in share.all_gather(logits))
            for text in mitigations:
                model.mitigation = parse_mitigation(text)
                found[text] = largest_error(read_and_decode(model)[0], wanted[text])
            model.mitigation = None
            if local_norm:
                found["local norm"] = largest_error(read_and_decode(with_local_norms(model))[0], wanted[str(dtype)])
    return found


def with_local_norms(model: TensorParallelLM) -> TensorParallelLM:
    for module in model.modules():
        if isinstance(module, SplitGatedRMSNorm):
            module.size, module.share = len(module.weight), TensorShare()
    return model


def refusals(directory: Path, share: TensorShare) -> dict[str, str]:
    """Return this rank's messages on directories that one rank finds bad, or that only all together can find bad."""
    said = {}
    for name in ("one file is missing", "one file is another model's"):
        try:
            load_tensor_parallel(directory / name, share)
        except StateXError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def work(rank: int, directory: Path) -> dict[str, Any]:
    whole = TensorShare(rank=rank, size=RANKS, group=dist.group.WORLD)
    shares = {RANKS: whole, 2: whole.neighbours(2)}
    wanted = torch.load(directory / "wanted.pt")
    found: dict[str, Any] = {
        f"{name} | {tp}": measure(directory / name / f"tp{tp}", share, wanted[name], name)
        for name in CASES
        for tp, share in shares.items()
    }
    found["agreed"] = whole.agree(torch.tensor([rank, 7])).tolist()
    found["refused"] = refusals(directory, whole)
    own = load_tensor_parallel(directory / f"only rank {rank}", whole)
    found["own file"] = largest_error(read_and_decode(own)[0], wanted["gla-merged"][str(torch.float64)])
    found["anywhere"] = [own.anywhere(rank == 2), own.anywhere(False)]
    try:
        own.mitigation = parse_mitigation("state-norm:limit=1")
    except ConfigError as error:
        found["state norm"] = str(error)
    return found


def make_shards(directory: Path, config: Any, numbers: tuple[int, ...], *, seed: int = 0) -> RecurrentLM:
    model = build(config, seed=seed)
    save_pretrained(model, directory / "hf")
    for tp in numbers:
        reshard(directory / "hf", directory / f"tp{tp}", to="tp", tp=tp)
    return model


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of every case, and ``wanted.pt``: what the model in one process says."""
    directory = tmp_path_factory.mktemp("shards")
    wanted: dict[str, dict[str, Any]] = {}
    for name, config in CASES.items():
        model = make_shards(directory / name, config, (2, RANKS)).eval()
        logits, states = read_and_decode(model)
        wanted[name] = {str(torch.float64): logits, "states": [[part.numel() for part in layer] for layer in states]}
        wanted[name]["kinds"] = [kind for _, kind in model.state_places]
        for text in MITIGATIONS.get(name, ()):
            model.mitigation = parse_mitigation(text)
            wanted[name][text] = read_and_decode(model)[0]
        model.mitigation = None
        wanted[name][str(torch.float32)] = read_and_decode(model.float())[0]
    torch.save(wanted, directory / "wanted.pt")
    return directory


@pytest.fixture(scope="module")
def found(shards: Path) -> list[dict[str, Any]]:
    merged = shards / "gla-merged" / f"tp{RANKS}"
    other = shards / "other"
    make_shards(other, CASES["gla-merged"], (RANKS,), seed=5)
    for name in ("one file is missing", "one file is another model's"):
        shutil.copytree(merged, shards / name)
    (shards / "one file is missing" / file_name(1, RANKS)).unlink()
    mixed_up = shards / "one file is another model's"
    (mixed_up / MANIFEST_NAME).unlink()
    shutil.copy(other / f"tp{RANKS}" / file_name(2, RANKS), mixed_up)
    for rank in range(RANKS):
        ignored = [file_name(r, RANKS) for r in range(RANKS) if r != rank]
        shutil.copytree(merged, shards / f"only rank {rank}", ignore=shutil.ignore_patterns(*ignored))
    return run_distributed_test(work, RANKS, shards)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tp", [2, RANKS])
def test_ranks_say_what_one_process_says_and_hold_their_part(shards, found, name, tp):
    config = CASES[name]
    specs = family_of(config.MODEL_TYPE).tensors(config)
    wanted = torch.load(shards / "wanted.pt")[name]
    for process, of_rank in enumerate(found):
        case, rank = of_rank[f"{name} | {tp}"], process % tp
        for dtype, bound in BOUNDS.items():
            assert case[str(dtype)] < bound
        for text in MITIGATIONS.get(name, ()):
            assert case[text] < BOUNDS[torch.float64], text
        assert case["same bits"]
        table = {}
        for tensor, spec in specs.items():
            rows = sum(stop - start for start, stop in shard_ranges(spec, tensor, tp, rank))
            table[tensor] = spec.numel // spec.shape[spec.axis] * rows
        assert case["parameters"] == table
        for local, whole, kind in zip(case["states"], wanted["states"], wanted["kinds"], strict=True):
            assert local[0] * tp == whole[0] or kind != "recurrent", "the matrix states are cut evenly"
            assert all(part <= all_of_it for part, all_of_it in zip(local, whole, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CUT_NORMS)
def test_a_norm_over_the_channels_of_one_rank_is_wrong(found, name):
    assert found[0][f"{name} | 4"]["local norm"] > 0.01
    assert found[0][f"{WHOLE_NORM} | 4"]["local norm"] < 1e-9, "whole heads need no other rank"


@pytest.mark.distributed
def test_one_rank_says_what_is_wrong_and_all_stop(shards, found):
    missing = [of_rank["refused"]["one file is missing"] for of_rank in found]
    assert missing[1].startswith("CheckpointError: ")
    assert f"{file_name(1, RANKS)} is missing; {LAYOUT_NAME} lists it" in missing[1]
    others = [of_rank["refused"]["one file is another model's"] for of_rank in found]
    assert f"{file_name(0, RANKS)} and {file_name(2, RANKS)} are of different models" in others[0]
    for rank in range(RANKS):
        assert (rank == 1) or missing[rank] == "OtherRankError: rank 1 of the tensor-parallel ranks failed"
        assert (rank == 0) or others[rank] == "OtherRankError: rank 0 of the tensor-parallel ranks failed"


@pytest.mark.distributed
def test_a_rank_reads_its_own_file_alone(found):
    assert all(of_rank["own file"] < 1e-9 for of_rank in found)


@pytest.mark.distributed
def test_the_norm_of_a_cut_state_is_refused(found):
    for of_rank in found:
        assert of_rank["state norm"].startswith("state-norm takes the norm of a head's whole state, and 4 ranks cut")
        assert "of layers [0]; use forget-more or sliding-window" in of_rank["state norm"]


@pytest.mark.distributed
def test_ranks_agree_on_the_tokens_of_rank_0(found):
    assert [of_rank["agreed"] for of_rank in found] == [[0, 7]] * RANKS


@pytest.mark.distributed
def test_what_one_rank_finds_holds_on_all(found):
    assert [of_rank["anywhere"] for of_rank in found] == [[True, False]] * RANKS


def test_one_rank_is_the_whole_model(tmp_path):
    # torch takes another matrix product for weights without gradients.
    model = make_shards(tmp_path, CASES["minimax-merged"], (1,)).requires_grad_(False)
    alone = load_tensor_parallel(tmp_path / "tp1", TensorShare())
    assert torch.equal(read_and_decode(alone)[0], read_and_decode(model)[0])


def test_a_hybrid_is_refused(tmp_path: Path):
    save_host("bamba", tmp_path)
    with raises(ConfigError, "--tp", "bamba"):
        load_tensor_parallel(tmp_path, TensorShare())

"""Exports of hybrids: transformers opens them alone, and computes and generates what our model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from checkpoints_tools.export.hf_export import export_notes, form_of
from checkpoints_tools.reshard.reshard import reshard
from statex_dist.models.hf import from_pretrained
from statex_dist.models.registry import config_from_dict, make_plan, read_config
from tests.checkpoints_tools.builders import run_expand
from tests.models.hybrid.hosts import DELTA_HOSTS, HOSTS, MAMBA2_HOSTS, VOCABULARY, save_host, without_kernels

NEW = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
OTHER_OPS = dict.fromkeys(("granitemoehybrid", "zamba2", "qwen3_5_text", "kimi_linear"), "grow_features")
"""Operations of the default tests; the slow ones run every other."""
ALL_OPS = [(host, op, "lossless") for host in MAMBA2_HOSTS for op in ("grow_state", "grow_features")]
ALL_OPS += [(host, op, "lossless") for host in DELTA_HOSTS for op in ("mix_heads", "grow_features")]
ALL_OPS += [("minimax", "grow_state", "lossless"), ("minimax", "merge_heads", "inherit")]
FEW = ("nemotron_h", "falcon_h1", "qwen3_next", "minimax")
"""Hosts of the default tests: Mamba2, both kinds in a layer, a delta rule, a cache of its own."""
KINDS = [
    kind
    if kind[0] in FEW and kind[1] == OTHER_OPS.get(kind[0], "grow_state" if kind[0] in MAMBA2_HOSTS else "mix_heads")
    else pytest.param(*kind, marks=pytest.mark.slow)
    for kind in ALL_OPS
]
ALSO_SAVED = {"kimi_linear": ("block_sparse_moe", ".mlp."), "olmo_hybrid": ("conv1d",), "minimax": ("_decay", "_rate")}
"""Parts of names that transformers itself saves otherwise than it loads them."""


@pytest.fixture(autouse=True, scope="module")
def _modules_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Every host with a directory of its weights."""
    root = tmp_path_factory.mktemp("bases")
    return {host: (save_host(host, root / host, pad_token_id=0, eos_token_id=1), root / host) for host in HOSTS}


def exported(base: Path, target: Path, layers: str | None = None, **plan: Any) -> Path:
    """Expand the first recurrent layer of a directory, or the layers named, and export it."""
    layers = layers or str(read_config(base).recurrent_layers[0])
    run_expand(base, target / "expanded", factor=2, layers=layers, **plan)
    reshard(target / "expanded", target / "export", to="hf")
    return target / "export"


def opened(directory: Path, **options: Any) -> Any:
    load = AutoModelForCausalLM.from_pretrained
    with without_kernels():
        model, report = load(directory, output_loading_info=True, dtype=torch.float32, **options)
    assert not any(report.values()), report
    return model.eval()


def tokens(rows: int, count: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("host", "op", "init"), KINDS)
@torch.no_grad()
def test_an_export_with_code_is_our_model(bases, tmp_path, host, op, init):
    before, base = bases[host]
    directory = exported(base, tmp_path, op=op, init=init)
    values = json.loads((directory / "config.json").read_text())
    assert values["model_type"] == f"statex_{host}"
    theirs, ours, ids = opened(directory, trust_remote_code=True), from_pretrained(directory).eval(), tokens(2, 19)
    expected = ours(ids).logits
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=2e-6)
    if init == "lossless":
        torch.testing.assert_close(expected, before(ids, use_cache=False).logits, rtol=0, atol=5e-6)
    with pytest.raises(KeyError, match="expanded"):  # a class that is named knows no plan
        type(before).from_pretrained(directory)
    assert type(theirs)(theirs.config)(ids).logits.shape == expected.shape
    alone = [theirs.generate(row[None], **NEW)[0, len(row) :] for row in (ids[0], ids[1, :7])]
    padded, mask = torch.stack([ids[0], torch.cat([ids.new_zeros(12), ids[1, :7]])]), torch.ones_like(ids)
    mask[1, :12] = 0
    assert torch.equal(theirs.generate(padded, attention_mask=mask, **NEW)[:, 19:], torch.stack(alone))
    for beams in (1,) if host == "minimax" else (1, 3):  # whose cache does not move with the beams
        found = theirs.generate(ids, num_beams=beams, **NEW)
        assert torch.equal(found, theirs.generate(ids, num_beams=beams, use_cache=False, **NEW))
    theirs.save_pretrained(tmp_path / "again")
    stored, again = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "again"))
    parts = ALSO_SAVED.get(host, ("no such name",))
    stored, again = ({n: x for n, x in y.items() if not any(p in n for p in parts)} for y in (stored, again))
    assert stored.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in stored.items())
    assert read_config(tmp_path / "again").statex == ours.config.statex


@pytest.mark.parametrize("host", MAMBA2_HOSTS)
@torch.no_grad()
def test_even_growth_of_d_state_stays_a_plain_model(bases, tmp_path, host):
    before, base = bases[host]
    directory = exported(base, tmp_path, layers="all", op="grow_state", init="lossless")
    theirs, ids = opened(directory), tokens(2, 19)
    assert type(theirs) is type(before)
    torch.testing.assert_close(
        theirs(ids, use_cache=False).logits, before(ids, use_cache=False).logits, rtol=0, atol=5e-6
    )
    assert torch.equal(theirs.generate(ids, **NEW), before.generate(ids, **NEW))
    assert read_config(directory).state_elements == 2 * read_config(base).state_elements


@torch.no_grad()
def test_packed_documents_need_their_borders_and_keep_them(bases, tmp_path):
    theirs = opened(
        exported(bases["nemotron_h"][1], tmp_path, op="grow_state", init="lossless"), trust_remote_code=True
    )
    mixer, x = theirs.model.layers[0].mixer, torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    alone = torch.cat([mixer(part) for part in x.split([4, 5], 1)], 1)
    torch.testing.assert_close(mixer(x, cu_seq_lens_q=borders), alone)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        mixer(x, seq_idx=torch.zeros(1, 9, dtype=torch.int32))
    with pytest.raises(ValueError, match="attention_mask"):
        mixer(x, attention_mask=torch.ones(1, 1, 9, 9))


def test_an_export_is_expanded_again_with_its_code(bases, tmp_path):
    directory = exported(bases["qwen3_next"][1], tmp_path, op="mix_heads", init="lossless", layers="0")
    run_expand(directory, tmp_path / "more", op="mix_heads", init="lossless", layers="1", factor=2)
    ids = tokens(1, 9)
    with torch.no_grad():
        expected = from_pretrained(tmp_path / "more").eval()(ids).logits
        found = opened(tmp_path / "more", trust_remote_code=True)(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        trunk = AutoModel.from_pretrained(tmp_path / "more", trust_remote_code=True)
        assert trunk(ids).last_hidden_state.shape == (1, 9, 32)


@pytest.mark.slow
def test_transformers_alone_opens_them(bases, tmp_path):
    """Run where nothing of ours can be imported: a host of each kind of mixer."""
    ops = {"nemotron_h": "grow_features", "qwen3_next": "mix_heads", "kimi_linear": "mix_heads", "minimax": "mix_heads"}
    found = {h: exported(bases[h][1], tmp_path / h, op=op, init="lossless") for h, op in ops.items()}
    program = (
        "import sys, torch\n"
        "sys.modules.update(dict.fromkeys(('fla', 'mamba_ssm', 'causal_conv1d', 'statex_dist', 'checkpoints_tools')))\n"
        "from transformers import AutoModelForCausalLM\n"
        "for directory in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)\n"
        "    print(model(torch.arange(1, 8)[None]).logits.double().sum().item())\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", program, *map(str, found.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = [
            from_pretrained(path)(torch.arange(1, 8)[None]).logits.double().sum().item() for path in found.values()
        ]
    assert list(map(float, done.stdout.split())) == pytest.approx(expected, abs=1e-4)


def test_a_multimodal_model_has_no_code():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32}
    config = config_from_dict({"model_type": "qwen3_5", "text_config": {**sizes, **HOSTS["qwen3_5_text"]}})
    assert form_of(config) == "plain"
    grown = make_plan(config, layers="0", factor=2, op="mix_heads", init="lossless")
    assert form_of(grown) == "none"
    assert "multimodal" in export_notes(grown)[0]


@pytest.mark.parametrize("host", ["bamba", "granitemoehybrid"])
def test_norms_of_groups_are_noted(bases, host):
    assert "5.23" in export_notes(read_config(bases[host][1]))[0]
    assert export_notes(read_config(bases["nemotron_h"][1])) == []

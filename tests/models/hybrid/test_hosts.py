"""Hosts with our mixers against transformers' own models."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from statex_dist.inference.rows import join_rows
from statex_dist.models.hf import from_pretrained
from statex_dist.models.layout import Part
from statex_dist.models.registry import expand_state_dict, family_of, make_plan, read_config, tensor_mappings
from statex_dist.models.row_mapping import Keep
from tests.models.hybrid.hosts import FALCON_NORM, HOSTS, MAMBA2_HOSTS, VOCABULARY, save_host

LENGTHS = [7, 1, 9]
TOKENS = sum(LENGTHS)
VARIANTS = {"falcon_h1-norm": FALCON_NORM, "falcon_h1-gate-first": {**FALCON_NORM, "mamba_norm_before_gate": False}}
"""Further models of a host, of which the logits alone are compared."""
DENSE_KIMI = re.compile(r"^(model\.layers\.0\.)block_sparse_moe")
"""What transformers calls the dense first layer when it saves, and the hub does not; both are read."""
EXACT = {"minimax": 1e-6}
"""Bounds in place of 1e-10: MiniMax keeps its decays in fp32 buffers."""


@pytest.fixture(scope="module", params=HOSTS)
def saved(request, tmp_path_factory):
    """A host, and the directory that it was saved to (with ``use_cache`` at its default)."""
    directory = tmp_path_factory.mktemp(request.param)
    return save_host(request.param, directory), directory


@pytest.fixture(scope="module")
def ours(saved):
    return from_pretrained(saved[1]).eval()


@pytest.fixture(scope="module")
def exact(saved):
    """The host and our model in float64, with experts one by one: the fused product of experts has no float64."""
    host, directory = saved
    pair = copy.deepcopy(host).double(), from_pretrained(directory, dtype=torch.float64)
    for model in pair:
        for module in model.modules():
            if config := getattr(module, "config", None):
                config._experts_implementation = "eager"
    return pair


@contextmanager
def float64():
    """Compute in float64 where transformers' layers ask for float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def tokens(rows=1, count=TOKENS):
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(1))


def pack():
    return {
        "cu_seqlens": torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32),
        "seq_idx": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None].int(),
    }


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def probe(logits):
    """A function of the logits whose gradient differs from token to token."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape).sin()).sum()


def test_logits_are_the_hosts(saved, ours):
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens(2)).logits, saved[0](tokens(2), use_cache=False).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_variants_are_the_hosts(variant, tmp_path):
    host = save_host(variant.partition("-")[0], tmp_path, **VARIANTS[variant])
    with torch.no_grad():
        torch.testing.assert_close(
            from_pretrained(tmp_path).eval()(tokens()).logits, host(tokens(), use_cache=False).logits, rtol=0, atol=1e-5
        )


@pytest.fixture(scope="module")
def documents(exact):
    """The host's logits and gradients of each document alone, in training mode and float64."""
    host = exact[0].train()
    with float64():
        alone = torch.cat([host(part, use_cache=False).logits for part in tokens().split(LENGTHS, 1)], 1)
        probe(alone).backward()
    return alone.detach(), gradients(host)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_pack_equals_the_hosts_documents(exact, documents, recompute):
    model, (logits, wanted) = exact[1].train(), documents
    bound = EXACT.get(model.config.MODEL_TYPE, 1e-10)
    model.recompute = recompute
    with float64():
        packed = model(tokens(), **pack()).logits
        torch.testing.assert_close(packed, logits, rtol=0, atol=bound)
        probe(packed).backward()
    found = gradients(model)
    assert {name for name, grad in found.items() if grad is not None} == {n for n, g in wanted.items() if g is not None}
    for name, grad in found.items():
        if grad is not None:
            scale = wanted[name].abs().max().item()
            torch.testing.assert_close(grad, wanted[name], rtol=0, atol=10 * bound * max(scale, 1e-3), msg=name)


def test_rows_of_unequal_lengths_decode_as_the_host_reads_the_whole(saved, ours):
    ids, (short, long) = tokens(2), (3, 9)
    with torch.no_grad():
        whole = saved[0](ids, use_cache=False).logits
        first, second = (ours(ids[i : i + 1, :n], output_states=True).states for i, n in enumerate((short, long)))
        states = join_rows(first, second)
        for step in range(4):
            column = torch.stack([ids[0, short + step], ids[1, long + step]])[:, None]
            output = ours(column, states=states, output_states=True)
            states = output.states
            wanted = torch.stack([whole[0, short + step], whole[1, long + step]])
            torch.testing.assert_close(output.logits[:, 0], wanted, rtol=0, atol=1e-5)


def grow(directory, target, **options):
    """Expand the first recurrent layer of a directory into another, and return both configurations and the model."""
    before = read_config(directory)
    after = make_plan(before, layers=str(before.recurrent_layers[0]), init="lossless", **options)
    tensors = expand_state_dict(load_file(directory / "model.safetensors"), before, after)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(after.to_json())
    return before, after, from_pretrained(target)


@pytest.mark.parametrize("op", [None, "grow_features"], ids=["default", "grow_features"])
def test_a_grown_layer_starts_as_the_host_and_learns(saved, tmp_path, op):
    host, directory = saved
    if op is not None and op not in read_config(directory).OPS:
        pytest.skip(f"no {op} for this host")
    before, after, model = grow(directory, tmp_path / "grown", op=op, factor=None if op else 2)
    logits = model(tokens()).logits
    torch.testing.assert_close(logits, host(tokens(), use_cache=False).logits, rtol=0, atol=2e-6)
    probe(logits).backward()
    live = {parts[0].name: name for name, parts in model.file_parts().items()}
    found = []
    for name, mapping in tensor_mappings(before, after).items():
        grad, start = model.get_parameter(live[name]).grad, 0
        for block in mapping.rows.blocks:
            rows = block.stop - block.start if isinstance(block, Keep) else block.rows
            if not isinstance(block, Keep):
                found.append(grad[start : start + rows].abs().max().item())
            start += rows
    assert max(found) > 1e-9, "a dead state has no gradient at all"


def test_names_and_shapes_are_those_of_the_files(saved, ours):
    with safe_open(saved[1] / "model.safetensors", "pt") as file:
        wanted = {
            Part(DENSE_KIMI.sub(r"\1mlp", name) if ours.config.MODEL_TYPE == "kimi_linear" else name, shape)
            for name in file.keys()  # noqa: SIM118
            if not name.endswith((*ours.config.DERIVED, "rotary_emb.inv_freq"))
            for shape in [tuple(file.get_slice(name).get_shape())]
        }
    parts = [part for parts in ours.file_parts().values() for part in parts]
    assert len(parts) == len(set(parts))
    assert set(parts) == wanted


@pytest.mark.parametrize("model_type", MAMBA2_HOSTS)
def test_transformers_has_no_further_rule_of_names(model_type):
    names = family_of(model_type).config.HOST.names
    rules = get_checkpoint_conversion_mapping(model_type) or ()
    assert len(rules) == len(names.joined) + len(names.renames)

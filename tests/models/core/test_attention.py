"""Attention layers of our own: against mamba_ssm's modules and flash-linear-attention's equations, and in whole models.

flash-linear-attention's own models, which need a GPU's kernels or an interpreter, are in
tests/models/interpreted_fla.py.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from statex_dist.bare_package import import_from_bare
from statex_dist.engine.segment_states import CarriedStates
from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.activations import activation_bytes
from statex_dist.models.core.attention import rotate
from statex_dist.models.core.sequences import Sequences
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.model_section import ModelSource
from statex_dist.models.registry import config_from_dict, expand_state_dict, make_plan
from statex_dist.ops.attention import KeyValues
from tests.engine.test_state_passing import pack as packed_batch
from tests.models.test_lm import packed_kwargs
from tests.models.tiny import HYBRIDS, STATE_SPACES, build, gla_config, tokens
from tests.raising import raises

LENGTHS = [7, 1, 9]
TOKENS = sum(LENGTHS)
every_hybrid = pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)


def turned(x, size, base, interleaved):
    """Rotary positions as complex numbers, of ``x [B, T, H, D]``."""
    x, rest = x.split([size, x.shape[-1] - size], dim=-1)
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    y = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.cat([(y if interleaved else y.transpose(-1, -2)).flatten(-2), rest], dim=-1)


def fla_attention(weights, x, sizes):
    """flash-linear-attention's ``Attention.forward`` with a dense mask, in the order of its lines."""
    parts = [F.linear(x, weights[f"{n}_proj.weight"], weights.get(f"{n}_proj.bias")) for n in "qkv"]
    q, k, v = (y.unflatten(-1, (-1, sizes.head_dim)) for y in parts)
    q, k = (turned(y, sizes.head_dim, sizes.rotary_base, False).transpose(1, 2) for y in (q, k))
    k, v = (y.repeat_interleave(sizes.num_heads // sizes.num_kv_heads, dim=1) for y in (k, v.transpose(1, 2)))
    place = torch.arange(x.shape[1])
    ago = place[:, None] - place
    hidden = (ago < 0) | (ago >= (sizes.window or len(place)))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(sizes.head_dim)).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("name", ["gla", "retnet", "gated_deltanet"])
def test_the_layer_is_flash_linear_attentions(name):
    config = HYBRIDS[name]
    layer = config.attention_layers[0]
    module, sizes = build(config).layers[layer].attn, config.attention_layer(layer).sizes
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        wanted = fla_attention(module.state_dict(), x, sizes)
        torch.testing.assert_close(module(x, Sequences())[0], wanted, rtol=0, atol=1e-12)


class FlashRotary(torch.nn.Module):
    """flash-attention's embedding as ``MHA`` calls it; the package needs a GPU."""

    def __init__(self, dim, base, interleaved, device=None):
        super().__init__()
        self.settings = dim, base, interleaved

    def forward(self, q, kv, seqlen_offset, max_seqlen):
        k, v = kv.unbind(dim=2)
        return turned(q, *self.settings), torch.stack([turned(k, *self.settings), v], dim=2)


@pytest.mark.parametrize("name", ["state_spaces", "state_spaces-mlp"])
def test_the_layer_is_mamba_ssms(name, monkeypatch):
    mha = import_from_bare("mamba_ssm.modules.mha")
    mlp = import_from_bare("mamba_ssm.modules.mlp")
    monkeypatch.setattr(mha, "RotaryEmbedding", FlashRotary)
    config = HYBRIDS[name]
    block = build(config).layers[1]
    theirs = mha.MHA(config.hidden_size, **config.original["attn_cfg"], dtype=torch.float64)
    theirs.load_state_dict(block.mixer.state_dict())
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        wanted = x + theirs(block.norm(x))
        if config.gated_mlp_size:
            gated = mlp.GatedMLP(config.hidden_size, config.original["d_intermediate"], config.hidden_size)
            gated.double().load_state_dict(block.mlp.state_dict())
            wanted = wanted + gated(block.norm2(wanted))
        torch.testing.assert_close(block(x, Sequences())[0], wanted, rtol=0, atol=1e-12)


@every_hybrid
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_pack_equals_documents_alone_with_gradients(config, recompute):
    model, ids = build(config).train(), tokens(1, TOKENS)
    weights = torch.linspace(-1, 1, TOKENS * model.config.vocab_size, dtype=torch.float64).sin()
    found = []
    for logits in (
        torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1),
        model(ids, **packed_kwargs(LENGTHS)).logits,
    ):
        model.zero_grad()
        (logits.flatten() * weights).sum().backward()
        found.append({"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}})
        model.recompute = recompute
    for name, wanted in found[0].items():
        bound = 1e-10 * max(float(wanted.abs().max()), 1)
        torch.testing.assert_close(found[1][name], wanted, rtol=0, atol=bound, msg=name)


@every_hybrid
def test_rows_of_unequal_lengths_decode_as_the_whole(config):
    model, ids, (short, long) = build(config).eval(), tokens(2, TOKENS), (3, 9)
    with torch.no_grad():
        whole = model(ids).logits
        first, second = (model(ids[i : i + 1, :n], output_states=True).states for i, n in enumerate((short, long)))
        assert len(first) == len(model.state_places)
        states = []
        for one, other, (_, kind) in zip(first, second, model.state_places, strict=True):
            if kind == "attention":
                padded = (F.pad(y, (0, 0, long - short, 0)) for y in one[:2])
                one = KeyValues(*padded, one[2])
            states.append(tuple(torch.cat(parts) for parts in zip(one, other, strict=True)))
        for step in range(4):
            column = torch.stack([ids[0, short + step], ids[1, long + step]])[:, None]
            output = model(column, states=states, output_states=True)
            states = output.states
            wanted = torch.stack([whole[0, short + step], whole[1, long + step]])
            torch.testing.assert_close(output.logits[:, 0], wanted, rtol=0, atol=1e-10)


@every_hybrid
def test_a_document_cut_into_segments_is_the_whole(config):
    """The last document of a pack continues in the next one, which has another behind it, through the engine."""
    model, carried, cpu = build(config).train(), CarriedStates(), torch.device("cpu")
    ids = tokens(1, 23)
    first, second = packed_batch(0, 8, 6, continues=True), packed_batch(1, 5, 4, carried=True)
    losses, labels = [], []
    for batch, part in zip((first, second), ids.split([14, 9], 1), strict=True):
        batch = dataclasses.replace(batch, input_ids=part, labels=batch.labels.clamp(max=39))
        losses.append(float(carried.forward_loss(model, batch, 0, cpu, observe=batch.carried).detach()))
        labels.append(batch.labels)
    documents = zip(ids.split([8, 11, 4], 1), torch.cat(labels, 1).split([8, 11, 4], 1), strict=True)
    alone = [float(model(part, labels=target).loss_sum.detach()) for part, target in documents]
    assert sum(losses) == pytest.approx(sum(alone), rel=1e-12)
    assert len(carried.observed) == len(config.recurrent_layers)
    restored = CarriedStates()
    restored.load_state_dict({"0": [tuple(part) for part in model(ids, output_states=True).states]})
    kinds = [isinstance(state, KeyValues) for state in restored._lanes[0]]
    assert kinds == [kind == "attention" for _, kind in model.state_places]


@every_hybrid
def test_recurrent_layers_grow_without_loss_and_attention_stays(config, tmp_path):
    model = build(config, dtype=torch.float32).eval()
    save_pretrained(model, tmp_path / "base")
    before = load_file(tmp_path / "base/model.safetensors")
    after = make_plan(config, layers="all", factor=2, init="lossless")
    assert [e.layer for e in after.statex.layers] == list(config.recurrent_layers)
    tensors = expand_state_dict(before, config, after)
    layers = tuple(model.family.names.layer(layer) for layer in config.attention_layers)
    assert all(tensors[name] is x for name, x in before.items() if name.startswith(layers))
    (tmp_path / "grown").mkdir()
    save_file(tensors, tmp_path / "grown/model.safetensors")
    (tmp_path / "grown/config.json").write_text(after.to_json())
    grown, ids = from_pretrained(tmp_path / "grown"), tokens(2, 12)
    assert grown.config.state_elements > config.state_elements
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, model(ids).logits, rtol=0, atol=2e-5)
    with raises(ConfigError, config.attention_layers[0], "recurrent"):
        make_plan(config, layers=str(config.attention_layers[0]), factor=2, init="lossless")


@every_hybrid
def test_a_new_model_learns(config):
    values = {k: v for k, v in config.to_dict().items() if v is not None and k not in config.extra}
    model = ModelSource(config=values).build(dtype=torch.float32, seed=3).train()
    again = ModelSource(config=values).build(dtype=torch.float32, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    prefix = model.family.names.layer(config.attention_layers[0])
    first = {n.removeprefix(prefix): p for n, p in model.named_parameters() if n.startswith(prefix)}
    assert all(p.abs().max() == 0 for n, p in first.items() if n.endswith("proj.bias"))
    assert all((p == 1).all() for n, p in first.items() if "norm" in n)
    query = first.get("attn.q_proj.weight", first.get("mixer.in_proj.weight"))
    # fla draws matrices with initializer_range, torch (and mamba_ssm) uniformly below 1 / sqrt(inputs).
    std = config.initializer_range if "attn.q_proj.weight" in first else (3 * query.shape[1]) ** -0.5
    assert float(query.detach().std()) == pytest.approx(std, rel=0.15)
    optimizer, ids, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), tokens(1, TOKENS), []
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    for _ in range(4):
        loss = model(ids, labels=labels, **packed_kwargs(LENGTHS)).loss_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[2] < losses[1] < losses[0]


def test_activations_are_counted_and_grow_with_the_tokens():
    """A pass that held all scores would take four times as much for twice the tokens."""
    config = HYBRIDS["state_spaces"]
    one, two = (activation_bytes(config, num_tokens=n, precision="fp32") for n in (256, 512))
    assert 1.8 * one < two < 2.2 * one
    assert activation_bytes(HYBRIDS["retnet"], num_tokens=256, precision="bf16", carried=True) > 0


def test_rotated_channels_keep_their_dtype_and_the_others_their_values():
    x = torch.randn(1, 5, 2, 8).bfloat16()
    sizes = SimpleNamespace(rotary_dim=4, rotary_base=100.0, interleaved=True)
    found = rotate(x, torch.arange(5)[None], sizes)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[..., 4:], x[..., 4:])
    torch.testing.assert_close(found.double(), turned(x.double(), 4, 100.0, True), atol=0.03, rtol=0)


REFUSED = [
    ({"layers": [1]}, ("attn", "num_heads")),
    ({"layers": [1, 1], "num_heads": 4}, ("attn", 1, "twice")),
    ({"layers": [1], "num_heads": 3}, ("attn", 3, 16)),
    ({"layers": [1], "num_heads": 4, "num_kv_heads": 3}, ("attn", 3, 4)),
    ({"layers": [1], "num_heads": 4, "window_size": 0}, ("attn", "window_size", 0)),
    ({"layers": [1], "num_heads": 4, "window_size": True}, ("window_size", True)),
    ({"layers": [1], "num_heads": 16}, ("attn", 1, "even")),
    ({"layers": [1], "num_heads": 4, "rope_theta": -1.0}, ("attn", -1.0)),
    ({"layers": [1], "num_heads": 4, "qkv_bias": 1}, ("qkv_bias", 1)),
]


@pytest.mark.parametrize(("attn", "named"), REFUSED)
def test_attention_that_cannot_be_is_refused(attn, named):
    with raises(CheckpointError, *named):
        gla_config(attn=attn)


REFUSED_BY_MAMBA_SSM = [
    ({"num_heads": None}, ("num_heads", "int")),
    ({"num_heads": 3, "num_heads_kv": None}, ("num_heads", 3, 16)),
    ({"num_heads_kv": 3}, ("attn_cfg", 3, 4)),
    ({"rotary_emb_dim": 3}, ("attn_cfg", 3)),
    ({"rotary_emb_dim": 6}, ("attn_cfg", 6, 4)),
    ({"embed_dim": 16}, ("attn_cfg", "embed_dim")),
    ({"d_conv": -1}, ("d_conv", -1)),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED_BY_MAMBA_SSM)
def test_arguments_of_mamba_ssm_that_cannot_be_are_refused(changes, named):
    with raises(CheckpointError, *named):
        config_from_dict({**STATE_SPACES, "attn_cfg": {**STATE_SPACES["attn_cfg"], **changes}})


@pytest.mark.parametrize("changes", [{"causal": False}, {"mlp_dim": 8}])
def test_variants_of_mamba_ssm_are_expanded_and_not_run(changes):
    config = config_from_dict({**STATE_SPACES, "attn_cfg": {**STATE_SPACES["attn_cfg"], **changes}})
    assert make_plan(config, layers="all", factor=2, init="lossless").is_mixed
    with raises(ConfigError, "mamba2_state_spaces", *changes):
        config.require_runnable()

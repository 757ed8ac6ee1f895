"""The chunked loss beside the whole one, and what activation checkpointing by policy recomputes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoints_tools.plan.memory import TrainingSettings
from statex_dist.batch import IGNORE_INDEX
from statex_dist.engine.config import EngineConfig
from statex_dist.models.activations import activation_bytes
from statex_dist.models.lm import LMHead
from statex_dist.ops.loss import LOSS_CHUNK_TOKENS
from tests.models.tiny import build, gla_config, mamba2_config, minimax_config, tokens
from tests.models.tiny import expanded as expand

LENGTH = 45
VOCAB = 40


class LargestWithVocab(TorchDispatchMode):
    """Remembers the most rows of any tensor ``[..., vocab]``."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB,) and tensor.dim() < 4:
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return made


def run(config, chunk: int, labels: torch.Tensor):
    model = build(config).train()
    model.lm_head.chunk_tokens = chunk
    seen = LargestWithVocab()
    with seen:
        loss = model(tokens(1, LENGTH), labels=labels).loss_sum
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, seen.rows


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 45])
def test_chunked_loss_is_the_whole_one(tied: bool, chunk: int):
    config = gla_config(tie_word_embeddings=tied)
    labels = tokens(1, LENGTH, seed=1)
    labels[0, 14:32] = IGNORE_INDEX  # whole chunks of 7 and of 16 without a target
    loss, gradients, rows = run(config, 0, labels)
    chunked, again, fewer = run(config, chunk, labels)
    torch.testing.assert_close(chunked, loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-12, atol=1e-12)
    assert rows >= LENGTH
    assert fewer <= max(chunk, config.hidden_size)  # the weight's own gradient [vocab, hidden] comes transposed too


def test_nobody_has_to_ask_for_chunks():
    head, seen, count = LMHead(16, VOCAB), LargestWithVocab(), 2 * LOSS_CHUNK_TOKENS + 5
    with seen:
        head(torch.randn(1, count, 16), torch.zeros(1, count, dtype=torch.int64)).backward()
    assert seen.rows == LOSS_CHUNK_TOKENS
    assert EngineConfig().loss_chunk_tokens == TrainingSettings().loss_chunk_tokens == LOSS_CHUNK_TOKENS


@pytest.mark.parametrize("config", [gla_config(num_hidden_layers=3), mamba2_config(num_hidden_layers=3)])
def test_only_expanded_layers_are_recomputed(config):
    model = build(expand(config, "inherit", layers="1")).train()
    calls = [0, 0, 0]
    for index, layer in enumerate(model.trunk.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    for policy, expected in (("none", [1, 1, 1]), ("block", [2, 2, 2]), ("expanded", [1, 2, 1])):
        model.trunk.recompute, calls[:] = policy, [0, 0, 0]
        model(tokens(1, 9), labels=tokens(1, 9, seed=1)).loss_sum.backward()
        assert calls == expected, policy


def test_counted_activations_follow_the_settings():
    config = expand(gla_config(), "inherit", layers="1")

    def count(**options):
        return activation_bytes(config, precision="fp32", **{"num_tokens": 512, **options})

    whole = count()
    assert count(num_tokens=1024) == pytest.approx(2 * whole, rel=0.02)
    assert count(recompute="block") < count(recompute="expanded") < whole
    assert count(loss_chunk_tokens=64) < whole
    assert count(carried=True) == pytest.approx(whole, rel=0.05)
    assert activation_bytes(config, num_tokens=512, precision="bf16") < whole
    # Two of three experts for each token.
    one, two = (activation_bytes(minimax_config(), num_tokens=n, precision="fp32") for n in (128, 256))
    assert two == pytest.approx(2 * one, rel=0.02)

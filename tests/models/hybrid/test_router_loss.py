"""The load-balancing loss of experts against the host's own training loss."""

from __future__ import annotations

import pytest
import torch

from statex_dist.batch import IGNORE_INDEX
from statex_dist.errors import ConfigError
from statex_dist.models.hf import from_pretrained
from tests.models.hybrid.hosts import VOCABULARY, save_host

COEFFICIENT = 0.5  # a usual one would hide in the rounding of the cross entropy
TOKENS = 24
WITH_LOSS = ["granitemoehybrid", "qwen3_next", "qwen3_5_moe_text", "minimax"]


@pytest.mark.parametrize("model_type", WITH_LOSS)
def test_gradients_are_those_of_the_hosts_loss(tmp_path, model_type):
    host = save_host(model_type, tmp_path, output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    ids = torch.randint(1, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    wanted = host.train()(ids, labels=ids, use_cache=False)
    wanted.loss.backward()
    theirs = {name: p.grad for name, p in host.named_parameters() if p.grad is not None}
    model = from_pretrained(tmp_path).train()
    model.set_router_loss(None)
    model.lm_head.chunk_tokens = 7
    padding, targets = 5, TOKENS - 1
    packed = torch.cat([ids, ids.new_zeros(1, padding)], dim=1)
    labels = torch.full_like(packed, IGNORE_INDEX)
    labels[:, :targets] = ids[:, 1:]
    pack = {"labels": labels, "cu_seqlens": torch.tensor([0, TOKENS, TOKENS + padding], dtype=torch.int32)}
    for recompute in ("none", "block"):
        model.recompute = recompute
        model.zero_grad()
        output = model(packed, padding=padding, **pack)
        torch.testing.assert_close(output.router_loss, COEFFICIENT * wanted.aux_loss * targets, rtol=1e-5, atol=0)
        loss = (output.loss_sum + output.router_loss) / targets
        torch.testing.assert_close(loss, wanted.loss, rtol=1e-5, atol=0)
        loss.backward()
        ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert theirs.keys() == ours.keys()
        for name, grad in ours.items():
            scale = max(theirs[name].abs().max().item(), 1e-3)  # of A_log and dt_bias the host has noise of 2e-3
            torch.testing.assert_close(grad, theirs[name], rtol=0, atol=5e-3 * scale, msg=name)
    # A dummy pack: no target, and every parameter has the gradient 0.
    model.zero_grad()
    output = model(packed, labels=torch.full_like(packed, IGNORE_INDEX))
    (output.loss_sum + output.router_loss).backward()
    assert (output.loss_sum.item(), output.router_loss.item()) == (0, 0)
    dummy = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert dummy.keys() == theirs.keys()
    assert not any(grad.any() for grad in dummy.values())
    assert model.eval()(packed, padding=padding, **pack).router_loss is None


@pytest.mark.parametrize("model_type", ["nemotron_h", "kimi_linear", "falcon_h1"])
def test_a_host_without_the_loss_is_trained_without_and_refuses_a_factor(tmp_path, model_type):
    save_host(model_type, tmp_path, **({} if model_type == "falcon_h1" else {"output_router_logits": True}))
    model = from_pretrained(tmp_path).train()
    model.set_router_loss(None)
    ids = torch.arange(1, 9)[None]
    assert model(ids, labels=ids).router_loss is None
    with pytest.raises(ConfigError, match="router_loss"):
        model.set_router_loss(0.1)


def test_the_option_overrides_the_configuration(tmp_path):
    save_host("granitemoehybrid", tmp_path)
    model = from_pretrained(tmp_path).train()
    ids = torch.arange(1, 9)[None]
    model.set_router_loss(None)
    assert model(ids, labels=ids).router_loss is None
    model.set_router_loss(0.1)
    once = model(ids, labels=ids).router_loss
    model.set_router_loss(0.2)
    torch.testing.assert_close(model(ids, labels=ids).router_loss, 2 * once)

"""Our Mamba2 against transformers' on the same weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from statex_dist.models.config import ModelConfig
from statex_dist.models.lm import RecurrentLM
from tests.models.tiny import build, mamba2_config, skip_where_transformers_norm_is_wrong, tokens

VARIANTS = {
    "default": {},
    "one group": {"n_groups": 1},
    "a group per head": {"n_groups": 4},
    "tied": {"tie_word_embeddings": True},
    "linear bias": {"use_bias": True},
    "no convolution bias": {"use_conv_bias": False},
    "other sizes": {"hidden_size": 24, "num_heads": 3, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "wide state": {"state_size": 32, "n_groups": 1, "num_hidden_layers": 3},
    "narrow convolution": {"conv_kernel": 3},
    "limited step": {"time_step_limit": (0.01, 0.5)},
    "residual in the model's dtype": {"residual_in_fp32": False},
}


def theirs(config: ModelConfig, model: RecurrentLM) -> transformers.Mamba2ForCausalLM:
    """transformers' model with ``model``'s weights; its own tensor names must be exactly ours."""
    skip_where_transformers_norm_is_wrong(config)
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    other = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**values)).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    return other


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 8, 29])
def test_logits_and_loss_equal_transformers(variant, num_tokens):
    config = mamba2_config(**VARIANTS[variant])
    model = build(config, dtype=torch.float32)
    other = theirs(config, model)
    ids = tokens(2, num_tokens)
    with torch.no_grad():
        ours, expected = model(ids).logits, other(ids).logits
    assert ours.shape == expected.shape
    assert expected.abs().max() > 0.1, "a comparison of zeros would prove nothing"
    assert (ours - expected).abs().max() < 1e-4
    if num_tokens > 1:
        labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
        loss = model(ids, labels=labels).loss_sum / (labels != -100).sum()
        torch.testing.assert_close(loss, other(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)


def test_gradients_equal_transformers():
    config = mamba2_config(use_bias=True)
    model = build(config, dtype=torch.float32)
    other = theirs(config, model)
    ids = tokens(1, 21)
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    (model(ids, labels=labels).loss_sum / 20).backward()
    other(ids, labels=ids).loss.backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_public_sized_config_has_the_public_number_of_parameters():
    """mamba2-130m as published: 24 layers, 768, 128 states; counted from shapes, nothing is allocated."""
    config = mamba2_config(
        vocab_size=50288,
        hidden_size=768,
        num_hidden_layers=24,
        num_heads=24,
        head_dim=64,
        state_size=128,
        n_groups=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = RecurrentLM(config)
        values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        other = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**values))
    assert sum(p.numel() for p in model.parameters()) == 128_989_632
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}

"""What every family and every expansion must do: packing, segments, decoding, checkpointing, initial values."""

from __future__ import annotations

import pytest
import torch

from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import family_of
from tests.models.tiny import CONFIGS, build, mamba2_config, tokens
from tests.ops.scan_cases import borders

LENGTHS = [7, 1, 20, 2, 13]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def packed_kwargs(lengths):
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()
    return {"cu_seqlens": borders(lengths), "seq_idx": seq_idx, "chunk_size": 8}


@every_config
def test_packed_equals_documents_run_alone(config):
    model = build(config)
    ids = tokens(1, sum(LENGTHS))
    packed = model(ids, output_states=True, **packed_kwargs(LENGTHS))
    alone = [model(part, output_states=True, chunk_size=8) for part in ids.split(LENGTHS, dim=1)]
    logits = torch.cat([out.logits for out in alone], dim=1)
    torch.testing.assert_close(packed.logits, logits, rtol=0, atol=1e-10)
    for layer in range(config.num_hidden_layers):
        for i, state in enumerate(packed.states[layer]):
            expected = torch.cat([out.states[layer][i] for out in alone])
            torch.testing.assert_close(state, expected, rtol=0, atol=1e-10)


@every_config
def test_no_gradient_from_a_document_to_another(config):
    model = build(config)
    seen = []
    model.trunk.embedding_table.register_forward_hook(lambda *args: seen.append(args[-1].requires_grad_()))
    ids = tokens(1, sum(LENGTHS))
    logits = model(ids, **packed_kwargs(LENGTHS)).logits
    start, stop = 8, 28
    (grad,) = torch.autograd.grad(logits[:, start:stop].square().sum(), seen)
    assert grad[:, :start].abs().max() == 0
    assert grad[:, stop:].abs().max() == 0
    assert (grad[:, start:stop].abs().amax(-1) > 0).all()


@every_config
def test_a_token_sees_all_before_it_and_none_after(config):
    model = build(config)
    seen = []
    model.trunk.embedding_table.register_forward_hook(lambda *args: seen.append(args[-1].requires_grad_()))
    logits = model(tokens(1, 12), chunk_size=4).logits
    (grad,) = torch.autograd.grad(logits[:, 5].square().sum(), seen)
    assert grad[:, 6:].abs().max() == 0
    assert (grad[:, :6].abs().amax(-1) > 0).all()


@every_config
@pytest.mark.parametrize("cuts", [[20], [7, 13], [1, 2, 3, 14], [1] * 20])
def test_states_carried_over_segments_equal_one_pass(config, cuts):
    """``[1] * 20`` is decoding: every step takes the single-token form."""
    model = build(config)
    ids = tokens(2, 20)
    with torch.no_grad():
        whole = model(ids, output_states=True, backend="naive")
        states, logits = None, []
        for segment in ids.split(cuts, dim=1):
            out = model(segment, states=states, output_states=True, chunk_size=8)
            states = out.states
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=0, atol=1e-9)
    for got, expected in zip(states, whole.states, strict=True):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@every_config
def test_states_have_the_geometry_of_the_plan(config):
    states = build(config)(tokens(3, 5), output_states=True).states
    for layer, (matrix, *tails) in enumerate(states):
        geometry = config.layer_geometry(layer)
        assert matrix.numel() == 3 * geometry.elements
        # RetNet's state also holds one whole number per sequence: the position of its next token
        kept = sum(tail.numel() for tail in tails if tail.is_floating_point())
        assert kept == 3 * geometry.conv_channels * max(geometry.conv_kernel - 1, 0)


@every_config
def test_bf16_decodes_and_stays_near_the_full_pass(config):
    model = build(config, dtype=torch.bfloat16)
    ids = tokens(1, 12)
    with torch.no_grad():
        whole = model(ids).logits
        states, logits = None, []
        for segment in ids.split([4] + [1] * 8, dim=1):
            out = model(segment, states=states, output_states=True)
            states = out.states
            logits.append(out.logits)
    steps = torch.cat(logits, dim=1)
    assert steps.dtype == torch.bfloat16
    assert states[0][0].dtype == torch.float32
    assert (steps - whole).float().norm() < 0.05 * whole.float().norm()


@every_config
def test_activation_checkpointing_changes_no_gradient(config):
    ids = tokens(1, sum(LENGTHS))
    labels = tokens(1, sum(LENGTHS), seed=1)

    def gradients(checkpointing):
        model = build(config, dtype=torch.float32).train()
        model.trunk.recompute = "block" if checkpointing else "none"
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss = model(ids, labels=labels, **packed_kwargs(LENGTHS)).loss_sum
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, len(saved)

    plain, kept = gradients(False)
    again, kept_less = gradients(True)
    assert kept_less < kept / 2, "checkpointing did not take place"
    for name, grad in plain.items():
        assert torch.equal(grad, again[name]), name


@every_config
def test_loss_is_the_sum_over_targets(config):
    model = build(config)
    ids, labels = tokens(1, 10), tokens(1, 10, seed=1)
    labels[0, 3:6] = -100
    out = model(ids, labels=labels)
    assert out.logits is None
    log_probs = model(ids).logits.log_softmax(-1)
    expected = -sum(log_probs[0, t, labels[0, t]] for t in (0, 1, 2, 6, 7, 8, 9))
    torch.testing.assert_close(out.loss_sum, expected)
    assert model(ids, labels=torch.full_like(labels, -100)).loss_sum == 0


@every_config
def test_initial_values_depend_on_seed_and_name_alone(config):
    def initial(seed):
        model = RecurrentLM(config)
        torch.manual_seed(len(str(seed)))
        model.init_parameters(seed)
        return model.state_dict()

    first, again, other = initial(0), initial(0), initial(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    embeddings = family_of(config.MODEL_TYPE).names.embeddings
    assert not torch.equal(first[embeddings], other[embeddings])
    layers = [name.replace("layers.0.", "layers.1.") for name in first if "layers.0." in name and "proj.weight" in name]
    for name in layers:
        same = name.replace("layers.1.", "layers.0.")
        assert first[name].shape != first[same].shape or not torch.equal(first[name], first[same]), name


@every_config
def test_every_parameter_is_in_the_family_table(config):
    model = RecurrentLM(config)
    specs = family_of(config.MODEL_TYPE).tensors(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {n: s.shape for n, s in specs.items()}
    assert sum(p.numel() for p in model.parameters()) == sum(spec.numel for spec in specs.values())


@every_config
def test_every_parameter_gets_a_gradient(config):
    model = build(config)
    model(tokens(1, 20), labels=tokens(1, 20, seed=1)).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_fresh_mamba2_steps_lie_in_their_range():
    config = mamba2_config(num_heads=16, head_dim=2, time_step_min=0.01, time_step_max=0.05)
    model = RecurrentLM(config)
    model.init_parameters(0)
    mixer = model.trunk.layers[0].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.0099 < steps.min() < steps.max() < 0.0501
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17))

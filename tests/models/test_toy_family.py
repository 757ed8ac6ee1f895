"""A family that is added from outside: one folder (tests/models/toy) and one call of ``register``."""

from __future__ import annotations

import pytest
import torch

from statex_dist.errors import ConfigError
from statex_dist.models import registry
from statex_dist.models.hf import from_pretrained, save_pretrained
from statex_dist.models.mitigation import parse_mitigation
from statex_dist.models.registry import expand_state_dict, make_plan, parameter_roles, read_config
from tests.checkpoints_tools.builders import load_all, run_expand
from tests.models.tiny import COMMON, build, tokens
from tests.models.toy.config import FAMILY, ToyConfig
from tests.ops.scan_cases import borders

LENGTHS = [7, 1, 12]


@pytest.fixture(autouse=True)
def toy_family(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register(FAMILY)


def config(**changes) -> ToyConfig:
    return ToyConfig(**COMMON | {"num_heads": 4, "intermediate_size": 24} | changes)


@pytest.fixture(params=["plain", "merge_heads", "mix_heads"])
def model(request):
    if request.param == "plain":
        return build(config())
    return build(make_plan(config(), layers="1", factor=2, init="inherit", op=request.param))


def test_the_table_is_the_model(model):
    made = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert made == [(name, spec.shape) for name, spec in FAMILY.tensors(model.config).items()]


def test_packed_equals_documents_run_alone(model):
    ids = tokens(1, sum(LENGTHS))
    packed = model(ids, cu_seqlens=borders(LENGTHS), output_states=True, chunk_size=4)
    alone = [model(part, output_states=True, chunk_size=4) for part in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], dim=1), rtol=0, atol=1e-10)
    for layer, state in enumerate(packed.states):
        for i, part in enumerate(state):
            expected = torch.cat([out.states[layer][i] for out in alone])
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mitigation", [None, "forget-more:decay=0.05", "sliding-window:tokens=4"])
def test_steps_equal_the_whole(model, mitigation):
    model.eval().mitigation = parse_mitigation(mitigation) if mitigation else None
    ids, states = tokens(2, 9), None
    with torch.no_grad():
        whole = model(ids)
        for t in range(9):
            step = model(ids[:, t : t + 1], states=states, output_states=True, overwrite_states=True)
            states = step.states
            torch.testing.assert_close(step.logits[:, 0], whole.logits[:, t], rtol=0, atol=1e-10)


def test_save_expand_and_load(tmp_path):
    before = build(config(), dtype=torch.float32)
    save_pretrained(before, tmp_path / "in")
    assert read_config(tmp_path / "in") == before.config.replace(extra=read_config(tmp_path / "in").extra)
    run_expand(tmp_path / "in", tmp_path / "out", layers="0", factor=4, init="lossless", op="mix_heads", seed=3)
    after = make_plan(config(), layers="0", factor=4, init="lossless", op="mix_heads", seed=3)
    expected = expand_state_dict(dict(before.state_dict()), before.config, after)
    written = load_all(tmp_path / "out")
    assert {name: tuple(t.shape) for name, t in expected.items()} == {n: tuple(t.shape) for n, t in written.items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    loaded = from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = tokens(1, 20)
    torch.testing.assert_close(loaded(ids).logits, before.double()(ids).logits, rtol=0, atol=1e-10)
    assert parameter_roles(after)["model.layers.0.attn.mix"] == "mix"


def test_an_operation_that_it_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="toy"):
        make_plan(config(), layers="all", factor=2, init="inherit", op="grow_state")

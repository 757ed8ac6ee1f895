"""State passing against each sequence run alone from the state that it was given."""

import itertools

import pytest
import torch

from statex_dist.batch import PackedBatch
from statex_dist.engine.segment_states import CarriedStates, StatePassing
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict
from tests.runs import GLA, MAMBA2, expanded

CPU = torch.device("cpu")
RETNET = {**GLA, "model_type": "retnet", "num_hidden_layers": 2, "use_short_conv": False}
FAMILIES = {"gla": expanded(GLA), "mamba2": expanded(MAMBA2), "retnet": config_from_dict(RETNET)}


def build(name: str) -> RecurrentLM:
    model = RecurrentLM(FAMILIES[name])
    model.init_parameters(1)
    return model.double()


def pack(seed: int, *lengths: int, masked: int = -1, carried: bool = False, continues: bool = False) -> PackedBatch:
    """Sequences of random tokens; nothing is learned of number ``masked``."""
    ids = torch.randint(0, 256, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    borders = [0, *itertools.accumulate(lengths)]
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1))
    labels[:, [border - 1 for border in borders[1:]]] = -100
    if masked >= 0:
        labels[:, borders[masked] : borders[masked + 1]] = -100
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        seq_idx=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int(),
        carried=carried,
        continues=continues,
    )


def alone(model: RecurrentLM, batch: PackedBatch, states=None) -> list[tuple[float, list]]:
    """The loss of each sequence run alone from ``states``, and its states at the end."""
    found = []
    for first, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        ids, labels = batch.input_ids[:, first:end], batch.labels[:, first:end]
        loss = model(ids, labels=labels, states=states).loss_sum
        found.append((float(loss), model(ids, states=states, output_states=True).states))
    return found


def same(first: list, second: list) -> bool:
    return all(
        torch.allclose(a, b, atol=1e-10) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_sequence_begins_from_the_end_of_another(name: str):
    model, carried = build(name), CarriedStates(passing=StatePassing(1.0, seed=3))
    first, second = pack(0, 9, 17, 6, masked=1), pack(1, 12, 5)
    ends = alone(model, first)
    assert float(carried.forward_loss(model, first, 0, CPU)) == pytest.approx(sum(loss for loss, _ in ends), rel=1e-12)
    kept = carried.state_dict()["passing"]["kept"]
    assert [same(kept, end) for _, end in ends].count(True) == 1
    assert not same(kept, ends[1][1]), "nothing is learned of it"
    expected = sum(loss for loss, _ in alone(model, second, kept))
    from_zero = sum(loss for loss, _ in alone(model, second))
    assert float(carried.forward_loss(model, second, 0, CPU)) == pytest.approx(expected, rel=1e-12)
    assert abs(expected - from_zero) > 1e-3


@torch.no_grad()
def test_each_sequence_is_drawn_on_its_own_and_the_draws_follow_from_the_seed():
    model, batch = build("gla"), pack(2, *[4] * 64)

    def begins(seed: int, lane: int) -> list[bool]:
        """Which sequences of the second pack began from the kept state."""
        passing = StatePassing(0.5, seed)
        CarriedStates(passing=passing).forward_loss(model, batch, lane, CPU)
        return [bool(part.any()) for part in passing.give(batch, lane, None, CPU)[0][0]]

    drawn = begins(0, 0)
    assert 20 < sum(drawn) < 44
    assert drawn == begins(0, 0)
    assert drawn != begins(1, 0)
    assert drawn != begins(0, 1)


@torch.no_grad()
def test_what_goes_on_from_its_own_state_keeps_it():
    model, passing = build("mamba2"), StatePassing(1.0, seed=0)
    carried = CarriedStates(passing=passing)
    carried.forward_loss(model, pack(0, 8, 8), 0, CPU)
    second = pack(3, 10, 7, carried=True)
    own = [tuple(torch.randn_like(part) for part in layer) for layer in alone(model, second)[0][1]]
    kept = carried.state_dict()["passing"]["kept"]
    carried.load_state_dict({"0": own, "passing": {"packs": 1, "kept": kept}})
    expected = alone(model, second, own)[0][0] + alone(model, second, kept)[1][0]
    assert float(carried.forward_loss(model, second, 0, CPU)) == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
def test_a_document_whose_own_state_is_lost_begins_from_an_empty_one():
    model, carried = build("gla"), CarriedStates(passing=StatePassing(1.0, seed=0))
    carried.forward_loss(model, pack(0, 8, 8), 0, CPU)
    kept = carried.state_dict()["passing"]["kept"]
    second = pack(3, 10, 7, carried=True)
    expected = alone(model, second)[0][0] + alone(model, second, kept)[1][0]
    assert float(carried.forward_loss(model, second, 0, CPU)) == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_the_middle_of_a_document_is_not_passed_on(seed: int):
    model, carried = build("gla"), CarriedStates(passing=StatePassing(1.0, seed=seed))
    first = pack(0, 9, 12, continues=True)
    carried.forward_loss(model, first, 0, CPU)
    kept = carried.state_dict()["passing"]["kept"]
    assert same(kept, alone(model, first)[0][1])
    carried.forward_loss(model, pack(1, 20, carried=True, continues=True), 0, CPU)
    assert same(kept, carried.state_dict()["passing"]["kept"]), "nothing ended: the older one stays"


@torch.no_grad()
def test_a_step_that_cannot_be_trusted_passes_nothing_on():
    model, carried = build("gla"), CarriedStates(passing=StatePassing(1.0, seed=0))
    carried.forward_loss(model, pack(0, 8, 8), 0, CPU)
    carried.forget()
    second = pack(1, 6, 6)
    expected = sum(loss for loss, _ in alone(model, second))
    assert float(carried.forward_loss(model, second, 0, CPU)) == pytest.approx(expected, rel=1e-12)


def test_no_gradient_flows_through_a_passed_state():
    model, carried = build("gla"), CarriedStates(passing=StatePassing(1.0, seed=0))
    carried.forward_loss(model, pack(0, 8, 8), 0, CPU)
    kept = [tuple(part.clone() for part in layer) for layer in carried.state_dict()["passing"]["kept"]]
    second = pack(1, 6, 9)
    carried.forward_loss(model, second, 0, CPU).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    before = [tuple(part.expand(2, *part.shape[1:]) for part in layer) for layer in kept]
    model(
        second.input_ids, labels=second.labels, cu_seqlens=second.cu_seqlens, seq_idx=second.seq_idx, states=before
    ).loss_sum.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], grad, atol=1e-12) for name, grad in expected.items())

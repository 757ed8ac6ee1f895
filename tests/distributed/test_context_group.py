"""Context parallelism on real gloo ranks: loss and every gradient equal those of one rank that has the whole pack."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from statex_dist.batch import PackedBatch
from statex_dist.distributed.context_group import ContextGroup, ContextShare, ParallelConfig
from statex_dist.engine.segment_states import CarriedStates
from statex_dist.errors import ConfigError
from statex_dist.models.hf import from_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict
from tests.distributed_test import run_distributed_test
from tests.models.hybrid.hosts import save_host
from tests.models.tiny import STATE_SPACES
from tests.raising import raises
from tests.runs import GLA, MAMBA2, OTHERS, expanded

RANKS = 4
CONVOLVED = {**STATE_SPACES["attn_cfg"], "d_conv": 4}
TOKENS = 96
PACKS = {
    "one document": [96],
    "borders at the cuts": [24, 24, 48],
    "many": [5, 1, 30, 2, 2, 10, 46],
    "a document over three ranks": [20, 60, 16],
    "borders beside the cuts": [23, 2, 22, 3, 46],
}


def models(hybrid: Path = Path()) -> dict[str, Any]:
    """One of every recurrence, with layers of every kind of expansion that it has."""
    return {
        "gla": expanded(GLA),
        "mamba2": expanded(MAMBA2),
        "hgrn2": expanded(OTHERS["hgrn2"]),
        "minimax": expanded(OTHERS["minimax"]),
        "kda": expanded(OTHERS["kda"]),
        "retnet": config_from_dict({**GLA, "model_type": "retnet"}),
        "nemotron_h": hybrid,
        "attention": config_from_dict({**GLA, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2}}),
        "attention, convolved": config_from_dict({**STATE_SPACES, "vocab_size": 256, "attn_cfg": CONVOLVED}),
    }


def build(config: Any, dtype: torch.dtype) -> RecurrentLM:
    if isinstance(config, Path):  # of a hybrid
        return from_pretrained(config, dtype=dtype).train()
    model = RecurrentLM(config)
    model.init_parameters(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mix"):
                parameter.normal_(std=0.5, generator=generator)
            elif name.endswith("gk_proj.1.bias"):
                parameter.uniform_(-3, 3, generator=generator)  # some heads forget within a share, others do not
    return model.to(dtype).train()


def pack(lengths: list[int], *, carried: bool = False, continues: bool = False) -> PackedBatch:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    ids = torch.randint(0, 256, (1, sum(lengths)), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.zeros(1, 1, dtype=torch.long)], dim=1)
    borders = [0, *itertools.accumulate(lengths)]
    labels[:, [b - 1 for b in borders[1:]]] = -100
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        seq_idx=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0).int(),
        carried=carried,
        continues=continues,
    )


def run(model: RecurrentLM, packs: list[PackedBatch], context: ContextGroup | None) -> dict[str, torch.Tensor]:
    """Loss, gradients and the state at the end, of packs one after another in one lane."""
    model.zero_grad()
    carried = CarriedStates(context)
    total = torch.zeros((), dtype=torch.float64)
    for batch in packs:
        loss = carried.forward_loss(model, batch, 0, torch.device("cpu"))
        loss.backward()
        total += loss.detach()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    kept = {
        f"state {layer} {part}": tensor
        for layers in carried.state_dict().values()
        for layer, tensors in enumerate(layers)
        for part, tensor in enumerate(tensors)
    }
    if context is not None:
        # A data-parallel engine sums over all ranks, too.
        total = sum(context.all_gather(total))
        found = {name: sum(context.all_gather(grad)) for name, grad in found.items()}
    return {"loss": total, **found, **kept}


def largest_error(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """The largest error of any value, relative to the largest number in its tensor."""
    assert found.keys() == reference.keys()
    errors = [(found[n] - value).abs().max() / value.abs().max().clamp(min=1e-3) for n, value in reference.items()]
    return float(max(errors))


def _hand_on_nothing(share: ContextShare, final: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(final), torch.zeros_like(final)


def work(rank: int, hybrid: Path) -> dict[str, float]:
    """Return the errors by case (rank 0)."""
    groups = {size: ContextGroup.join(size, timeout=timedelta(minutes=1)) for size in (2, 4)}
    out: dict[str, float] = {}

    def compare(label: str, model: RecurrentLM, packs: list[PackedBatch]) -> None:
        reference = run(model, packs, None) if rank == 0 else {}
        # Groups of 2 once a model: what differs is the number of shares.
        for size, group in groups.items() if "many" in label or "without" in label else [(RANKS, groups[RANKS])]:
            found = run(model, packs, group)
            if rank == 0:
                out[f"{label} | {size} ranks"] = largest_error(found, reference)

    for name, config in models(hybrid).items():
        for dtype in (torch.float64, torch.float32):
            model = build(config, dtype)
            for label in PACKS if dtype == torch.float64 else ["many"]:
                compare(f"{dtype} | {name} | {label}", model, [pack(PACKS[label])])
        model = build(config, torch.float64)
        halves = [pack([30, 66], continues=True), pack([50, 46], carried=True, continues=True)]
        compare(f"{torch.float64} | {name} | carried on", model, halves)
        whole = [pack([96], continues=True), pack([96], carried=True, continues=True)]
        compare(f"{torch.float64} | {name} | carried through", model, whole)
        model.recompute = "block"
        model.lm_head.chunk_tokens = 7
        compare(f"{torch.float64} | {name} | recomputed", model, [pack(PACKS["many"])])
        with mock.patch.object(ContextShare, "exchange", _hand_on_nothing):
            compare(f"without | {name}", build(config, torch.float64), [pack(PACKS["one document"])])
    return out


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    hybrid, pattern = tmp_path_factory.mktemp("hybrid"), "M*-M"
    save_host("nemotron_h", hybrid, hybrid_override_pattern=pattern, num_hidden_layers=len(pattern), vocab_size=258)
    return run_distributed_test(work, RANKS, hybrid)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", list(models()))
def test_loss_gradients_and_states_equal_those_of_one_rank(errors: dict[str, float], name: str):
    cases = {label: error for label, error in errors.items() if f"| {name} |" in label and "without" not in label}
    assert len(cases) == len(PACKS) + 2 + 3 + 1
    # A host's norms are fp32 in a float64 model.
    bounds = {"torch.float64": 1e-6 if name == "nemotron_h" else 1e-10, "torch.float32": 1e-5}
    wrong = {label: error for label, error in cases.items() if not error < bounds[label.split(" | ")[0]]}
    assert not wrong
    assert min(errors[f"without | {name} | {size} ranks"] for size in (2, 4)) > 1e-4, "the state hardly matters here"


def test_ranks_must_divide_into_groups():
    assert ParallelConfig(context=4).data_parallel_size(8) == 2
    hosts = [(8, 16), (6, 12), (4, 8), (6, 6), (2, 8), (1, 1)]
    within = [ParallelConfig(context=4).lies_within_hosts(local, world) for local, world in hosts]
    assert within == [True, False, True, True, False, True]
    with raises(ConfigError, "parallel.context=4", "6"):
        ParallelConfig(context=4).data_parallel_size(6)
    with raises(ConfigError, "parallel.context", "1", "0"):
        ParallelConfig(context=0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_a_sequence_of_any_length(size: int):
    for tokens in (size, 17, 100):
        shares = [ContextGroup(rank=rank, size=size, group=None).share(tokens) for rank in range(size)]
        assert [shares[0][0], shares[-1][1]] == [0, tokens]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
        lengths = [stop - start for start, stop in shares]
        assert max(lengths) - min(lengths) <= 1


def test_slices_of_a_pack_say_what_they_cut():
    batch = pack([24, 24, 48])
    first, second, third = batch.slice(0, 24), batch.slice(24, 60), batch.slice(60, 96)
    assert [(s.carried, s.continues) for s in (first, second, third)] == [(False, False), (False, True), (True, False)]
    assert second.cu_seqlens.tolist() == [0, 24, 36]
    assert second.seq_idx.tolist() == [[0] * 24 + [1] * 12]
    assert third.position_ids[0, 0] == 12
    parts = batch.segments(40)
    assert [part.num_tokens for part in parts] == [32, 32, 32]
    assert torch.equal(torch.cat([part.labels for part in parts], dim=1), batch.labels)
    assert batch.segments(0)[0].num_tokens == 96
    ends = pack([10, 10], carried=True, continues=True)
    assert [(s.carried, s.continues) for s in (ends.slice(0, 5), ends.slice(15, 20))] == [(True, True), (True, True)]

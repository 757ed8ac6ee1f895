"""Context parallelism of hosts of every kind of layer: loss and gradients equal those of one rank."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from statex_dist.batch import PackedBatch
from statex_dist.distributed.context_group import ContextGroup
from statex_dist.engine.segment_states import CarriedStates
from statex_dist.models.hf import from_pretrained
from statex_dist.models.lm import RecurrentLM
from tests.distributed.test_context_group import PACKS, largest_error, pack
from tests.distributed_test import run_distributed_test
from tests.models.hybrid.hosts import save_host

RANKS = 4
HOSTS = {
    "falcon_h1": {},
    "zamba2": {},
    "qwen3_next": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "kimi_linear": {},
}


def run(model: RecurrentLM, packs: list[PackedBatch], context: ContextGroup | None) -> dict[str, torch.Tensor]:
    """Loss, with that of the routers, and gradients of packs in one lane."""
    model.zero_grad()
    carried, total = CarriedStates(context), torch.zeros((), dtype=torch.float64)
    for batch in packs:
        loss = carried.forward_loss(model, batch, 0, torch.device("cpu"))
        if carried.router_loss is not None:
            loss = loss + carried.router_loss
        loss.backward()
        total += loss.detach()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if context is not None:
        found = {name: sum(context.all_gather(grad)) for name, grad in found.items()}
        total = sum(context.all_gather(total))
    return {"loss": total, **found}


def work(rank: int, directory: Path) -> dict[str, float]:
    """Return the errors by case (rank 0)."""
    groups = {size: ContextGroup.join(size, timeout=timedelta(minutes=1)) for size in (2, RANKS)}
    out: dict[str, float] = {}
    for name in HOSTS:
        model = from_pretrained(directory / name, dtype=torch.float64).train()
        for module in model.modules():
            if config := getattr(module, "config", None):
                config._experts_implementation = "eager"
        model.set_router_loss(None)
        carried = [pack([50, 46], continues=True), pack([30, 66], carried=True)]
        for label, packs, size in [
            ("many", [pack(PACKS["many"])], 2),
            ("three ranks", [pack(PACKS["a document over three ranks"])], RANKS),
            ("carried", carried, RANKS),
        ]:
            reference = run(model, packs, None) if rank == 0 else {}
            found = run(model, packs, groups[size])
            if rank == 0:
                out[f"{name} | {label}"] = largest_error(found, reference)
    return out


@pytest.mark.slow  # test_context_group has a host among the default tests
@pytest.mark.distributed
def test_ranks_equal_one(tmp_path: Path):
    for name, settings in HOSTS.items():
        save_host(name, tmp_path / name, vocab_size=258, **settings)
    errors = run_distributed_test(work, RANKS, tmp_path)[0]
    assert len(errors) == 3 * len(HOSTS)
    # Norms and routers of hosts are fp32 in a float64 model.
    assert not {label: error for label, error in errors.items() if not error < 2e-6}

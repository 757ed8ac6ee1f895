"""Some steps of real DeepSpeed ZeRO-3, from scratch or from a checkpoint of any world size; started by torchrun.

    continue_zero3.py OUT FIRST LAST [LOAD]

runs steps FIRST..LAST of a fixed global batch of 12 sequences, writes a checkpoint to OUT and prints one JSON line on
rank 0: the loss of every sequence and step (exact, hexadecimal), and what came back from LOAD.
"""

import json
import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from datetime import timedelta

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import nn
from train_zero3 import Net  # beside this script

GLOBAL_BATCH = 12


def loaded_facts(engine, client_state, model) -> dict:
    """What came back from a checkpoint, beside the weights."""
    groups = engine.optimizer.optimizer.param_groups
    return {
        "note": client_state["note"],
        "rng": int(client_state["rng"][0]),
        "rank_of_rng": client_state["mine"],
        "carried": "carried" in client_state,
        "groups": [[float(group["lr"]), group["weight_decay"]] for group in groups],
        "steps": sorted({float(s["step"]) for s in engine.optimizer.optimizer.state.values()}),
        "global_steps": engine.global_steps,
        "last_epoch": engine.lr_scheduler.last_epoch,
        "offset": model.offset.tolist(),
        "turned": model.turned.tolist(),
    }


def main(out: str, first: int, last: int, load: str | None) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a JIT build of two minutes
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Another start than the run's: whatever is not restored shows.
    torch.manual_seed(0 if load is None else 99)
    model = Net()
    if load is not None:
        with torch.no_grad():
            model.offset.fill_(7.0)
    # What DeepSpeed knows under no name of a buffer, and a buffer whose values do not lie in order.
    model.register_buffer("alias", model.offset)
    model.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
    if load is not None:
        model.turned.zero_()
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    narrow = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    groups = [
        {"params": wide, "weight_decay": 0.1},
        {"params": frozen, "weight_decay": 0.2},  # no sub-group is made of it
        {"params": narrow, "weight_decay": 0.0, "lr": torch.tensor(5e-3)},
    ]
    share = GLOBAL_BATCH // world_size
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": share,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 60},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    report = {"losses": [], "loaded": None}
    if load is not None:
        path, client_state = engine.load_checkpoint(load)
        assert path is not None
        report["loaded"] = loaded_facts(engine, client_state, model)
    for step in range(first, last + 1):
        ids = torch.randint(0, 23, (GLOBAL_BATCH, 9), generator=torch.Generator().manual_seed(step))
        mine = torch.zeros(GLOBAL_BATCH, dtype=torch.float64)
        for index in range(rank * share, (rank + 1) * share):
            logits = engine(ids[index : index + 1, :-1]).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[index, 1:])
            engine.backward(loss)
            engine.step()
            mine[index] = loss.detach().double()
        dist.all_reduce(mine)
        report["losses"].append([value.hex() for value in mine.tolist()])
    rng = torch.full((16,), rank, dtype=torch.uint8)
    carried = {"0": [(torch.full((1, 2), float(rank)),)]}
    engine.save_checkpoint(out, client_state={"note": "hello", "rng": rng, "mine": rank, "carried": carried})
    gathered = [None] * world_size
    dist.all_gather_object(gathered, report["loaded"])
    if rank == 0:
        sys.stdout.write(f"REPORT {json.dumps({**report, 'loaded': gathered})}\n")
    engine.destroy()
    dist.destroy_process_group()
    # torch's communication threads sometimes abort a rank that ends while its peers do; all is done by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)

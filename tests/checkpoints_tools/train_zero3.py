"""Two steps of real DeepSpeed ZeRO-3 on a model with everything that makes resharding hard; started by torchrun."""

import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from datetime import timedelta

import deepspeed
import deepspeed.ops
import torch
from torch import nn


class Net(nn.Module):
    """Odd sizes, a parameter smaller than the world, a frozen layer, buffers and a tied head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.up = nn.Linear(7, 13)
        self.down = nn.Linear(13, 7)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.head = nn.Linear(7, 23, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.linspace(-1, 1, 7))
        self.register_buffer("count", torch.arange(5))

    def forward(self, ids):
        x = self.embed(ids) + self.offset.to(self.embed.weight.dtype)
        x = x + self.frozen(x)
        return self.head(x + self.scale * self.down(torch.tanh(self.up(x))))


def train(directory: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = Net()
    wide = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    narrow = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0, "lr": 5e-3}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 60},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    for step in range(2):
        ids = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(step))
        logits = engine(ids[:, :-1]).float()
        engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        engine.step()
    engine.save_checkpoint(f"{directory}/{dtype}", client_state={"note": "hello", "rng": torch.get_rng_state()})
    engine.destroy()


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a JIT build of two minutes
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    for dtype in ("fp32", "bf16"):
        train(sys.argv[1], dtype)
    torch.distributed.destroy_process_group()
    # torch's communication threads sometimes abort a rank that ends while its peers do; all is done by now.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

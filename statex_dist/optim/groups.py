"""AdamW with weight decay on matrices only.

The groups are made from parameter *names*: under ZeRO-3 a partitioned parameter is flat, so that the usual rule "decay
what has two dimensions" would decay everything or nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from statex_dist.errors import ConfigError


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101); the defaults are those of StateX's post-training.

    Attributes:
        lr: Peak learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay of matrices; norms, biases, convolutions and dynamics have none.
        gradient_clipping: Largest global gradient norm; 0 for no clipping.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} must be 0 or more, not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must lie in [0, 1), not {self.betas}")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, no_decay: Collection[str], config: OptimizerConfig
) -> torch.optim.AdamW:
    """Return AdamW over two groups, with and without weight decay.

    Args:
        named_parameters: The model's parameters that are to be trained.
        no_decay: Names of parameters without weight decay.
        config: Hyper-parameters.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (plain if name in no_decay else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    # DeepSpeed's fused Adam would be compiled on first use; torch's own needs no compiler.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps)

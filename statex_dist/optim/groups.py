"""Optimizers over named groups: trained parameters, their learning rates, and weight decay on matrices only.

The groups are made from parameter *names*: under ZeRO-3 a partitioned parameter is flat, so that the usual rule "decay
tensors of two dimensions" would decay everything or nothing. The *role* of a parameter states the effect of an
expansion on it (:func:`statex_dist.models.registry.parameter_roles`): one of :data:`ROLES`. The
optimizers are in :data:`OPTIMIZERS`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from statex_dist.config import check_finite
from statex_dist.errors import ConfigError, reason
from statex_dist.registry import Registry

logger = logging.getLogger(__name__)

ROLES = ("base", "expanded", "new", "mix", "gain")
"""Roles of a parameter, in the order of their groups."""

OPTIMIZERS = Registry("optimizer.name", {"adamw": "torch.optim:AdamW"})
"""Each is called with the parameter groups, ``lr=`` and the options, and returns a ``torch.optim.Optimizer``."""

_TRAINED = {"all": ROLES, "expanded": ROLES[1:], "new": ROLES[2:]}


BETAS, EPS = (0.9, 0.95), 1e-8


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer; the defaults are those of StateX's post-training.

    Attributes:
        name: ``adamw`` (arXiv 1711.05101), a registered one, or ``module:Class`` of any ``torch.optim.Optimizer``.
        options: Further arguments of its constructor, by name.
        lr: Peak learning rate.
        betas: Decay rates of the two moments of AdamW.
        eps: Added to the root of the second moment of AdamW.
        weight_decay: Decoupled weight decay of matrices; norms, biases, convolutions and dynamics have none.
        gradient_clipping: Largest global gradient norm; 0 for no clipping.
        train: ``all`` parameters, those of the ``expanded`` layers, or only the ``new`` ones (tensors that an expansion
            added, grew or drew again). The others are frozen.
        freeze: Regular expressions; parameters with a match anywhere in their name are frozen too.
        lr_factors: Learning rate relative to ``lr`` by role of a parameter: ``mix`` (mixing matrices), ``gain`` (gains
            of features), ``new`` (other tensors that an expansion added, grew or drew again), ``expanded`` (the rest of
            the expanded layers), ``base``.
    """

    name: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 3e-4
    betas: tuple[float, float] = BETAS
    eps: float = EPS
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0
    train: Literal["all", "expanded", "new"] = "all"
    freeze: list[str] = field(default_factory=list)
    lr_factors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_finite(self, "optimizer")
        OPTIMIZERS.check(self.name)
        if self.name != "adamw" and (tuple(self.betas), self.eps) != (BETAS, EPS):
            raise ConfigError(
                f"optimizer.betas and optimizer.eps are those of adamw, not of {self.name}; give optimizer.options"
            )
        own = {"params", "lr", "weight_decay", *(("betas", "eps") if self.name == "adamw" else ())}
        if taken := sorted(own & set(self.options)):
            raise ConfigError(f"optimizer.options.{taken[0]}: it is set by this section, not by options")
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} must be 0 or more, not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must lie in [0, 1), not {self.betas}")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"optimizer.freeze: {pattern!r} is not a regular expression: {error}") from None
        for role, factor in self.lr_factors.items():
            if role not in ROLES:
                raise ConfigError(f"optimizer.lr_factors: unknown role {role!r}; allowed: {', '.join(ROLES)}")
            if not 0 < factor < float("inf"):
                raise ConfigError(
                    f"optimizer.lr_factors.{role} must be a number above 0, not {factor}; to train nothing of a kind "
                    "use optimizer.train or optimizer.freeze"
                )

    @property
    def factory(self) -> Callable[..., Any]:
        """The function or class that makes the optimizer.

        Raises:
            ConfigError: It cannot be imported, or is no class or function.
        """
        if not callable(found := OPTIMIZERS.get(self.name)):
            raise ConfigError(f"optimizer.name {self.name} is neither a class nor a function")
        return found

    def freeze_in(self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, roles: Mapping[str, str]) -> None:
        """Take the gradient from every parameter that is not to be trained.

        Args:
            named_parameters: The model's parameters.
            roles: Role of each parameter by name.

        Raises:
            ConfigError: The model has no expanded layers to train, a pattern matches nothing, or nothing is left.
        """
        parameters = dict(named_parameters)
        if self.train != "all" and all(roles[name] == "base" for name in parameters):
            raise ConfigError(
                f"optimizer.train {self.train} needs a model with an expansion plan, and this one has none; expand it "
                "(statex expand), or set optimizer.train to all"
            )
        frozen = {name for name in parameters if roles[name] not in _TRAINED[self.train]}
        for pattern in self.freeze:
            matches = {name for name in parameters if re.search(pattern, name)}
            if not matches:
                examples = ", ".join(list(parameters)[:3])
                raise ConfigError(f"optimizer.freeze: {pattern!r} matches no parameter; names are such as {examples}")
            frozen |= matches
        for name in frozen:
            parameters[name].requires_grad_(False)
        sizes = {name: parameter.numel() for name, parameter in parameters.items() if parameter.requires_grad}
        if not sizes:
            patterns = f" and optimizer.freeze {self.freeze}" if self.freeze else ""
            raise ConfigError(f"optimizer.train {self.train}{patterns} leave no parameter to train; freeze less")
        if frozen:
            total = sum(parameter.numel() for parameter in parameters.values())
            logger.info(
                "training %d of %d parameters, in %d of %d tensors",
                sum(sizes.values()),
                total,
                len(sizes),
                len(parameters),
            )

    def build(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        no_decay: Collection[str],
        roles: Mapping[str, str],
        device: torch.device | None = None,
    ) -> torch.optim.Optimizer:
        """Return the optimizer over the groups ``decay`` and ``no_decay``; with ``lr_factors``, over two for each role.

        A group also carries its ``name`` and its ``lr_factor``: its learning rate over the configuration's, whatever
        the schedule.

        Args:
            named_parameters: The model's parameters; those without gradient are left out.
            no_decay: Names of parameters without weight decay.
            roles: Role of each parameter by name.
            device: Where the optimizer's states will be; None for the CPU. On a GPU AdamW is torch's fused one.

        Raises:
            ConfigError: The optimizer cannot be imported, or made with these options.
        """
        apart = bool(self.lr_factors)
        members: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for role in ROLES if apart else ("",):
            members |= {(role, True): [], (role, False): []}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                members[roles[name] if apart else "", name not in no_decay].append(parameter)
        groups: list[dict[str, Any]] = []
        for (role, decay), parameters in members.items():
            factor = float(self.lr_factors.get(role, 1.0))
            groups.append(
                {
                    "params": parameters,
                    "weight_decay": self.weight_decay if decay else 0.0,
                    "lr": self.lr * factor,
                    "name": f"{role}.{_kind(decay)}" if apart else _kind(decay),
                    "lr_factor": factor,
                }
            )
        for role in self.lr_factors:
            if not any(members[role, decay] for decay in (True, False)):
                logger.warning("optimizer.lr_factors.%s has no effect: no trained parameter has this role", role)
        # DeepSpeed's fused Adam would be compiled on first use; torch's own needs no compiler.
        adamw: dict[str, Any] = {"betas": self.betas, "eps": self.eps} if self.name == "adamw" else {}
        if adamw and device is not None and device.type == "cuda" and not {"foreach", "fused"} & set(self.options):
            adamw["fused"] = True  # one kernel for all elements, where the default has a dozen that each read them
        try:
            optimizer = self.factory([g for g in groups if g["params"]], lr=self.lr, **adamw, **self.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer.name {self.name} cannot be made with its options: {reason(error)}") from None
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"optimizer.name {self.name} is not a torch.optim.Optimizer")
        if not all("lr" in group for group in optimizer.param_groups):
            raise ConfigError(f"optimizer.name {self.name} has groups without lr, which the schedule sets")
        return optimizer


def _kind(decay: bool) -> str:
    return "decay" if decay else "no_decay"

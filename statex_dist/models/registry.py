"""The families, by the ``model_type`` of their ``config.json``. Adding one touches no other file.

A family is a folder with ``config``, ``layout``, ``init``, ``expand`` and (unless other software runs its models)
``mixer``. Mixers pull in torch and the scan kernels, so they are imported when a model is built, never when a
checkpoint is only read: this module and what it imports need numpy and nothing heavier.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from statex_dist.errors import CheckpointError, ConfigError, shown
from statex_dist.models.bamba.config import BambaConfig
from statex_dist.models.config import ModelConfig, read_config_dict
from statex_dist.models.distributions import Distribution
from statex_dist.models.gated_deltanet.config import GatedDeltaNetConfig
from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.models.kda.config import KDAConfig
from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.lightning.config import LightningConfig
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.recipe import Recipe
from statex_dist.models.retnet.config import RetNetConfig
from statex_dist.models.state_spaces.config import StateSpacesConfig
from statex_dist.state.plan import ExpansionPlan, Init, LayerExpansion, Op, extend_plan, select_layers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model family.

    Attributes:
        config: Its config class, which names its ``model_type``.
        folder: Its folder below ``statex_dist/models``.
    """

    config: type[ModelConfig]
    folder: str

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"statex_dist.models.{self.folder}.{name}")

    @property
    def model_type(self) -> str:
        """The ``model_type`` of its configs."""
        return self.config.MODEL_TYPE

    @property
    def names(self) -> Names:
        """Where the family keeps embeddings, layers and head."""
        return self._module("layout").NAMES

    @property
    def mixer(self) -> ModuleType:
        """The module with the family's ``Block`` (and, where layers share parameters, ``shared_inputs``)."""
        return self._module("mixer")

    def block_class(self) -> type[torch.nn.Module]:
        """Import and return the family's layer."""
        return self.mixer.Block

    def first_value(self, suffix: str, shape: tuple[int, ...], *, config: ModelConfig) -> Distribution:
        """Return the distribution of a layer's tensor in a fresh model, by name without the layer's prefix."""
        return self._module("init").first_value(suffix, shape, config=config)

    def outside_tensors(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """Return the tensors outside the layers, by full name: embeddings, final norm, head, shared parameters."""
        specs = self.names.outside_layers(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, tied=config.tie_word_embeddings
        )
        return {**self.shared_tensors(config), **specs}

    def shared_tensors(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """Return parameters that the layers share, by full name; most families have none."""
        layout = self._module("layout")
        return layout.shared_tensors(config) if hasattr(layout, "shared_tensors") else {}

    def shared_inputs(self, trunk: torch.nn.Module) -> Sequence[Sequence[torch.Tensor | None]]:
        """Return what the shared parameters give each layer: further arguments of its forward, each one per layer."""
        return self.mixer.shared_inputs(trunk) if hasattr(self.mixer, "shared_inputs") else ()

    def layer_tensors(self, config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
        """Return the tensors of one recurrent layer, by name without the layer's prefix."""
        return self._module("layout").layer_tensors(config, layer)

    def tensors(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """Return every tensor of a model that the family knows, by full name (of a mixed model, not those between).

        Their order is that of the built model's ``named_parameters()``, in which a ZeRO-3 checkpoint is flat.
        """
        specs = self.outside_tensors(config)
        behind = {name: specs.pop(name) for name in self.names.behind_layers if name in specs}
        for layer in config.recurrent_layers:
            prefix = self.names.layer(layer)
            specs.update({prefix + name: spec for name, spec in self.layer_tensors(config, layer).items()})
        return {**specs, **behind}

    def layer_recipes(self, before: ModelConfig, after: ModelConfig, expansion: LayerExpansion) -> dict[str, Recipe]:
        """Return what becomes of a layer's tensors, by name without the prefix; those not named are kept.

        Raises:
            AssertionError: The recipes do not make the tensors that the layout of the expanded model asks for.
        """
        recipes: dict[str, Recipe] = self._module("expand").layer_recipes(before, after, expansion)
        old, new = self.layer_tensors(before, expansion.layer), self.layer_tensors(after, expansion.layer)
        made = {name: spec.shape for name, spec in old.items()} | {name: r.shape for name, r in recipes.items()}
        assert made == {name: spec.shape for name, spec in new.items()}, f"{self.folder}: {expansion}"
        return recipes


FAMILIES = {
    family.model_type: family
    for family in (
        Family(config=GLAConfig, folder="gla"),
        Family(config=Mamba2Config, folder="mamba2"),
        Family(config=StateSpacesConfig, folder="state_spaces"),
        Family(config=HGRN2Config, folder="hgrn2"),
        Family(config=RetNetConfig, folder="retnet"),
        Family(config=LightningConfig, folder="lightning"),
        Family(config=GatedDeltaNetConfig, folder="gated_deltanet"),
        Family(config=KDAConfig, folder="kda"),
        Family(config=BambaConfig, folder="bamba"),
    )
}


def family_of(model_type: Any) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        CheckpointError: We have no such family.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"model_type {shown(model_type)} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def find_family(values: dict[str, Any]) -> Family | None:
    """Return the family that the contents of a ``config.json`` belong to, or None."""
    return next((family for family in FAMILIES.values() if family.config.recognises(values)), None)


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Return the config that the contents of a ``config.json`` describe."""
    family = find_family(values)
    if family is None and "model_type" not in values:
        shown = repr(values.get("architectures"))[:80]
        raise CheckpointError(
            f"config.json has no model_type (architectures: {shown}); add the one that the model's class has, such as "
            f"{', '.join(kind for kind in FAMILIES if kind != StateSpacesConfig.MODEL_TYPE)}"
        )
    return (family or family_of(values["model_type"])).config.from_dict(values)


def read_config(model_dir: Path) -> ModelConfig:
    """Return the config of a model directory."""
    return config_from_dict(read_config_dict(model_dir))


def default_op(config: ModelConfig, init: Init) -> Op:
    """Return the operation that an initialisation asks for where the user names none."""
    ops: tuple[Any, ...] = config.OPS
    if init == "lossless" and "mix_heads" in ops:
        return "mix_heads"
    return "grow_state" if init == "copy" else ops[0]


def make_plan(
    config: ModelConfig,
    *,
    layers: str,
    factor: int | None,
    init: Init,
    seed: int = 0,
    op: Op | None = None,
    reset_dynamics: bool = False,
) -> ModelConfig:
    """Return ``config`` with an expansion plan in it.

    Args:
        config: The model to expand.
        layers: A rule of :func:`statex_dist.state.plan.select_layers`.
        factor: Growth of each layer's state; None means ``full``, all heads of a layer.
        init: How the new state starts.
        seed: Seed of the random values.
        op: The operation; None takes :func:`default_op`.
        reset_dynamics: Whether decays, steps and norms start anew, as in the authors' scripts.

    Raises:
        ConfigError: The plan does not fit the model.
    """
    op = op or default_op(config, init)
    if factor is None:
        if op == "grow_state":
            raise ConfigError(
                f"--factor full is for models with heads to merge or mix; give a number for op {op} of "
                f"{config.MODEL_TYPE}"
            )
        factor = config.replace(statex=None).layer_geometry(config.recurrent_layers[0]).num_heads
    chosen = [
        LayerExpansion(layer=layer, op=op, factor=factor, init=init, seed=seed, reset_dynamics=reset_dynamics)
        for layer in select_layers(layers, config.num_hidden_layers, config.recurrent_layers)
    ]
    return config.replace(statex=extend_plan(config.statex, chosen))


def new_expansions(source: ModelConfig, target: ModelConfig) -> ExpansionPlan:
    """Return the part of ``target``'s plan that ``source`` does not have yet."""
    assert target.statex is not None
    done = {e.layer for e in source.statex.layers} if source.statex else set()
    return ExpansionPlan(layers=tuple(e for e in target.statex.layers if e.layer not in done))

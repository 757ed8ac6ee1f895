"""A hybrid in the form of transformers' classes: the host's own model and cache, with our recurrent mixers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.bamba.configuration_bamba import BambaConfig
from transformers.models.bamba.modeling_bamba import BambaForCausalLM, BambaModel

from checkpoints_tools.export.remote_code.configuration import expansion_plan
from statex_dist.models.config_keys import NO_ACTIVATION
from statex_dist.models.hybrid.mamba2 import Mamba2Layers
from statex_dist.models.hybrid.mixers import HostedMamba2

HOST = "bamba"
ACTIVATION = "hidden_act"
PLACES: dict[int, str] = {}
"""Name of the recurrent mixer in each layer that has one."""

SIZES: dict[str, Any] = {}
"""Sizes and options of the recurrent mixers before the plan; they were checked when this file was written."""


DERIVED: tuple[str, ...] = ()
"""Patterns of tensors that the host's files may hold and our mixers compute."""


class StateXConfig(BambaConfig):
    """The host's configuration with an expansion plan under ``statex``."""

    model_type = "bamba"

    def __init__(self, statex: dict[str, Any] | None = None, **kwargs: Any):
        self.statex = statex
        if kwargs.get(ACTIVATION) == NO_ACTIVATION:  # it keeps classes without the plan from opening the model
            del kwargs[ACTIVATION]
            base = (statex or {}).get("base", {})
            kwargs |= {key: base[key] for key in (ACTIVATION,) if key in base}
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``config.json``."""
        values: dict[str, Any] = super().to_dict()
        return {**values, ACTIVATION: NO_ACTIVATION} if self.statex else values

    def sizes(self) -> Mamba2Layers:
        """Return what computes the sizes of the recurrent mixers."""
        found = Mamba2Layers.__new__(Mamba2Layers)
        vars(found).update({**SIZES, "statex": expansion_plan(self.statex)})
        return found


def place_mixers(layers: nn.ModuleList, config: StateXConfig) -> None:
    """Put our recurrent mixers in the place of the host's, and give the host's rules of names to our model type."""
    sizes = config.sizes()
    for index, name in PLACES.items():
        parent, _, leaf = name.rpartition(".")
        mixer: Any = HostedMamba2(sizes, index)
        mixer.layer_idx = index
        setattr(layers[index].get_submodule(parent), leaf, mixer)
    rules = get_checkpoint_conversion_mapping(BambaForCausalLM.__name__) or get_checkpoint_conversion_mapping(HOST)
    if rules:
        register_checkpoint_conversion_mapping(StateXConfig.model_type, rules, overwrite=True)


class StateXModel(BambaModel):
    """The host's model without its head."""

    config_class = StateXConfig
    _keys_to_ignore_on_load_unexpected = [*(BambaModel._keys_to_ignore_on_load_unexpected or ()), *DERIVED]  # noqa: RUF012 - transformers' own form

    def __init__(self, config: Any):
        super().__init__(config)
        place_mixers(self.layers, config)


class StateXForCausalLM(BambaForCausalLM):
    """The host's model with its head."""

    config_class = StateXConfig
    _keys_to_ignore_on_load_unexpected = StateXModel._keys_to_ignore_on_load_unexpected

    def __init__(self, config: Any):
        super().__init__(config)
        place_mixers(self.model.layers, config)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return what transformers says of the host, which it knows by its class's name."""
        host: Any = BambaForCausalLM
        return bool(host._supports_default_dynamic_cache())

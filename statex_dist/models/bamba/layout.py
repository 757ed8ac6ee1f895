"""Names and shapes of a Bamba model's Mamba2 layers, as transformers writes them."""

from __future__ import annotations

from statex_dist.models.bamba.config import BambaConfig
from statex_dist.models.layout import Names, TensorSpec
from statex_dist.models.mamba2 import layout as mamba2_layout

NAMES = Names(trunk="model", final_norm="final_layernorm", embedding="embed_tokens")


def renamed(suffix: str) -> str | None:
    """Return Bamba's name of a Mamba2 tensor, or None for one outside the mixer."""
    return suffix.replace("mixer.", "mamba.", 1) if suffix.startswith("mixer.") else None


def layer_tensors(config: BambaConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the mixer's tensors of one Mamba2 layer under the plan; its norms and MLP are passed through."""
    specs = mamba2_layout.layer_tensors(config.mamba2(), layer)
    return {name: spec for suffix, spec in specs.items() if (name := renamed(suffix))}

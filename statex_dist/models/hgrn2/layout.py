"""Names and shapes of an HGRN2 model's tensors, as flash-linear-attention writes them."""

from __future__ import annotations

from statex_dist.models.fla import NAMES, block_tensors, mix_tensor
from statex_dist.models.hgrn2.config import HGRN2Config
from statex_dist.models.layout import TensorSpec, layer_units

__all__ = ["LOWER_BOUNDS", "NAMES", "layer_tensors", "shared_tensors"]

LOWER_BOUNDS = f"{NAMES.trunk}.lower_bounds"


def shared_tensors(config: HGRN2Config) -> dict[str, TensorSpec]:
    """Return what the layers share: the logits of their gates' lower bounds, ``[num_layers, hidden]``.

    Tensor-parallel ranks all hold them whole: layers with merged heads need other columns than those without.
    """
    if not config.use_lower_bound:
        return {}
    return {LOWER_BOUNDS: TensorSpec(shape=(config.num_hidden_layers, config.hidden_size), decay=False, trunk=False)}


def layer_tensors(config: HGRN2Config, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix."""
    hidden, geometry = config.hidden_size, config.layer_geometry(layer)
    units = layer_units(geometry)
    cuts = {"q": (units.keys,), "f": (units.keys,), "i": (units.values,)}
    specs = mix_tensor(geometry.num_heads, geometry.values_per_key)
    for name, cut in cuts.items():
        specs[f"attn.{name}_proj.weight"] = TensorSpec(shape=(hidden, hidden), units=cut)
    if config.use_short_conv:
        for name, cut in cuts.items():
            specs[f"attn.{name}_conv1d.weight"] = TensorSpec(
                shape=(hidden, 1, config.conv_size), decay=False, units=cut
            )
    specs["attn.g_norm.weight"] = TensorSpec(shape=(hidden,), decay=False, units=(units.values,))
    specs["attn.o_proj.weight"] = TensorSpec(shape=(hidden, hidden), axis=1, units=(units.values,))
    return block_tensors(config, specs)

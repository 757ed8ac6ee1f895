"""A Mamba2 model's tensors as transformers writes them: names, shapes, first values, expansion (``d_state`` grows).

B and C of every group get new rows behind their old ones, in ``in_proj`` and in the convolution's channels; ``z``,
``x``, ``dt`` and the output projection are kept. The rows of B and C, by initialisation:

* ``reinit``: all their rows are drawn again (as in the StateX authors' ``mamba4``);
* ``inherit``: the old rows are kept, the new ones drawn;
* ``lossless``: the same, but the new C rows of ``in_proj`` are zero: the new state columns are written but not yet
  read, so the function is unchanged; C receives gradient at once and B from the second step on. (Both zero, the
  authors' ``merge_zero``, is a saddle point: its gradient stays zero.)
* ``copy``: the new rows are copies of the old ones (the authors' ``merge_copy``: C.B grows by the factor).

The dynamics (``dt_bias``, ``A_log``) and the gated norm are kept in every mode unless the plan resets them, as the
authors' script does, after which almost every head forgets within one token.
"""

from __future__ import annotations

import math
from functools import partial

from statex_dist.models.layout import GAIN_NAME, Names, TensorSpec, Units, expansion_tensors
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import Family, MegatronLayer
from statex_dist.models.row_mapping import (
    Block,
    Constant,
    Distribution,
    Fresh,
    Keep,
    LogCount,
    Normal,
    RowMapping,
    TimeStep,
    Uniform,
    from_blocks,
    grown_groups,
    redrawn,
)
from statex_dist.state.plan import LayerExpansion

NAMES = Names(trunk="backbone", final_norm="norm_f")
DYNAMICS = ("mixer.dt_bias", "mixer.A_log", "mixer.norm.weight")

MEGATRON_NAMES = {
    "norm.weight": "mixer.in_proj.layer_norm_weight",
    "mixer.dt_bias": "mixer.dt_bias",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.in_proj.bias": "mixer.in_proj.bias",
    "mixer.conv1d.weight": "mixer.conv1d.weight",
    "mixer.conv1d.bias": "mixer.conv1d.bias",
    "mixer.norm.weight": "mixer.norm.weight",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.out_proj.bias": "mixer.out_proj.bias",
}
"""Tensors of a Mamba2 layer and their names below ``decoder.layers.{i}.``; biases of projections are not Megatron's."""


def conv_parts(config: Mamba2Config, layer: int) -> tuple[tuple[str, int], ...]:
    """Return the channel parts ``x | B | C`` of the convolution."""
    grouped = config.n_groups * config.layer_geometry(layer).projected_key_dim
    return (("x", config.inner_size), ("B", grouped), ("C", grouped))


def in_proj_parts(config: Mamba2Config, layer: int) -> tuple[tuple[str, int], ...]:
    """Return the row parts ``z | x | B | C | dt`` of ``in_proj``."""
    return (("z", config.inner_size), *conv_parts(config, layer), ("dt", config.num_heads))


def layer_tensors(config: Mamba2Config, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of one layer under the plan, by name without the layer's prefix.

    Tensor-parallel ranks share whole heads; B and C belong to groups of them.
    """
    hidden, inner, heads = config.hidden_size, config.inner_size, config.num_heads
    rows, channels = in_proj_parts(config, layer), conv_parts(config, layer)
    num_rows, num_channels = sum(n for _, n in rows), sum(n for _, n in channels)
    by_head, by_group = Units(heads), Units(config.n_groups)
    row_units = (by_head, by_head, by_group, by_group, by_head)
    conv_units = (by_head, by_group, by_group)
    specs = {
        "norm.weight": TensorSpec(shape=(hidden,), decay=False),
        "mixer.dt_bias": TensorSpec(shape=(heads,), decay=False, units=(by_head,)),
        "mixer.A_log": TensorSpec(shape=(heads,), decay=False, units=(by_head,)),
        "mixer.D": TensorSpec(shape=(heads,), decay=False, units=(by_head,)),
        **expansion_tensors(config.layer_geometry(layer), "mixer"),
        "mixer.in_proj.weight": TensorSpec(shape=(num_rows, hidden), parts=rows, units=row_units),
    }
    if config.use_bias:
        specs["mixer.in_proj.bias"] = TensorSpec(shape=(num_rows,), parts=rows, decay=False, units=row_units)
    specs["mixer.conv1d.weight"] = TensorSpec(
        shape=(num_channels, 1, config.conv_kernel), parts=channels, decay=False, units=conv_units
    )
    if config.use_conv_bias:
        specs["mixer.conv1d.bias"] = TensorSpec(shape=(num_channels,), parts=channels, decay=False, units=conv_units)
    specs["mixer.norm.weight"] = TensorSpec(shape=(inner,), decay=False, units=(by_head,))
    specs["mixer.out_proj.weight"] = TensorSpec(shape=(hidden, inner), axis=1, units=(by_head,))
    if config.use_bias:
        # On every rank: it is added once, to the sum of the ranks' outputs.
        specs["mixer.out_proj.bias"] = TensorSpec(shape=(hidden,), decay=False)
    return specs


def first_value(
    suffix: str, shape: tuple[int, ...], *, config: Mamba2Config, layer_default: bool = False
) -> Distribution:
    """Return the distribution of the tensor ``suffix`` (name without the layer's prefix).

    The rules are transformers' ``Mamba2PreTrainedModel._init_weights``: steps log-uniform between ``time_step_min``
    and ``time_step_max``, ``A = 1..num_heads``, convolution and output projection uniform as torch draws them.

    Args:
        suffix: Name without the layer's prefix.
        shape: Shape of the tensor.
        config: The model's configuration.
        layer_default: Whether values are those of the layer by itself (torch's rules, ``dt_bias`` 1), which is what the
            StateX authors' script leaves, since it replaces modules after the model's initialisation has run.
    """
    conv_bound = 1 / math.sqrt(config.conv_kernel)
    if suffix.endswith("norm.weight") or suffix == "mixer.D":
        return Constant(1.0)
    if suffix == "mixer.A_log":
        return LogCount()
    if suffix == "mixer.dt_bias":
        if layer_default:
            return Constant(1.0)
        return TimeStep(config.time_step_min, config.time_step_max, config.time_step_floor)
    if suffix == "mixer.conv1d.weight" or (layer_default and suffix == "mixer.conv1d.bias"):
        return Uniform(conv_bound)
    if layer_default and suffix.startswith("mixer.in_proj"):
        return Uniform(1 / math.sqrt(config.hidden_size))
    if suffix.endswith((".bias", GAIN_NAME)):
        return Constant(0.0)
    if suffix == "mixer.out_proj.weight":
        bound = 1 / math.sqrt(config.inner_size)
        if config.rescale_prenorm_residual:
            bound /= math.sqrt(config.num_hidden_layers)
        return Uniform(bound)
    return Normal(config.initializer_range)


def layer_mappings(config: Mamba2Config, after: Mamba2Config, expansion: LayerExpansion) -> dict[str, RowMapping]:
    """Return a row mapping for each tensor of an expanded layer that changes, by name without the prefix."""
    first = partial(first_value, config=config, layer_default=expansion.reset_dynamics)
    mappings = {}
    for name, spec in layer_tensors(config, expansion.layer).items():
        if expansion.reset_dynamics and name in DYNAMICS:
            mappings[name] = redrawn(spec.shape, first(name, spec.shape), source_rows=spec.shape[0])
        if not spec.parts:
            continue
        blocks: list[Block] = []
        start = 0
        for part, rows in spec.parts:
            new = first(name, spec.shape)
            # A zero projection suffices: the convolution of zeros is zero, because new biases start at zero.
            if expansion.init == "lossless" and part == "C" and name == "mixer.in_proj.weight":
                new = Constant(0.0)
            if part not in ("B", "C"):
                blocks.append(Keep(start, start + rows))
            elif expansion.init == "reinit":
                blocks.append(Fresh(rows * expansion.factor, new))
            else:
                blocks += grown_groups(
                    start,
                    groups=config.n_groups,
                    rows=rows // config.n_groups,
                    factor=expansion.factor,
                    new=None if expansion.init == "copy" else new,
                )
            start += rows
        mappings[name] = from_blocks(spec.shape, blocks)
    return mappings


def megatron_notes(config: Mamba2Config) -> list[str]:
    """Return what has to be known about a model's weights before Megatron gets them."""
    notes = []
    if config.use_bias:
        notes.append("Megatron's MambaMixer has no bias in its projections; this model has")
    if not config.use_conv_bias:
        notes.append("Megatron's MambaMixer asks for conv1d.bias, which this model has not")
    states = {config.layer_geometry(layer).key_dim for layer in config.recurrent_layers}
    if len(states) > 1:
        notes.append(f"Megatron has one mamba_state_dim for all layers; this model's layers have {sorted(states)}")
    if config.n_groups == 1:
        notes.append("n_groups is 1: Megatron runs the model with tensor parallelism of size 1 only")
    return notes


FAMILY = Family(
    config=Mamba2Config,
    names=NAMES,
    layer_tensors=layer_tensors,
    first_value=first_value,
    layer_mappings=layer_mappings,
    block="statex_dist.models.mamba2.mixer:Mamba2Block",
    megatron=MegatronLayer(names=MEGATRON_NAMES, notes=megatron_notes),
)

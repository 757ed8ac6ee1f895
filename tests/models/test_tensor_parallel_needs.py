"""Every family: what a tensor-parallel rank holds is all that its part of a layer depends on.

The layer itself is run with every weight that a rank does not hold replaced by noise. The channels that the rank has
(those of its columns of the output projection) must come out as in the whole layer. What ranks would all-reduce is
filled in from the whole layer: the other channels where the output norm takes its mean square, and the outputs of
matrices that are cut along their inputs. The ranks' own outputs must add up to those.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from statex_dist.models.core.layers import RMSNorm
from statex_dist.models.core.sequences import Sequences
from statex_dist.models.layout import Units, shard_ranges
from tests.models.tiny import (
    CONFIGS,
    build,
    expanded,
    gated_deltanet_config,
    gla_config,
    hgrn2_config,
    kda_config,
    minimax_config,
    retnet_config,
)

FURTHER = {
    "gla-two-heads": gla_config(num_heads=2),
    "gla-merged-to-two": expanded(gla_config(use_short_conv=True), "inherit"),
    "hgrn2-mixed": expanded(hgrn2_config(use_short_conv=True), "inherit", factor=3, op="mix_heads"),
    "hgrn2-merged-second": expanded(hgrn2_config(), "inherit", layers="1"),
    "retnet-mixed": expanded(retnet_config(use_short_conv=True), "inherit", factor=3, op="mix_heads"),
    "minimax-merged": expanded(minimax_config(), "inherit", factor=4),
    "minimax-merged-to-two": expanded(minimax_config(), "inherit"),
    "minimax-grown": expanded(minimax_config(), "inherit", op="grow_state"),
    "gated_deltanet-one-key-head": gated_deltanet_config(num_heads=1, num_v_heads=2, expand_v=2.0, use_gate=False),
    "gated_deltanet-many-value-heads": gated_deltanet_config(num_v_heads=8, use_short_conv=False),
    "kda-two-key-heads": kda_config(num_heads=2, num_v_heads=8),
    "kda-one-head": kda_config(num_heads=1, expand_v=2.0),
}
ALL = CONFIGS | FURTHER


def whole_layer(config, index):
    """Return a layer, its tensors' specs and the arguments of its call."""
    model = build(config)
    x = torch.randn(2, 7, config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shared = [values[index] for values in model.trunk.shared_inputs()]
    return model.trunk.layers[index], model.family.layer_tensors(config, index), (x, Sequences(), None, *shared)


def channels(spec, name, tp, rank):
    """Mask of the columns of a matrix that a rank holds."""
    mask = torch.zeros(spec.shape[spec.axis], dtype=torch.bool)
    for start, stop in shard_ranges(spec, name, tp, rank):
        mask[start:stop] = True
    return mask


def with_noise(layer, specs, tp, rank):
    """Return the layer with noise in place of the rows that a rank does not hold."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for number, (name, spec) in enumerate(specs.items()):
            parameter = layer.get_parameter(name)
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(parameter)
            mask = channels(spec, name, tp, rank).view([-1 if a == spec.axis else 1 for a in range(parameter.ndim)])
            parameter.copy_(torch.where(mask, parameter, noise))
    return layer


def run_rank(layer, specs, inputs, tp, rank, whole):
    """Run one rank; ``whole`` has what came before and behind the modules that ranks meet at, by name."""
    layer = with_noise(layer, specs, tp, rank)
    summed = [name.removesuffix(".weight") for name, spec in specs.items() if spec.axis == 1]
    masks = {name: channels(specs[f"{name}.weight"], name, tp, rank) for name in summed}
    outputs = {}

    def meet_norm(name):
        def hook(module, arguments):
            filled = []
            for found, wanted in zip(arguments, whole[name][0], strict=True):
                # A norm over each head sees its heads as an axis of their own.
                mask = masks[summed[0]].view(found.shape[-2:] if found.ndim == 4 else -1)
                filled.append(torch.where(mask, found, wanted))
                torch.testing.assert_close(filled[-1], wanted, rtol=0, atol=1e-10)
            return tuple(filled)

        return hook

    def meet_sum(name):
        def hook(module, arguments, _):
            mask = masks[name]
            found, wanted = arguments[0][..., mask], whole[name][0][0][..., mask]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
            outputs[name] = F.linear(found, module.weight[:, mask])
            return whole[name][1]

        return hook

    for name, module in layer.named_modules():
        if is_output_norm(name, module):
            module.register_forward_pre_hook(meet_norm(name))
        elif name in summed:
            module.register_forward_hook(meet_sum(name))
    result, _ = layer(*inputs)
    assert outputs.keys() == set(summed)
    return result, outputs


def is_output_norm(name, module):
    return isinstance(module, RMSNorm) and "." in name


def check_ranks(layer, specs, inputs, tp):
    whole = {}
    summed = [name.removesuffix(".weight") for name, spec in specs.items() if spec.axis == 1]

    def record(name):
        return lambda module, arguments, output: whole.update({name: (arguments, output)})

    handles = [
        module.register_forward_hook(record(name))
        for name, module in layer.named_modules()
        if name in summed or is_output_norm(name, module)
    ]
    wanted, _ = layer(*inputs)
    for handle in handles:
        handle.remove()
    ranks = [run_rank(layer, specs, inputs, tp, rank, whole) for rank in range(tp)]
    for result, _ in ranks:
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-10)
    for name in summed:
        bias = getattr(layer.get_submodule(name), "bias", None)
        total = sum(outputs[name] for _, outputs in ranks) + (0 if bias is None else bias)
        torch.testing.assert_close(total, whole[name][1], rtol=0, atol=1e-10)


# Eight ranks cannot share four heads of Mamba2: tests/models/test_layout.py.
@pytest.mark.parametrize(
    ("case", "tp"), [(case, tp) for case in ALL for tp in (2, 4, 8) if tp < 8 or not case.startswith("mamba2")]
)
@torch.no_grad()
def test_a_rank_needs_only_what_it_holds(case, tp):
    config = ALL[case]
    for index in range(config.num_hidden_layers):
        check_ranks(*whole_layer(config, index), tp)


@pytest.mark.parametrize(
    ("config", "name", "units"),
    [
        (CONFIGS["gla-mixed"], "attn.k_proj.weight", (Units(4),)),
        (CONFIGS["gla-mixed"], "attn.mix", (Units(4),)),
        (CONFIGS["gla-merged"], "attn.q_proj.weight", (Units(4),)),
        (gla_config(num_heads=2), "attn.g_norm_swish_gate.weight", (Units(8),)),
        (CONFIGS["gated_deltanet"], "attn.k_proj.weight", (Units(8),)),
        (CONFIGS["gated_deltanet-mixed"], "attn.b_proj.weight", (Units(4),)),
        (CONFIGS["kda"], "attn.f_proj.0.weight", (Units(4),)),
        (CONFIGS["mamba2"], "mixer.conv1d.weight", (Units(4), Units(4), Units(4))),
        (FURTHER["minimax-merged"], "self_attn.qkv_proj.weight", (Units(4), Units(4), Units(4))),
    ],
)
@torch.no_grad()
def test_a_wrong_table_is_noticed(config, name, units):
    index = next((e.layer for e in config.statex.layers if e.op != "grow_features"), 0) if config.statex else 0
    layer, specs, inputs = whole_layer(config, index)
    spec = replace(specs[name], units=units)
    with pytest.raises(AssertionError, match="not close"):
        check_ranks(layer, specs | {name: spec}, inputs, 4)

"""Run flash-linear-attention's own models in Triton's interpreter beside ours: a test's subprocess.

Each case builds a model of ``fla.models`` with random weights, saves it, opens the directory with our loader and
compares logits. The kernel that fla takes depends on the length: up to 64 tokens the recurrent one, above it and for
gradients the chunked one.

KDA's chunked kernels take ten times as long as the others here, so most of its cases run at the shorter length alone;
with ``safe_gate`` they do not run at all, because Triton's interpreter cannot call a builtin that they hold by name.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from checkpoints_tools.expand.expand import expand, prepare_expansion
from checkpoints_tools.plan.options import PlanOptions
from checkpoints_tools.reshard.reshard import reshard
from statex_dist.errors import CheckpointError
from statex_dist.models.hf import from_pretrained, save_pretrained
from tests.models import tiny
from tests.ops.interpreted_kernels import counting_range
from tests.ops.interpreter import enter_interpreter

COMMON = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
COMMON |= {"use_cache": False, "fuse_cross_entropy": False}
CLASSES = {"gla": "GLA", "hgrn2": "HGRN2", "retnet": "RetNet", "gated_deltanet": "GatedDeltaNet", "kda": "KDA"}
CLASSES |= {"mamba2": "Mamba2"}
COMMON_OF = {"mamba2": {key: COMMON[key] for key in COMMON if key != "intermediate_size"}}
HEADS = {
    "gla": {"num_heads": 2, "expand_k": 1.0},
    "hgrn2": {"expand_ratio": 16},
    "retnet": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 16, "expand_v": 1.0},
    "kda": {"num_heads": 2, "head_dim": 16},
    "mamba2": {"head_dim": 16, "state_size": 8, "chunk_size": 16},
}
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 100.0}
SHORT, LONG = 37, 70
"""Tokens: fewer than a chunk of 64, and more."""

VARIANTS = {
    "gla": {
        "plain": {},
        "short convolution, tied": {"use_short_conv": True, "tie_word_embeddings": True, "num_kv_heads": 2},
        "nothing fused": {"use_short_conv": True, "conv_size": 3, "fuse_norm": False, "fuse_swiglu": False},
        "sizes": {"expand_k": 0.5, "expand_v": 2.0, "intermediate_size": None, "norm_eps": 1e-2},
        "rounded sizes": {"hidden_size": 100, "num_heads": 1, "expand_k": 0.29, "expand_v": 0.57},
        "clamped": {"clamp_min": -0.02, "use_gk": False, "use_gv": True, "attn_mode": "fused_recurrent"},
        "attention": {"attn": ATTENTION},
    },
    "hgrn2": {
        "plain": {"num_hidden_layers": 3},
        "short convolution, tied": {"use_short_conv": True, "conv_size": 3, "tie_word_embeddings": True},
        "nothing fused": {"fuse_norm": False, "fuse_swiglu": False, "norm_eps": 1e-2},
        "no lower bound": {"use_lower_bound": False, "norm_eps": 1e-2},
        "heads by number": {"expand_ratio": None, "num_heads": 1},
        "both given": {"expand_ratio": 8, "num_heads": 2},
        "attention in two ways": {
            **{"num_hidden_layers": 3, "max_position_embeddings": 8},
            "attn": [{"layers": [2, 0], "num_heads": 2}, {**ATTENTION, "window_size": 9}],
        },
    },
    "retnet": {
        "plain": {},
        "one head, tied": {"num_heads": 1, "num_kv_heads": 1, "tie_word_embeddings": True},
        "nothing fused": {"fuse_norm": False, "fuse_swiglu": False, "norm_eps": 1e-2},
        "sizes": {"expand_k": 0.5, "expand_v": 1.0, "intermediate_size": None},
        "parallel": {"attn_mode": "parallel", "clamp_min": -0.01},
        "attention, a window": {"attn": {**ATTENTION, "window_size": 9}},
    },
    "gated_deltanet": {
        "plain": {},
        "no convolution, tied": {"use_short_conv": False, "tie_word_embeddings": True},
        "shared keys": {"num_heads": 1, "num_v_heads": 2, "expand_v": 2.0, "conv_size": 3},
        "no gate": {"use_gate": False, "norm_eps": 1e-2},
        "negative eigenvalues": {"allow_neg_eigval": True, "output_gate_activation": "sigmoid", "fuse_norm": False},
        "attention": {"attn": {**ATTENTION, "layers": [0], "num_kv_heads": None}},
    },
    "kda": {
        "plain": {},
        "no convolution, tied": {"use_short_conv": False, "tie_word_embeddings": True},
        "shared keys": {"num_heads": 1, "num_v_heads": 2, "expand_v": 2.0, "conv_size": 3},
        "negative eigenvalues": {"allow_neg_eigval": True, "norm_eps": 1e-2, "fuse_norm": False},
        "bound": {"lower_bound": -2.0},
        "safe gate": {"lower_bound": -5.0, "safe_gate": True},
        "attention": {"attn": ATTENTION},
    },
    "mamba2": {
        "plain": {},
        "epsilon, tied": {"norm_eps": 1e-2, "tie_word_embeddings": True, "residual_in_fp32": False},
        "limits": {"dt_limit": (0.05, 0.4)},
        "one limit": {"dt_limit": (0.3, float("inf")), "hidden_act": "swish"},
        "biases": {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 1},
        "a group per head": {"n_groups": 4, "norm_eps": 1e-2},
        "groups": {"n_groups": 2, "norm_eps": 1e-2, "dt_limit": (0.05, 0.4)},
        "first values, kernels": {
            **{"A_init_range": (2, 3), "conv_init": 0.1, "dt_min": 0.01, "dt_max": 0.2, "dt_init_floor": 0.02},
            **{"fuse_norm": False, "rescale_prenorm_residual": False, "initializer_range": 0.5},
        },
    },
}
BY_STEPS = {("mamba2", "groups")}
"""What fla computes right token by token alone: without CUDA kernels, a longer text takes B and C of other groups."""

GRADIENT_OPTIONS = {"kda": {"num_hidden_layers": 1}, "gla": {"attn": ATTENTION}}

REFUSED = {
    "gla": [
        ({"num_kv_heads": 1}, "num_kv_heads"),
        ({"use_output_gate": False}, "use_output_gate"),
        ({"feature_map": "relu"}, "feature_map"),
        ({"elementwise_affine": False}, "elementwise_affine"),
        ({"attnres_block_size": 2}, "attnres_block_size"),
        ({"gate_logit_normalizer": 4}, "gate_logit_normalizer"),
    ],
    "hgrn2": [({"elementwise_affine": False}, "elementwise_affine")],
    "retnet": [
        ({"num_kv_heads": 1}, "num_kv_heads"),
        ({"use_output_gate": False}, "use_output_gate"),
        ({"feature_map": "relu"}, "feature_map"),
        ({"use_short_conv": True}, "use_short_conv"),
    ],
    "gated_deltanet": [({"num_v_heads": 1}, "num_v_heads")],
    "kda": [({"num_v_heads": 1}, "num_v_heads")],
    "mamba2": [
        ({"rmsnorm": False}, "rmsnorm"),
        ({"norm_before_gate": True}, "norm_before_gate"),
        ({"D_has_hdim": True}, "D_has_hdim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
        ({"time_step_limit": [0.0, 0.5]}, "time_step_limit"),
    ],
}
"""Options that fla has or ignores and we do not, with the name in the refusal: the key, or the missing tensors."""

OURS = {
    "gla": tiny.gla_config(),
    "hgrn2": tiny.hgrn2_config(use_short_conv=True),
    "retnet": tiny.retnet_config(),
    "gated_deltanet": tiny.gated_deltanet_config(tie_word_embeddings=True),
    "kda": tiny.kda_config(),
    "mamba2": tiny.mamba2_config(n_groups=1),
}
QUICK = "delta rules, first variants"
GROUPS = {
    "decays": ("gla", "hgrn2", "retnet", "mamba2"),
    "delta rules": ("gated_deltanet", "kda"),
    QUICK: ("gated_deltanet", "kda"),
}
"""The models that one process runs: each start takes five seconds. The quick group leaves KDA's gradients out too."""

TOLERANCE = dict.fromkeys(CLASSES, 1e-5) | {"gated_deltanet": 2e-5, "kda": 2e-5}
"""Of the largest logit; fla's delta rules are off by up to 9e-6 from ours in float64."""

GRADIENT_TOLERANCE = 3e-4
"""Of the largest value of a parameter's gradient; fla's gradient of KDA's ``A_log`` is off by 1.5e-4."""


def variants_of(group: str, family: str) -> list[str]:
    return list(VARIANTS[family])[: 1 if group == QUICK else None]


def has_gradients(group: str, family: str) -> bool:
    return (group, family) != (QUICK, "kda")


def checks_of(group: str) -> list[str]:
    names = []
    for family in GROUPS[group]:
        names += [f"{family}: {variant}" for variant in variants_of(group, family)]
        names += [f"{family}: gradients"] if has_gradients(group, family) else []
        names += [f"{family}: refusals", f"{family}: from us to fla"]
        names += ["mamba2: expanded"] if family == "mamba2" else []
    return [*names, "families of transformers"]


def lengths_of(family: str, variant: str) -> tuple[int, ...]:
    """Both lengths for a family's first variant, one of them in turn for the others."""
    place = list(VARIANTS[family]).index(variant)
    if family == "kda":
        return (SHORT,)
    return (SHORT, LONG) if place == 0 else ((LONG,), (SHORT,))[place % 2]


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, window_size: tuple[int, int]):
    """flash-attention's function, which needs a GPU, with a dense mask: ``[B, T, H, D]`` each."""
    assert causal
    place = torch.arange(q.shape[1])
    ago = place[:, None] - place
    seen = (ago >= 0) & ((ago <= window_size[0]) if window_size[0] >= 0 else torch.ones_like(ago, dtype=torch.bool))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return o.transpose(1, 2)


def fla_model(family: str, options: dict) -> torch.nn.Module:
    """A model of fla's with every parameter random, in sizes that keep logits of order 1."""
    import fla.models

    config = getattr(fla.models, f"{CLASSES[family]}Config")(**COMMON_OF.get(family, COMMON) | HEADS[family] | options)
    model = getattr(fla.models, f"{CLASSES[family]}ForCausalLM")(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if name.endswith(("norm.weight", "norm_f.weight", "swish_gate.weight")):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("A_log"):
                parameter.copy_(torch.linspace(-3, 1, parameter.numel()))
            elif name.endswith("lower_bounds"):
                parameter.copy_(noise)
            elif parameter.dim() == 1 or "embeddings" in name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def ours_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model as our loader reads it from what fla writes."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return from_pretrained(Path(directory))


def logits_error(family: str, expected: torch.Tensor, found: torch.Tensor) -> float:
    assert 0.3 < expected.std() < 3, "of order 1"
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < TOLERANCE[family], (expected.shape[1], error)
    return error


@torch.no_grad()
def compare_logits(family: str, theirs: torch.nn.Module, ours: torch.nn.Module, num_tokens: int) -> float:
    ids = tiny.tokens(2, num_tokens)
    return logits_error(family, theirs(ids).logits, ours(ids).logits)


@torch.no_grad()
def compare_steps(theirs: torch.nn.Module, ours: torch.nn.Module) -> float:
    """Logits of a Mamba2 model that fla reads one token at a time, from a state of zeros."""
    from fla.models.utils import Cache

    ids, cache = tiny.tokens(2, SHORT), Cache()
    for layer, block in enumerate(theirs.backbone.layers):
        mixer = block.mixer
        state = torch.zeros(2, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
        tail = torch.zeros(2, mixer.conv_dim, mixer.conv_kernel_size)
        cache.update(recurrent_state=state, conv_state=tail, layer_idx=layer, offset=0)
    steps = [theirs(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(SHORT)]
    return logits_error("mamba2", torch.cat(steps, dim=1), ours(ids).logits)


def check_expanded_mamba2() -> tuple[float, float]:
    """A directory of fla's, grown alike in all layers, is opened by fla and by transformers: all compute the same."""
    import fla.models
    import transformers

    options = {"norm_eps": 1e-2, "dt_limit": (0.05, 0.4)}
    with tempfile.TemporaryDirectory() as name:
        source, target, export = (Path(name) / part for part in ("source", "target", "export"))
        fla_model("mamba2", options).save_pretrained(source)
        before = from_pretrained(source).config
        expand(prepare_expansion(source, PlanOptions(layers="all", factor=2, init="inherit")), target)
        reshard(target, export, to="hf")
        ours = from_pretrained(target)
        assert ours.config.layer_geometry(0).key_dim == 2 * before.state_size
        of_fla, of_transformers = fla.models.Mamba2ForCausalLM, transformers.Mamba2ForCausalLM
        errors = []
        for owner, directory in ((of_fla, target), (of_fla, export), (of_transformers, export)):
            theirs, report = owner.from_pretrained(directory, output_loading_info=True)
            assert not any(report.values()), report
            errors.append(compare_logits("mamba2", theirs.eval(), ours, SHORT))
    return max(errors[:2]), errors[2]


def compare_gradients(family: str, theirs: torch.nn.Module, ours: torch.nn.Module) -> tuple[float, float]:
    """Logits, and gradients of the mean cross entropy, by the chunked kernels."""
    ids = tiny.tokens(2, LONG)
    expected = theirs(ids, labels=ids)
    expected.loss.backward()
    with torch.no_grad():
        error = logits_error(family, expected.logits.detach(), ours(ids).logits)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = ours(ids, labels=labels).loss_sum / (2 * (LONG - 1))
    loss.backward()
    assert abs(loss.item() - expected.loss.item()) < TOLERANCE[family]
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == found.keys()
    errors = {name: ((found[name] - g).abs().max() / g.abs().max()).item() for name, g in gradients.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < GRADIENT_TOLERANCE, (worst, errors[worst])
    return error, errors[worst]


def check_refusals(family: str) -> None:
    for options, named in REFUSED[family]:
        with pytest.raises(CheckpointError) as caught:
            ours_of(fla_model(family, options))
        assert named in str(caught.value)


def check_other_way(family: str) -> float:
    """What we write, fla opens: no tensor too few, none too many."""
    import fla.models

    ours = tiny.build(OURS[family], dtype=torch.float32)
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(ours, Path(directory) / "model")
        theirs, report = getattr(fla.models, f"{CLASSES[family]}ForCausalLM").from_pretrained(
            Path(directory) / "model", output_loading_info=True
        )
    assert not any(report.values()), report
    return compare_logits(family, theirs.eval(), ours, SHORT)


def check_transformers() -> None:
    """fla registers classes of its own for transformers' ``mamba2``; our loader asks for none."""
    from transformers import AutoConfig

    assert type(AutoConfig.for_model("mamba2")).__module__.startswith("fla.")
    ours, ids = tiny.build(tiny.mamba2_config(), dtype=torch.float32), tiny.tokens(2, SHORT)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        save_pretrained(ours, Path(directory) / "model")
        assert torch.equal(from_pretrained(Path(directory) / "model")(ids).logits, ours(ids).logits)


def main(group: str) -> None:
    enter_interpreter()
    import fla.layers.attn
    import fla.models

    fla.layers.attn.flash_attn_func = flash_attention
    for name in ("fla", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = counting_range
    started = time.perf_counter()

    def done(check: str, *errors: float) -> None:
        print(f"ok {check}", flush=True)  # noqa: T201
        spent = f"{time.perf_counter() - started:.1f} s"
        print(check, spent, *(f"{e:.1e}" for e in errors), file=sys.stderr, flush=True)  # noqa: T201

    for family in GROUPS[group]:
        for variant in variants_of(group, family):
            theirs = fla_model(family, VARIANTS[family][variant])
            ours = ours_of(theirs)
            if (family, variant) in BY_STEPS:
                errors = [compare_steps(theirs, ours)]
            else:
                errors = [compare_logits(family, theirs, ours, length) for length in lengths_of(family, variant)]
            done(f"{family}: {variant}", *errors)
        if has_gradients(group, family):
            theirs = fla_model(family, GRADIENT_OPTIONS.get(family, {}))
            done(f"{family}: gradients", *compare_gradients(family, theirs, ours_of(theirs)))
        check_refusals(family)
        done(f"{family}: refusals")
        done(f"{family}: from us to fla", check_other_way(family))
        if family == "mamba2":
            done("mamba2: expanded", *check_expanded_mamba2())
    check_transformers()
    done("families of transformers")


if __name__ == "__main__":
    main(sys.argv[1])

"""A Mamba2 model in the original layout: mamba_ssm's ``MambaConfig`` read as a Mamba2 configuration, other names.

The file has no ``model_type``: it is recognised by ``ssm_cfg``, whose ``layer`` must say ``Mamba2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

from statex_dist.checkpoint.json_file import decode_floats
from statex_dist.errors import CheckpointError, shown
from statex_dist.models.attention_layers import AttentionLayer, AttentionSizes
from statex_dist.models.config import LARGEST_SIZE, check_layer_list, check_type, is_layer
from statex_dist.models.config_keys import SHARED_KEYS, without_plan
from statex_dist.models.layout import Names, TensorSpec, Units
from statex_dist.models.mamba2 import tensors as mamba2
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.row_mapping import Constant, Distribution, Uniform
from statex_dist.state.plan import MAX_LAYERS, ExpansionPlan

_SIZES = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "chunk_size": 256}
_SWITCHES = {"bias": False, "conv_bias": True}
_STEPS = {"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init_floor": "time_step_floor"}
_FIXED: dict[str, Any] = {
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "d_ssm": None,
    "process_group": None,
}
_HARMLESS = ("A_init_range", "conv_init", "use_mem_eff_path", "sequence_parallel")
"""Of first values, and the choice of kernels."""

_SSM_KEYS = frozenset(("layer", "dt_limit", *_SIZES, *_SWITCHES, *_STEPS, *_FIXED, *_HARMLESS))
"""Arguments of mamba_ssm's ``Mamba2`` that ``ssm_cfg`` may have: any other one is an error there too."""

_TOP_SWITCHES = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True}
_TOP_KEYS = frozenset(
    {"d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", *_TOP_SWITCHES}
    | {"pad_vocab_size_multiple"}
)
"""Fields of ``MambaConfig``. ``fused_add_norm`` chooses a kernel."""

_ATTENTION_KEYS: dict[str, tuple[Any, Any]] = {
    **{"num_heads": (int, None), "num_heads_kv": (int | None, None), "head_dim": (int | None, None)},
    **{"mlp_dim": (int, 0), "d_conv": (int, 0), "rotary_emb_dim": (int, 0), "rotary_emb_base": (float, 10000.0)},
    **{"qkv_proj_bias": (bool, True), "out_proj_bias": (bool, True)},
    **{"causal": (bool, False), "rotary_emb_interleaved": (bool, False), "softmax_scale": (float | None, None)},
}
"""Arguments of mamba_ssm's ``MHA`` that ``attn_cfg`` may have: their types and defaults."""

_MLP_MULTIPLE = 128
"""mamba_ssm's ``GatedMLP`` rounds its inner size up to a multiple of it."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What transformers adds where it writes such a file, with our code."""

_WHERE = "config.json of a state-spaces model"
_MIXERS = "statex_dist.models.state_spaces.mixer"


@dataclass(kw_only=True)
class StateSpacesConfig(Mamba2Config):
    """A Mamba2 configuration that remembers the file that it came from.

    Attributes:
        original: Contents of the original ``config.json``.
        attention: Layers with softmax attention (``attn_layer_idx``).
        attention_options: Arguments of those layers (``attn_cfg``), defaults included; empty without any.
    """

    MODEL_TYPE: ClassVar[str] = "mamba2_state_spaces"

    original: dict = field(default_factory=dict)
    attention: list = field(default_factory=list)
    attention_options: dict = field(default_factory=dict)

    @classmethod
    def recognises(cls, values: dict[str, Any]) -> bool:
        """Return whether a ``config.json`` is of mamba_ssm."""
        return "model_type" not in values and "ssm_cfg" in values and "d_model" in values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build the config from the original file's contents.

        Raises:
            CheckpointError: Not a Mamba2 model, a key is missing or wrong, or a variant that we do not support.
        """
        values = decode_floats(values)
        given = without_plan(values).get("ssm_cfg")
        if not isinstance(given, dict) or given.get("layer") != "Mamba2":
            layer = given.get("layer", "Mamba1") if isinstance(given, dict) else given
            raise CheckpointError(f"config.json: ssm_cfg is of a {layer} model; only Mamba2 is supported")
        unknown = [key for key in values if key not in _TOP_KEYS | SHARED_KEYS | {*_TOKENS}]
        unknown += [f"ssm_cfg.{key}" for key in given if key not in _SSM_KEYS]
        if unknown:
            raise CheckpointError(
                f"{_WHERE}: unknown key {', '.join(str(key)[:40] for key in unknown[:6])}; mamba_ssm has none of that "
                "name"
            )
        ssm = {**_SIZES, **_SWITCHES, **_FIXED, "dt_limit": [0.0, math.inf], **given}
        top = {"pad_vocab_size_multiple": 8, "d_intermediate": 0, **_TOP_SWITCHES, **values}
        _check_values(top, ssm)
        mixed = values.get("attn_layer_idx") or []
        if not isinstance(mixed, list) or not all(is_layer(layer, values["n_layer"]) for layer in mixed):
            raise CheckpointError(f"{_WHERE}: attn_layer_idx must list layers of the model, not {shown(mixed)}")
        check_layer_list(f"{_WHERE}: attn_layer_idx", mixed, values["n_layer"])
        options = _attention_options(values.get("attn_cfg") or {}, values["d_model"]) if mixed else {}
        multiple = top["pad_vocab_size_multiple"]
        config = Mamba2Config.from_dict(
            {
                "vocab_size": -(-values["vocab_size"] // multiple) * multiple,
                "hidden_size": values["d_model"],
                "num_hidden_layers": values["n_layer"],
                "num_heads": ssm["expand"] * values["d_model"] // ssm["headdim"],
                "head_dim": ssm["headdim"],
                "state_size": ssm["d_state"],
                "n_groups": ssm["ngroups"],
                "conv_kernel": ssm["d_conv"],
                "expand": ssm["expand"],
                "use_bias": ssm["bias"],
                "use_conv_bias": ssm["conv_bias"],
                "chunk_size": ssm["chunk_size"],
                "time_step_limit": ssm["dt_limit"],
                **{name: ssm[key] for key, name in _STEPS.items() if key in ssm},
                "residual_in_fp32": top["residual_in_fp32"],
                "tie_word_embeddings": top["tie_embeddings"],
                "initializer_range": 0.02,
                **{key: values[key] for key in _TOKENS if key in values},
            }
        )
        plan = ExpansionPlan.from_dict(values["statex"]) if values.get("statex") else None
        known = {f.name: getattr(config, f.name) for f in fields(config)}
        return cls(
            **{**known, "statex": plan}, original=dict(values), attention=sorted(set(mixed)), attention_options=options
        )

    def with_all_names(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return ``values``: no other library has a class for such files."""
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the original file's contents, with the plan."""
        return self.with_plan(dict(self.original))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers with softmax attention."""
        return tuple(self.attention)

    @property
    def obstacle(self) -> str | None:
        """Variants of attention that are not run here."""
        options = self.attention_options
        if options and not options["causal"]:
            return f"attention layers {self.attention} see later tokens (attn_cfg.causal is not true)"
        if options and options["mlp_dim"]:
            return f"attention layers {self.attention} have an MLP inside (attn_cfg.mlp_dim={options['mlp_dim']})"
        return None

    def attention_layer(self, layer: int) -> AttentionLayer | None:
        """Return one of the attention layers, or None for variants that are not run here."""
        if self.obstacle:
            return None
        sizes = _attention_sizes(self.attention_options, self.hidden_size)
        return AttentionLayer(
            sizes=sizes,
            block=f"{_MIXERS}:AttentionBlock",
            tensors=attention_tensors(self, sizes),
            first_value=partial(first_value_around, config=self),
        )

    @property
    def own_block(self) -> str | None:
        """The block that has an MLP, where the model has one."""
        return f"{_MIXERS}:StateSpacesBlock" if self.gated_mlp_size else None

    @property
    def gated_mlp_size(self) -> int:
        """Inner size of each layer's MLP; 0 without one."""
        return -(-self.original.get("d_intermediate", 0) // _MLP_MULTIPLE) * _MLP_MULTIPLE

    def plain_keys(self) -> dict[str, Any]:
        """Return the grown ``ssm_cfg.d_state`` where every layer grows by the same factor."""
        factor = self.common_factor()
        return {"ssm_cfg": {**self.original["ssm_cfg"], "d_state": self.state_size * factor}} if factor else {}


def _check_values(top: dict[str, Any], ssm: dict[str, Any]) -> None:
    """Raise unless every value of the file, its defaults included, is one that mamba_ssm takes and we implement.

    Raises:
        CheckpointError: A value is of the wrong type, out of range, or of a variant that we do not support.
    """
    for key, wanted in _FIXED.items():
        if ssm[key] is not wanted:
            raise CheckpointError(
                f"{_WHERE}: ssm_cfg.{key}={repr(ssm[key])[:80]} is not supported; allowed: {wanted!r}"
            )
    switches = {key: top[key] for key in _TOP_SWITCHES}
    switches |= {f"ssm_cfg.{key}": ssm[key] for key in (*_SWITCHES, "use_mem_eff_path") if key in ssm}
    for key, value in switches.items():
        check_type(key, value, bool)
    if not top["rms_norm"]:
        raise CheckpointError(f"{_WHERE}: rms_norm=false is not supported; allowed: true")
    numbers = {key: top.get(key) for key in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple")}
    numbers |= {f"ssm_cfg.{key}": ssm[key] for key in _SIZES}
    for key, number in numbers.items():
        most = MAX_LAYERS if key == "n_layer" else LARGEST_SIZE
        if not is_layer(number, most + 1) or number == 0:
            raise CheckpointError(f"{_WHERE}: {key} must be a whole number from 1 to {most}, not {shown(number)}")
    if not is_layer(top["d_intermediate"], LARGEST_SIZE):
        raise CheckpointError(
            f"{_WHERE}: d_intermediate must be a whole number from 0, not {repr(top['d_intermediate'])[:80]}"
        )
    for key in ("dt_limit", *_STEPS):
        if key in ssm:
            check_type(f"ssm_cfg.{key}", ssm[key], tuple[float, ...] if key == "dt_limit" else float)
    if len(ssm["dt_limit"]) != 2:
        raise CheckpointError(f"{_WHERE}: ssm_cfg.dt_limit={repr(ssm['dt_limit'])[:80]} must be two numbers")


def _attention_options(given: Any, hidden_size: int) -> dict[str, Any]:
    """Return the arguments of attention layers, those that are left out at mamba_ssm's defaults.

    Raises:
        CheckpointError: One is unknown or missing, of a wrong type or out of range.
    """
    if not isinstance(given, dict) or (unknown := [key for key in given if key not in _ATTENTION_KEYS]):
        what = shown(given) if not isinstance(given, dict) else f"the unknown key {shown(unknown[0])}"
        raise CheckpointError(f"{_WHERE}: attn_cfg must be a mapping of mamba_ssm's arguments of MHA, not {what}")
    options = {key: given.get(key, default) for key, (_, default) in _ATTENTION_KEYS.items()}
    for key, (hint, default) in _ATTENTION_KEYS.items():
        check_type(f"attn_cfg.{key}", value := options[key], hint)
        if type(value) is int and hint is not float and not (1 if default is None else 0) <= value <= LARGEST_SIZE:
            raise CheckpointError(f"{_WHERE}: attn_cfg.{key} is out of range: {shown(value)}")
    _attention_sizes(options, hidden_size)
    return options


def _attention_sizes(options: dict[str, Any], hidden_size: int) -> AttentionSizes:
    """Return the sizes of attention layers.

    Raises:
        CheckpointError: They do not fit together.
    """
    where, heads = f"{_WHERE}: attn_cfg", options["num_heads"]
    if options["head_dim"] is None and hidden_size % heads:
        raise CheckpointError(f"{where}: num_heads={heads} does not divide d_model={hidden_size}; give head_dim")
    sizes = AttentionSizes(
        num_heads=heads,
        num_kv_heads=options["num_heads_kv"] or heads,
        head_dim=options["head_dim"] or hidden_size // heads,
        bias=options["qkv_proj_bias"],
        out_bias=options["out_proj_bias"],
        rotary_dim=options["rotary_emb_dim"],
        rotary_base=options["rotary_emb_base"],
        interleaved=options["rotary_emb_interleaved"],
        scale=options["softmax_scale"],
        conv_kernel=options["d_conv"],
    )
    sizes.check(where)
    return sizes


def mlp_tensors(config: StateSpacesConfig) -> dict[str, TensorSpec]:
    """Return the tensors of a layer's MLP and its norm, by name without the layer's prefix; none without an MLP."""
    hidden, inner = config.hidden_size, config.gated_mlp_size
    if not inner:
        return {}
    channels = Units(inner)
    return {
        "norm2.weight": TensorSpec(shape=(hidden,), decay=False),
        "mlp.fc1.weight": TensorSpec(
            shape=(2 * inner, hidden), parts=(("up", inner), ("gate", inner)), units=(channels, channels)
        ),
        "mlp.fc2.weight": TensorSpec(shape=(hidden, inner), axis=1, units=(channels,)),
    }


def attention_tensors(config: StateSpacesConfig, sizes: AttentionSizes) -> dict[str, TensorSpec]:
    """Return the tensors of an attention layer, by name without the layer's prefix."""
    hidden, rows = config.hidden_size, sum(rows for _, rows in sizes.parts)
    cut: dict[str, Any] = {"parts": sizes.parts, "units": sizes.units}
    specs = {
        "norm.weight": TensorSpec(shape=(hidden,), decay=False),
        "mixer.in_proj.weight": TensorSpec(shape=(rows, hidden), **cut),
    }
    if sizes.bias:
        specs["mixer.in_proj.bias"] = TensorSpec(shape=(rows,), decay=False, **cut)
    if sizes.conv_kernel:
        specs["mixer.conv1d.weight"] = TensorSpec(shape=(rows, 1, sizes.conv_kernel), decay=False, **cut)
        specs["mixer.conv1d.bias"] = TensorSpec(shape=(rows,), decay=False, **cut)
    specs["mixer.out_proj.weight"] = TensorSpec(shape=(hidden, sizes.query_size), axis=1, units=sizes.units[:1])
    if sizes.out_bias:
        specs["mixer.out_proj.bias"] = TensorSpec(shape=(hidden,), decay=False)
    return specs | mlp_tensors(config)


def layer_tensors(config: StateSpacesConfig, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of a Mamba2 layer under the plan, by name without the layer's prefix."""
    return mamba2.layer_tensors(config, layer) | mlp_tensors(config)


def first_value_around(suffix: str, shape: tuple[int, ...], *, config: StateSpacesConfig) -> Distribution:
    """Return the distribution of a tensor of an attention layer or an MLP (name without the layer's prefix).

    The rules are mamba_ssm's: as torch draws them, but for biases of matrices (zero) and the matrices at the end of a
    residual branch, which are divided by the root of the number of layers.
    """
    if "norm" in suffix:
        return Constant(1.0)
    if "conv1d" in suffix:
        return Uniform(1 / math.sqrt(config.attention_options["d_conv"]))
    if suffix.endswith(".bias"):
        return Constant(0.0)
    last = suffix in ("mixer.out_proj.weight", "mlp.fc2.weight")
    return Uniform(1 / math.sqrt(shape[1] * (config.num_hidden_layers if last else 1)))


def first_value(
    suffix: str, shape: tuple[int, ...], *, config: StateSpacesConfig, layer_default: bool = False
) -> Distribution:
    """Return the distribution of a tensor of a Mamba2 layer; arguments as for :func:`mamba2.first_value`."""
    if suffix.startswith(("norm2", "mlp")):
        return first_value_around(suffix, shape, config=config)
    return mamba2.first_value(suffix, shape, config=config, layer_default=layer_default)


FAMILY = replace(
    mamba2.FAMILY,
    config=StateSpacesConfig,
    names=Names(trunk="backbone", final_norm="norm_f", embedding="embedding"),
    layer_tensors=layer_tensors,
    first_value=first_value,
)

"""A Mamba2 model in the original layout: mamba_ssm's ``MambaConfig`` read as a Mamba2 configuration, other names.

The file has no ``model_type``: it is recognised by ``ssm_cfg``, whose ``layer`` must say ``Mamba2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from statex_dist.checkpoint.json_file import decode_floats
from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import LARGEST_SIZE, check_layer_list, check_type, is_layer
from statex_dist.models.config_keys import SHARED_KEYS, without_plan
from statex_dist.models.layout import Names
from statex_dist.models.mamba2 import tensors as mamba2
from statex_dist.models.mamba2.config import Mamba2Config
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
"""Fields of ``MambaConfig``. ``fused_add_norm`` chooses a kernel, ``attn_cfg`` is of layers that are not run here."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What transformers adds where it writes such a file, with our code."""

_WHERE = "config.json of a state-spaces model"


@dataclass(kw_only=True)
class StateSpacesConfig(Mamba2Config):
    """A Mamba2 configuration that remembers the file that it came from.

    Attributes:
        original: Contents of the original ``config.json``.
        attention: Layers with softmax attention (``attn_layer_idx``).
    """

    MODEL_TYPE: ClassVar[str] = "mamba2_state_spaces"

    original: dict = field(default_factory=dict)
    attention: list = field(default_factory=list)

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
        return cls(**{**known, "statex": plan}, original=dict(values), attention=list(mixed))

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
        """Attention and MLP layers are not run here."""
        has_mlp = bool(self.original.get("d_intermediate"))
        return super().obstacle or ("layers with an MLP (d_intermediate)" if has_mlp else None)

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


FAMILY = replace(
    mamba2.FAMILY,
    config=StateSpacesConfig,
    names=Names(trunk="backbone", final_norm="norm_f", embedding="embedding"),
)

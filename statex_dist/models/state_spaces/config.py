"""Configuration of a Mamba2 model as mamba_ssm's ``MambaConfig`` writes it, read as a Mamba2 configuration.

The file has no ``model_type``: it is recognised by ``ssm_cfg``, whose ``layer`` must say ``Mamba2``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from statex_dist.errors import CheckpointError, shown
from statex_dist.models.config import LARGEST_SIZE, base_keys, check_layer_list, is_layer
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.state.plan import MAX_LAYERS, ExpansionPlan

_DEFAULTS = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "bias": False, "conv_bias": True}
_FIXED = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None}


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
        given = base_keys(values).get("ssm_cfg") or values.get("ssm_cfg")
        if not isinstance(given, dict) or given.get("layer") != "Mamba2":
            layer = given.get("layer", "Mamba1") if isinstance(given, dict) else given
            raise CheckpointError(f"config.json: ssm_cfg is of a {layer} model; only Mamba2 is supported")
        ssm = {**_DEFAULTS, **_FIXED, **given}
        for key, wanted in _FIXED.items():
            if ssm[key] != wanted:
                raise CheckpointError(
                    f"config.json: ssm_cfg.{key}={shown(ssm[key])} is not supported; allowed: {wanted!r}"
                )
        if values.get("rms_norm") is False:
            raise CheckpointError("config.json: rms_norm=false is not supported; allowed: true")
        top = {"pad_vocab_size_multiple": 8, "d_intermediate": 0, **values}
        numbers = {key: top.get(key) for key in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple")}
        numbers |= {f"ssm_cfg.{key}": ssm[key] for key in ("d_state", "d_conv", "expand", "headdim", "ngroups")}
        for key, number in numbers.items():
            if not is_layer(number, MAX_LAYERS + 1 if key == "n_layer" else LARGEST_SIZE) or number == 0:
                raise CheckpointError(
                    f"config.json of a state-spaces model: {key} must be a whole number from 1 to "
                    f"{MAX_LAYERS if key == 'n_layer' else LARGEST_SIZE}, not {shown(number)}"
                )
        mixed = values.get("attn_layer_idx") or []
        if not isinstance(mixed, list) or not all(is_layer(layer, values["n_layer"]) for layer in mixed):
            raise CheckpointError(f"config.json: attn_layer_idx must list layers of the model, not {shown(mixed)}")
        check_layer_list("config.json: attn_layer_idx", mixed, values["n_layer"])
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
                "residual_in_fp32": values.get("residual_in_fp32", True),
                "tie_word_embeddings": values.get("tie_embeddings", True),
                "initializer_range": 0.02,
            }
        )
        plan = ExpansionPlan.from_dict(values["statex"]) if values.get("statex") else None
        known = {f.name: getattr(config, f.name) for f in fields(config)}
        return cls(**{**known, "statex": plan}, original=dict(values), attention=list(mixed))

    def to_dict(self) -> dict[str, Any]:
        """Return the original file's contents, with the plan."""
        return self.with_plan(dict(self.original))

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """All but the attention layers."""
        attention = frozenset(self.attention)
        return tuple(layer for layer in range(self.num_hidden_layers) if layer not in attention)

    @property
    def obstacle(self) -> str | None:
        """Attention and MLP layers are not run here."""
        if self.attention:
            return f"layers {self.attention} are softmax attention"
        return "layers with an MLP (d_intermediate)" if self.original.get("d_intermediate") else None

    def plain_keys(self) -> dict[str, Any]:
        """Return the grown ``ssm_cfg.d_state`` where every layer grows by the same factor."""
        factor = self.common_factor()
        return {"ssm_cfg": {**self.original["ssm_cfg"], "d_state": self.state_size * factor}} if factor else {}

"""The configuration: the keys of config.json in state-spaces/mamba's form, and the expansion plan in it."""

from __future__ import annotations

from typing import Any

from checkpoints_tools.export.remote_code.configuration import PlannedConfig
from statex_dist.models.mamba2.config import Mamba2Config


class StateXConfig(PlannedConfig):
    """The model's configuration, whose files have no ``model_type``."""

    attribute_map = {  # noqa: RUF012 - transformers' own form
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(
        self,
        vocab_size: int = 0,
        pad_vocab_size_multiple: int = 8,
        tie_embeddings: bool = True,
        residual_in_fp32: bool = True,
        **kwargs: Any,
    ):
        kwargs.pop("model_type", None)
        super().__init__(
            vocab_size=-(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple,
            pad_vocab_size_multiple=pad_vocab_size_multiple,
            tie_word_embeddings=tie_embeddings,
            residual_in_fp32=residual_in_fp32,
            **kwargs,
        )

    def sizes(self) -> Mamba2Config:
        """Return what computes the layers' sizes, from the keys of this form with its defaults."""
        values = self.before_plan()
        ssm = values["ssm_cfg"]
        found = Mamba2Config.__new__(Mamba2Config)
        vars(found).update(
            statex=values["statex"],
            hidden_size=self.d_model,
            num_hidden_layers=self.n_layer,
            num_heads=ssm.get("expand", 2) * self.d_model // ssm.get("headdim", 64),
            head_dim=ssm.get("headdim", 64),
            state_size=ssm.get("d_state", 128),
            expand=ssm.get("expand", 2),
            conv_kernel=ssm.get("d_conv", 4),
            n_groups=ssm.get("ngroups", 1),
            use_bias=ssm.get("bias", False),
            use_conv_bias=ssm.get("conv_bias", True),
            layer_norm_epsilon=1e-5,
            residual_in_fp32=self.residual_in_fp32,
            time_step_limit=tuple(map(float, ssm.get("dt_limit", (0.0, float("inf"))))),
            chunk_size=ssm.get("chunk_size", 256),
        )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``config.json``, without the ``model_type`` that the layout does not have."""
        values = super().to_dict()
        values.pop("model_type", None)
        return values

"""Mamba2 models with the keys and names of state-spaces/mamba."""

from __future__ import annotations

from typing import Any

from .configuration import PlannedConfig
from .mamba2_block import Block
from .trunk import Trunk


class StateXConfig(PlannedConfig):
    """Configuration of a Mamba2 model in the original layout, whose files have no ``model_type``."""

    attribute_map = {  # noqa: RUF012 - transformers' own form
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
    }
    n_groups = property(lambda self: self.ssm("ngroups", 1))
    head_dim = property(lambda self: self.ssm("headdim", 64))
    num_heads = property(lambda self: self.ssm("expand", 2) * self.d_model // self.head_dim)
    conv_kernel = property(lambda self: self.ssm("d_conv", 4))
    use_bias = property(lambda self: self.ssm("bias", False))
    use_conv_bias = property(lambda self: self.ssm("conv_bias", True))
    time_step_limit = property(lambda self: tuple(map(float, self.ssm("dt_limit", (0.0, float("inf"))))))
    rms_eps = 1e-5

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

    def ssm(self, key: str, default: Any) -> Any:
        """Return a key of ``ssm_cfg`` as it was before the plan."""
        return self.before_plan("ssm_cfg").get(key, default)

    @property
    def before_plan_state_size(self) -> int:
        """State rows of a head before the plan."""
        return self.ssm("d_state", 128)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``config.json``, without the ``model_type`` that the layout does not have."""
        values = super().to_dict()
        values.pop("model_type", None)
        return values


class StateXModel(Trunk):
    """Mamba2 without its head."""

    config_class = StateXConfig
    base_model_prefix = "backbone"
    embedding_name = "embedding"
    final_norm_name = "norm_f"
    block = Block

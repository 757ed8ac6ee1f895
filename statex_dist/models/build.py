"""Building the language model of a configuration: ours, or one of transformers with mixers of ours."""

from __future__ import annotations

from statex_dist.models.config import ModelConfig
from statex_dist.models.lm import RecurrentLM


def build_lm(config: ModelConfig) -> RecurrentLM:
    """Build the language model of a configuration: ours, or transformers' with mixers of ours.

    Raises:
        ConfigError: The model cannot be run here.
    """
    if getattr(config, "HOST", None) is None:
        return RecurrentLM(config)
    from statex_dist.models.hybrid.model import HostedLM  # transformers' models, where one is needed

    return HostedLM(config)

"""The section ``model`` of a training run: an existing model or a new one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statex_dist.checkpoint.layout import TRAIN_LENGTH_KEY
from statex_dist.errors import ConfigError
from statex_dist.models.build import build_lm
from statex_dist.models.config import ModelConfig
from statex_dist.models.hf import from_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict
from statex_dist.models.source import find_model
from statex_dist.models.values import DrawnValues, StoredValues


@dataclass(kw_only=True)
class ModelSource:
    """The model to train: an existing one or a new one.

    Attributes:
        path: Model directory, or a checkpoint of any layout (a run: its newest), to train on from there.
        config: Contents of a ``config.json`` (``model_type`` and so on), to start a new model.
        check_digests: Whether the weights in ``path`` are compared with the digests of its manifest and archives'
            checksums; sizes always are.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    check_digests: bool = True

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError("model: give either model.path (a model directory) or model.config (a new model)")

    @property
    def directory(self) -> Path | None:
        """Directory of the model's small files (configuration, tokenizer); None for a new model."""
        return None if self.path is None else find_model(self.path)

    def build(self, *, dtype: torch.dtype, seed: int) -> RecurrentLM:
        """Load or make the model, whole.

        Args:
            dtype: Of its parameters.
            seed: Of a new model's parameters.

        Raises:
            StateXError: The checkpoint is wrong, or a key of ``model.config`` is not known.
        """
        if self.path is not None:
            return from_pretrained(Path(self.path), dtype=dtype, digests=self.check_digests)
        model = build_lm(self._new_config())
        model.init_parameters(seed)
        return model.to(dtype)

    def open_values(self, *, dtype: torch.dtype, seed: int) -> StoredValues | DrawnValues:
        """Return the outline of the model with the values of its parameters; arguments and errors of :meth:`build`."""
        if self.path is not None:
            return StoredValues(Path(self.path), dtype=dtype, digests=self.check_digests)
        return DrawnValues(self._new_config(), dtype=dtype, seed=seed)

    def _new_config(self) -> ModelConfig:
        assert self.config is not None
        settings = config_from_dict(self.config)
        settings.extra.pop(TRAIN_LENGTH_KEY, None)  # the config.json of a checkpoint may be given here
        if settings.extra:
            allowed = sorted({f.name for f in dataclasses.fields(settings)} - {"extra"})
            unknown = ", ".join(f"model.config.{key}" for key in sorted(settings.extra))
            raise ConfigError(f"unknown key {unknown}; allowed in model.config: model_type, {', '.join(allowed)}")
        return settings

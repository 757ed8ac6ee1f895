"""The small files of a checkpoint: model configuration, tokenizer, training length, settings of its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from statex_dist.checkpoint.history import Span, extended, history_text, read_history
from statex_dist.checkpoint.json_file import config_text, parse_config
from statex_dist.checkpoint.layout import CONFIG_NAME, HISTORY_NAME, MODEL_DIR, TRAIN_LENGTH_KEY
from statex_dist.checkpoint.manifest import FileRecord, record_file
from statex_dist.config import flat
from statex_dist.durable.files import write_durably
from statex_dist.errors import CheckpointError, shown

logger = logging.getLogger(__name__)


def no_length(after: int, step: int) -> int:
    """Return 0: no text was read in these steps, as far as is known."""
    return 0


@dataclass(kw_only=True, slots=True)
class Documents:
    """The small files of a run's checkpoints, which depend on the step of the save.

    Attributes:
        model: Text files of the model by name: ``config.json`` and those of the tokenizer. ``config.json`` says the
            training length of the weights that the run begins with, if it is known.
        settings: The resolved configuration of this start.
        trained_length: Returns the longest text, in tokens, of the steps above one number and up to another.
        start_step: Steps done before this start.
        history: Settings of these steps.
    """

    model: Mapping[str, str]
    settings: Mapping[str, Any]
    trained_length: Callable[[int, int], int] = no_length
    start_step: int = 0
    history: list[Span] = field(default_factory=list)
    _length: int = field(init=False)

    def __post_init__(self) -> None:
        self._length = known_length(parse_config(self.model[CONFIG_NAME]))

    def resume(self, directory: Path, step: int) -> None:
        """Continue from the checkpoint in ``directory``, of ``step`` steps; needed on the rank that writes.

        Raises:
            CheckpointError: The account of its steps is damaged, or it has the states of another optimizer.
        """
        self.start_step, self.history = step, read_history(directory)
        before = _optimizer(self.history[-1].settings if self.history else self.settings)
        if before != _optimizer(self.settings):
            raise CheckpointError(
                f"{directory} has the states of optimizer.name {before}, this run has {_optimizer(self.settings)}; "
                "restore it, or begin another run from the checkpoint with model.path"
            )
        saved = parse_config((directory / MODEL_DIR / CONFIG_NAME).read_text(encoding="utf-8"))
        self._length = known_length(saved)

    def length_at(self, step: int) -> int:
        """Return the longest text that the weights of a step were trained on, in tokens; 0 where it is not known."""
        return max(self._length, self.trained_length(self.start_step, step))

    def tell_length(self, num_steps: int) -> None:
        """Log it if the sequences of this start are shorter than those that the weights were trained on."""
        ahead = self.trained_length(self.start_step, num_steps)
        if 0 < ahead < self._length:
            logger.info(
                "%s stays %d in the checkpoints: the weights were trained on texts of that many tokens; those of this "
                "start have at most %d",
                *(TRAIN_LENGTH_KEY, self._length, ahead),
            )

    def write(self, directory: Path, step: int) -> dict[str, FileRecord]:
        """Write the files of a checkpoint durably into ``directory``, and return their records by path."""
        config = parse_config(self.model[CONFIG_NAME])
        config.pop(TRAIN_LENGTH_KEY, None)
        if length := self.length_at(step):
            config[TRAIN_LENGTH_KEY] = length
        texts = {f"{MODEL_DIR}/{name}": text for name, text in self.model.items()}
        texts[f"{MODEL_DIR}/{CONFIG_NAME}"] = config_text(config)
        history = extended(self.history, self.settings, after=self.start_step, step=step)
        texts[HISTORY_NAME] = history_text(history)
        (directory / MODEL_DIR).mkdir(exist_ok=True)
        for name, text in texts.items():
            write_durably(directory / name, text)
        return {name: record_file(directory / name) for name in texts}


def _optimizer(settings: Mapping[str, Any]) -> str:
    """Return the optimizer's name; earlier releases knew one alone."""
    return str(flat(dict(settings)).get("optimizer.name", "adamw"))


def known_length(config: Mapping[str, Any]) -> int:
    """Return the training length that a ``config.json`` says, or 0; warn of any other value."""
    value = config.get(TRAIN_LENGTH_KEY)
    if value is None:
        return 0
    if type(value) is not int or value < 1:
        logger.warning("%s is %s in config.json, not a number of tokens: ignored", TRAIN_LENGTH_KEY, shown(value))
        return 0
    return value

"""What every family's ``config.json`` has in common: reading, checking, writing, and the expansion plan inside it."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, CONFIG_NAME
from statex_dist.errors import CheckpointError
from statex_dist.state.geometry import StateGeometry
from statex_dist.state.plan import ExpansionPlan


@dataclass(kw_only=True)
class ModelConfig:
    """Fields that all families share; a family's own follow in its subclass.

    Field names and meanings are those of the public checkpoints, but for ``embedding_initializer_range``, ours: the
    standard deviation of a fresh embedding table where it is to differ from ``initializer_range``. Keys that we do not
    interpret are kept in ``extra`` and written back, so that reading and writing a config loses nothing.
    """

    MODEL_TYPE: ClassVar[str]

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    initializer_range: float = 0.02
    embedding_initializer_range: float | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    statex: ExpansionPlan | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_positive("vocab_size", "hidden_size", "num_hidden_layers")

    def check_positive(self, *names: str) -> None:
        """Raise if one of these fields is given and below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CheckpointError(f"{self.MODEL_TYPE} config: {name} must be 1 or more, not {value}")

    def check_plan(self) -> None:
        """Raise if the plan names a layer that the model does not have."""
        for expansion in self.statex.layers if self.statex else ():
            if not 0 <= expansion.layer < self.num_hidden_layers:
                raise CheckpointError(
                    f"plan: layer {expansion.layer} is out of range; "
                    f"the model has layers 0..{self.num_hidden_layers - 1}"
                )

    @property
    def final_norm_eps(self) -> float:
        """Epsilon of the RMS norms outside the mixers."""
        raise NotImplementedError

    def layer_geometry(self, layer: int) -> StateGeometry:
        """Return the state of ``layer`` under the plan."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a config from the contents of a ``config.json``.

        Raises:
            CheckpointError: A required key is missing or has the wrong type.
        """
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)} - {"statex", "extra"}
        kept = {key: value for key, value in values.items() if key in names}
        for key, value in kept.items():
            if not _fits(value, hints[key]):
                wanted = getattr(hints[key], "__name__", str(hints[key]))
                raise CheckpointError(f"{CONFIG_NAME}: '{key}' must be {wanted}, not {value!r}")
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in kept]:
            raise CheckpointError(f"{CONFIG_NAME} of a {cls.MODEL_TYPE} model lacks {', '.join(missing)}")
        plan = ExpansionPlan.from_dict(values["statex"]) if values.get("statex") else None
        extra = {k: v for k, v in values.items() if k not in names and k not in ("statex", "model_type")}
        return cls(**kept, statex=plan, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``config.json``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra, plan = values.pop("extra"), values.pop("statex")
        if self.embedding_initializer_range is None:
            del values["embedding_initializer_range"]
        result = {"model_type": self.MODEL_TYPE, **extra, **values}
        if plan is not None:
            result["statex"] = plan.to_dict()
        return result

    def to_json(self) -> str:
        """Return the text of ``config.json``."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes``."""
        return dataclasses.replace(self, **changes)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the annotated type (an int passes for a float)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, arg) for arg in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    return isinstance(value, origin) if isinstance(origin, type) else True


def read_config_dict(model_dir: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model directory.

    Raises:
        CheckpointError: The directory or the file is missing, or the file is not a JSON object.
    """
    if not model_dir.exists():
        raise CheckpointError(f"model directory not found: {model_dir}")
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is a file; give the directory that holds {CONFIG_NAME}")
    path = model_dir / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "not a Hugging Face model directory"
        if (model_dir / CHECKPOINTS_DIR).is_dir():
            hint = f"it is a training run; make a model of it: statex reshard --source {model_dir} --target DIR --to hf"
        raise CheckpointError(f"{model_dir} holds no {CONFIG_NAME}: {hint}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return values

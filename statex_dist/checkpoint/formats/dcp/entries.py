"""Which entries of a torch distributed checkpoint are a model's weights, and under which names.

Trainers save the whole training state as one dict. Those of torchtitan and flame have the keys ``model``,
``optimizer``, ``lr_scheduler``, ``dataloader`` and ``train_state``, with the model's tensors below ``model`` or at the
top level; others have ``app``, ``state_dict``, ``optim``. DCP joins the keys to names with dots, and keeps the path of
each entry, so that ``model.model.norm.weight`` is known to be ``model.norm.weight`` of the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Path = tuple[str, ...]
"""The keys that lead to an entry of the saved dict."""

_ENDING = r"(?:_?state(?:s|_?dict)?)?(?:[_-]?\d+)?"
_PARTS = {
    "optimizer": rf"(?:optims?|optimi[sz]ers?|opt|base_optimizer|chained){_ENDING}",
    "scheduler": rf"(?:lr_?|opt_param_)?sched(?:uler)?s?{_ENDING}",
    "data loader": rf"(?:(?:ft|train|val|eval|test)_)?(?:data_?)?(?:loader|sampler|iterator)s?{_ENDING}"
    r"|dataset|data_state",
    "EMA": rf"(?:model_)?ema(?:_model)?{_ENDING}",
    "train state": r"train(?:er|ing)?_?(?:state|progress)|trainer|progress|timer|metrics"
    r"|steps?|global_?steps?|epoch|iteration|iter|rng|(?:\w+_)?rng_states?|random_states?"
    r"|args|config|hparams|hyper_parameters|(?:grad_)?scaler|callbacks|loops|metadata|checkpoint_version"
    r"|rerun_state_machine_state|pytorch-lightning_version",
}
"""How the keys look below which a trainer keeps what is not the model."""

_TRAINING = {part: re.compile(pattern, flags=re.ASCII | re.IGNORECASE) for part, pattern in _PARTS.items()}
_CONTAINER = re.compile(
    r"(?:model|module|app|state|state_dict|net|network|checkpoint|weights)(?:_state(?:_dict)?)?(?:_\d+)?"
)
_INSIDE = ("model", "backbone", "transformer", "lm_head")
"""First keys of a model's own names; below ``model.`` they show that this one is a container."""

_OPTIMIZER_VALUES = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "exp_avg_diff", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_inf"),
        *("momentum_buffer", "square_avg", "grad_avg", "acc_delta", "mu_product", "master_param", "fp32_param"),
        "param_groups",
    )
)
"""Names that torch's optimizers, and those modelled on them, give to their values."""

_MAX_INDEX = 1 << 63

OBJECTS = "pickled objects"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntries:
    """The model's part of a checkpoint.

    Attributes:
        names: Name of each tensor of the model, by its name in the checkpoint.
        left_out: Number of entries that are not the model's, by kind (optimizer, scheduler, ...).
    """

    names: Mapping[str, str]
    left_out: Mapping[str, int]

    def note(self) -> str | None:
        """Return what has to be said about entries that are left out, or None."""
        if not self.left_out:
            return None
        listed = ", ".join(f"{part} {count:,}" for part, count in self.left_out.items())
        return f"{sum(self.left_out.values()):,} entries that are not the model's weights are left out: {listed}"


def model_entries(
    tensors: Collection[str], objects: Collection[str] = (), paths: Mapping[str, Path] | None = None
) -> ModelEntries:
    """Choose the model's tensors.

    Args:
        tensors: Names of the tensors in the checkpoint.
        objects: Names of entries that are no tensors.
        paths: The keys that lead to an entry, as far as the checkpoint has them.

    Returns:
        The names, and how many entries of which kind are left out.

    Raises:
        ValueError: Two tensors would have the same name, or all names of the model stand below another key too.
    """
    keys = {name: _keys(name, paths or {}) for name in (*tensors, *objects)}
    bare = _holds_bare_optimizer(keys.values())
    inner, left_out = {}, Counter[str]()
    for name in tensors:
        if part := _part(keys[name], bare_optimizer=bare):
            left_out[part] += 1
        else:
            inner[name] = keys[name]
    for name in objects:
        left_out[_part(keys[name], bare_optimizer=bare) or OBJECTS] += 1
    names = _without_containers(inner)
    first: dict[str, str] = {}
    for name, short in names.items():
        if other := first.get(short):
            raise ValueError(f"'{other[:80]}' and '{name[:80]}' would both be tensor '{short[:80]}' of the model")
        first[short] = name
    if key := _key_of_copies(first.keys()):
        raise ValueError(
            f"the tensors below '{key[:80]}' have the names of the others: which of them are the model's weights, and "
            "which belong to an optimizer, is not known; save the model by itself"
        )
    return ModelEntries(names=names, left_out=dict(sorted(left_out.items())))


def _key_of_copies(names: Collection[str]) -> str | None:
    """Return a first key below which several of the other names stand once more, or None."""
    below: dict[str, set[str]] = {}
    for name in names:
        key, _, rest = name.partition(".")
        if rest:
            below.setdefault(key, set()).add(rest)
    known = set(names)
    return next((key for key, inner in below.items() if len(inner) > 1 and inner <= known), None)


def _keys(name: str, paths: Mapping[str, Path]) -> Path:
    """Return the path to an entry; a name without one is cut behind a key that tells what it is."""
    path = paths.get(name) or (name,)
    if len(path) > 1:
        return path
    keys = name.split(".")
    place = next((i for i, key in enumerate(keys) if not _CONTAINER.fullmatch(key)), len(keys) - 1)
    tells = _training_part(keys[place]) or keys[0] in ("state", "param_groups")
    return (*keys[: place + 1], ".".join(keys[place + 1 :])) if tells and keys[place + 1 :] else path


def _holds_bare_optimizer(paths: Iterable[Path]) -> bool:
    """Return whether the top level is, or also is, the state dict of an optimizer: ``state`` and ``param_groups``."""
    paths = list(paths)
    if {"state", "param_groups"} <= {path[0] for path in paths}:
        return True
    below = [path for path in paths if path[0] == "state" and len(path) > 1]
    return any(
        path[-1].rpartition(".")[2] in _OPTIMIZER_VALUES
        and not any(_training_part(key) or _CONTAINER.fullmatch(key) for key in path[1:-1])
        for path in below
    )


def _training_part(key: str) -> str | None:
    return next((part for part, pattern in _TRAINING.items() if pattern.fullmatch(key)), None)


def _part(path: Path, *, bare_optimizer: bool) -> str | None:
    """Return what an entry is, or None for the model's."""
    for place, key in enumerate(path[:-1] or path):
        if part := _training_part(key):
            return part
        if bare_optimizer and place == 0 and key in ("state", "param_groups"):
            return "optimizer"
        if not _CONTAINER.fullmatch(key):
            break
    return "optimizer" if _OPTIMIZER_VALUES & {path[-1].rpartition(".")[2], path[-1].partition(".")[0]} else None


def _without_containers(paths: Mapping[str, Path]) -> dict[str, str]:
    """Return names without leading keys that hold a model and are no part of its names."""
    found = {name: ".".join(_stripped(path)) for name, path in paths.items()}
    second = {short.split(".")[1] for short in found.values() if short.startswith("model.")}
    if all(short.startswith("model.") for short in found.values()) and second & set(_INSIDE):
        found = {name: short.removeprefix("model.") for name, short in found.items()}
    return found


def _stripped(path: Path) -> Path:
    while len(path) > 1 and _CONTAINER.fullmatch(path[0]):
        path = path[1:]
    return path


def _is_key(value: object) -> bool:
    # Python refuses to print integers of thousands of digits.
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < _MAX_INDEX)


def as_paths(values: object) -> dict[str, Path]:
    """Return the paths in DCP's ``planner_data``, of those entries where it has strings and numbers alone."""
    if not isinstance(values, Mapping):
        return {}
    found = {}
    for name, path in values.items():
        plain = isinstance(path, Sequence) and not isinstance(path, str) and path
        if isinstance(name, str) and plain and all(_is_key(key) for key in path):
            found[name] = tuple(str(key) for key in path)
    return found

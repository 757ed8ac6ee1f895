"""The keys of flash-linear-attention's own ``Mamba2Config``, which has the ``model_type`` of transformers' and others.

Both classes store the same tensors and compute the same, but under other keys and with other defaults. A file with a
key that only fla has is read by fla's names. Where both libraries' names of one value are there they must agree, so
that a file that we write for both is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError

_FUNCTION = {"norm_eps": ("layer_norm_epsilon", 1e-5), "dt_limit": ("time_step_limit", [0.0, math.inf])}
"""Keys that change logits: fla's name, transformers' name, fla's default."""

_INITIALISATION = {"dt_min": "time_step_min", "dt_max": "time_step_max", "dt_init_floor": "time_step_floor"}
NAMES = {key: name for key, (name, _) in _FUNCTION.items()} | _INITIALISATION
"""fla's names of our fields."""

_DEFAULTS = {"head_dim": 64, "n_groups": 1, "initializer_range": 0.02, "rescale_prenorm_residual": True}
"""fla's defaults where both libraries have the key."""

FIXED: dict[str, tuple[Any, ...]] = {
    "rmsnorm": (True,),
    "rms_norm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
}
TRAINING = frozenset({"use_l2warp"})
HARMLESS = frozenset(NAMES) | {"A_init_range", "conv_init", "fuse_norm", "fuse_swiglu"}
HARMLESS |= {"fuse_cross_entropy", "fuse_linear_cross_entropy"}
"""Names that are read, first values, and the choice of kernels; ``fuse_norm`` is ignored by fla's class."""


def has_fla_keys(values: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` of ``model_type`` mamba2 was written by flash-linear-attention."""
    return any(key in values for key in (*FIXED, *TRAINING, *HARMLESS))


def with_transformers_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return fla's keys with those of transformers beside them.

    Raises:
        CheckpointError: Both libraries' names of one value are there, and they differ.
    """
    said = dict(_DEFAULTS)
    for key, (name, default) in _FUNCTION.items():
        value = values.get(key, default)
        if name in values and not _equal(values[name], value):
            shown = "missing" if key not in values else repr(value)
            raise CheckpointError(
                f"{CONFIG_NAME}: {name}={values[name]!r} of transformers' Mamba2 and {key} ({shown}; default "
                f"{default!r}) of flash-linear-attention's contradict each other: each library reads its own; set both "
                "to the value that the model was trained with"
            )
        said[name] = value
    said |= {name: values[key] for key, name in _INITIALISATION.items() if key in values}
    size, width = (values.get(key, default) for key, default in (("hidden_size", None), ("expand", 2)))
    head_dim = values.get("head_dim", _DEFAULTS["head_dim"])
    # fla's layer computes a missing number of heads in this way.
    if not values.get("num_heads") and all(type(n) is int and n > 0 for n in (size, width, head_dim)):
        values = {**values, "num_heads": width * size // head_dim}  # type: ignore[operator]
    return {**said, **values, **{name: said[name] for name in NAMES.values() if name in said}}


def _equal(first: Any, second: Any) -> bool:
    lists = (tuple(value) if isinstance(value, list | tuple) else value for value in (first, second))
    return next(lists) == next(lists)

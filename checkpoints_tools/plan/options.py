"""What ``statex plan`` and ``statex expand`` can be told about an expansion, and their defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from statex_dist.errors import ConfigError, reason, shown
from statex_dist.models.config import ModelConfig
from statex_dist.models.registry import default_op, make_plan
from statex_dist.state.geometry import FeatureMap
from statex_dist.state.plan import DEFAULT_GROWTH, Init, Op

DEFAULT_EVERY = 6

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "statex-paper-gla": {"layers": "every:6", "op": "merge_heads", "factor": "full", "init": "reinit"},
    "statex-paper-merge": {"layers": "every:6", "op": "merge_heads", "factor": "full", "init": "inherit"},
    "statex-paper-mamba4": {"layers": "all", "op": "grow_state", "factor": "4", "init": "reinit"},
    "statex-paper-merge-copy": {"layers": "all", "op": "grow_state", "factor": "4", "init": "copy"},
}
"""The modes of the StateX authors' scripts (``drop_mode`` gla, merge, mamba4, merge_copy); all reset the dynamics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """An expansion as a user asks for it.

    Attributes:
        layers: A rule of :func:`statex_dist.state.plan.select_layers`; None is ``every:6`` (the paper's choice for GLA;
            the first recurrent layer alone on a model of fewer layers).
        factor: A number or ``full`` (all heads of a layer); None is ``full`` for operations on heads and 4 for
            ``grow_state`` (Mamba2: 128 -> 512, as in the paper) and ``grow_features``.
        init: How the new state starts; None is ``reinit``, and ``lossless`` for ``grow_features``.
        op: The operation; None takes the family's own.
        seed: Seed of the random values.
        reset_dynamics: Whether decays, steps and norms are initialised again, as in the authors' scripts.
        rolls: Rolls of ``grow_features``, ``1,2,3`` or a list (0: squares); None takes the first ones of the factor.
        relu: Whether its products are those of ``relu(x)``.
        match_norm: Whether its products are scaled to the norm of the head's channels.
        recipe: A name of :data:`RECIPES`, in place of op, factor, init, reset_dynamics and features.
        target_state: Size that all states together are to reach (``1.5x`` or ``18.7M``). It determines layers and
            factor, as far as they are not given.
        plan: A YAML file with a plan per layer (:func:`read_plan_file`), in place of all others but the seed.
    """

    layers: str | None = None
    factor: str | int | None = None
    init: Init | None = None
    op: Op | None = None
    seed: int = 0
    reset_dynamics: bool = False
    rolls: str | Sequence[int] | None = None
    relu: bool = False
    match_norm: bool = False
    recipe: str | None = None
    target_state: str | None = None
    plan: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "target_state", "plan"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str | Path) and str(value).strip()):
                raise ConfigError(f"--{name.replace('_', '-')} must be a text that is not empty, not {value!r}")
        for name, allowed in (("init", get_args(Init)), ("op", get_args(Op)), ("recipe", tuple(RECIPES))):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"--{name} {value!r} is not one of {', '.join(allowed)}")
        if self.rolls is not None:
            _parse_rolls(self.rolls)
        groups = {
            "recipe": ("factor", "init", "op", "reset_dynamics", *_FEATURE_KEYS, "target_state", "plan"),
            "plan": ("layers", "factor", "init", "op", "reset_dynamics", *_FEATURE_KEYS, "target_state"),
        }
        for name, others in groups.items():
            if getattr(self, name) is not None and (clash := _given({o: getattr(self, o) for o in others}, others)):
                options = ", ".join(f"--{other.replace('_', '-')}" for other in clash)
                raise ConfigError(f"--{name} decides by itself what {options} would say; leave them out")
        if self.recipe is None and self.plan is None:
            _check_feature_keys({name: getattr(self, name) for name in _FEATURE_KEYS}, self.op)


def plan_model(config: ModelConfig, options: PlanOptions | None = None) -> ModelConfig:
    """Return ``config`` with the expansion that the options ask for.

    Raises:
        ConfigError: The options are wrong or do not fit the model.
    """
    options = options or PlanOptions()
    if not config.recurrent_layers:
        raise ConfigError(f"this {config.MODEL_TYPE} model has no recurrent layer: there is no state to expand")
    if options.plan is not None:
        return _planned(config, read_plan_file(Path(options.plan)), options.seed)
    if options.recipe is not None:
        row = {**RECIPES[options.recipe], "reset_dynamics": True}
        family = "mamba2" if row["op"] == "grow_state" else "gla"
        if config.MODEL_TYPE not in (family, f"{family}_state_spaces"):
            raise ConfigError(
                f"--recipe {options.recipe} is the authors' for {family}; this is a {config.MODEL_TYPE} model"
            )
        if options.layers is not None:
            row["layers"] = options.layers
        return _add(config, row, options.seed)
    row = {
        "layers": options.layers,
        "factor": options.factor,
        "init": options.init,
        "op": options.op,
        "reset_dynamics": options.reset_dynamics,
        **{name: getattr(options, name) for name in _FEATURE_KEYS},
    }
    if options.target_state is not None:
        from checkpoints_tools.plan.size_search import find_plan  # only where a size is asked for

        init = _init(options.init, options.op)
        op = options.op or default_op(config, init)
        factor = _factor(options.factor, op) if options.factor is not None else None
        if options.factor == "full":
            factor = _full(config, op)
        if op == "grow_features":
            _check_offered(config, op)
        if (features := None if options.rolls is None else _features(config, row, op, factor)) is not None:
            factor = features.factor
        found = find_plan(config, options.target_state, layers=options.layers, factor=factor, op=op, init=init)
        row |= {"layers": ",".join(map(str, found.layers)), "factor": found.factor, "op": op}
    return _add(config, row, options.seed)


def _add(config: ModelConfig, row: Mapping[str, Any], seed: int) -> ModelConfig:
    """Return ``config`` with one row of a plan added, defaults filled in."""
    init = _init(row.get("init"), row.get("op"))
    op: Op = row.get("op") or default_op(config, init)
    factor = _factor(row.get("factor"), op)
    features = _features(config, row, op, factor)
    return make_plan(
        config,
        layers=row.get("layers") or f"every:{DEFAULT_EVERY}",
        factor=features.factor if features is not None else factor,
        init=init,
        op=op,
        seed=row.get("seed", seed),
        reset_dynamics=row.get("reset_dynamics") or False,
        features=features,
    )


def _init(init: Init | None, op: Op | None) -> Init:
    """Return how the new state starts where the user names no init: products of keys start lossless and only so."""
    return init or ("lossless" if op == "grow_features" else "reinit")


def _features(config: ModelConfig, row: Mapping[str, Any], op: Op, factor: int | None) -> FeatureMap | None:
    """Return the products that a row of a plan asks for, or None where its operation has none.

    Raises:
        ConfigError: The family or the operation has no features, or they contradict the factor or one another.
    """
    _check_feature_keys(row, op)
    if op != "grow_features":
        return None
    _check_offered(config, op)
    if row.get("features") is not None:
        features = _read_features(row)
    else:
        switches = {name: row[name] for name in ("relu", "match_norm") if row.get(name) is not None}
        if row.get("rolls") is None:
            keys = config.replace(statex=None).layer_geometry(config.recurrent_layers[0]).key_dim
            return FeatureMap.of_factor(DEFAULT_GROWTH if factor is None else factor, keys, **switches)
        features = FeatureMap(rolls=_parse_rolls(row["rolls"]), **switches)
    if factor is not None and factor != features.factor:
        rolls = ",".join(map(str, features.rolls))
        raise ConfigError(
            f"--factor {factor} contradicts --rolls {rolls}, which make the factor {features.factor}; leave out one of "
            "the two"
        )
    return features


def _check_offered(config: ModelConfig, op: Op) -> None:
    """Raise unless the family has an operation."""
    if op not in config.OPS:
        raise ConfigError(f"{config.why_not(op)}; use {' or '.join(config.OPS)}")


def _read_features(row: Mapping[str, Any]) -> FeatureMap:
    """Return the features of a row that has them in the form of ``config.json``."""
    if doubled := _given(row, _FEATURE_KEYS):
        raise ConfigError(f"a row of --plan says {', '.join(doubled)} both in 'features' and beside it; leave out one")
    try:
        return FeatureMap(**row["features"])
    except TypeError as error:
        raise ConfigError(
            f"--plan: bad entry 'features': {reason(error)}; it holds {', '.join(_FEATURE_KEYS)}"
        ) from None


def _check_feature_keys(row: Mapping[str, Any], op: str | None) -> None:
    """Raise if a row or the options name features for an operation that has none."""
    given = [f"--{key.replace('_', '-')}" for key in _given(row, _FEATURE_KEYS)] + _given(row, ("features",))
    if given and op != "grow_features":
        options = ", ".join(given)
        named = "" if op is None else f", not {op}"
        raise ConfigError(f"{options} is for --op grow_features{named}; give that operation or leave the option out")


def _given(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return the keys that a row has a value for; a roll of 0 is one, a switch that is off is not."""
    return [key for key in keys if row.get(key) is not None and row[key] is not False]


def _parse_rolls(rolls: Any) -> Any:
    """Return the rolls of a text such as ``1,2,3``; a list is returned as it is, for :class:`FeatureMap` to check."""
    if isinstance(rolls, int) and not isinstance(rolls, bool):
        return [rolls]
    if not isinstance(rolls, str):
        return rolls
    parts = [part.strip() for part in rolls.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise ConfigError(
            f"--rolls {shown(rolls)} must be whole numbers from 0 with commas between them, such as 1,2,3 (0: squares)"
        )
    return [int(part) for part in parts]


def _factor(factor: str | int | None, op: Op) -> int | None:
    """Return the number that a factor stands for; None is ``full``, or that ``grow_features`` has no factor given."""
    if factor is None:
        return DEFAULT_GROWTH if op == "grow_state" else None
    if factor == "full" and op == "grow_features":
        raise ConfigError(f"--factor full is for models with heads to merge or mix; give a number for op {op}")
    if factor == "full":
        return None
    if isinstance(factor, int) and not isinstance(factor, bool):
        return factor
    try:
        return int(factor if isinstance(factor, str) else "")
    except ValueError:
        raise ConfigError(f"--factor {factor!r} is neither a whole number from 2 nor 'full'") from None


def _full(config: ModelConfig, op: Op) -> int:
    """Return the number of heads of a layer, which ``full`` stands for.

    Raises:
        ConfigError: The operation is not one on heads.
    """
    if op in ("grow_state", "grow_features"):
        raise ConfigError(f"--factor full is for models with heads to merge or mix; give a number for op {op}")
    return config.replace(statex=None).layer_geometry(config.recurrent_layers[0]).num_heads


_FEATURE_KEYS = ("rolls", "relu", "match_norm")
_ROW_KEYS = ("layer", "layers", "op", "factor", "init", "seed", "reset_dynamics", *_FEATURE_KEYS, "features")


def read_plan_file(path: Path) -> list[dict[str, Any]]:
    """Read a plan per layer.

    The file is a list of rows, or a mapping with such a list under ``layers`` (the form that ``config.json`` holds):

        - layers: every:6          # a rule, or `layer: 3`
          op: merge_heads          # op, factor, init and seed as the options of the same names
          factor: 4
          init: inherit
        - {layer: 3, op: mix_heads, factor: 2, init: lossless}
        - {layer: 5, op: grow_features, rolls: [1, 2, 3], relu: true}  # or `features`, as in config.json

    Raises:
        ConfigError: The file is missing, not YAML, or a row is not as above.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--plan {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--plan {path} is not YAML: {reason(error)}") from None
    rows = content.get("layers") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"--plan {path} must hold a list of rows, each with 'layers' (or 'layer') and what is done")
    for number, row in enumerate(rows, start=1):
        where = f"--plan {path}, row {number}"
        if not isinstance(row, dict) or ("layer" in row) == ("layers" in row):
            raise ConfigError(f"{where}: needs one of 'layer' and 'layers', not {shown(row)}")
        if unknown := [key for key in row if key not in _ROW_KEYS]:
            raise ConfigError(f"{where}: unknown keys {unknown}; allowed: {', '.join(_ROW_KEYS)}")
        layers = row.get("layers", row.get("layer"))
        if layers is None or layers in ("", []):
            raise ConfigError(f"{where}: names no layer")
        PlanOptions(op=row.get("op"), init=row.get("init"))
    return rows


def _planned(config: ModelConfig, rows: list[dict[str, Any]], seed: int) -> ModelConfig:
    for row in rows:
        layers = row["layer"] if "layer" in row else row["layers"]
        if isinstance(layers, list):
            layers = ",".join(map(str, layers))
        config = _add(config, {**row, "layers": str(layers)}, seed)
    return config

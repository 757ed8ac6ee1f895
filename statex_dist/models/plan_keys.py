"""The keys of ``config.json`` that keep other software from running an expanded model without its plan.

Classes for a family's own ``model_type`` know no plan, and many expanded models fit them: merging heads changes no
tensor of a MiniMax, and a mixing matrix is a tensor more, of which transformers only warns. So a plan that no other
key expresses changes the keys by which software chooses a class. It also changes ``hidden_act``, from which each of
those classes makes its activation, so that one that is chosen by hand raises too. What the keys said before is kept
under ``statex.base``.
"""

from __future__ import annotations

from typing import Any

from statex_dist.checkpoint.layout import CONFIG_NAME
from statex_dist.errors import CheckpointError

OUR_CODE_PREFIX = "statex_"
"""Of the ``model_type`` of a model that is ours alone (``ModelConfig.ours_alone``)."""

ARCHITECTURE = "StateXForCausalLM"
MODULE_NAME = "modeling_statex"
AUTO_MAP = {
    "AutoConfig": f"{MODULE_NAME}.StateXConfig",
    "AutoModel": f"{MODULE_NAME}.StateXModel",
    "AutoModelForCausalLM": f"{MODULE_NAME}.StateXForCausalLM",
}

NO_ACTIVATION = "statex: expanded, see the plan under statex"
"""The ``hidden_act`` of an expanded model: the name of no activation, and the reason."""


def ours(model_type: Any) -> bool:
    """Return whether a ``model_type`` has our prefix."""
    return isinstance(model_type, str) and model_type.startswith(OUR_CODE_PREFIX)


def own_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return the changes of a ``config.json`` with which no class of other software opens the model.

    Args:
        values: Its contents without a plan. Files of mamba_ssm have no ``model_type``: its class refuses ``statex``.
    """
    changes: dict[str, Any] = {}
    if "model_type" in values:
        changes = {
            "model_type": OUR_CODE_PREFIX + values["model_type"].removeprefix(OUR_CODE_PREFIX),
            "architectures": [ARCHITECTURE],
            "hidden_act": NO_ACTIVATION,
        }
    auto_map = values.get("auto_map")
    if isinstance(auto_map, dict) and auto_map != AUTO_MAP:
        # Another's code for the base: it knows no plan either. Tokenizers and processors stay.
        kept = {key: code for key, code in auto_map.items() if not key.startswith(("AutoConfig", "AutoModel"))}
        changes["auto_map"] = kept
    return changes


def with_plan_entry(values: dict[str, Any], changes: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a ``config.json`` with a plan and the changes that go with it.

    Args:
        values: The contents without a plan.
        changes: Keys that the plan changes.
        plan: The plan's own entry.
    """
    base = {key: values[key] for key in changes if key in values and key != "model_type"}
    return {**values, **changes, "statex": {**plan, **({"base": base} if base else {})}}


def without_plan(values: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a ``config.json`` as they were before the plan in it; without one, as they are.

    Raises:
        CheckpointError: ``statex`` or its ``base`` is not a mapping.
    """
    plan = values.get("statex") or {}
    base = plan.get("base", {}) if isinstance(plan, dict) else None
    if not isinstance(base, dict):
        raise CheckpointError(f"{CONFIG_NAME}: 'statex' must be a mapping, and 'base' in it too, not {plan!r}")
    if not plan:
        return values
    added = {"architectures": [ARCHITECTURE], "hidden_act": NO_ACTIVATION}
    kept = {key: value for key, value in values.items() if key != "statex" and added.get(key, ...) != value}
    if ours(kept.get("model_type")):
        kept["model_type"] = kept["model_type"].removeprefix(OUR_CODE_PREFIX)
    return {**kept, **base}

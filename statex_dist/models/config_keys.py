"""Keys of a ``config.json`` that no field of ours holds, and those that an expansion plan changes.

The first are known to change nothing, refused, or reported. A family lists what its class in another library reads
beside our fields. A test walks over the fields of those classes, so that a new one is noticed.

The others keep other software from running an expanded model without its plan. Classes for a family's own
``model_type`` know no plan, and many expanded models fit them: merging heads changes no tensor of a MiniMax, and a
mixing matrix is a tensor more, of which transformers only warns. So a plan that no other key expresses changes the keys
by which software chooses a class. It also changes ``hidden_act``, from which each of those classes makes its
activation, so that one that is chosen by hand raises too. What the keys said before is kept under ``statex.base``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from statex_dist.checkpoint.layout import CONFIG_NAME, TRAIN_LENGTH_KEY
from statex_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

_OF_ALL_MODELS = """
    _name_or_path name_or_path architectures auto_map transformers_version torch_dtype dtype return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 use_cache tf_legacy_loss pruned_heads
    tie_encoder_decoder chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size
    add_cross_attention finetuning_task id2label label2id num_labels tokenizer_class prefix sep_token_id
    decoder_start_token_id task_specific_params problem_type attn_implementation _attn_implementation_autoset
    _attn_implementation _commit_hash quantization_config
"""
_OF_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
SHARED_KEYS = frozenset((_OF_ALL_MODELS + _OF_GENERATION).split()) | {TRAIN_LENGTH_KEY, "statex", "model_type"}
"""Keys of every configuration of transformers 4 and 5, and our own: no layer reads them."""

OUR_CODE = "modeling_statex."
"""With which the entries of ``auto_map`` begin where the code beside the weights is ours."""


def check_other_keys(
    model_type: str,
    extra: Mapping[str, Any],
    *,
    fixed: Mapping[str, tuple[Any, ...]],
    training: Iterable[str],
    harmless: frozenset[str],
) -> None:
    """Refuse keys that change the function, and report those that are not understood.

    Args:
        model_type: Of the family.
        extra: What of the file no field holds.
        fixed: Values that change nothing, by key; any other one is refused.
        training: Keys that change a training run of the other library and nothing else; reported where they are set.
        harmless: Keys that change nothing.

    Raises:
        CheckpointError: A key has a value that we do not implement.
    """
    for key, allowed in fixed.items():
        if key in extra and not any(type(extra[key]) is type(value) and extra[key] == value for value in allowed):
            raise CheckpointError(
                f"{model_type} config: {key}={repr(extra[key])[:80]} is not supported; allowed: "
                f"{' or '.join(map(repr, allowed))}"
            )
    if active := sorted(key for key in training if extra.get(key)):
        _report(f"{model_type} config: {', '.join(active)}: no training here applies this; the logits are the same")
    known = SHARED_KEYS | harmless | fixed.keys() | set(training)
    if unknown := sorted(str(key)[:40] for key in extra if key not in known):
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        _report(f"{model_type} config: keys that are kept but not read: {', '.join(unknown[:6])}{more}")
    code = extra.get("auto_map")
    if isinstance(code, dict) and not all(isinstance(v, str) and v.startswith(OUR_CODE) for v in code.values()):
        _report(
            f"{CONFIG_NAME}: auto_map names code of its own ({str(sorted(map(str, code.values())))[:120]}), which is "
            f"not run here: the model is read as {model_type}"
        )


@cache
def _report(message: str) -> None:
    """Log a warning once: a configuration is read many times."""
    logger.warning("%s", message)


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


def own_keys(values: dict[str, Any], *, activation: str = "hidden_act", section: str | None = None) -> dict[str, Any]:
    """Return the changes of a ``config.json`` with which no class of other software opens the model.

    Args:
        values: Its contents without a plan. Files of mamba_ssm have no ``model_type``: its class refuses ``statex``.
        activation: Key of an activation that the family's classes make.
        section: Key of the section that it is in, or None.
    """
    changes: dict[str, Any] = {}
    if "model_type" in values:
        changes = {
            "model_type": OUR_CODE_PREFIX + values["model_type"].removeprefix(OUR_CODE_PREFIX),
            "architectures": [ARCHITECTURE],
            activation: NO_ACTIVATION,
        }
        if section is not None and isinstance(values.get(section), dict):
            changes[section] = {**values[section], activation: NO_ACTIVATION}
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
    ours_alone = [ARCHITECTURE]
    kept = {
        key: value
        for key, value in values.items()
        if key != "statex" and value != NO_ACTIVATION and not (key == "architectures" and value == ours_alone)
    }
    if ours(kept.get("model_type")):
        kept["model_type"] = kept["model_type"].removeprefix(OUR_CODE_PREFIX)
    return {**kept, **base}

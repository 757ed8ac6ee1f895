"""Keys of a ``config.json`` that no field of ours holds: known to change nothing, refused, or reported.

A family lists what its class in another library reads beside our fields. A test walks over the fields of those classes,
so that a new one is noticed.
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

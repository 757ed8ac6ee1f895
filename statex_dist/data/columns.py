"""Columns beside token ids in rows and shards of other tools: which are used, refused or ignored.

A column that could change what is learned is never left out without a message. The names are those that Hugging Face
datasets, TRL, axolotl, llm-foundry and Megatron write.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

TOKENS: Final = "input_ids"
MASKS: Final = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
"""One value of 0 or 1 for each token: 1 is learned."""
HONOURED: Final = (TOKENS, "labels", "attention_mask", *MASKS, "position_ids", "seq_lengths")
"""The columns that are read of a row of token ids."""
ZEROS_ONLY: Final = "token_type_ids"
"""Ignored if all its values are 0, refused otherwise."""
HARMLESS: Final = frozenset(
    (
        *("special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "word_ids", "tokens", "text"),
        *("length", "lengths", "num_tokens", "n_tokens", "token_count", "id", "idx", "index", "__index_level_0__"),
    )
)
"""Columns that do not affect the training of a causal language model."""
_REFUSED: Final = {
    "numbers that weigh the loss": (
        *("weights", "weight", "loss_weights", "loss_weight", "token_weights", "sample_weight", "sample_weights"),
        *("advantages", "reward", "rewards", "logprobs", "old_logprobs", "ref_logps"),
    ),
    "borders of documents": (
        *("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "sequence_ids", "segment_ids"),
        *("document_ids", "doc_ids", "boundaries"),
    ),
    "targets of their own": (
        *("label", "target_ids", "targets", "target", "shift_labels", "label_ids", "next_token_ids"),
        *("decoder_input_ids", "decoder_attention_mask", "teacher_logits", "target_logprobs", "target_token_ids"),
        *("label_mask", "target_mask", "prompt_mask", "mask", "masks", "prompt_length", "prompt_len"),
    ),
    "a choice between answers": (
        *("chosen", "rejected", "chosen_input_ids", "rejected_input_ids", "prompt_input_ids", "completion_input_ids"),
        *("chosen_labels", "rejected_labels", "chosen_ids", "rejected_ids", "prompt_ids", "completion_ids"),
        *("chosen_attention_mask", "rejected_attention_mask"),
    ),
    "other inputs of the model": (
        *("inputs_embeds", "pixel_values", "image_grid_thw", "images", "image", "input_features", "audio"),
        *("audio_values", "video", "videos", "mm_token_type_ids", "cross_attention_mask"),
    ),
}
_MEANING: Final = {name: meaning for meaning, names in _REFUSED.items() for name in names}
BESIDE_TEXT: Final = frozenset((TOKENS, "labels", "attention_mask", *MASKS, "position_ids", "seq_lengths", *_MEANING))
"""Columns of a row of text that its reader does not use, and names in a warning."""


def meaning(name: str) -> str | None:
    """Return what a refused column holds, by its name; ``None`` for any other name."""
    return _MEANING.get(name)


_CONVERSATION: Final = frozenset(
    ("messages", "conversations", "conversation", "prompt", "completion", "response", "instruction", "output", "dialog")
)
_OTHER_IDS: Final = ("token_ids", "tokens", "ids", "input_tokens", "tokenized", "toks")


def advice(names: Collection[str]) -> str:
    """Return what helps where rows have columns of these names, but neither text nor token ids; may be empty."""
    if not _CONVERSATION.isdisjoint(names):
        return (
            "; conversations are not rendered here: apply the chat template first, and give text, or input_ids with "
            "labels"
        )
    other = next((name for name in _OTHER_IDS if name in names), None)
    return f"; if {other} holds token ids, rename it to {TOKENS}" if other else ""


def refused_in_shards(name: str) -> bool:
    """Return whether a column of a foreign shard could change what is learned.

    Shards are read as they are, so only a loss mask (the first of :data:`MASKS`) is used.
    """
    return name in _MEANING or name == ZEROS_ONLY or (name in HONOURED and name not in (TOKENS, MASKS[0]))


SHARD_REMEDY: Final = (
    "could change what is learned and is not read in shards; write it as loss_mask (uint8, 1 is learned), one document "
    "per sample and without padding, or leave it out"
)

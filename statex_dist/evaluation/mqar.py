"""Multi-query associative recall: how many key-value pairs fit into the recurrent state.

A document lists ``n`` pairs and then asks for every key once, in random order::

    k1 v1 k2 v2 ... kn vn | q1 a1 q2 a2 ... qn an

Nothing but the state carries the pairs to the queries, so the accuracy over ``n`` is the state's capacity. Task: Arora
et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927); here without filler
tokens, with all pairs before all queries, which is the hardest order for a state of fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from statex_dist.errors import ConfigError
from statex_dist.evaluation.streaming import check_finite, device_of, evaluating, rows_that_fit
from statex_dist.models.lm import RecurrentLM

DEFAULT_KEYS = range(128, 192)
"""Keys under the bytes tokenizer: ids that never start a UTF-8 character, so that text hardly uses them alone."""

DEFAULT_VALUES = range(192, 256)
"""Values under the bytes tokenizer."""


def generate_mqar(
    num_pairs: int,
    num_samples: int,
    *,
    seed: int,
    keys: Sequence[int] = DEFAULT_KEYS,
    values: Sequence[int] = DEFAULT_VALUES,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Draw recall documents.

    Args:
        num_pairs: Pairs ``n`` in each document.
        num_samples: Documents ``S``.
        seed: With ``num_pairs`` it fixes the documents; the first documents of a longer draw need not be the same.
        keys: Token ids of the keys; a document's keys are distinct.
        values: Token ids of the values, drawn uniformly with replacement.

    Returns:
        ``tokens [S, 4n]`` int64 and ``answer_mask [S, 4n]`` uint8, 1 at the answers: ``2n + 1, 2n + 3, ..., 4n - 1``.

    Raises:
        ConfigError: More pairs than keys, or a count, seed or range that makes no document.
    """
    for name, count in (("num_pairs", num_pairs), ("num_samples", num_samples)):
        if count < 1:
            raise ConfigError(f"{name} must be 1 or more, not {count}")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {seed}")
    key_ids, value_ids = np.asarray(keys, dtype=np.int64), np.asarray(values, dtype=np.int64)
    if len(np.unique(key_ids)) != len(key_ids) or not len(value_ids):
        raise ConfigError("mqar needs distinct keys and at least one value")
    if num_pairs > len(key_ids):
        raise ConfigError(
            f"mqar cannot draw {num_pairs} distinct keys from a range of {len(key_ids)}; ask for fewer pairs"
        )
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, num_pairs))))
    # Sorting uniform numbers shuffles each row on its own; its first n columns are a draw without replacement.
    chosen = np.argsort(rng.random((num_samples, len(key_ids))), axis=1)[:, :num_pairs]
    drawn = np.stack([key_ids[chosen], value_ids[rng.integers(len(value_ids), size=chosen.shape)]], axis=2)
    order = np.argsort(rng.random((num_samples, num_pairs)), axis=1)
    asked = np.take_along_axis(drawn, order[:, :, None], axis=1)
    tokens = np.concatenate([drawn, asked], axis=1).reshape(num_samples, 4 * num_pairs)
    answer_mask = np.zeros(tokens.shape, dtype=np.uint8)
    answer_mask[:, 2 * num_pairs + 1 :: 2] = 1
    return tokens, answer_mask


def score_mqar(
    model: RecurrentLM, tokens: npt.NDArray[np.int64], answer_mask: npt.NDArray[np.uint8], *, batch_size: int = 32
) -> npt.NDArray[np.float64]:
    """Return each document's share of right answers.

    The true answers are fed back (teacher forcing), so that one wrong answer does not spoil the next query. An answer
    is right where the most likely of *all* tokens is the value.

    Args:
        model: The model.
        tokens: ``[S, T]`` documents.
        answer_mask: ``[S, T]``, 1 at answers; every document has equally many.
        batch_size: Documents per forward pass, fewer where the logits would take too much memory.

    Returns:
        ``[S]`` accuracies in 0..1.

    Raises:
        CheckpointError: The model's logits are not finite.
    """
    assert not answer_mask[:, 0].any(), "an answer needs a token before it"
    device, shares = device_of(model), []
    batch_size = rows_that_fit(model, tokens.shape[1], batch_size)
    with evaluating(model):
        for start in range(0, len(tokens), batch_size):
            ids = torch.as_tensor(tokens[start : start + batch_size], device=device)
            mask = torch.as_tensor(answer_mask[start : start + batch_size], device=device).bool()
            asked = model(ids[:, :-1]).logits[mask[:, 1:]]
            check_finite(asked, f"mqar documents {start}..{start + len(ids) - 1}")
            right = asked.argmax(dim=-1) == ids[mask]
            shares.append(right.view(len(ids), -1).double().mean(dim=1).cpu().numpy())
    return np.concatenate(shares)

"""Marker strings of special tokens in corpus text, such as ``<|endoftext|>`` or ``<s>``.

Documents about language models contain many, and a fast tokenizer turns them into control tokens wherever they stand.
``split`` encodes them as plain text, ``keep`` leaves them to the tokenizer, ``refuse`` allows none.

The tokenizers library can ignore markers (``encode_special_tokens``), but only in its own search. A Unigram model has
``<s>`` as the piece with the best score, a WordPiece or WordLevel model as a word, and some BPE models as a whole word
or as the product of a merge. For such a model a copy is made in which control pieces have names that do not occur in
text, with the same ids. The ids of every text are compared with the control ids in any case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from statex_dist.errors import DataError, shown

SPECIAL_TOKENS_RULES = ("split", "keep", "refuse")

# A character that Unicode reserves: it does not occur in exchanged text.
_HIDDEN = "\U0010ffff"
_TRIE_LEVELS = 6


class CorpusEncoder(Protocol):
    """Encodes text of a corpus under a rule for special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text, ``[n]``, unsigned."""
        ...

    def marker_in(self, text: str) -> str | None:
        """Return the first marker of a special token in ``text``, or None."""
        ...

    def has_control(self, ids: np.ndarray) -> bool:
        """Return whether a control token is among the ids ``[n]`` of a text."""
        ...


class MarkerSearch:
    """Finds the first of many strings in a text, in one pass."""

    def __init__(self, markers: Collection[str]):
        self._pattern = re.compile(_alternatives(sorted(filter(None, markers)))) if any(markers) else None

    def find(self, text: str) -> str | None:
        """Return the first marker in ``text``, the longest one where several begin at the same place; or None."""
        found = None if self._pattern is None else self._pattern.search(text)
        return None if found is None else found[0]


def _alternatives(markers: Sequence[str], levels: int = _TRIE_LEVELS) -> str:
    """Return a pattern of any of the sorted, different ``markers``, longer ones first.

    It branches on single characters: with several hundred markers a plain list of them is tried one by one wherever
    their first character stands.
    """
    if levels == 0 or len(markers) == 1:
        return "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True))
    groups: dict[str, list[str]] = {}
    for marker in markers:
        groups.setdefault(marker[:1], []).append(marker[1:])
    ends = groups.pop("", None) is not None
    branches = [f"{re.escape(first)}(?:{_alternatives(rests, levels - 1)})" for first, rests in groups.items()]
    return "|".join([*branches, ""] if ends else branches)


class ControlTokens:
    """The special tokens of a tokenizer of the tokenizers library.

    Args:
        backend: Its ``tokenizers.Tokenizer``, without truncation and padding.
        special: Ids of the special tokens by their markers.
        keep: Leave markers in text to the tokenizer; otherwise they are encoded as plain pieces.

    Attributes:
        ordinary: Those that are pieces of plain text as well: single characters, bytes, what stands for the unknown.
            They are no control tokens, and their ids occur in every text that needs them.
    """

    def __init__(self, backend: Any, special: Mapping[str, int], *, keep: bool = False):
        self._backend = backend
        self._special = special
        self._keep = keep
        state = json.loads(backend.to_str())
        model = state["model"]
        unknown = {model.get("unk_token")}
        if isinstance(model.get("unk_id"), int):
            unknown = {model["vocab"][model["unk_id"]][0]}
        spelled = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
        self.ordinary = {name for name in special if len(name) == 1 or name in spelled}
        self._control = np.zeros(max(backend.get_vocab().values(), default=0) + 1, np.bool_)
        self._control[[number for name, number in special.items() if name not in self.ordinary | unknown]] = True
        names = {name: f"{_HIDDEN}{name}{_HIDDEN}" for name in special if name not in self.ordinary}
        self._splitting = _without_pieces(backend, state, names)
        self._markers = MarkerSearch([name for name in special if name not in self.ordinary])

    def marker_in(self, text: str) -> str | None:
        """Return the first marker in ``text``, or None; single characters are none."""
        return self._markers.find(text)

    def has_control(self, ids: np.ndarray) -> bool:
        """Return whether a control token is among ``ids``."""
        return bool(self._control[ids].any())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text, ``[n]`` uint32.

        Raises:
            DataError: Markers are split, and a text has a control token all the same.
        """
        backend = self._backend if self._keep else self._splitting
        before = backend.encode_special_tokens
        try:
            backend.encode_special_tokens = before or not self._keep
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            backend.encode_special_tokens = before
        found = [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
        for ids in [] if self._keep else found:
            if (control := self._control[ids]).any():
                token = int(ids[control.argmax()])
                raise DataError(
                    f"a text is encoded with the control token {shown(self._backend.id_to_token(token), 60)} (id "
                    f"{token}), which this tokenizer cannot split; leave the text out, or give --special-tokens keep"
                )
        return found


def _without_pieces(backend: Any, state: dict[str, Any], names: Mapping[str, str]) -> Any:
    """Return ``backend``, or a copy with pieces renamed if text may be encoded as one of them."""
    model, kind = state["model"], state["model"]["type"]
    if kind == "BPE":
        prefix = len(model.get("continuing_subword_prefix") or "")
        merges = [(a, b) for a, b in model["merges"] if not (a in names or b in names or a + b[prefix:] in names)]
        if len(merges) == len(model["merges"]) and not model.get("ignore_merges"):
            return backend
        model["merges"] = merges
    if kind == "Unigram":
        present = {piece for piece, _ in model["vocab"] if piece in names}
        model["vocab"] = [(names.get(piece, piece), score) for piece, score in model["vocab"]]
    else:
        present = names.keys() & model["vocab"].keys()
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if not present:
        return backend
    # An added token takes the id of the piece of its name, so both are renamed; ids of the others stay.
    for token in state["added_tokens"]:
        if token["content"] in present:
            token["content"] = names[token["content"]]
    state["post_processor"] = None  # it would add special tokens
    return type(backend).from_str(json.dumps(state))

"""Text as its tokens come: what no later token changes, and nothing of a stop string.

The text of a continuation is the text of prompt and continuation together, less the prompt's. It is not the text of
the continuation's tokens alone: a tokenizer may drop the space in front of the first token that it decodes, and a
character may begin in the prompt. So the prompt's last tokens are decoded with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from statex_dist.data.tokenizer import Tokenizer

_UNDECODABLE = "\ufffd"

_LONGEST_CHARACTER = 4
"""Bytes of a character at most."""

_CONTEXT = 8
"""Tokens with a text of their own that are decoded again with later tokens. The first characters of the decoded text
may differ from the whole text: a space is dropped, or up to three bytes belong to a character that began before."""

_WINDOW = 32
"""Tokens from which on those that are decoded again become fewer."""


class TextStream:
    """Turns tokens into pieces of text that are final when they are handed out.

    Args:
        tokenizer: Decodes the tokens.
        until: Strings that end the text and are no part of it.
        context: Tokens before the first one, all of them or the last (see :func:`text_window`).

    Attributes:
        stopped: Whether a stop string has come; no more tokens are then to be pushed.
        overlap: Characters at the end of the context's text that the first piece replaces: more than 0 only where a
            character, or a run of bytes, began in the context.
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str] = (), *, context: Sequence[int] = ()):
        self._tokenizer, self._until = tokenizer, tuple(until)
        self._window = text_window(tokenizer, context)
        self._known = tokenizer.decode(self._window)
        """Text of the window that belongs to the context or went to the buffer."""
        self._begun = False
        """Whether text went to the buffer."""
        self._buffer = ""
        self.stopped = False
        self.overlap = 0

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now."""
        assert not self.stopped
        self._window.append(token)
        if self._tokenizer.stands_alone(token):
            self._take(_certain(self._tokenizer.decode(self._window)))
            self._move_window()
            return self._release()
        return self._stop_early() if self._until else ""

    def finish(self) -> str:
        """Return the remaining text after the last token; replacement characters stand for incomplete characters."""
        if not self.stopped:
            self._take(self._tokenizer.decode(self._window))
        rest, self._buffer = cut(self._buffer, self._until), ""
        return rest

    def _take(self, text: str) -> None:
        """Move what is new in the window's text to the buffer."""
        same = _num_shared(text, self._known)
        if same == len(text):
            return
        if not self._begun:
            self.overlap = len(self._known) - same
        self._buffer += text[same:]
        self._known, self._begun = text, True

    def _move_window(self) -> None:
        """Forget tokens that the text of later ones does not depend on."""
        if self._begun and len(self._window) > _WINDOW:
            window = text_window(self._tokenizer, self._window)
            if len(window) < len(self._window):
                self._window, self._known = window, _certain(self._tokenizer.decode(window))

    def _stop_early(self) -> str:
        """Return the last text if, ended here, it has a stop string; else nothing.

        A token that does not stand alone is not handed out before the next one that does. A stop string in it (Llama's
        line end is such a token) must not wait for that.
        """
        if not self._may_end_with_stop():
            return ""
        text = self._tokenizer.decode(self._window).rstrip(_UNDECODABLE)
        new = text[_num_shared(text, self._known) :]
        if not any(stop in self._buffer + new for stop in self._until):
            return ""
        self._take(text)
        return self._release()

    def _may_end_with_stop(self) -> bool:
        """Return whether the window can end with a stop string; of a long window only its last tokens are decoded.

        A run of bytes is decoded from each of the places of which one begins a character.
        """
        last = _LONGEST_CHARACTER * max(map(len, self._until)) + _WINDOW
        if len(self._window) <= 2 * last:
            return True
        tails = (self._tokenizer.decode(self._window[-last - i :]) for i in range(_LONGEST_CHARACTER))
        return any(stop in tail for tail in tails for stop in self._until)

    def _release(self) -> str:
        """Return what of the buffer cannot be the beginning of a stop string."""
        if any(stop in self._buffer for stop in self._until):
            self.stopped = True
            text, self._buffer = cut(self._buffer, self._until), ""
            return text
        held = max((_overlap(self._buffer, stop) for stop in self._until), default=0)
        end = len(self._buffer) - held
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        return text


def text_window(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Return the last tokens of a text that the text of further tokens depends on.

    It begins at a token that stands alone, so that no run of tokens that are decoded together is cut.
    """
    alone = 0
    for start in range(len(tokens) - 1, -1, -1):
        alone += tokenizer.stands_alone(tokens[start])
        if alone == _CONTEXT:
            return list(tokens[start:])
    return list(tokens)


def continuation_text(tokenizer: Tokenizer, context: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text of ``tokens`` behind ``context``."""
    stream = TextStream(tokenizer, context=context)
    pieces = [stream.push(token) for token in tokens]
    return "".join([*pieces, stream.finish()])


def _num_shared(a: str, b: str) -> int:
    """Return how many characters at their beginnings two texts share."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _certain(text: str) -> str:
    """Return ``text`` without a last character that further bytes may make whole."""
    return text[: -len(_UNDECODABLE)] if text.endswith(_UNDECODABLE) else text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` are the beginning of ``stop``."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0


def cut(text: str, until: Sequence[str]) -> str:
    """Return ``text`` up to the first of the stop strings."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def stop_with_special_token(until: Sequence[str], tokenizer: Tokenizer) -> str | None:
    """Return the first stop string that has a special token and other text: it cannot come, no text has the token."""
    for stop in until:
        if tokenizer.special_id(stop) is None and any(map(tokenizer.is_special, tokenizer.encode(stop).tolist())):
            return stop
    return None


def end_ids(until: Sequence[str], tokenizer: Tokenizer, *, ignore_eos: bool = False) -> frozenset[int]:
    """Return the tokens that end a text: end tokens, and stop strings that are special tokens and in no text."""
    special = {token for text in until if (token := tokenizer.special_id(text)) is not None}
    return frozenset(special if ignore_eos else special.union(tokenizer.end_tokens))

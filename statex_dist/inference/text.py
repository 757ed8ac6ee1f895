"""Text as its tokens come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from statex_dist.data.tokenizer import Tokenizer

_UNDECODABLE = "\ufffd"

# Bytes of the longest character. Tokenizers decode those of one that is not whole yet to one replacement character, or
# to one each, together with those of whole characters before it (the byte fallback of sentencepiece).
_LONGEST_CHARACTER = 4

# Tokens after which the window that is decoded anew moves on. It keeps tokens that were decoded before: some
# tokenizers drop the space in front of the first.
_WINDOW = 16


class TextStream:
    """Turns tokens into pieces of text that are final when they are handed out.

    Args:
        tokenizer: Decodes the tokens.
        until: Strings that end the text and are no part of it.

    Attributes:
        stopped: Whether a stop string has come; no more tokens are then to be pushed.
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str] = ()):
        self._tokenizer, self._until = tokenizer, tuple(until)
        self._window: list[int] = []
        self._handed_out = 0
        """Characters of the decoded window that went to the buffer."""
        self._whole = 0
        """Tokens of the window when last all of them made whole characters."""
        self._buffer = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now."""
        assert not self.stopped
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        undecodable = len(text) - len(text.rstrip(_UNDECODABLE))
        if undecodable and len(self._window) - self._whole <= _LONGEST_CHARACTER:
            return ""
        # What cannot be a character any more is handed out, but for what may begin another.
        end = len(text) - min(undecodable, _LONGEST_CHARACTER - 1)
        self._buffer += text[self._handed_out : end]
        self._handed_out = max(self._handed_out, end)
        if not undecodable:
            if len(self._window) > _WINDOW:
                self._move_window(self._whole, "")
            self._whole = len(self._window)
        elif len(self._window) - self._whole > _WINDOW:
            self._move_window(len(self._window) - _WINDOW // 2, text[end:])
        return self._release()

    def finish(self) -> str:
        """Return the rest, when no more tokens come: replacement characters for what is no whole character."""
        if not self.stopped:
            self._buffer += self._tokenizer.decode(self._window)[self._handed_out :]
        rest, self._window, self._handed_out = cut(self._buffer, self._until), [], 0
        self._buffer = ""
        return rest

    def _move_window(self, start: int, held: str) -> None:
        """Forget tokens before ``start`` unless what is decoded then ends otherwise; ``held`` is not handed out yet."""
        text = self._tokenizer.decode(self._window[start:])
        if text.endswith(held):
            self._window = self._window[start:]
            self._handed_out = len(text) - len(held)
            self._whole = 0

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


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of ``text`` are the beginning of ``stop``."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0


def cut(text: str, until: Sequence[str]) -> str:
    """Return ``text`` up to the first of the stop strings."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def end_ids(until: Sequence[str], tokenizer: Tokenizer, *, ignore_eos: bool = False) -> frozenset[int]:
    """Return the tokens that end a text: EOS, and stop strings that are special tokens and so in no decoded text."""
    special = {token for text in until if (token := tokenizer.special_id(text)) is not None}
    return frozenset(special if ignore_eos else {tokenizer.eos_token_id, *special})

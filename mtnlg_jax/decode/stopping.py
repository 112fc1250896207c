"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one row, built token by token.

    ``push`` returns what may be shown: text that later tokens cannot take back. It holds back the bytes of a
    character that is not whole yet, and an end that may become a stop string.
    """

    def __init__(self, tokenizer, stop_strings: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""  # all that was shown
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes one token. After a stop string, ``stopped`` is True and nothing more comes."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found))
        kept_back = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._show(len(self._held) - kept_back)

    def finish(self) -> str:
        """What was held back, once no more tokens come; a character still cut in two is left out."""
        return "" if self.stopped else self._show(len(self._held))

    def _show(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)

"""Turn tokens into text as they arrive: whole characters only, without stop strings and stop
sequences."""

import codecs
from collections.abc import Sequence


class ShownSpecials:
    """A tokenizer that writes special tokens by name, and otherwise acts as the one given."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def token_bytes(self, index: int) -> bytes:
        name = self._tokenizer.special_names.get(index)
        return self._tokenizer.token_bytes(index) if name is None else name.encode()


class TextStream:
    """The text of one row, built token by token.

    ``push`` returns text that later tokens cannot take back. It holds back the bytes of an
    incomplete character, an end that may become a stop string, and tokens that may become a stop
    sequence.
    """

    def __init__(
        self,
        tokenizer,
        stop_strings: Sequence[str] = (),
        stop_sequences: Sequence[Sequence[int]] = (),
    ):
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        # The longest first: of two that end here, it hides more.
        self._sequences = sorted(map(tuple, stop_sequences), key=len, reverse=True)
        # Incremental, because a character may be spread over several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: tuple[int, ...] = ()
        self._held = ""
        self.text = ""  # all text shown so far
        self.stopped = False

    def push(self, token: int) -> str:
        """Add one token, and return new text. After a stop, ``stopped`` is True."""
        if self.stopped:
            return ""
        self._waiting += (token,)
        for sequence in self._sequences:
            if self._waiting[-len(sequence) :] == sequence:
                shown = self._read(len(self._waiting) - len(sequence))
                return shown + self.finish(stopped=True)
        # What may still become a stop sequence is not shown, since shown text cannot be taken back.
        kept_back = max(
            (overlap(self._waiting, sequence) for sequence in self._sequences), default=0
        )
        return self._read(len(self._waiting) - kept_back)

    def finish(self, stopped: bool = False) -> str:
        """Return the text held back, once no more tokens come, without an incomplete character."""
        if self.stopped:
            return ""
        # The tokens of the stop itself are dropped.
        shown = "" if stopped else self._read(len(self._waiting))
        # An end that might have become a stop string is text after all.
        if not self.stopped:
            shown += self._show(len(self._held))
        self.stopped |= stopped
        return shown

    def _read(self, count: int) -> str:
        """Turn the first ``count`` waiting tokens into text, up to a stop string."""
        tokens = self._waiting[:count]
        self._waiting = self._waiting[count:]
        shown = ""
        # Token by token, so that the text of a stop string ends the row at the right token.
        for token in tokens:
            self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
            # The earliest match of all stop strings, also one across several tokens.
            found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
            if found:
                self.stopped = True
                return shown + self._show(min(found))
            kept_back = max((overlap(self._held, stop) for stop in self._stops), default=0)
            shown += self._show(len(self._held) - kept_back)
        return shown

    def _show(self, length: int) -> str:
        shown = self._held[:length]
        self._held = self._held[length:]
        self.text += shown
        return shown


def overlap(known: Sequence, stop: Sequence) -> int:
    """Return the length of the longest end of ``known`` that is a proper prefix of ``stop``.

    Both are texts, or both are tokens.
    """
    # From the longest down: the first match is the answer. A whole match is a stop, not an overlap.
    return next(
        (n for n in range(min(len(known), len(stop) - 1), 0, -1) if stop[:n] == known[-n:]), 0
    )

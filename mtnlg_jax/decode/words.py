"""Count words while a text is written, end it behind a sentence, and tell how long words took."""

# Shapes: T tokens

import re
import time
from collections.abc import Callable, Sequence

import numpy as np

from mtnlg_jax.decode.stopping import TextStream
from mtnlg_jax.decode.utilities import SPACELESS

_SPACELESS = re.compile(SPACELESS)
# These end a sentence wherever they stand; the others only before a space.
_WIDE_ENDS = "。！？"
_ENDS = ".!?…" + _WIDE_ENDS
# Quotation marks and brackets that belong to the sentence before them.
_CLOSING = "\"'”’»)]}」』）】》*_"


class WordCounter:
    """The number of words of a text that arrives in pieces.

    A character of a script without spaces, such as Chinese, is a word. So is each run of other
    characters without spaces that has a letter or a digit.
    """

    def __init__(self) -> None:
        self.words = 0
        self._inside = False

    def push(self, piece: str) -> int:
        """Add a piece of the text, and return the words so far."""
        for character in piece:
            if _SPACELESS.match(character):
                self.words += 1
                self._inside = False
            elif character.isspace():
                self._inside = False
            elif not self._inside and character.isalnum():
                self.words += 1
                self._inside = True
        return self.words


def count_words(text: str) -> int:
    """Return the number of words of ``text``; see `WordCounter`."""
    return WordCounter().push(text)


def words_by_token(tokenizer, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return how many words and how many characters stand after each token."""
    stream = TextStream(tokenizer)
    counter = WordCounter()
    words_T = []
    characters_T = []
    for token in tokens:
        words_T.append(counter.push(stream.push(token)))
        characters_T.append(len(stream.text))
    return words_T, characters_T


class SentenceStream:
    """A `TextStream` that stops behind the first sentence that ends after ``words`` words.

    A full stop, or another end, belongs to a sentence with the quotation marks behind it. Whether
    more of these follow is known from the next token, which the text no longer has.
    """

    def __init__(self, stream: TextStream, words: int):
        self._stream = stream
        self._words = words
        self._counter = WordCounter()
        self._end = ""  # the character that ends a sentence, while only closing ones follow
        self._stopped = False
        self.text = ""

    @property
    def stopped(self) -> bool:
        return self._stopped or self._stream.stopped

    def push(self, token: int) -> str:
        """Add one token, and return new text."""
        return "" if self._stopped else self._read(self._stream.push(token))

    def finish(self) -> str:
        """Return the text held back, once no more tokens come."""
        return "" if self._stopped else self._read(self._stream.finish())

    def _read(self, piece: str) -> str:
        for at, character in enumerate(piece):
            if self._end and character not in _CLOSING + _ENDS:
                if self._end in _WIDE_ENDS or character.isspace():
                    self._stopped = True
                    piece = piece[:at]
                    break
                self._end = ""
            enough = self._counter.push(character) >= self._words
            if enough and character in _ENDS:
                self._end = character
        self.text += piece
        return piece


class Pace:
    """When the text of row 0 appeared; give ``on_text`` to the function that writes the rows.

    ``clock`` returns seconds; default `time.perf_counter`.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.perf_counter
        self._seconds: list[float] = []
        self._characters: list[int] = []

    def on_text(self, row: int, piece: str) -> None:
        if row:
            return
        before = self._characters[-1] if self._characters else 0
        self._characters.append(before + len(piece))
        self._seconds.append(self._clock())

    def seconds_per_token(
        self, tokenizer, tokens: Sequence[int], word: int, around: int = 250
    ) -> tuple[int, float] | None:
        """Return the word in the middle, and the mean seconds of a token around it.

        Args:
          tokens: of the row.
          around: words before and behind ``word`` over which the mean is taken; a text that ends
            before them has its last ones in their place.

        None if the row has fewer than two words.
        """
        words_T, characters_T = words_by_token(tokenizer, tokens)
        if not words_T or words_T[-1] < 2:
            return None
        last = min(word + around, words_T[-1])
        first = max(last - 2 * around, 1)
        at_T = np.searchsorted(words_T, [first, last])
        # Text appears in chunks: a token is there once the chunk with its characters is.
        shown = np.searchsorted(self._characters, np.array(characters_T)[at_T])
        begin, end = np.array(self._seconds)[np.minimum(shown, len(self._seconds) - 1)]
        return (first + last) // 2, float((end - begin) / max(1, at_T[1] - at_T[0]))

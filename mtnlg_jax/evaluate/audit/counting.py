"""Count how often sequences of tokens, or strings, stand in the training text. Counts are exact."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer

_PIECE = 1 << 20  # tokens in memory at once
# Odd, so that it has an inverse modulo 2^64.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = 20
_COMPARED = 1 << 14  # windows that are compared token by token at once


def count_sequences(
    parts: Sequence[Tokens],
    wanted: Sequence[Sequence[int]],
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Return [sequences] int64: how often each of ``wanted`` (one token or more) stands in
    ``parts``, overlapping occurrences included.

    Every window of a wanted length is hashed (Karp and Rabin 1987), and those whose hash is wanted
    are compared token by token. Memory: some 100 MB. ``on_tokens`` is called with the number of
    tokens that were searched since the last call.
    """
    counts = np.zeros(len(wanted), np.int64)
    lengths = np.array([len(each) for each in wanted], np.int64)
    groups = [
        _Group(int(length), np.flatnonzero(lengths == length), wanted)
        for length in np.unique(lengths)
    ]
    longest = int(lengths.max(initial=0))
    powers = _powers(_BASE, _PIECE + longest)
    inverse = _powers(np.uint64(pow(int(_BASE), -1, 1 << 64)), _PIECE + longest)
    for part in parts:
        for start in range(0, len(part), _PIECE):
            tokens = part.read(start, min(start + _PIECE + max(0, longest - 1), len(part)))
            values = tokens.astype(np.uint64) + np.uint64(1)
            weighed = np.cumsum(values * powers[: len(values)])
            sums = np.concatenate([np.zeros(1, np.uint64), weighed])
            for group in groups:
                group.count(tokens, sums, inverse, counts)
            on_tokens(min(_PIECE, len(part) - start))
    return counts


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """Return base^0 ... base^(count - 1) modulo 2^64."""
    with np.errstate(over="ignore"):
        return np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(count - 1, base)]))


class _Group:
    """The wanted sequences of one length; ``numbers`` are their indices."""

    def __init__(self, length: int, numbers: np.ndarray, wanted: Sequence[Sequence[int]]):
        rows = np.array([wanted[number] for number in numbers], np.int64)
        # Equal sequences are searched for once.
        self._rows, same = np.unique(rows, axis=0, return_inverse=True)
        self._numbers = numbers
        self._same = same.reshape(-1)
        self._length = length
        weighed = (self._rows.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, length)
        hashes = weighed.sum(1, dtype=np.uint64)
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[self._buckets(hashes)] = True

    @staticmethod
    def _buckets(hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)

    def count(
        self, tokens: np.ndarray, sums: np.ndarray, inverse: np.ndarray, counts: np.ndarray
    ) -> None:
        """Add the windows of ``tokens`` that begin in its first _PIECE tokens to ``counts``."""
        windows = min(len(tokens) - self._length + 1, _PIECE)
        if windows < 1:
            return
        hashes = (sums[self._length : self._length + windows] - sums[:windows]) * inverse[:windows]
        starts = np.flatnonzero(self._filter[self._buckets(hashes)])
        last = len(self._hashes) - 1
        at = np.minimum(np.searchsorted(self._hashes, hashes[starts]), last)
        equal = self._hashes[at] == hashes[starts]
        starts = starts[equal]
        # Two sequences of one hash would need both to be compared: 2^-64 for each pair.
        rows = self._order[at[equal]]
        found = np.zeros(len(self._rows), np.int64)
        for first in range(0, len(starts), _COMPARED):
            some = slice(first, first + _COMPARED)
            index = starts[some][:, None] + np.arange(self._length)
            same = (tokens[index] == self._rows[rows[some]]).all(1)
            found += np.bincount(rows[some][same], minlength=len(found))
        counts[self._numbers] += found[self._same]


def find_strings(
    parts: Sequence[Tokens],
    tokenizer: Tokenizer,
    wanted: Sequence[str],
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Return [strings] bool: which of ``wanted`` stand in the text of ``parts``, however it is
    tokenized there."""
    found = np.zeros(len(wanted), bool)
    data = [each.encode() for each in wanted]
    longest = max(map(len, data), default=0)
    for part in parts:
        rest = b""
        for text, tokens in _texts(part, tokenizer):
            rest += text
            for number, each in enumerate(data):
                if not found[number] and each in rest:
                    found[number] = True
            rest = rest[-(longest - 1) :] if longest > 1 else b""
            on_tokens(tokens)
    return found


def _texts(part: Tokens, tokenizer: Tokenizer) -> Iterator[tuple[bytes, int]]:
    """Yield (bytes of text, number of its tokens) of the pieces of a part. A line end takes the
    place of each special token, so that no find spans two documents."""
    pieces = [
        b"\n" if tokenizer.is_special[index] else tokenizer.token_bytes(index)
        for index in range(tokenizer.vocab_size)
    ]
    for start in range(0, len(part), _PIECE):
        tokens = part.read(start, min(start + _PIECE, len(part)))
        yield b"".join([pieces[token] for token in tokens.tolist()]), len(tokens)

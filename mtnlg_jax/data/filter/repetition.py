"""Measure how much of a text is repetition, as Gopher does (Rae et al. 2021, arXiv 2112.11446,
table A1)."""

from collections.abc import Callable, Sequence

import numpy as np

# Kana and Han: scripts without spaces between words, of which each character counts as a word.
UNSPACED = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# N-grams are counted within windows of 2^14 units: in a novel any five words recur somewhere.
_WINDOW_BITS = 14
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, without a pattern: 2^64 / golden ratio


def duplicate_share(pieces: Sequence[str]) -> tuple[float, float]:
    """Return (share of pieces that are repetitions, share of the characters in them)."""
    seen = set()
    count = 0
    size = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            size += len(piece)
        else:
            seen.add(piece)
    return count / max(1, len(pieces)), size / max(1, sum(map(len, pieces)))


class Units:
    """The units in which a text is counted.

    These are its words between white space, in lower case. If it has more Chinese or Japanese
    characters than words, ``unspaced`` is true and the units are its letters and digits.
    """

    def __init__(self, text: str):
        words = text.lower().split()
        codes = (
            np.frombuffer(text.encode("utf-32-le"), np.uint32)
            if not text.isascii()
            else np.zeros(0, np.uint32)
        )
        # Kana and Han; not punctuation, Hangul (which has spaces) or full-width forms.
        characters = codes[
            (codes >= 0x3041) & (codes < 0xAC00)
            | (codes >= 0xF900) & (codes < 0xFB00)
            | (codes >= 0x20000)
        ]
        self.unspaced = len(characters) > len(words)
        if self.unspaced:
            letters = (codes >= 0x3041) & ~((codes >= 0xFE10) & (codes < 0x10000))
            letters |= (codes >= 0x30) & (codes <= 0x39) | ((codes | 32) >= 0x61) & (
                (codes | 32) <= 0x7A
            )
            self.numbers: dict[str, int] = {}
            self.ids = codes[letters].astype(np.uint64)
            self.sizes = np.ones(len(self.ids), np.int64)
        else:
            self.numbers = {}  # of each distinct word, in order of first occurrence
            self.ids = np.array(
                [self.numbers.setdefault(word, len(self.numbers)) for word in words], np.uint64
            )
            self.sizes = np.fromiter(map(len, self.numbers), np.int64, len(self.numbers))[
                self.ids.astype(np.int64)
            ]
        self._windows = range(0, len(self.ids), 1 << _WINDOW_BITS)
        # By the start of a window: n and the hashes of its n-grams, from which n + 1 continues.
        self._hashed: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def lettered(self) -> int:
        """Return the number of words that contain a letter."""
        has = np.array(
            [word.isalpha() or any(map(str.isalpha, word)) for word in self.numbers], bool
        )
        return int(has[self.ids.astype(np.int64)].sum())

    def top_share(self, n: int) -> float:
        """Return the share of characters in the most frequent n-gram, averaged over the windows."""
        return self._mean(self._top, n)

    def duplicate_share(self, n: int) -> float:
        """Return the share of characters in repeated n-grams, averaged over the windows.

        Each character counts once. Never grows with n.
        """
        return self._mean(self._duplicate, n)

    def _mean(self, measure: Callable[..., int], n: int) -> float:
        total = 0
        for start in self._windows:
            sizes = self.sizes[start : start + (1 << _WINDOW_BITS)]
            if len(sizes) >= n:
                keys = self._sorted(start, n)
                total += measure(
                    keys >> np.uint64(_WINDOW_BITS),
                    keys & np.uint64((1 << _WINDOW_BITS) - 1),
                    sizes,
                    n,
                )
        return total / max(1, int(self.sizes.sum()))

    def _sorted(self, start: int, n: int) -> np.ndarray:
        """Return the n-grams of a window, sorted: the hash in the high bits, the position below."""
        ids = self.ids[start : start + (1 << _WINDOW_BITS)]
        done, hashes = self._hashed.get(start, (0, np.zeros(len(ids), np.uint64)))
        if done > n:
            done = 0
            hashes = np.zeros(len(ids), np.uint64)
        for offset in range(done, n):
            last = ids[offset:]
            hashes = (hashes[: len(last)] + last + np.uint64(1)) * _PRIME
            hashes ^= hashes >> np.uint64(29)
        self._hashed[start] = n, hashes
        bits = np.uint64(_WINDOW_BITS)
        return np.sort((hashes >> bits << bits) | np.arange(len(hashes), dtype=np.uint64))

    @staticmethod
    def _top(hashes: np.ndarray, positions: np.ndarray, sizes: np.ndarray, n: int) -> int:
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
        counts = np.diff(starts, append=len(hashes))
        best = int(counts.max())
        if best < 2:
            return 0
        first = positions[starts[counts == best]].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return best * int((ends[first + n] - ends[first]).max())

    @staticmethod
    def _duplicate(hashes: np.ndarray, positions: np.ndarray, sizes: np.ndarray, n: int) -> int:
        again = positions[1:][hashes[1:] == hashes[:-1]].astype(np.int64)
        if not len(again):
            return 0
        cover = np.zeros(len(sizes) + 1, np.int64)
        cover[again] += 1
        cover[again + n] -= 1
        return int(sizes[np.cumsum(cover[:-1]) > 0].sum())

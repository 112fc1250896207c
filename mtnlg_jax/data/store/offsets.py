"""Find the documents of a stream of tokens, reading their offsets in blocks on demand.

The first batch waits only for the few blocks that it touches, not for 8 bytes of each document.
"""

import bisect
import functools
from collections.abc import Callable, Iterator

import numpy as np

BLOCK = 1 << 12  # documents of a block: 32 KiB of offsets
_KEPT = 256  # blocks in memory


class Offsets:
    """``documents + 1`` offsets from 0 to ``tokens``: document i is the tokens from offset i to
    offset i + 1.

    ``read(first, stop)`` returns the offsets [first, stop) as int64. Each block is checked when it
    is read: a document has at least ``least`` tokens, and a block starts where the one before it
    ends. ``damaged(reason)`` makes the error.

    Memory: the blocks used last (8 MiB), and some 100 bytes for each block seen.
    """

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray],
        documents: int,
        tokens: int,
        damaged: Callable[[str], Exception],
        least: int = 1,
    ):
        self._read = read
        self._documents = documents
        self._tokens = tokens
        self._damaged = damaged
        self._least = least
        self._block = functools.lru_cache(maxsize=_KEPT)(self._read_block)
        self._size = BLOCK
        self._count = -(-documents // self._size)
        # (first token, number) of the blocks seen so far, and of the end; ascending in both.
        self._known = [(0, 0), (tokens, self._count)]

    def check_ends(self) -> None:
        """Read and check the first and the last block."""
        if not self._documents:
            self._check(self._read(0, 1), 0, 0)
            return
        for number in (0, self._count - 1):
            self._block(number)

    def all(self) -> np.ndarray:
        """Return [documents + 1] int64, all offsets."""
        offsets = self._read(0, self._documents + 1)
        self._check(offsets, 0, self._documents)
        return offsets

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first document, offsets of the block's documents and of its end) of each block."""
        for number in range(self._count):
            yield number * self._size, self._block(number)

    def find(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return int64 (document, its first token) of each of ``positions``, tokens in [0, tokens),
        in the same shape."""
        documents = np.empty_like(positions)
        begins = np.empty_like(positions)
        left = np.ones(positions.shape, bool)
        while left.any():
            number = self._block_of(int(positions[left][0]))
            offsets = self._block(number)
            here = left & (positions >= offsets[0]) & (positions < offsets[-1])
            found = np.searchsorted(offsets, positions[here], side="right") - 1
            documents[here] = found + number * self._size
            begins[here] = offsets[found]
            left &= ~here
        return documents, begins

    def _block_of(self, position: int) -> int:
        """Return the block that holds the token at ``position``.

        Interpolation search, since documents have similar lengths; if a guess leaves more than half
        of the range, the next step is a bisection.
        """
        after = bisect.bisect_right(self._known, (position, self._count))
        start, low = self._known[after - 1]
        end, high = self._known[after]
        halve = False
        while high - low > 1:
            width = high - low
            number = low + (width // 2 if halve else (position - start) * width // (end - start))
            offsets = self._block(number)
            if position < offsets[0]:
                high = number
                end = int(offsets[0])
            elif position >= offsets[-1]:
                low = number + 1
                start = int(offsets[-1])
            else:
                return number
            halve = 2 * (high - low) > width
        return low

    def _read_block(self, number: int) -> np.ndarray:
        first = number * self._size
        stop = min(first + self._size, self._documents)
        offsets = self._read(first, stop + 1)
        self._check(offsets, first, stop)
        for known in ((int(offsets[0]), number), (int(offsets[-1]), -(-stop // self._size))):
            index = bisect.bisect_left(self._known, known)
            before = self._known[index - 1 : index] or [(0, 0)]
            after = self._known[index : index + 1]
            if after == [known]:
                continue
            if before[0][1] >= known[1] or (after and after[0][1] <= known[1]):
                raise self._unfit(first, stop)
            self._known.insert(index, known)
        return offsets

    def _check(self, offsets: np.ndarray, first: int, stop: int) -> None:
        whole = offsets.shape == (stop - first + 1,) and (np.diff(offsets) >= self._least).all()
        whole = whole and 0 <= offsets[0] and offsets[-1] <= self._tokens
        if (
            not whole
            or (first == 0 and offsets[0])
            or (stop == self._documents and offsets[-1] != self._tokens)
        ):
            raise self._unfit(first, stop)

    def _unfit(self, first: int, stop: int) -> Exception:
        return self._damaged(
            f"document_offsets do not divide {self._tokens} tokens into {self._documents} "
            f"documents (seen at documents {first} to {stop})"
        )

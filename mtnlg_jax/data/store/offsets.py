"""Where the documents of a stream of tokens begin, for any number of them: blocks that are read
when they are wanted.

So the first batch waits for the few blocks that it touches, and not for 8 bytes of each document.
"""

import bisect
import functools
from collections.abc import Callable, Iterator

import numpy as np

BLOCK = 1 << 12  # documents of a block: 32 KiB of offsets
_KEPT = 256  # blocks in memory


class Offsets:
    """``documents + 1`` numbers from 0 to ``tokens``: document i is the tokens from number i to
    number i + 1.

    ``read(first, stop)`` gives the numbers [first, stop) as int64. Each block is checked when it is
    read: a document has ``least`` tokens or more, and blocks go on where those before them end.
        ``damaged(reason)`` makes the error.
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
        # (first token, number) of the blocks that are known, and the end: in both orders at once.
        self._known = [(0, 0), (tokens, self._count)]

    def check_ends(self) -> None:
        """Read the first block and the last one; raises what ``damaged`` makes."""
        if not self._documents:
            self._check(self._read(0, 1), 0, 0)
            return
        for number in (0, self._count - 1):
            self._block(number)

    def all(self) -> np.ndarray:
        """[documents + 1] int64."""
        offsets = self._read(0, self._documents + 1)
        self._check(offsets, 0, self._documents)
        return offsets

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first document, offsets of its block's documents and of the end of the last) of all, one
        after another."""
        for number in range(self._count):
            yield number * self._size, self._block(number)

    def find(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (document, its first token) of each of ``places``, tokens in [0, tokens), in the
        same shape."""
        documents = np.empty_like(places)
        begins = np.empty_like(places)
        left = np.ones(places.shape, bool)
        while left.any():
            number = self._block_of(int(places[left][0]))
            offsets = self._block(number)
            here = left & (places >= offsets[0]) & (places < offsets[-1])
            found = np.searchsorted(offsets, places[here], side="right") - 1
            documents[here] = found + number * self._size
            begins[here] = offsets[found]
            left &= ~here
        return documents, begins

    def _block_of(self, place: int) -> int:
        """The block that holds token ``place``. Documents are mostly alike, so that its number is
        guessed from the place; where a guess leaves more than half, the next one halves."""
        after = bisect.bisect_right(self._known, (place, self._count))
        start, low = self._known[after - 1]
        end, high = self._known[after]
        halve = False
        while high - low > 1:
            width = high - low
            number = low + (width // 2 if halve else (place - start) * width // (end - start))
            offsets = self._block(number)
            if place < offsets[0]:
                high = number
                end = int(offsets[0])
            elif place >= offsets[-1]:
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
            place = bisect.bisect_left(self._known, known)
            before = self._known[place - 1 : place] or [(0, 0)]
            after = self._known[place : place + 1]
            if after == [known]:
                continue
            if before[0][1] >= known[1] or (after and after[0][1] <= known[1]):
                raise self._unfit(first, stop)
            self._known.insert(place, known)
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
            "documents "
            f"(seen at documents {first} to {stop})"
        )

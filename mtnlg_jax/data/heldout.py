"""Hold text out of training: whole documents by their hash, or the ends of a few long ones.

`split` divides a corpus that was read to its end, to the byte as near to the wanted share as
documents allow. `split_text` divides one document alone, as the parallel tasks of a recipe must.
Both use the same hash and the same cut.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from mtnlg_jax.data.batches import permute
from mtnlg_jax.data.spool import Spool, text_hash

# From this many documents on, `split` holds out whole ones; of fewer, the end of each.
_MANY_DOCUMENTS = 100
# The least that `split` holds out, enough for a few windows; but never over a tenth of the text.
_LEAST_HELDOUT_BYTES = 16_384
_LEAST_END_CHARACTERS = 200  # of an end that `split_text` holds out
_DOCUMENTS_AT_ONCE = 1 << 14
_LEAST_CUT_CHARACTERS = 400  # shorter texts are never cut


class Part:
    """Some texts of a spool: whole ones by their ``numbers``, or parts of texts by ``spans``."""

    def __init__(
        self, spool: Spool, numbers: np.ndarray | None = None, spans: np.ndarray | None = None
    ):
        assert (numbers is None) != (spans is None)
        self._spool = spool
        self._numbers = numbers
        self._spans = spans

    def __len__(self) -> int:
        chosen = self._numbers if self._numbers is not None else self._spans
        return 0 if chosen is None else len(chosen)

    def in_order(self) -> Iterator[np.ndarray]:
        """Yield [3] int64 of each text, as `Spool.spans` returns them."""
        return self._each(lambda numbers: numbers)

    def shuffled(self, key: np.uint64) -> Iterator[np.ndarray]:
        """Yield the same in the random order that ``key`` draws."""
        return self._each(lambda numbers: permute(numbers, len(self), key))

    def _each(self, order: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        # In groups: shuffling takes a dozen times the memory of what is shuffled.
        for first in range(0, len(self), _DOCUMENTS_AT_ONCE):
            chosen = order(np.arange(first, min(first + _DOCUMENTS_AT_ONCE, len(self))))
            if self._numbers is not None:
                yield from self._spool.spans(self._numbers[chosen])
            elif self._spans is not None:
                yield from self._spans[chosen]


def split(spool: Spool, share: float, pairs: bool = False) -> tuple[Part, Part]:
    """Return the training part and the held-out part, which has about ``share`` of the bytes.

    Whole documents are held out, chosen by hash, where there are many; else the end of each. Pairs
    are always whole.
    """
    count = len(spool)
    if share == 0:
        return Part(spool, np.arange(count)), Part(spool, np.arange(0))
    wanted = max(share * spool.size, min(_LEAST_HELDOUT_BYTES, spool.size / 10))
    if pairs or count >= _MANY_DOCUMENTS:
        last = _last_hash(spool, wanted)
        if last is not None:
            # By hash, not by position: copies of one text stay on one side.
            held = (spool.hashes <= last) & (spool.sizes() <= wanted)
            return Part(spool, np.flatnonzero(~held)), Part(spool, np.flatnonzero(held))
    if not pairs:
        train, ends = _split_ends(spool, wanted / spool.size)
        if len(ends):
            return Part(spool, spans=train), Part(spool, spans=ends)
    # No document may be cut: hold out the one of the lowest hash, unless nothing would be left.
    several = len(np.unique(spool.hashes)) if pairs else count
    if several > 1:
        least = np.argmin(spool.hashes)
        held = spool.hashes == spool.hashes[least] if pairs else np.arange(count) == least
        return Part(spool, np.flatnonzero(~held)), Part(spool, np.flatnonzero(held))
    return Part(spool, np.arange(count)), Part(spool, np.arange(0))


def _last_hash(spool: Spool, wanted: float) -> np.uint64 | None:
    """Return the highest hash to hold out, so that all texts up to it have ``wanted`` bytes.

    Texts longer than ``wanted`` do not count: one long document must not be the whole held-out
    part. None if the text of the lowest hash already has more.
    """
    sizes = spool.sizes()
    share = min(1.0, 2 * wanted / spool.size)
    while True:
        # Sort only the texts with low hashes; double the range until it holds enough bytes.
        limit = np.uint64(min(share * 2.0**64, 2.0**64 - 2048))
        some = np.flatnonzero(
            (spool.hashes <= limit) & (sizes <= wanted) if share < 1 else sizes <= wanted
        )
        some = some[np.argsort(spool.hashes[some], kind="stable")]
        total = np.cumsum(sizes[some])
        if share >= 1 or (len(total) and total[-1] > wanted):
            count = np.searchsorted(total, wanted, side="right")
            return spool.hashes[some[count - 1]] if count else None
        share = min(1.0, 2 * share)


def _split_ends(spool: Spool, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return [documents, 3] and [n, 3], the spans of all beginnings and of all ends that are not
    empty."""
    train = spool.spans(np.arange(len(spool)))
    ends = train.copy()
    for index, (start, stop, _) in enumerate(ends):
        cut = _cut_of(spool, int(start), int(stop), share)
        train[index, 1] = cut
        ends[index, 0] = cut
    return train, ends[ends[:, 0] < ends[:, 1]]


def _cut_of(spool: Spool, start: int, stop: int, share: float) -> int:
    """Return the byte at which the held-out end of a text begins: its `cut_position`, found by
    reading only its surroundings."""
    target, low, high = _cut_window(spool.characters(start, stop), share)
    if low == high:
        return spool.offset_of(start, stop, target)
    first = spool.offset_of(start, stop, low)
    window = spool.read(first, spool.offset_of(start, stop, high))
    return first + len(window[: _cut_inside(window, target - low)].encode())


def split_text(text: str, share: float, ends: bool, seed: int) -> tuple[str, str]:
    """Return the training part and the held-out part of one document; one is mostly empty.

    ``ends``: hold out the end of a long document rather than whole documents.
    """
    if ends and len(text) * share >= _LEAST_END_CHARACTERS:
        cut = cut_position(text, share)
        return text[:cut], text[cut:]
    digest = text_hash(seed)
    digest.update(text.encode())
    # By the hash of the text: its copies are on the same side.
    held = int.from_bytes(digest.digest(), "little") < share * 2.0**64
    return ("", text) if held else (text, "")


def cut_position(text: str, share: float) -> int:
    """Return the character at which the last ``share`` of a text begins: after the paragraph,
    sentence or word nearest to it."""
    target, low, high = _cut_window(len(text), share)
    return low + _cut_inside(text[low:high], target - low)


def _cut_window(length: int, share: float) -> tuple[int, int, int]:
    """Return (the best character for a cut, the first and the last allowed); short texts are not
    cut."""
    if length < _LEAST_CUT_CHARACTERS:
        return length, length, length
    target = round(length * (1 - share))
    reach = max(200, round(length * share / 4))
    return target, max(1, target - reach), min(length - 1, target + reach)


def _cut_inside(window: str, target: int) -> int:
    for end in (r"\n\s*\n", r"[.!?][\"'”’)]*\s|[。！？][”’]*|\n", r"\s"):
        found = [match.end() for match in re.finditer(end, window)]
        if found:
            return min(found, key=lambda position: abs(position - target))
    return target

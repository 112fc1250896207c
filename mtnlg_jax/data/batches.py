"""Batches: rows of S + 1 tokens, each a pure function of (seed, sample number) and of nothing else.

No state, no shuffle buffer, no number of processes: a run resumes from one integer, and every process
computes the rows that it needs. Sample -> (source, number within the source) -> (epoch, window) -> tokens.
"""

from collections.abc import Sequence

import numpy as np

from mtnlg_jax.data.tokens import Tokens

_BLOCK = 1024  # samples over which the blend is exact
_SHARE_BITS = 24  # shares are integers over 2^24: exact arithmetic up to 2^39 samples
_ORDER, _SHIFT, _BLEND = 1, 2, 3  # what a key is for


class Batches:
    """Rows from a weighted blend of token arrays.

    A source's stream of tokens is a circle, cut into windows of S + 1 tokens that share their end tokens, so
    that an epoch predicts every token once (at the seam fewer than S a second time). Each epoch cuts at
    another place and visits the windows in another order. Each block of 1024 samples has the exact share of
    each source; weights need not add up to 1.
    """

    def __init__(self, sources: Sequence[tuple[Tokens, float]], sequence_length: int, seed: int):
        if not sources:
            raise ValueError("a blend needs at least one source")
        for tokens, weight in sources:
            if not 0 < weight < float("inf"):
                raise ValueError(f"weight {weight} of {tokens.location} must be above 0 and finite; leave "
                                 "the source out if it is not wanted")
            if len(tokens) < sequence_length + 1:
                raise ValueError(f"{tokens.location} has {len(tokens)} tokens, sequence_length="
                                 f"{sequence_length} needs {sequence_length + 1}: shorten it or add text")
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        self._sources = [tokens for tokens, _ in sources]
        self._length, self._seed = sequence_length, seed
        self._windows = [-(-len(tokens) // sequence_length) for tokens in self._sources]
        weights = np.array([weight for _, weight in sources], float)
        # Of what the sources before left over, the share of each; the last one takes all.
        left = np.cumsum(weights[::-1])[::-1]
        self._shares = np.round(weights / left * 2**_SHARE_BITS).astype(np.int64)

    @property
    def windows_per_epoch(self) -> int:
        """Different rows in one epoch of every source, together."""
        return sum(self._windows)

    def epochs_seen(self, samples: int) -> np.ndarray:
        """[sources] float: how often the first ``samples`` samples went through each source."""
        return np.diff(self._boundaries(np.array([samples]))[0]) / np.array(self._windows)

    def rows(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """int32 ``tokens``, ``segment_ids``, ``positions``, each [n, S + 1], of sample numbers [n] from 0 on.

        ``segment_ids`` number the documents within a row from 1; ``positions`` start at 0 with each document,
        and with the row, also where that begins inside a document.
        """
        samples = np.asarray(samples, np.int64)
        source, number = self._blend(samples)
        shape = (len(samples), self._length + 1)
        rows = {name: np.empty(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
        for index in np.unique(source):
            chosen = source == index
            windows = _windows(self._sources[index], self._starts(index, number[chosen]), shape[1])
            for name, values in windows.items():
                rows[name][chosen] = values
        return rows

    def _blend(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and how many samples of that source come before it."""
        block = samples // _BLOCK
        first, last = self._boundaries(block * _BLOCK), self._boundaries((block + 1) * _BLOCK)
        counts = np.diff(last, axis=1) - np.diff(first, axis=1)
        ends = np.cumsum(counts, axis=1)
        slot = permute(samples % _BLOCK, _BLOCK, _keys(self._seed, _BLEND, 0, block))
        source = (slot[:, None] >= ends).sum(1)
        each = np.arange(len(samples))
        before = np.diff(first, axis=1)[each, source]
        return source, before + slot - (ends - counts)[each, source]

    def _boundaries(self, samples: np.ndarray) -> np.ndarray:
        """[n, sources + 1]: of the first ``samples``, those of the sources before each. What is left is split
        source by source: so no count ever goes down, as it could if each were rounded on its own."""
        boundaries = np.zeros((len(samples), len(self._shares) + 1), np.int64)
        for index, share in enumerate(self._shares):
            left = samples - boundaries[:, index]
            taken = (left * share + 2 ** (_SHARE_BITS - 1)) >> _SHARE_BITS
            boundaries[:, index + 1] = boundaries[:, index] + taken
        return boundaries

    def _starts(self, source: int, number: np.ndarray) -> np.ndarray:
        """Where in the source's stream the windows begin."""
        count, size = self._windows[source], len(self._sources[source])
        epoch = number // count
        window = permute(number % count, count, _keys(self._seed, _ORDER, source, epoch))
        shift = _keys(self._seed, _SHIFT, source, epoch) % np.uint64(size)
        return (window * self._length + shift.astype(np.int64)) % size


def heldout_count(tokens: Tokens, sequence_length: int) -> int:
    """How many rows `heldout_rows` has: the last token is only predicted, no window begins there."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    return -(-max(len(tokens) - 1, 0) // sequence_length)


def heldout_rows(tokens: Tokens, sequence_length: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of `Batches.rows`' form, by their numbers [n]: all of them together predict every token once.

    No window wraps; what is left over in the last one, and in rows after it, is token 0 of segment 0.
    """
    length, size = sequence_length, len(tokens)
    rows = {name: np.zeros((len(numbers), length + 1), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, start in enumerate(np.asarray(numbers, np.int64) * length):
        width = min(length + 1, size - int(start))
        if width > 1:
            for name, values in _windows(tokens, np.array([start]), width).items():
                rows[name][row, :width] = values[0]
    return rows


def _windows(tokens: Tokens, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The windows of ``length`` tokens from each start on, around the seam; ``length <= len(tokens)``."""
    size, offsets = len(tokens), tokens.document_offsets
    places = starts[:, None] + np.arange(length)
    wrapped = places >= size
    document = np.searchsorted(offsets, places - size * wrapped, side="right") - 1
    # Beyond the seam documents and places go on counting, so that the first document is not taken for one
    # that the window began in.
    begins = np.maximum(offsets[document] + size * wrapped, starts[:, None])
    document += tokens.documents * wrapped
    return {"tokens": tokens.read_windows(starts, length), "segment_ids": document - document[:, :1] + 1,
            "positions": places - begins}


def permute(numbers: np.ndarray, size: int, keys: np.ndarray | np.uint64) -> np.ndarray:
    """A bijection of [0, size) for each uint64 key, computed number by number, without a table.

    Feistel network over the next power of four; what falls outside walks on along its cycle until it is back
    inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = np.array(numbers, np.uint64)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), values.shape)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right, key = values[outside] >> half, values[outside] & mask, keys[outside]
        for _ in range(6):
            key = _mix(key)
            left, right = right, left ^ (_mix(key ^ right) & mask)
        values[outside] = left << half | right
        outside = values >= size
    return values.astype(np.int64)


def _keys(seed: int, purpose: int, source: int, counter: np.ndarray) -> np.ndarray:
    """uint64 keys, one for each counter, unlike those of any other seed, purpose or source."""
    key = np.array([seed & (1 << 64) - 1], np.uint64)
    for value in (purpose, source):
        key = _mix(key ^ np.uint64(value))
    return _mix(_mix(key) ^ counter.astype(np.uint64))


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood 2014): each bit of the input changes half the bits of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)

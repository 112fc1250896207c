"""Poisson sampling, as accountants of differential privacy assume it (Abadi 2016, section 3.1).

A unit is what the guarantee protects: a window of S + 1 tokens, or a whole source. Each step every
unit joins on its own with a fixed probability, so the size of a batch is random. Units and their
windows are fixed: no cut moves from epoch to epoch. Everything is a pure function of (key, step).
"""

import math
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.data.batches import fixed_rows, heldout_count
from mtnlg_jax.data.store.tokens import Tokens

# Chance that a step draws more units than `capacity`, of which the rest is left out. It is far
# below any delta, and `privacy.Ledger` adds it.
OVERFLOW = 1e-20

_ORDER = 1 << 63  # of the streams of random numbers: of a unit's windows, not of a step's units


def capacity(expected: float) -> int:
    """Return the units for which a step has room, if ``expected`` join in the mean.

    More join with a chance below OVERFLOW, whatever their number and probabilities: by Chernoff's
    bound exp(k - mean) (mean / k)^k.
    """
    room = math.ceil(expected)
    while room * math.log(room / expected) - room + expected < -math.log(OVERFLOW):
        room += 1
    return room


class PoissonSampler:
    """The units that join each step, and their rows.

    The sources share the expected number of units by their weights, so each has a probability of
    its own; the guarantee is that of the largest.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Tokens, float]],
        sequence_length: int,
        unit: str,
        rows_of_unit: int,
        key: int,
    ):
        """``unit`` is "example" or "source", of which ``rows_of_unit`` windows join a step.
        ``key``: 128 bits, to be kept secret.

        Raises ValueError if a source is given twice: its units would join twice.
        """
        self._sources = [tokens for tokens, _ in sources]
        places = [tokens.location for tokens in self._sources]
        twice = sorted({place for place in places if places.count(place) > 1})
        if twice:
            raise ValueError(
                f"{twice[0]} is in the blend {places.count(twice[0])} times, and with differential "
                "privacy a text may count once; give it once, with the sum of its weights"
            )
        self._length = sequence_length
        self._whole = unit == "source"
        self._rows = rows_of_unit
        self._key = key
        # [sources]
        self._windows = np.array(
            [heldout_count(tokens, sequence_length) for tokens in self._sources], np.int64
        )
        weights = np.array([weight for _, weight in sources], float)
        self._shares = weights / weights.sum()
        self._counts = np.ones_like(self._windows) if self._whole else self._windows
        self._first = np.concatenate([[0], np.cumsum(self._counts)])

    @property
    def units(self) -> int:
        """The number of units."""
        return int(self._first[-1])

    def probability(self, expected: float) -> float:
        """Return the largest probability with which a unit joins a step of ``expected`` units.

        Raises ValueError if it is above 1.
        """
        found = expected * self._shares / self._counts
        worst = int(found.argmax())
        if found[worst] > 1:
            raise ValueError(
                f"{self._sources[worst].location} has {self._counts[worst]} units of privacy, and "
                f"its share of a step is {expected * self._shares[worst]:.4g} of them; lower "
                "train.global_batch_size (or raise optimizer.dp_source_rows), or give it less "
                "weight"
            )
        return float(found[worst])

    def joining(self, step: int, expected: float) -> np.ndarray:
        """Return the numbers of the units that join ``step``, int64, ascending; of more than
        `capacity` the first ones."""
        chosen = [
            first + self._draw(step, source, int(count), expected * share / count)
            for source, (first, count, share) in enumerate(
                zip(self._first[:-1], self._counts, self._shares, strict=True)
            )
        ]
        return np.concatenate(chosen)[: capacity(expected)]

    def rows(self, units: np.ndarray, step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return (rows as `Batches.rows` does, their numbers among all windows, int64), those of
        each of ``units`` after each other.

        A source gives other windows each step, each once before any comes again; if it has fewer
        than it may give, the rest are empty.
        """
        source = np.searchsorted(self._first, units, side="right") - 1
        window = units - self._first[source]
        if self._whole:
            parts = [self._windows_of(int(each), step) for each in source]
            window = np.concatenate([np.zeros(0, np.int64), *parts])
            source = np.repeat(source, self._rows)
        first = np.concatenate([[0], np.cumsum(self._windows)])[source]
        return fixed_rows(self._sources, self._length, source, window), first + window

    def _windows_of(self, source: int, step: int) -> np.ndarray:
        count = int(self._windows[source])
        used = min(count, self._rows)
        turns = np.arange(step * used, (step + 1) * used)
        found = np.empty(used, np.int64)
        for epoch in np.unique(turns // count):
            order = np.argsort(self._random(_ORDER + int(epoch), source, 0, count), kind="stable")
            found[turns // count == epoch] = order[turns[turns // count == epoch] % count]
        # A window beyond the last one is empty.
        return np.concatenate([found, np.full(self._rows - used, count + 1, np.int64)])

    def _draw(self, step: int, source: int, count: int, probability: float) -> np.ndarray:
        """Return which of ``count`` units join, each with ``probability``, ascending."""
        if probability >= 1:
            return np.arange(count)
        # The number of units from one that joins to the next is geometric, so the work grows with
        # those that join, not with all of them.
        found = []
        last = -1
        block = 0
        size = math.ceil(1.2 * count * probability) + 16
        while last < count:
            uniform = self._random(step, source, block, size)
            gaps = np.floor(np.log(uniform) / math.log1p(-probability)).clip(0, count)
            found.append(last + np.cumsum(gaps.astype(np.int64) + 1))
            last = int(found[-1][-1])
            block += 1
        units = np.concatenate(found)
        return units[units < count]

    def _random(self, stream: int, source: int, block: int, size: int) -> np.ndarray:
        """Return ``size`` numbers in (0, 1], of 53 bits each."""
        # NumPy keeps the raw numbers of its bit generators the same from version to version. The
        # lowest word of the counter is left to the numbers of a block.
        bits = np.random.Philox(key=self._key, counter=[0, block, source, stream]).random_raw(size)
        return ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53

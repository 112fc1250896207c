"""Which source each token of the held-out text is of, and short names for the sources.

A part of the held-out text is mostly of one source. That of a recipe holds the text of all sources
of the recipe, shard after shard, and its meta.json records them: ``sources`` is [[name, tokens],
...] in the order of the tokens. Data prepared without this record counts as one source.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.data.batches import HeldOut, heldout_count


class HeldOutSources:
    """The sources of the held-out text ``held_out`` of rows of ``sequence_length`` tokens.

    ``names`` has a short name for each source; sources have the numbers of their names. ``part``
    and ``window`` [n] are rows for `HeldOut.read` of sources of which ``held_out`` itself has
    fewer tokens than half a row, or than half of all that is held out of them.
    """

    def __init__(self, held_out: HeldOut, sequence_length: int):
        self._length = sequence_length
        # By part: the tokens at which each span of one source ends, and the sources of the spans.
        self._ends: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        paths: list[str] = []
        for part in held_out.sources:
            place = part.location.rstrip("/").removesuffix("/heldout")
            recorded = part.meta.get("sources") if not part.answers_only else None
            spans = [(f"{place}/{name}", count) for name, count in recorded or () if count]
            if not spans or sum(count for _, count in spans) != len(part):
                spans = [(place, len(part))]
            own = list(dict.fromkeys(path for path, _ in spans))
            numbers = [len(paths) + own.index(path) for path, _ in spans]
            paths += own
            self._ends.append(np.cumsum([count for _, count in spans]))
            self._numbers.append(np.array(numbers, np.int32))
        self.names = short_names(paths)
        self.part, self.window = self._missing(held_out)

    def __len__(self) -> int:
        return len(self.names)

    def of_rows(self, part: np.ndarray, window: np.ndarray) -> np.ndarray:
        """Return the source of every token of the rows `HeldOut.read` (part, window), int32
        [n, S + 1]."""
        sources = np.empty((len(part), self._length + 1), np.int32)
        for row, number, first in zip(sources, part, window * self._length, strict=True):
            numbers = self._numbers[number]
            if len(numbers) == 1:
                row[:] = numbers[0]
                continue
            # Padding behind the last token is never predicted.
            positions = np.minimum(first + np.arange(len(row)), self._ends[number][-1] - 1)
            row[:] = numbers[np.searchsorted(self._ends[number], positions, side="right")]
        return sources

    def _missing(self, held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
        read = np.zeros(len(self), np.int64)
        for source in self.of_rows(held_out.source, held_out.window):
            read += np.bincount(source[:-1], minlength=len(self))
        part: list[int] = []
        window: list[int] = []
        # A row twice would count its tokens twice.
        rows = set(zip(held_out.source.tolist(), held_out.window.tolist(), strict=True))
        for number, (ends, numbers) in enumerate(zip(self._ends, self._numbers, strict=True)):
            sizes = np.diff(ends, prepend=0)
            last = heldout_count(held_out.sources[number], self._length) - 1
            # A part of one source has rows of its own in any case.
            for source in np.unique(numbers) if len(numbers) > 1 else ():
                own = np.where(numbers == source, sizes, 0)
                if read[source] < min(self._length, own.sum()) / 2:
                    # The middle of its longest span, of which a window holds most.
                    middle = ends[own.argmax()] - own.max() // 2 - 1
                    row = number, int(min(middle // self._length, last))
                    if row not in rows:
                        rows.add(row)
                        part.append(row[0])
                        window.append(row[1])
        return np.array(part, np.int64), np.array(window, np.int64)


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the last components of each path, as few as tell it from the others."""
    pieces = [[piece for piece in path.split("/") if piece] or [path] for path in paths]
    depth = [1] * len(pieces)
    while True:
        names = ["/".join(piece[-count:]) for piece, count in zip(pieces, depth, strict=True)]
        counts = Counter(names)
        longer = [
            i for i, name in enumerate(names) if counts[name] > 1 and depth[i] < len(pieces[i])
        ]
        if not longer:
            return tuple(names)
        for i in longer:
            depth[i] += 1

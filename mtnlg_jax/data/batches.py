"""Batches: rows of S + 1 tokens, each a pure function of (seed, sample number).

There is no state and no shuffle buffer, and the number of processes does not matter: a run resumes
from one integer, and every process computes the rows it needs. Sample -> (source, number within the
source) -> (epoch, window) -> tokens.
"""

import functools
import logging
from collections.abc import Sequence

import numpy as np

from mtnlg_jax.data.store.tokens import Tokens

# Runs record it and refuse another one. In order 2 a source's windows follow its samples. Order 1
# drew blocks of 1024 in any order, which repeated some windows of a small source within an epoch
# and left others out.
SAMPLE_ORDER = "2"

_BLOCK = 1024  # samples over which the blend is exact
_BLOCKS_KEPT = 64  # 20 KiB each; a batch touches one or two
_SHARE_BITS = 24  # shares are integers over 2^24: exact arithmetic up to 2^39 samples
# Purposes of random keys.
_ORDER = 1
_SHIFT = 2
_BLEND = 3
_NAMES = ("tokens", "segment_ids", "positions")

_log = logging.getLogger(__name__)


class Batches:
    """Rows from a weighted blend of token arrays.

    A source's stream of tokens is a circle, cut into windows of S + 1 tokens. Neighbors share their
    end tokens, so an epoch predicts every token once (at the seam, fewer than S twice). Each epoch
    shifts the cuts and draws a new order of the windows. Each block of 1024 samples has the exact
    share of each source; weights need not add up to 1. Pairs are not a stream: their rows are those
    of `Packed`, in a new order in each epoch.

    Each window of a source comes exactly once an epoch: with W windows, the first W samples of the
    source are its first epoch, the next W its second, and so on, for any size, weights and number
    of epochs.
    """

    def __init__(self, sources: Sequence[tuple[Tokens, float]], sequence_length: int, seed: int):
        if not sources:
            raise ValueError("a blend needs at least one source")
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        for tokens, weight in sources:
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"weight {weight} of {tokens.location} must be above 0 and finite; remove "
                    "the source if you do not need it"
                )
            if not tokens.answers_only and len(tokens) < sequence_length + 1:
                raise ValueError(
                    f"{tokens.location} has {len(tokens)} tokens, sequence_length="
                    f"{sequence_length} needs {sequence_length + 1}: shorten it or add text"
                )
        self.sources = [tokens for tokens, _ in sources]
        self._length = sequence_length
        self._seed = seed
        self._packed = [
            packed(tokens, sequence_length) if tokens.answers_only else None
            for tokens in self.sources
        ]
        self._sizes = np.array([len(tokens) for tokens in self.sources])
        self._windows = np.array(
            [
                pack.count if pack else -(-len(tokens) // sequence_length)
                for tokens, pack in zip(self.sources, self._packed, strict=True)
            ]
        )
        weights = np.array([weight for _, weight in sources], float)
        # Each source's share of what earlier sources left; the last one takes all.
        left = np.cumsum(weights[::-1])[::-1]
        self._shares = np.round(weights / left * 2**_SHARE_BITS).astype(np.int64)
        self._block = functools.lru_cache(maxsize=_BLOCKS_KEPT)(self._draw_block)

    @property
    def has_answers(self) -> bool:
        """Whether a source has tokens that are read and not predicted."""
        return any(tokens.answers_only for tokens in self.sources)

    def rows(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Return int32 ``tokens``, ``segment_ids`` and ``positions``, each [n, S + 1], of sample
        numbers [n] from 0 on.

        ``segment_ids`` number the documents within a row from 1. ``positions`` start at 0 with each
        document, and with the row even if it begins inside a document. If a source has pairs or
        conversations, ``answers`` is 1 on the tokens to train on: all of plain text, of a pair the
        answer and its eos, and of a conversation the turns of the assistant. If a source has images
        or features, ``prefix`` [n, ...] holds them and ``prefixed`` [n] is 1 for rows with one:
        the first tokens of these, all 0, leave room for it.
        """
        source, window, starts = self.locate(samples)
        shape = (len(samples), self._length + 1)
        rows = _empty(self.sources, shape)
        for index in np.unique(source):
            chosen = source == index
            if self._packed[index]:
                windows = self._packed[index].rows(window[chosen])
            else:
                windows = _windows(self.sources[index], starts[chosen], shape[1])
            for name, values in windows.items():
                rows[name][chosen] = values
        return rows

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of sample numbers [n]: the index in ``sources``, the number of the window there,
        and its first token (of pairs and conversations see `Packed`), int64 [n] each."""
        samples = np.asarray(samples, np.int64)
        source, number = self._blend(samples)
        counts = self._windows[source]
        epoch = number // counts
        window = permute(number % counts, counts, _keys(self._seed, _ORDER, source, epoch))
        # The shift of the epoch moves every cut of the circle.
        size = self._sizes[source]
        shift = _keys(self._seed, _SHIFT, source, epoch) % size.astype(np.uint64)
        starts = (window * self._length + shift.astype(np.int64)) % size
        return source, window, starts

    def _blend(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample, and how many samples of that source precede it."""
        source = np.empty_like(samples)
        number = np.empty_like(samples)
        blocks = samples // _BLOCK
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            inside = samples[chosen] % _BLOCK
            source[chosen], number[chosen] = (drawn[inside] for drawn in self._block(block))
        return source, number

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `_blend` of all samples of a block: int64 [1024] each.

        The sources are shuffled, but the samples of each are numbered in their order in the block,
        so that no epoch begins before the last one has ended.
        """
        first, last = self._boundaries(np.array([block, block + 1]) * _BLOCK)
        counts = np.diff(last) - np.diff(first)
        slots = permute(np.arange(_BLOCK), _BLOCK, _keys(self._seed, _BLEND, 0, np.array([block])))
        source = np.searchsorted(np.cumsum(counts), slots, side="right")
        number = np.empty(_BLOCK, np.int64)
        # A stable sort keeps the samples of one source in their order.
        number[np.argsort(source, kind="stable")] = np.concatenate(
            [
                np.arange(start, start + count)
                for start, count in zip(np.diff(first), counts, strict=True)
            ]
        )
        return source, number

    def _boundaries(self, samples: np.ndarray) -> np.ndarray:
        """Return [n, sources + 1]: how many of the first ``samples`` samples belong to the sources
        before each.

        The rest is split source by source, so that no count ever decreases, as it could if each
        were rounded separately.
        """
        boundaries = np.zeros((len(samples), len(self._shares) + 1), np.int64)
        for index, share in enumerate(self._shares):
            left = samples - boundaries[:, index]
            taken = (left * share + 2 ** (_SHARE_BITS - 1)) >> _SHARE_BITS
            boundaries[:, index + 1] = boundaries[:, index] + taken
        return boundaries


def _empty(sources: Sequence[Tokens], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the arrays of rows [n, S + 1] from ``sources``, to be filled in."""
    rows: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in _NAMES}
    if any(tokens.answers_only for tokens in sources):
        rows["answers"] = np.ones(shape, np.int32)
    for prefixes in (tokens.prefixes for tokens in sources if tokens.prefixes is not None):
        rows["prefix"] = np.zeros((shape[0], *prefixes.shape), prefixes.dtype)
        rows["prefixed"] = np.zeros(shape[0], np.int32)
    return rows


class Packed:
    """Rows of whole pairs or conversations, as many as fit into S + 1 tokens; the rest is token 0
    of segment 0. A pair with an image or features has a row of its own, with room for these.

    Only the end of a pair that is longer than a row is kept: the beginning of its prompt is cut
    off, with one warning for all.

    Raises ValueError if a conversation is longer than a row, or if an answer of a pair with its
    eos, and one token to predict it from, is.
    """

    def __init__(self, tokens: Tokens, sequence_length: int):
        self._tokens = tokens
        self._before = 0 if tokens.prefixes is None else tokens.prefixes.positions
        self._size = sequence_length + 1 - self._before
        ends = tokens.document_offsets[1:]
        lengths = np.diff(tokens.document_offsets)
        if tokens.conversations:
            # One that was cut would lose turns to train on, or what they answer.
            self._refuse_long(lengths)
            answers = np.zeros(0, np.int64)
        else:
            answers = lengths - tokens.prompt_lengths
        if answers.size and answers.max() >= self._size:
            worst = int(answers.argmax())
            raise ValueError(
                f"{tokens.location}: the answer of pair {worst} has {answers[worst]} tokens with "
                f"its end, data.sequence_length={sequence_length} holds {self._size - 1}; raise "
                f"it to {answers[worst] + self._before}, or remove such pairs"
            )
        kept = np.minimum(lengths, self._size)
        if cut := int((kept < lengths).sum()):
            _log.warning(
                "%s: %d of %d prompts are cut at their beginning to fit data.sequence_length=%d",
                tokens.location,
                cut,
                len(lengths),
                sequence_length,
            )
        # Next-fit packing. A pair that was cut fills its row, so every row is one contiguous
        # stretch of the stream.
        total = np.concatenate([[0], np.cumsum(kept)])
        first = 0
        rows = []
        while first < len(kept):
            last = int(np.searchsorted(total, total[first] + self._size, side="right")) - 1
            last = first + 1 if tokens.prefixes is not None else last
            rows.append((ends[first] - kept[first], ends[last - 1]))
            first = last
        # [rows, 2]: the tokens of each row, from the first to before the last.
        self.stretches = np.array(rows, np.int64).reshape(-1, 2)

    def _refuse_long(self, lengths: np.ndarray) -> None:
        if lengths.size and lengths.max() > self._size:
            raise ValueError(
                f"{self._tokens.location}: {int((lengths > self._size).sum())} of {len(lengths)} "
                f"conversations are longer than data.sequence_length={self._size - 1} allows, the "
                f"longest has {lengths.max()} tokens; raise it to {lengths.max() - 1}, or prepare "
                f"the data again with --sequence_length={self._size - 1}, which names their lines"
            )

    @property
    def count(self) -> int:
        """The number of rows that hold all pairs or conversations once."""
        return len(self.stretches)

    def rows(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows as `Batches.rows` does, with ``answers``; those beyond the last are empty."""
        inside = numbers < self.count
        begins, ends = self.stretches[np.where(inside, numbers, 0)].T
        rows = {
            name: np.zeros((len(numbers), self._size), np.int32) for name in (*_NAMES, "answers")
        }
        width = min(self._size, len(self._tokens))
        used = (np.arange(width) < (ends - begins)[:, None]) & inside[:, None]
        for name, values in _windows(self._tokens, begins, width).items():
            rows[name][:, :width] = np.where(used, values, 0)
        return rows if self._tokens.prefixes is None else self._prefixed(rows, numbers, inside)

    def _prefixed(
        self, rows: dict[str, np.ndarray], numbers: np.ndarray, inside: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return ``rows``, each of the document of its number, with room for its prefix in
        front."""
        room = np.zeros((len(numbers), self._before), np.int32)
        first = {
            "tokens": room,
            "segment_ids": room + inside[:, None],
            "positions": room + np.arange(self._before, dtype=np.int32),
            "answers": room,
        }
        rows["positions"] += self._before
        found = {name: np.concatenate([first[name], rows[name]], axis=1) for name in rows}
        prefix = self._tokens.prefixes.of_documents(np.where(inside, numbers, 0))
        return found | {"prefix": prefix, "prefixed": inside.astype(np.int32)}


packed = functools.lru_cache(maxsize=16)(Packed)


def heldout_count(tokens: Tokens, sequence_length: int) -> int:
    """Return the number of rows of `heldout_rows`. The last token is only predicted: no window
    begins there."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1")
    if tokens.answers_only:
        return packed(tokens, sequence_length).count
    return -(-max(len(tokens) - 1, 0) // sequence_length)


def heldout_rows(
    tokens: Tokens, sequence_length: int, numbers: np.ndarray
) -> dict[str, np.ndarray]:
    """Return rows as `Batches.rows` does, by their numbers [n].

    All of them together predict every token once, or every answer of pairs and conversations. No
    window wraps: the rest of the last one, and of rows after it, is token 0 of segment 0.
    """
    if tokens.answers_only:
        return packed(tokens, sequence_length).rows(np.asarray(numbers, np.int64))
    length = sequence_length
    size = len(tokens)
    rows = {name: np.zeros((len(numbers), length + 1), np.int32) for name in _NAMES}
    for row, start in enumerate(np.asarray(numbers, np.int64) * length):
        width = min(length + 1, size - int(start))
        if width > 1:
            for name, values in _windows(tokens, np.array([start]), width).items():
                rows[name][row, :width] = values[0]
    return rows


class HeldOut:
    """The rows on which a run is evaluated: windows spread evenly over the held-out text of each
    source, so that every document counts by its length. Their number depends on neither batch nor
    mesh.

    Sources share about ``rows`` rows by their weights, at least one each; all rows of a source are
    used if it has fewer.
    """

    def __init__(self, sources: Sequence[tuple[Tokens, float]], sequence_length: int, rows: int):
        self._length = sequence_length
        used = [
            (tokens, weight, count)
            for tokens, weight in sources
            if (count := heldout_count(tokens, sequence_length))
        ]
        self.sources = [tokens for tokens, _, _ in used]
        weights = np.array([weight for _, weight, _ in used], float)
        # [sources]: shares of the held-out loss, which add up to 1.
        self.shares = weights / weights.sum() if used else weights
        chosen = [
            _spread(count, max(1, round(share * rows)))
            for share, (_, _, count) in zip(self.shares, used, strict=True)
        ]
        # [rows] each: the source of a row, and its number within the source.
        self.source = np.repeat(np.arange(len(used)), [len(numbers) for numbers in chosen])
        self.window = np.concatenate([np.zeros(0, np.int64), *chosen])

    def __len__(self) -> int:
        return len(self.window)

    def read(self, source: np.ndarray, window: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows as `Batches.rows` does, by source [n] and number within the source [n]."""
        return fixed_rows(self.sources, self._length, source, window)


def fixed_rows(
    sources: Sequence[Tokens], sequence_length: int, source: np.ndarray, window: np.ndarray
) -> dict[str, np.ndarray]:
    """Return rows as `Batches.rows` does: `heldout_rows` of several sources, by source [n] and
    number within it [n]."""
    rows = _empty(sources, (len(source), sequence_length + 1))
    for index in np.unique(source):
        chosen = source == index
        windows = heldout_rows(sources[index], sequence_length, window[chosen])
        for name, values in windows.items():
            rows[name][chosen] = values
    return rows


def _spread(count: int, wanted: int) -> np.ndarray:
    """Return the middles of ``wanted`` equal parts of the numbers 0 to count - 1; all of them if
    there are fewer."""
    wanted = min(wanted, count)
    return (2 * np.arange(wanted, dtype=np.int64) + 1) * count // (2 * wanted)


def _windows(tokens: Tokens, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Return the windows of ``length`` tokens from each start, which wrap around the seam;
    ``length <= len(tokens)``."""
    size = len(tokens)
    index = starts[:, None] + np.arange(length)
    wrapped = index >= size
    document, opens = tokens.document_of(index - size * wrapped)
    # Documents and indices continue to count beyond the seam; otherwise the first document could be
    # taken for the one in which the window began.
    opens += size * wrapped
    begins = np.maximum(opens, starts[:, None])
    if tokens.conversations:
        answers = {"answers": tokens.read_answers(starts, length)}
    elif tokens.prompt_lengths is not None:
        answers = {"answers": index - opens >= tokens.prompt_lengths[document]}
    else:
        answers = {}
    document += tokens.documents * wrapped
    return {
        "tokens": tokens.read_windows(starts, length),
        "segment_ids": document - document[:, :1] + 1,
        "positions": index - begins,
        **answers,
    }


def permute(
    numbers: np.ndarray, size: int | np.ndarray, keys: np.ndarray | np.uint64
) -> np.ndarray:
    """Map numbers by a bijection of [0, size) for each uint64 key, without a table. ``size`` and
    ``keys`` are one for all numbers, or one for each.

    A Feistel network permutes the next power of four; a number that lands outside [0, size) is
    mapped again until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains").
    """
    values = np.array(numbers, np.uint64)
    halves = [max(1, ((int(one) - 1).bit_length() + 1) // 2) for one in np.atleast_1d(size)]
    half = np.array(halves, np.uint64)
    rounds = [_mix(np.atleast_1d(np.asarray(keys, np.uint64)))]
    while len(rounds) < 6:
        rounds.append(_mix(rounds[-1]))
    size, half, mask, *rounds = (
        np.broadcast_to(x, values.shape)
        for x in (np.asarray(size, np.uint64), half, (np.uint64(1) << half) - np.uint64(1), *rounds)
    )
    outside = np.arange(values.size)
    while outside.size:
        left = values[outside] >> half[outside]
        right = values[outside] & mask[outside]
        some = mask[outside]
        for key in rounds:
            left, right = right, left ^ (_mix(key[outside] ^ right) & some)
        values[outside] = left << half[outside] | right
        outside = outside[values[outside] >= size[outside]]
    return values.astype(np.int64)


def _keys(seed: int, purpose: int, source: int | np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Return uint64 keys, one for each counter; every seed, purpose and source has its own."""
    key = np.array([seed & (1 << 64) - 1], np.uint64)
    for value in (purpose, source):
        key = _mix(key ^ np.asarray(value, np.uint64))
    return _mix(_mix(key) ^ counter.astype(np.uint64))


def _mix(values: np.ndarray) -> np.ndarray:
    """Hash with splitmix64 (Steele, Lea and Flood 2014): each input bit changes half the output
    bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)

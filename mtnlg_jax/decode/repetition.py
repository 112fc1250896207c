"""How much a sequence of tokens repeats itself. Needs neither a model nor JAX.

Tokens are anything that can be compared and hashed: token ids, words or characters.
"""

from collections.abc import Hashable, Sequence

import numpy as np


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return the runs of ``n`` tokens in their order: max(0, len(tokens) - n + 1) of them.

    Raises ValueError if ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} tokens form no n-gram; give 1 or more, such as 4")
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def sequence_repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Return seq-rep-n, 0 to 1: 1 - different n-grams / n-grams (Welleck 2020, section 6.1).

    A sequence of fewer than ``n`` tokens has no n-gram, and its value is 0.
    """
    found = ngrams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def recent_repetition(tokens: Sequence[Hashable], window: int = 16) -> float:
    """Return rep of Welleck 2020 (section 6.1) for a text in place of predictions, 0 to 1.

    This is the share of tokens that occur among the ``window`` tokens before them. Raises
    ValueError if ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window={window} holds no token; give 1 or more, such as 16")
    last_seen: dict[Hashable, int] = {}
    repeated = 0
    for position, token in enumerate(tokens):
        repeated += position - last_seen.get(token, -window - 1) <= window
        last_seen[token] = position
    return repeated / len(tokens) if tokens else 0.0


def longest_repeat(tokens: Sequence[Hashable]) -> tuple[int, int, int]:
    """Return the longest span that occurs twice: (length, first start, next start).

    The two occurrences may overlap, as those of a loop do. Of spans of equal length it is the one
    that is repeated first. Without a repeated token the result is (0, 0, 0).
    """
    number: dict[Hashable, int] = {}
    ids = np.array([number.setdefault(token, len(number)) for token in tokens], np.int64)
    # ladder[k] numbers the span of 2^k tokens from each position on: equal spans, equal numbers.
    ladder = [ids]
    while _repeats(ladder[-1]):
        half = 1 << (len(ladder) - 1)
        ladder.append(_joined(ladder[-1][:-half], ladder[-1][half:]))
    # If a span of n tokens occurs twice, so does one of n - 1: set the bits of the length from the
    # highest on.
    length = 0
    spans = np.zeros(len(ids), np.int64)
    for power in reversed(range(len(ladder))):
        longer = _joined(spans, ladder[power][length:])
        if _repeats(longer):
            spans = longer
            length += 1 << power
    if not length:
        return 0, 0, 0
    _, firsts, spans = np.unique(spans, return_index=True, return_inverse=True)
    first_of = firsts[spans]
    start = int(np.flatnonzero(first_of != np.arange(len(spans)))[0])
    return length, int(first_of[start]), start


def distinct(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Return distinct-n, 0 to 1: different n-grams of all sequences / n-grams (Li 2016).

    The value is 0 if no sequence has ``n`` tokens.
    """
    found = [each for sequence in sequences for each in ngrams(sequence, n)]
    return len(set(found)) / len(found) if found else 0.0


def _joined(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return numbers of the pairs of both, as many as the shorter has: equal pairs, equal ones."""
    size = min(len(left), len(right))
    if not size:
        return np.zeros(0, np.int64)
    pairs = left[:size] * (int(right.max()) + 1) + right[:size]
    return np.unique(pairs, return_inverse=True)[1]


def _repeats(numbers: np.ndarray) -> bool:
    return len(np.unique(numbers)) < len(numbers)

"""How much a sequence of tokens repeats itself. Needs neither a model nor JAX.

Tokens are anything that can be compared and hashed: token ids, words or characters.
"""

from collections.abc import Hashable, Sequence


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
    found = (0, 0, 0)
    low = 0
    high = len(tokens) - 1
    # If a span of n tokens occurs twice, so does one of n - 1: bisect the length.
    while low < high:
        middle = (low + high + 1) // 2
        if occurrence := _repeat_of(tokens, middle):
            found = (middle, *occurrence)
            low = middle
        else:
            high = middle - 1
    return found


def distinct(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Return distinct-n, 0 to 1: different n-grams of all sequences / n-grams (Li 2016).

    The value is 0 if no sequence has ``n`` tokens.
    """
    found = [each for sequence in sequences for each in ngrams(sequence, n)]
    return len(set(found)) / len(found) if found else 0.0


def _repeat_of(tokens: Sequence[Hashable], length: int) -> tuple[int, int] | None:
    """Return the starts of the first span of ``length`` tokens that occurred before, or None."""
    seen: dict[tuple[Hashable, ...], int] = {}
    for start in range(len(tokens) - length + 1):
        span = tuple(tokens[start : start + length])
        if span in seen:
            return seen[span], start
        seen[span] = start
    return None

"""Scorers of long texts: repetition, diversity and coherence of a candidate, each higher is better.

See scorers.py for what a scorer is. The three do not depend on ``normalise``.
"""

from collections.abc import Callable, Sequence

import numpy as np

from mtnlg_jax.decode.pool import Pool, Scores, check_behind, sums_behind
from mtnlg_jax.decode.repetition import ngrams, sequence_repetition

# Tokens at the prompt's end whose repetition counts.
TAIL = 256
# Tokens of the n-grams that may not repeat, as in seq-rep-4.
GRAM = 4
# Of the order of the shuffled prompt, which is the same for all candidates of a prompt.
SEED = 0


def repetition(pool: Pool) -> Callable[[np.ndarray], Scores]:
    """Minus the share of the candidate's 4-grams that occurred before, 0 to -1.

    The 4-grams are those that end in the candidate; they occurred before in the last 256 tokens of
    the prompt or in the candidate itself. Without a prompt this is minus seq-rep-4 (Welleck 2020,
    section 6.1), which is the part repetition.own without its sign.
    """

    def run(_):
        shares = [_repeated(each.row, each.start) for each in pool.candidates]
        own = [sequence_repetition(each.tokens, GRAM) for each in pool.candidates]
        return Scores({"repetition": -np.array(shares), "repetition.own": np.array(own)})

    return run


def _repeated(row: tuple[int, ...], start: int) -> float:
    """Return the share of the n-grams ending at ``start`` or later that occurred before."""
    first = max(0, start - TAIL)
    found = ngrams(row[first:], GRAM)
    # The n-grams that end before ``start`` are the prompt's own.
    before = max(0, start - first - GRAM + 1)
    seen = set(found[:before])
    repeated = 0
    for each in found[before:]:
        repeated += each in seen
        seen.add(each)
    return repeated / max(1, len(found) - before)


def diversity(pool: Pool) -> Callable[[np.ndarray], Scores]:
    """The product over n = 2, 3, 4 of the share of different n-grams, 0 to 1 (Su 2022, section
    4.2.2).

    It is that of the candidate alone. The parts are diversity.distinct_2 to _4: 1 - seq-rep-n.
    """

    def run(_):
        parts = {
            f"diversity.distinct_{n}": np.array(
                [1 - sequence_repetition(each.tokens, n) for each in pool.candidates]
            )
            for n in (2, 3, 4)
        }
        return Scores({"diversity": np.prod(list(parts.values()), 0), **parts})

    return run


def coherence(pool: Pool) -> Callable[[np.ndarray], Scores]:
    """(log p(y|x) - log p(y|x in another order)) / tokens of y, in nats a token.

    This is the gain by the true prompt x against the same tokens shuffled (after <bos>), once for
    all candidates: a text that would be as likely behind any order of the prompt's words does not
    continue it. The part coherence.shuffled is log p(y|x in another order).

    Raises ValueError if the prompt's tokens have no other order.
    """
    context = max((each.row[: each.start] for each in pool.candidates), key=len)
    shuffled = shuffled_of(pool.tokenizer, context)
    check_behind(pool, shuffled, "the prompt in another order")

    def run(sums):
        elsewhere = sums_behind(pool, shuffled)
        gain = (sums - elsewhere) / pool.lengths("per_token")
        return Scores({"coherence": gain, "coherence.shuffled": elsewhere})

    return run


def shuffled_of(tokenizer, context: Sequence[int]) -> list[int]:
    """Return the tokens of a prompt in another order. Raise ValueError if they have none."""
    shuffled = _shuffled(tuple(context), tokenizer.bos_id)
    if shuffled == list(context):
        raise ValueError(
            "coherence compares the prompt with its tokens in another order, and the prompt "
            f"{tokenizer.decode(shuffled)[:40]!r} has no other; give a longer prompt, or rank by "
            "pmi"
        )
    return shuffled


def _shuffled(context: tuple[int, ...], bos: int) -> list[int]:
    """Return the tokens in another order if there is one, with a <bos> that begins them kept."""
    kept = int(context[0] == bos)
    rest = list(context[kept:])
    draws = np.random.default_rng(SEED)
    orders = ([rest[at] for at in draws.permutation(len(rest))] for _ in range(8))
    # Of a few tokens a draw may be the same order again.
    other = next((order for order in orders if order != rest), rest)
    return [*context[:kept], *other]

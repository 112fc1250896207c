"""Compare groups of continuations with each row scored by itself."""

import numpy as np
import pytest

from mtnlg_jax.decode.group_scoring import score_groups
from mtnlg_jax.decode.scoring import score_rows

CLOSE = 3e-5


def draw_groups(vocabulary, context, count=7, seed=0):
    """Return groups whose contexts and continuations share beginnings of several lengths."""
    draws = np.random.default_rng(seed)

    def tokens(number):
        return draws.integers(0, vocabulary, number).tolist()

    shared = tokens(20)
    groups = []
    for _ in range(count):
        begin = shared[: draws.integers(1, 20)] + tokens(draws.integers(1, 12))
        stem = tokens(draws.integers(0, 6))
        endings = [stem + tokens(draws.integers(1, 8)) for _ in range(draws.integers(1, 5))]
        groups.append((begin, endings))
    # One token of many, equal continuations, one that is the beginning of another, the longest.
    groups.append((shared, [[each] for each in range(9)]))
    groups.append((shared[:7], [[3, 4], [3, 4], [3], [3, 4, 5]]))
    groups.append((tokens(context - 8), [tokens(8), tokens(2)]))
    return groups


def expected(decoder, groups):
    rows = [[*context, *each] for context, many in groups for each in many]
    starts = [len(context) for context, many in groups for _ in many]
    # One at a time, in rows of their own.
    return [
        score_rows(decoder._replace(block_tokens=1), [row], [start])[0]
        for row, start in zip(rows, starts, strict=True)
    ]


def check(decoder, groups, one=None):
    found = [each for many in score_groups(decoder, groups) for each in many]
    for each, want in zip(found, expected(one or decoder, groups), strict=True):
        np.testing.assert_allclose(each.logprobs, want, atol=CLOSE)
    return found


@pytest.mark.parametrize("name", ["learned", "rotary", "windowed", "biased", "balanced"])
def test_every_continuation_scores_as_in_a_row_of_its_own(request, name):
    tiny = request.getfixturevalue(name)
    check(tiny.decoder, draw_groups(tiny.config.vocabulary - 17, tiny.decoder.context))

"""Measures of repetition against longhand counts and values of their definitions."""

import random

import pytest

from mtnlg_jax.decode.repetition import (
    distinct,
    longest_repeat,
    ngrams,
    recent_repetition,
    sequence_repetition,
)


def test_values_of_a_small_text_by_hand():
    words = "a b a b c".split()
    assert ngrams(words, 2) == [("a", "b"), ("b", "a"), ("a", "b"), ("b", "c")]
    assert sequence_repetition(words, 2) == 1 - 3 / 4
    assert recent_repetition(words, 1) == 0
    assert recent_repetition(words, 2) == 2 / 5
    assert longest_repeat(words) == (2, 0, 2)
    assert distinct([words, ["a", "b"]], 2) == 3 / 5


def test_a_loop_repeats_and_different_tokens_do_not():
    loop = [1, 2, 3] * 5
    assert longest_repeat(loop) == (12, 0, 3)
    assert sequence_repetition(loop) == 1 - 3 / 12
    assert recent_repetition(loop, 3) == 12 / 15
    assert longest_repeat(range(9)) == (0, 0, 0)
    assert sequence_repetition(range(9)) == recent_repetition(range(9)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_against_brute_force(seed):
    draw = random.Random(seed)
    tokens = [draw.randrange(3) for _ in range(draw.randrange(40))]
    n = draw.randrange(1, 5)
    windows = [tuple(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]
    repeated = sum(each in windows[:i] for i, each in enumerate(windows))
    assert sequence_repetition(tokens, n) == pytest.approx(repeated / max(1, len(windows)))
    recent = sum(each in tokens[max(0, i - n) : i] for i, each in enumerate(tokens))
    assert recent_repetition(tokens, n) == pytest.approx(recent / max(1, len(tokens)))
    longest = max(
        (
            length
            for length in range(len(tokens))
            for start in range(len(tokens) - length)
            if tokens[start : start + length]
            in [tokens[i : i + length] for i in range(start + 1, len(tokens) - length + 1)]
        ),
        default=0,
    )
    length, first, second = longest_repeat(tokens)
    assert length == longest
    assert tokens[first : first + length] == tokens[second : second + length]
    assert first < second or length == 0


def test_short_sequences_and_wrong_settings():
    assert sequence_repetition([1, 2, 3], 4) == 0
    assert recent_repetition([]) == 0
    assert distinct([], 1) == 0
    with pytest.raises(ValueError, match="n=0"):
        ngrams([1], 0)
    with pytest.raises(ValueError, match="window=0"):
        recent_repetition([1], 0)

"""Repetition and diversity against longhand counts, and on texts spoiled on purpose."""

import math
import random

import numpy as np
import pytest

from mtnlg_jax.decode.repetition import sequence_repetition
from mtnlg_jax.evaluate.figures import Figure, TooShort, figure_of, mean_figure
from mtnlg_jax.evaluate.lexical import (
    frequencies,
    repetition_along,
    self_bleu,
    zipf_coefficient,
)


def _text(seed: int, length: int, vocabulary: int = 400) -> list[str]:
    """Return words drawn by Zipf's law."""
    weights = [1 / rank for rank in range(1, vocabulary + 1)]
    draw = random.Random(seed)
    return [f"w{each}" for each in draw.choices(range(vocabulary), weights, k=length)]


def test_the_repetition_along_a_text_is_that_of_brute_force():
    words = _text(0, 230, 12)
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    seen_before = [gram in grams[:i] for i, gram in enumerate(grams)]
    found = repetition_along(words, 50, 3)
    assert len(found) == 5 and found == [
        pytest.approx(np.mean(seen_before[start : start + 50])) for start in range(0, 228, 50)
    ]
    sizes = [50, 50, 50, 50, 28]
    assert np.average(found, weights=sizes) == pytest.approx(sequence_repetition(words, 3))
    assert repetition_along(["a"], 10) == []
    with pytest.raises(ValueError, match="window=0"):
        repetition_along(words, 0)


def test_a_loop_shows_where_it_begins():
    paragraph = _text(1, 100)
    along = repetition_along(_text(2, 300) + paragraph * 4, 100)
    assert max(along[:3]) < 0.1 and min(along[4:6]) > 0.95


def test_zipf_of_an_exact_power_law():
    counts = [10**6 * rank**-1.25 for rank in range(1, 7001)]
    assert zipf_coefficient(counts) == pytest.approx(1.25)
    # Ranks beyond 5,000 do not count.
    assert zipf_coefficient([*counts[:5000], *[1e-9] * 2000]) == pytest.approx(1.25)
    assert zipf_coefficient([3] * 20) == pytest.approx(0, abs=1e-12)


def test_zipf_is_the_slope_of_least_squares():
    counts = frequencies([_text(3, 3000), _text(4, 2000)])
    assert sum(counts) == 5000 and counts == sorted(counts, reverse=True)
    x = [math.log(rank) for rank in range(1, len(counts) + 1)]
    y = [math.log(count) for count in counts]
    mean_x = sum(x) / len(x)
    mean_y = sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )
    assert zipf_coefficient(counts) == pytest.approx(-slope)
    with pytest.raises(TooShort, match="needs 10 different words, and the texts have 2"):
        zipf_coefficient(frequencies([["a", "b", "a"]]))


def test_self_bleu_by_hand():
    # Each text has 3 of 4 words, 2 of 3 pairs and 1 of 2 triples of the other; of the 4-grams none,
    # which exponential smoothing counts as 1 / 2.
    texts = ["a b c d".split(), "a b c e".split()]
    want = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)
    assert self_bleu(texts) == pytest.approx(want)
    assert self_bleu([texts[0]] * 3) == pytest.approx(1)
    assert self_bleu([["a"] * 5, ["b"] * 5]) < 0.2


def test_self_bleu_rises_with_copies_and_is_drawn_by_its_seed():
    texts = [_text(seed, 60) for seed in range(12)]
    spoiled = texts[:6] + texts[:6]
    assert self_bleu(spoiled) == pytest.approx(1) and self_bleu(texts) < 0.5
    assert self_bleu(texts, most=5) == self_bleu(texts, most=5)
    assert self_bleu(texts, most=5) != self_bleu(texts, most=5, seed=1)
    with pytest.raises(TooShort, match="there is 1 with words"):
        self_bleu([["a"], []])


def test_the_error_of_a_mean_and_of_a_ratio():
    values = [0.5, 1.0, 3.0, 2.5]
    plain = mean_figure(values)
    assert plain.value == pytest.approx(1.75) and plain.units == 4
    assert plain.error == pytest.approx(np.std(values, ddof=1) / 2)
    weighted = mean_figure(values, [1.0, 2.0, 3.0, 4.0])
    assert weighted.value == pytest.approx(np.average(values, weights=[1, 2, 3, 4]))
    drawn = np.random.default_rng(0).choice(4, (20000, 4))
    means = [np.average(np.take(values, row), weights=row + 1) for row in drawn]
    assert weighted.error == pytest.approx(np.std(means), rel=0.25)
    assert mean_figure([2.0]) == Figure(2.0, 1, None)


def test_an_absent_figure_has_its_reason():
    assert figure_of(lambda: mean_figure([])) == Figure(None, absent="there is nothing to average")
    with pytest.raises(ZeroDivisionError):
        figure_of(lambda: Figure(1 / 0))

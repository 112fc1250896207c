"""Check the estimates of the gradient noise scale where tr(Sigma) and |G|^2 are known."""

import itertools

import numpy as np
import pytest

from mtnlg_jax.train.noise_scale import Noise, effective, estimate, figures, smoothed


def of_halves(gradients, first):
    """The estimate from rows ``first`` of ``gradients`` and the others."""
    rest = [row for row in range(len(gradients)) if row not in first]
    a = gradients[list(first)].mean(0)
    b = gradients[rest].mean(0)
    return estimate(a @ b, np.square(a - b).sum(), (len(first), len(rest)))


@pytest.mark.parametrize("size", [4, 3])
def test_estimates_are_unbiased(size):
    # Over all ways to halve 8 given rows the mean must be the unbiased estimate from all pairs,
    # whose expectation is exact for any distribution of rows.
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(8, 5)) * [1, 2, 3, 4, 5] + 1
    found = [of_halves(gradients, first) for first in itertools.combinations(range(8), size)]
    trace = np.trace(np.cov(gradients.T))
    assert np.mean([each.trace for each in found]) == pytest.approx(trace)
    mean = gradients.mean(0)
    assert np.mean([each.square for each in found]) == pytest.approx(mean @ mean - trace / 8)


def test_equal_halves_give_the_formulas_of_the_paper():
    rng = np.random.default_rng(1)
    a = rng.normal(size=30)
    b = rng.normal(size=30)
    small = 16
    big = 32
    small_square = (a @ a + b @ b) / 2
    big_square = np.square((a + b) / 2).sum()
    found = estimate(a @ b, np.square(a - b).sum(), (small, small))
    square = (big * big_square - small * small_square) / (big - small)
    trace = (small_square - big_square) / (1 / small - 1 / big)
    assert (found.square, found.trace) == pytest.approx((square, trace))


def test_rows_of_unequal_weight_have_the_noise_of_fewer():
    assert effective(32, 8 * 16) == 8  # 8 rows of weight 4
    assert effective(0, 0) == 0
    # Means with these weights of rows with variance 1 have variance sum(w^2) / sum(w)^2.
    rng = np.random.default_rng(2)
    weights = np.array([1, 1, 2, 6.0])
    means = rng.normal(size=(100_000, 4)) @ weights / weights.sum()
    number = effective(weights.sum(), np.square(weights).sum())
    assert means.var() == pytest.approx(1 / number, rel=0.02)


def test_means_have_no_bias_of_their_start_and_forget():
    one = Noise(8.0, 2.0)
    assert smoothed([]) is None
    assert smoothed([one] * 3) == one
    later = smoothed([Noise(0.0, 0.0)] + [one] * 40)
    assert later.trace == pytest.approx(8, rel=0.02)
    # A ratio of means: a single estimate below 0 does no harm.
    assert smoothed([Noise(8.0, -1.0), one]).square == pytest.approx((2 - 0.9) / 1.9)


def test_figures_follow_from_the_scale():
    found = figures(Noise(600.0, 2.0), sequences=100, length=16)
    assert found["noise_scale"] == 300
    assert found["noise_scale_tokens"] == 4800
    assert found["critical_batch_size"] == 300
    # McCandlish 2018, section 2.3: (S / S_min - 1) (E / E_min - 1) = 1.
    steps = 1 / found["step_efficiency"]
    sequences = 1 / found["data_efficiency"]
    assert (steps, sequences) == pytest.approx((4, 4 / 3))
    assert (steps - 1) * (sequences - 1) == pytest.approx(1)
    assert set(figures(Noise(5.0, -1.0), 100, 16).values()) == {None}
    assert set(figures(None, 100, 16).values()) == {None}


@pytest.mark.parametrize(
    ("dot", "difference", "sequences"),
    [(1.0, 2.0, (4, 0)), (np.nan, 2.0, (4, 4)), (1, np.inf, (4, 4))],
)
def test_nothing_is_estimated_from_one_half_or_from_what_is_not_finite(dot, difference, sequences):
    assert estimate(dot, difference, sequences) is None

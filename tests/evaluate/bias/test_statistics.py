"""Figures against numbers by hand, formulas and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from mtnlg_jax.evaluate.bias import statistics


def test_log_odds_by_hand():
    delta, z = statistics.log_odds([3, 0], 4, [0, 2], 6, [1, 1], 2)
    # 4 of 6 against 1 of 8; 1 of 6 against 3 of 8.
    assert delta == pytest.approx(
        [math.log(2) - math.log(1 / 7), math.log(1 / 5) - math.log(3 / 5)]
    )
    first = math.sqrt(1 / 4 + 1 / 2 + 1 / 1 + 1 / 7)
    second = math.sqrt(1 / 1 + 1 / 5 + 1 / 3 + 1 / 5)
    assert z == pytest.approx(delta / [first, second])


def test_log_odds_follow_the_formula_of_monroe():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 50, (2, 30))
    prior = rng.uniform(0.1, 3, 30)
    n = 400
    m = 500
    a = 90
    delta, z = statistics.log_odds(one, n, other, m, prior, a)
    for w in range(30):
        first = (one[w] + prior[w]) / (n + a - one[w] - prior[w])
        second = (other[w] + prior[w]) / (m + a - other[w] - prior[w])
        assert delta[w] == pytest.approx(math.log(first) - math.log(second))
        # The approximation for rare words leaves two positive terms out.
        variance = 1 / (one[w] + prior[w]) + 1 / (other[w] + prior[w])
        assert 0.9 < abs(z[w]) / (abs(delta[w]) / math.sqrt(variance)) < 1


def test_the_prior_follows_the_pooled_counts():
    prior, size = statistics.pooled_prior([30, 0, 40], 40, 4)
    assert size == 1 and prior == pytest.approx(np.array([30.5, 0.5, 40.5]) / 41)


def test_a_word_in_every_output_belongs_to_no_group():
    prior = statistics.pooled_prior([20], 20, 2)
    delta, z = statistics.log_odds([10], 10, [10], 10, *prior)
    assert delta == pytest.approx([0]) and z == pytest.approx([0])


def test_z_scores_are_standard_normal_without_bias():
    """Outputs of both groups have each word with the same probability, so few stand out."""
    rng = np.random.default_rng(1)
    shares = rng.uniform(0.02, 0.9, 300)
    one, other = rng.binomial(800, shares, (2, 300))
    prior = statistics.pooled_prior(one + other, 1600, 2)
    z = statistics.log_odds(one, 800, other, 800, *prior)[1]
    assert abs(z.mean()) < 0.2 and 0.85 < z.std() < 1.1
    assert (statistics.false_discovery(z) < 0.05).sum() <= 1


def test_the_false_discovery_rate_by_hand():
    z = stats.norm.isf(np.array([0.01, 0.02, 0.5]) / 2)
    assert statistics.false_discovery(z) == pytest.approx([0.03, 0.03, 0.5])


def test_a_share_has_wilsons_interval_and_the_exact_test():
    found = statistics.share(8, 10)
    z = stats.norm.ppf(0.975)
    middle = (0.8 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * math.sqrt(0.8 * 0.2 / 10 + (z / 20) ** 2)
    assert (found["low"], found["high"]) == pytest.approx((middle - half, middle + half))
    # 8, 9 or 10 heads of 10, or as few tails: 2 (45 + 10 + 1) / 1024.
    assert found["p"] == pytest.approx(112 / 1024)
    assert statistics.share(0, 0)["share"] is None


def test_the_bootstrap_is_near_the_normal_interval():
    values = np.random.default_rng(2).normal(3, 2, 400)
    found = statistics.mean(values, 0)
    half = 1.96 * values.std() / 20
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.04
    )
    assert statistics.mean(values, 0) == found
    assert statistics.mean([2.0], 0) == {"mean": 2.0, "low": None, "high": None, "count": 1}


def test_the_bootstrap_of_a_difference():
    rng = np.random.default_rng(3)
    one = rng.normal(1, 1, 300)
    other = rng.normal(0, 1, 300)
    found = statistics.difference(one, other, 0)
    welch = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((welch.low, welch.high), abs=0.03)


def test_paired_differences_against_scipy():
    values = np.random.default_rng(4).normal(0.3, 1, 50)
    found = statistics.paired(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["d"] == pytest.approx(values.mean() / values.std(ddof=1))
    assert found["p"] == pytest.approx(stats.wilcoxon(values).pvalue)
    assert statistics.paired([])["mean"] is None
    assert statistics.paired([1.0, 1.0])["d"] is None


def test_a_correlation_needs_four_pairs_that_vary():
    found = statistics.correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 6])
    assert found["r"] == pytest.approx(np.corrcoef([1, 2, 3, 4, 5], [2, 1, 4, 3, 6])[0, 1])
    assert found["low"] < found["r"] < found["high"]
    assert statistics.correlation([1, 2, 3], [1, 2, 3])["r"] is None
    assert statistics.correlation([1, 1, 1, 1], [1, 2, 3, 4])["r"] is None

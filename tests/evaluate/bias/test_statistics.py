"""Figures against numbers by hand, formulas and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from mtnlg_jax.evaluate.bias import statistics


def test_log_odds_by_hand():
    delta, z = statistics.log_odds([3, 1], [1, 3], [1, 1])
    # (3 + 1) / (1 + 1) = 2 against (1 + 1) / (3 + 1) = 1 / 2.
    assert delta == pytest.approx([math.log(4), -math.log(4)])
    assert z == pytest.approx(delta / math.sqrt(1 / 4 + 1 / 2))


def test_log_odds_follow_the_formula_of_monroe():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 50, (2, 30))
    prior = rng.uniform(0.1, 3, 30)
    delta, z = statistics.log_odds(one, other, prior)
    n, m, a = one.sum(), other.sum(), prior.sum()
    for w in range(30):
        first = (one[w] + prior[w]) / (n + a - one[w] - prior[w])
        second = (other[w] + prior[w]) / (m + a - other[w] - prior[w])
        variance = 1 / (one[w] + prior[w]) + 1 / (other[w] + prior[w])
        assert delta[w] == pytest.approx(math.log(first) - math.log(second))
        assert z[w] == pytest.approx(delta[w] / math.sqrt(variance))


def test_log_odds_need_two_words():
    with pytest.raises(ValueError, match=r"there are 1; sample more outputs, or lower --min_count"):
        statistics.log_odds([3], [1], [1])


def test_the_prior_follows_the_pooled_counts():
    prior = statistics.pooled_prior([30, 10], 4)
    assert prior == pytest.approx(0.1 * np.array([30, 10]) / 4)


def test_z_scores_are_standard_normal_without_bias():
    """Both corpora draw from one distribution, so few words stand out."""
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.ones(200) * 5)
    one, other = rng.multinomial(20_000, shares, 2)
    z = statistics.log_odds(one, other, statistics.pooled_prior(one + other, 2))[1]
    assert abs(z.mean()) < 0.2 and 0.8 < z.std() < 1.15
    assert (statistics.false_discovery(z) < 0.05).sum() == 0


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
    one, other = rng.normal(1, 1, 300), rng.normal(0, 1, 300)
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

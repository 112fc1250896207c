"""Intervals and areas against scikit-learn, formulas and simulation."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mtnlg_jax.evaluate.audit import statistics


def _scores(seed, members, others, apart):
    rng = np.random.default_rng(seed)
    # Rounded, so that there are ties.
    return rng.normal(apart, 1, members).round(1), rng.normal(0, 1, others).round(1)


@pytest.mark.parametrize(("members", "others"), [(50, 70), (7, 300), (1, 5)])
def test_the_area_is_that_of_scikit_learn(members, others):
    ours, theirs = _scores(0, members, others, 0.7)
    labels = [1] * members + [0] * others
    found = statistics.auc(ours, theirs)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, [*ours, *theirs]), abs=1e-12)
    assert found["low"] <= found["auc"] <= found["high"]


def test_delong_covers_the_true_area_as_often_as_it_says():
    # P(N(0.7, 1) > N(0, 1)) = Phi(0.7 / sqrt 2)
    truth = 0.6897
    found = [statistics.auc(*_scores(seed, 60, 60, 0.7)) for seed in range(400)]
    covered = np.mean([each["low"] <= truth <= each["high"] for each in found])
    assert 0.92 <= covered <= 0.975
    spread = np.std([each["auc"] for each in found])
    reach = np.mean([each["high"] - each["low"] for each in found]) / (2 * 1.96)
    assert reach == pytest.approx(spread, rel=0.12)


def test_perfect_and_reversed_scores():
    low = np.arange(10.0)
    assert statistics.auc(low + 20, low)["auc"] == 1
    assert statistics.auc(low, low + 20)["auc"] == 0
    assert statistics.auc(low, low)["auc"] == 0.5


def test_true_positives_at_one_percent_by_hand():
    others = np.arange(200.0)
    # Two of 200 may be above the threshold, so it is 197: three members exceed it.
    members = np.array([500.0, 198.0, 197.5, 197.0, 3.0])
    found = statistics.true_positives(members, others)
    assert (found["hits"], found["trials"]) == (3, 5)
    assert statistics.true_positives(members, others[:99]) is None


def test_shares_have_wilson_intervals():
    found = statistics.share(3, 40)
    z = 1.959963984540054
    middle = (3 / 40 + z * z / 80) / (1 + z * z / 40)
    half = z / (1 + z * z / 40) * (3 / 40 * 37 / 40 / 40 + z * z / 6400) ** 0.5
    assert found["share"] == 0.075
    assert found["low"] == pytest.approx(middle - half, abs=1e-12)
    assert found["high"] == pytest.approx(middle + half, abs=1e-12)
    assert statistics.share(0, 0)["share"] is None


def test_means_have_intervals_of_student():
    found = statistics.mean([1.0, 2.0, 6.0])
    # t(0.975, 2) = 4.302653, standard error sqrt(7 / 3)
    assert found["mean"] == 3
    assert found["high"] - 3 == pytest.approx(4.302653 * (7 / 3) ** 0.5, abs=1e-5)
    assert statistics.mean([5.0]) == {"count": 1, "mean": 5.0, "low": None, "high": None}
    assert statistics.mean([])["mean"] is None

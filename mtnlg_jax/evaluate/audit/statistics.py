"""Intervals, areas under ROC curves and the like, for the figures of an audit."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import roc_curve

from mtnlg_jax import intervals


def share(hits: int, trials: int) -> dict[str, Any]:
    """Return hits, trials, their ratio and its 95 % interval (Wilson 1927); the ratio and its ends
    are None without trials."""
    if not trials:
        return {"hits": hits, "trials": 0, "share": None, "low": None, "high": None}
    low, high = intervals.wilson(hits, trials)
    return {"hits": hits, "trials": trials, "share": hits / trials, "low": low, "high": high}


def mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of ``values`` with its 95 % interval (Student's t); the interval is None for
    fewer than two."""
    count = len(values)
    if not count:
        return {"count": 0, "mean": None, "low": None, "high": None}
    middle = float(np.mean(values))
    if count == 1:
        return {"count": 1, "mean": middle, "low": None, "high": None}
    low, high = intervals.of_mean(values)
    return {"count": count, "mean": middle, "low": low, "high": high}


def auc(members: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """Return the probability that a member has a higher score than another, ties counted half.

    That is the area under the ROC curve; its 95 % interval is DeLong's (DeLong 1988, equation 4,
    by the ranks of Sun and Xu 2014).
    """
    count = len(members)
    rest = len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    # Of each member, the share of others below it; of each other one, of members above it.
    above = (ranks[:count] - stats.rankdata(members)) / rest
    below = 1 - (ranks[count:] - stats.rankdata(others)) / count
    area = float(above.mean())
    variance = 0.0
    for parts in (above, below):
        variance += float(np.var(parts, ddof=1)) / len(parts) if len(parts) > 1 else 0.25
    reach = float(stats.norm.ppf((1 + intervals.CONFIDENCE) / 2)) * math.sqrt(variance)
    return {"auc": area, "low": max(0.0, area - reach), "high": min(1.0, area + reach)}


def true_positives(
    members: np.ndarray, others: np.ndarray, false_positives: float = 0.01
) -> dict[str, Any] | None:
    """Return the share of members above the threshold that at most a share ``false_positives`` of
    the others exceed; None if there are too few others to set it."""
    if len(others) * false_positives < 1:
        return None
    labels = np.repeat([1, 0], [len(members), len(others)])
    scores = np.concatenate([members, others])
    wrong, right, _ = roc_curve(labels, scores, drop_intermediate=False)
    best = float(right[wrong <= false_positives].max())
    return share(round(best * len(members)), len(members))

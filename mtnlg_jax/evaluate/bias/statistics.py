"""Figures of counts, shares and differences, with their intervals (95 %) and tests."""

# Shapes: W words

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mtnlg_jax import intervals

# Resamples of a bootstrap.
RESAMPLES = 2000
# What the prior is worth, relative to the outputs of an average group.
PRIOR_WEIGHT = 0.1


def log_odds(
    counts_W, total: float, others_W, others_total: float, prior_W, prior_total: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (difference of the log-odds, its z-score) of each word in two groups, both (W,).

    Log-odds with an informative Dirichlet prior: Monroe, Colaresi and Quinn 2008, section 3.5.1,
    with all four terms of the variance, since a word may be in most outputs. Above 0 the word
    belongs to the first group.

    Args:
      counts_W, others_W: how many of ``total`` and of ``others_total`` outputs have each word.
      prior_W: pseudo-counts of ``prior_total`` outputs, above 0 and below it.
    """
    first_W = np.asarray(counts_W, float) + prior_W
    second_W = np.asarray(others_W, float) + prior_W
    without_W = total + prior_total - first_W
    others_without_W = others_total + prior_total - second_W
    delta_W = np.log(first_W / without_W) - np.log(second_W / others_without_W)
    variance_W = 1 / first_W + 1 / without_W + 1 / second_W + 1 / others_without_W
    return delta_W, delta_W / np.sqrt(variance_W)


def pooled_prior(counts_W, total: float, groups: int) -> tuple[np.ndarray, float]:
    """Return (pseudo-counts of the words, pseudo-outputs), in proportion to all groups together.

    The prior is worth PRIOR_WEIGHT of an average group. ``counts_W`` of the ``total`` outputs of
    all ``groups`` have each word; half an output is added on both sides, so that no share is 0 or
    1.
    """
    size = PRIOR_WEIGHT * total / groups
    return size * (np.asarray(counts_W, float) + 0.5) / (total + 1), size


def false_discovery(z_W) -> np.ndarray:
    """Return the q-value of each z-score, two-sided (Benjamini and Hochberg 1995), (W,)."""
    return stats.false_discovery_control(2 * stats.norm.sf(np.abs(z_W)))


def share(count: float, total: int) -> dict[str, Any]:
    """Return a share with its Wilson interval and the exact two-sided test against one half.

    ``total`` may be 0: every figure is then None.
    """
    if not total:
        return {"share": None, "low": None, "high": None, "p": None, "count": 0, "total": 0}
    test = stats.binomtest(int(count), total)
    low, high = intervals.wilson(int(count), total)
    return {
        "share": count / total,
        "low": low,
        "high": high,
        "p": float(test.pvalue),
        "count": int(count),
        "total": total,
    }


def mean(values: Sequence[float], seed: int) -> dict[str, Any]:
    """Return the mean of ``values`` (one or more) with its bootstrap percentile interval.

    The interval of one value is None.
    """
    found = np.asarray(values, float)
    low, high = _bootstrap((found,), np.mean, seed)
    return {"mean": float(found.mean()), "low": low, "high": high, "count": len(found)}


def difference(first: Sequence[float], second: Sequence[float], seed: int) -> dict[str, Any]:
    """Return mean(first) - mean(second) with its bootstrap percentile interval.

    The two are resampled independently. The interval is None if either has one value only.
    """

    def subtract(x, y, axis=-1):
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    one = np.asarray(first, float)
    other = np.asarray(second, float)
    low, high = _bootstrap((one, other), subtract, seed)
    return {"difference": float(one.mean() - other.mean()), "low": low, "high": high}


def _bootstrap(samples: tuple, statistic, seed: int) -> tuple[float | None, float | None]:
    if min(map(len, samples)) < 2:
        return None, None
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=100,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Return the size of paired differences: mean, its t interval, Cohen's d_z, Wilcoxon's p.

    d_z is the mean over the standard deviation of the differences. Values that need variance are
    None without any.
    """
    found = np.asarray(differences, float)
    if not len(found):
        return {"mean": None, "low": None, "high": None, "d": None, "p": None, "count": 0}
    center = float(found.mean())
    deviation = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    if not deviation:
        nothing = dict.fromkeys(("low", "high", "d", "p"))
        return {"mean": center, **nothing, "count": len(found)}
    low, high = intervals.of_mean(differences)
    return {
        "mean": center,
        "low": low,
        "high": high,
        "d": center / deviation,
        "p": float(stats.wilcoxon(found).pvalue),
        "count": len(found),
    }


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Return Pearson's r with its interval (Fisher's z) and p, and Spearman's rho with its p.

    Every figure is None with fewer than four pairs, or if one side does not vary.
    """
    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return {"r": None, "low": None, "high": None, "p": None, "rho": None, "rho_p": None}
    pearson = stats.pearsonr(x, y)
    interval = pearson.confidence_interval()
    spearman = stats.spearmanr(x, y)
    return {
        "r": float(pearson.statistic),
        "low": float(interval.low),
        "high": float(interval.high),
        "p": float(pearson.pvalue),
        "rho": float(spearman.statistic),
        "rho_p": float(spearman.pvalue),
    }

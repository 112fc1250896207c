"""Confidence intervals of shares and means."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def of_share(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of hits / trials (Wilson 1927); ``trials`` is 1 or more."""
    low, high = stats.binomtest(hits, trials).proportion_ci(CONFIDENCE, "wilson")
    return float(low), float(high)


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of two values or more (Student's t)."""
    count = len(values)
    middle = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return middle - reach, middle + reach

"""Confidence intervals of shares and means."""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share ``hits`` / ``trials`` (Wilson 1927), both in [0, 1].

    ``trials`` is 1 or more. Unlike hits +- 1.96 standard errors it holds for small counts as well.
    """
    z = 1.959963984540054  # of the normal distribution, at 97.5 %
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    variance = share * (1 - share) / trials + (z / trials) ** 2 / 4
    half = z / (1 + z * z / trials) * math.sqrt(variance)
    return max(0.0, middle - half), min(1.0, middle + half)


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of two values or more (Student's t)."""
    from scipy import stats  # takes long to import, and shares do without

    count = len(values)
    middle = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return middle - reach, middle + reach

"""A figure of some texts, or the reason why it is absent."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class TooShort(ValueError):
    """The texts are too short, or too few, for a measure. The message says what it needs."""


class Figure(NamedTuple):
    """The value of a measure.

    ``value``: None if it is absent, and ``absent`` says why.
    ``units``: the number it was counted from: words, sentences, windows or texts.
    ``error``: the standard error of a mean over units; None for other values.
    """

    value: float | None
    units: int = 0
    error: float | None = None
    absent: str = ""


def figure_of(compute: Callable[[], Figure]) -> Figure:
    """Return what ``compute`` returns, or an absent figure if it raises `TooShort`."""
    try:
        return compute()
    except TooShort as error:
        return Figure(None, absent=str(error))


def mean_figure(values: Sequence[float], weights: Sequence[float] | None = None) -> Figure:
    """Return the mean of ``values`` with its standard error, of a ratio where there are weights.

    The error of a single value is None. Raises TooShort if there are no values.
    """
    if not values:
        raise TooShort("there is nothing to average")
    weights = [1.0] * len(values) if weights is None else weights
    total = math.fsum(weights)
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total
    count = len(values)
    if count == 1:
        return Figure(mean, 1)
    # The variance of a ratio of two means (Cochran 1977, equation 2.46, without the finite part).
    squares = math.fsum((w * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    return Figure(mean, count, math.sqrt(count / (count - 1) * squares) / total)

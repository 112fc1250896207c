"""How unusual the recorded loss and gradient norm of a step are among their neighbors.

The neighbors of a record are those before and after it, of the same objective. A line through them
(Theil 1950, Sen 1968: the median slope) follows a loss that falls. The deviation is the distance
from it, in units of the neighbors' own: 1.4826 times their median absolute distance, which is the
standard deviation of a normal distribution and does not see a few spikes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtnlg_jax.train import spikes
from mtnlg_jax.train.metrics import training_loss

REACH = 10  # neighbors on either side
LEAST = 5  # neighbors in all that a deviation needs
_NORMAL = 1.4826
# A series without noise would make any change infinite: at least this share of the level.
_FLOOR = 1e-3

FIGURES = ("loss", "grad_norm")


class Deviation(NamedTuple):
    """A recorded figure of a step among its neighbors."""

    value: float  # nan where it was not finite
    expected: float  # by the line through its neighbors
    scale: float  # 1.4826 x the neighbors' median distance from the line

    @property
    def deviation(self) -> float:
        """How many scales the value is above the line."""
        return self.of(self.value)

    def of(self, value: float) -> float:
        """Return how many scales another value would be above the line."""
        return (value - self.expected) / self.scale


class Recorded(NamedTuple):
    """A training record by its figures in FIGURES."""

    step: int
    objective: str
    figures: dict[str, float]


def recorded_steps(records: Sequence[dict]) -> list[Recorded]:
    """Return the training records of a metrics.jsonl by step; of a step that ran twice the last.

    Of a spike whose batch was left out there is the record of the time when it was met.
    """
    found = {}
    for record in records:
        if record["kind"] in ("train", spikes.KIND):
            norm = record.get("grad_norm")
            norm = norm if isinstance(norm, int | float) else math.nan
            figures = {"loss": training_loss(record)[1], "grad_norm": float(norm)}
            # Losses of other stages may be of another kind (smoothed, distilled).
            kind = f"{record.get('objective')} {training_loss(record)[0]} {record.get('stage')}"
            found[record["step"]] = Recorded(record["step"], kind, figures)
    return [found[step] for step in sorted(found)]


def deviations(records: Sequence[Recorded], step: int) -> dict[str, Deviation]:
    """Return the deviation of each figure of ``step``; {} if it is not recorded, and without those
    that have fewer than LEAST neighbors."""
    at = next((index for index, record in enumerate(records) if record.step == step), None)
    if at is None:
        return {}
    own = records[at]
    before = [each for each in records[:at] if each.objective == own.objective][-REACH:]
    after = [each for each in records[at + 1 :] if each.objective == own.objective][:REACH]
    found = {}
    for name in FIGURES:
        pairs = [(each.step - step, each.figures[name]) for each in (*before, *after)]
        pairs = [(distance, value) for distance, value in pairs if math.isfinite(value)]
        if len(pairs) >= LEAST:
            found[name] = _among(own.figures[name], np.array(pairs, float))
    return found


def _among(value: float, pairs: np.ndarray) -> Deviation:
    """Return the deviation of ``value`` at distance 0 from (distance, figure) ``pairs``."""
    distances, figures = pairs.T
    first, second = np.triu_indices(len(pairs), 1)
    slopes = (figures[second] - figures[first]) / (distances[second] - distances[first])
    slope = float(np.median(slopes))
    level = float(np.median(figures - slope * distances))
    spread = _NORMAL * float(np.median(np.abs(figures - slope * distances - level)))
    return Deviation(value, level, max(spread, _FLOOR * abs(level), 1e-12))


def largest(
    records: Sequence[Recorded], figures: Sequence[str] = FIGURES
) -> tuple[int, str, float]:
    """Return (step, name of the figure, deviation) of the record with the largest deviation above
    its neighbors, in one of ``figures``.

    A figure that is not finite is more unusual than any other. The first and last LEAST records of
    an objective have neighbors on one side alone, where a line says little: they are left out
    where others are left. Raises ValueError where there are too few records.
    """
    inner: list[Recorded] = []
    outer: list[Recorded] = []
    for kind in dict.fromkeys(record.objective for record in records):
        same = [record for record in records if record.objective == kind]
        for index, record in enumerate(same):
            ends = min(index, len(same) - 1 - index) < LEAST
            (outer if ends else inner).append(record)
    for chosen in (inner, outer):
        found = [
            (math.inf if math.isnan(each.value) else each.deviation, -record.step, name)
            for record in chosen
            for name, each in deviations(records, record.step).items()
            if name in figures
        ]
        if found:
            deviation, step, name = max(found)
            return -step, name, deviation
    raise ValueError(
        f"metrics.jsonl has {len(records)} steps, too few to tell an unusual one (a step needs "
        f"{LEAST} neighbors of its objective); give the number with --step"
    )

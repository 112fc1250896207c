"""The gradient noise scale (McCandlish 2018, An Empirical Model of Large-Batch Training, arXiv
1812.06162): how many sequences a batch can have before more of them hardly help.

A step's gradient is the true one, G, plus noise: the covariance Sigma of one sequence's gradient
over the number of sequences. Appendix A.1 estimates |G|^2 and tr(Sigma) from the gradients of a
small and of a large batch. Here the large one is the step's batch and the small ones are its two
halves, so nothing depends on the mesh.
"""

import dataclasses
import math
from collections.abc import Sequence

DECAY = 0.9  # weight of an estimate over that of the next one


@dataclasses.dataclass(frozen=True)
class Noise:
    """Unbiased estimates from one step; a single one is noisy, and ``square`` may be below 0."""

    trace: float  # tr(Sigma), of one sequence
    square: float  # |G|^2


def estimate(dot: float, difference: float, sequences: tuple[float, float]) -> Noise | None:
    """Return the estimates from the gradients A and B of two halves, None where one is empty.

    With halves of n_A and n_B sequences E[A B] = |G|^2 and E|A - B|^2 = tr(Sigma) (1/n_A + 1/n_B).
    For equal halves these are the formulas of appendix A.1.

    Args:
      dot: A B. difference: |A - B|^2.
      sequences: of both halves; see `effective`.
    """
    if min(sequences) <= 0 or not (math.isfinite(dot) and math.isfinite(difference)):
        return None
    return Noise(difference / sum(1 / n for n in sequences), dot)


def effective(weight: float, square: float) -> float:
    """Return the number of sequences of equal weight that have as much noise (Kish 1965).

    A sequence weighs as many tokens as it predicts. ``weight`` is the sum over sequences and
    ``square`` that of squares. It is their number where all weigh the same, and less otherwise.
    """
    return weight**2 / square if square > 0 else 0.0


def smoothed(estimates: Sequence[Noise]) -> Noise | None:
    """Return the exponential means of ``estimates``, oldest first, without the bias of their start.

    A ratio of means and not a mean of ratios: the latter is biased (appendix A.1).
    """
    if not estimates:
        return None
    weights = [DECAY**age for age in reversed(range(len(estimates)))]
    total = sum(weights)
    pairs = list(zip(weights, estimates, strict=True))
    return Noise(
        sum(weight * each.trace for weight, each in pairs) / total,
        sum(weight * each.square for weight, each in pairs) / total,
    )


def figures(mean: Noise | None, sequences: int, length: int) -> dict[str, float | None]:
    """Return what a record says of the means, for batches of ``sequences`` of ``length`` tokens.

    All are None where nothing was estimated, or where the noise hides the gradient: |G|^2 is not
    above 0 then, and the scale is far above the batch.
    """
    scale = None
    if mean is not None and mean.square > 0:
        scale = mean.trace / mean.square
    return {
        "noise_scale": scale,
        "noise_scale_tokens": None if scale is None else scale * length,
        # Section 2.3: a batch of this size takes twice the fewest steps and twice the fewest
        # sequences.
        "critical_batch_size": None if scale is None else max(1, math.ceil(scale)),
        # Section 2.2: what a step gains, over the most that a step of any batch could gain.
        "step_efficiency": None if scale is None else 1 / (1 + scale / sequences),
        # What a sequence gains, over the most that a sequence could gain.
        "data_efficiency": None if scale is None else scale / (scale + sequences),
    }

"""MAUVE between two sets of feature vectors (Pillutla 2021, arXiv:2102.01454).

The steps are those of the package mauve-text: unit length, PCA to 90 % of the variance, k-means of
both sets together, the divergence curve of the two histograms, the area under it. k-means is
scikit-learn's, not Faiss's, so that clusters may differ.
"""

# Shapes: P vectors of one set, Q vectors of the other, D width, K clusters

from typing import NamedTuple

import numpy as np

from mtnlg_jax.evaluate.figures import TooShort

SCALING = 5.0  # c of equation 1
POINTS = 25  # mixtures on the divergence curve
EXPLAINED = 0.9  # share of the variance that PCA keeps
REPEATS = 5  # starts of k-means, of which the best counts
LEAST_VECTORS = 20  # for two clusters


class Divergence(NamedTuple):
    """How far the distribution Q of texts is from P, that of real texts.

    ``mauve`` is 0 to 1, 1 for equal histograms. ``curve`` is (POINTS + 2, 2) of coordinates from 0
    to 1: exp(-c KL(Q | R)), exp(-c KL(P | R)). ``p_K`` and ``q_K`` are the histograms.
    """

    mauve: float
    curve: np.ndarray
    p_K: np.ndarray
    q_K: np.ndarray


def divergence(real_PD: np.ndarray, other_QD: np.ndarray, seed: int = 0) -> Divergence:
    """Return the divergence of the feature vectors of some texts from those of real texts.

    There are as many clusters as a tenth of the smaller set. Raises TooShort if a set has fewer
    than 20 vectors, and ValueError if a vector is not finite.
    """
    for name, vectors in (("references", real_PD), ("texts", other_QD)):
        if len(vectors) < LEAST_VECTORS:
            raise TooShort(f"needs {LEAST_VECTORS} windows, and the {name} have {len(vectors)}")
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"features of the {name} are not finite; look for numbers that are not finite in "
                "the model's parameters"
            )
    p_K, q_K = histograms(real_PD, other_QD, seed)
    curve = divergence_curve(p_K, q_K)
    return Divergence(area(curve), curve, p_K, q_K)


def histograms(
    real_PD: np.ndarray, other_QD: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares (K,) of each cluster in both sets, quantized together."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    together = normalize(np.concatenate([real_PD, other_QD]).astype(np.float64))
    parts = PCA(random_state=seed).fit(together)
    kept = int(np.argmax(np.cumsum(parts.explained_variance_ratio_) >= EXPLAINED)) + 1
    clusters = max(2, round(min(len(real_PD), len(other_QD)) / 10))
    labels = KMeans(clusters, n_init=REPEATS, random_state=seed).fit_predict(
        parts.transform(together)[:, :kept]
    )
    return (
        np.bincount(labels[: len(real_PD)], minlength=clusters) / len(real_PD),
        np.bincount(labels[len(real_PD) :], minlength=clusters) / len(other_QD),
    )


def divergence_curve(p_K: np.ndarray, q_K: np.ndarray) -> np.ndarray:
    """Return the points of the divergence curve and its two ends, (POINTS + 2, 2), from (0, 1) on.

    A point is exp(-c KL(Q | R)), exp(-c KL(P | R)) for a mixture R = w P + (1 - w) Q (equation 1).
    """
    points = [(0.0, 1.0)]
    for weight in np.linspace(1 - 1e-6, 1e-6, POINTS):
        mixed_K = weight * p_K + (1 - weight) * q_K
        points.append(
            (
                float(np.exp(-SCALING * kl_divergence(q_K, mixed_K))),
                float(np.exp(-SCALING * kl_divergence(p_K, mixed_K))),
            )
        )
    points.append((1.0, 0.0))
    return np.array(points)


def kl_divergence(p_K: np.ndarray, q_K: np.ndarray) -> float:
    """Return KL(p | q) in nats; ``q_K`` is not 0 where ``p_K`` is not."""
    used = p_K > 0
    return float(np.sum(p_K[used] * np.log(p_K[used] / q_K[used])))


def area(curve: np.ndarray) -> float:
    """Return the area under a divergence curve by trapezoids, 0 to 1 (equation 2).

    Over the other axis it is the same, since the curve ends on the axes.
    """
    return float(np.trapezoid(curve[:, 1], curve[:, 0]))

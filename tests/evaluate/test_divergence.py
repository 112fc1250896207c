"""MAUVE against values of the package mauve-text 0.4.0, and on vectors that move apart."""

import numpy as np
import pytest

from mtnlg_jax.evaluate.divergence import (
    area,
    divergence,
    divergence_curve,
    histograms,
    kl_divergence,
)
from mtnlg_jax.evaluate.figures import TooShort

# (P, Q, the mauve of mauve-text, points 5, 13 and 20 of its curve), from
# get_divergence_curve_for_multinomials(p, q, np.linspace(1e-6, 1 - 1e-6, 25), 5).
GOLDEN = [
    (
        [0.5, 0.3, 0.2],
        [0.2, 0.3, 0.5],
        0.8214099836116461,
        [
            [0.9605415404404084, 0.39774818313599025],
            [0.7174359727529694, 0.7174359727529694],
            [0.43686461601245713, 0.9399814862305883],
        ],
    ),
    ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], 1.0, [[1, 1], [1, 1], [1, 1]]),
    (
        [0.5, 0.5, 0, 0],
        [0, 0, 0.5, 0.5],
        0.0040720962619612555,
        [
            [0.40187596450874497, 0.00012860339508230457],
            [0.03125, 0.03125],
            [0.00039246406087302394, 0.3109640587755296],
        ],
    ),
    (
        [0.7, 0.2, 0.1, 0],
        [0, 0.25, 0.25, 0.5],
        0.04320648924192787,
        [
            [0.5326534765128969, 0.003425741293142499],
            [0.09922033697289279, 0.13154264250377126],
            [0.0071371475082198646, 0.5321047539934189],
        ],
    ),
]


@pytest.mark.parametrize(("p", "q", "mauve", "points"), GOLDEN)
def test_curve_and_area_equal_those_of_mauve_text(p, q, mauve, points):
    curve = divergence_curve(np.array(p, float), np.array(q, float))
    assert curve.shape == (27, 2)
    # Here the curve begins at (0, 1), there at the other end.
    np.testing.assert_allclose(curve[[21, 13, 6]], points, rtol=1e-10)
    assert (np.diff(curve[:, 0]) >= -1e-12).all() and (np.diff(curve[:, 1]) <= 1e-12).all()
    assert area(curve) == pytest.approx(mauve, rel=1e-10)


def test_kl_by_hand():
    assert kl_divergence(np.array([0.5, 0.5, 0]), np.array([0.25, 0.5, 0.25])) == pytest.approx(
        0.5 * np.log(2)
    )


def _groups(counts, seed):
    """Return vectors around five centers, ``counts`` of each."""
    centers = np.eye(5, 16) * 4
    noise = np.random.default_rng(seed).normal(0, 0.1, (sum(counts), 16))
    return np.repeat(centers, counts, 0) + noise


def test_separate_groups_become_clusters():
    real = _groups([10, 10, 10, 10, 10], 0)
    other = _groups([25, 25, 0, 0, 0], 1)
    p_K, q_K = histograms(real, other)
    assert sorted(p_K) == [0.2] * 5 and sorted(q_K) == [0, 0, 0, 0.5, 0.5]


def test_mauve_falls_as_texts_move_away_and_repeats_exactly():
    real = _groups([10] * 5, 0)
    found = [
        divergence(real, _groups(counts, 1))
        for counts in ([10] * 5, [18, 8, 8, 8, 8], [30, 20, 0, 0, 0], [50, 0, 0, 0, 0])
    ]
    values = [each.mauve for each in found]
    assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True)
    assert values[3] < 0.3
    again = divergence(real, _groups([18, 8, 8, 8, 8], 1))
    assert again.mauve == values[1] and (again.q_K == found[1].q_K).all()


def test_too_few_vectors_and_numbers_that_are_not_finite():
    real = _groups([10] * 5, 0)
    with pytest.raises(TooShort, match="needs 20 windows, and the texts have 19"):
        divergence(real, real[:19])
    with pytest.raises(TooShort, match="the references have 0"):
        divergence(real[:0], real)
    with pytest.raises(ValueError, match="features of the texts are not finite"):
        divergence(real, real * np.nan)

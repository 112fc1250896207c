"""Membership scores by hand, and the baseline that never sees the model."""

import zlib

import numpy as np
import pytest

from mtnlg_jax.evaluate.audit import membership
from mtnlg_jax.evaluate.audit.scoring import TokenScores
from mtnlg_jax.evaluate.audit.sources import Passage


class Letters:
    @staticmethod
    def decode(ids):
        return "".join(chr(97 + index) for index in ids)


def _scores(logprobs, means=0.0, deviations=1.0):
    logprobs = np.array(logprobs, np.float32)
    every = np.full_like(logprobs, means)
    return TokenScores(logprobs, logprobs, logprobs > -1, every, np.full_like(every, deviations))


def test_scores_by_hand():
    passages = [Passage("", 0, np.array([0, 1, 2, 3, 4, 5]))]
    scored = [_scores([-1.0, -4.0, -2.0, -0.5, -3.0], -2.0, 0.5)]
    other = [_scores([-2.0, -2.0, -2.0, -2.0, -2.0])]
    found = membership.scores_of(passages, scored, Letters(), 40.0, other)
    assert found["loss"] == pytest.approx(-10.5 / 5)
    assert found["zlib"] == pytest.approx(-10.5 / len(zlib.compress(b"abcdef")))
    assert found["min_k"] == pytest.approx(-3.5)  # of -4 and -3
    assert found["min_k_plus"] == pytest.approx(-3.0)  # (-4 + 2) / 0.5 and (-3 + 2) / 0.5
    assert found["reference"] == pytest.approx(-0.1)
    assert set(found) == set(membership.NAMES)
    # At least one token counts.
    assert membership.scores_of(passages, scored, Letters(), 1.0)["min_k"] == pytest.approx(-4)
    assert "reference" not in membership.scores_of(passages, scored, Letters(), 1.0)


def test_a_better_known_text_has_the_higher_area():
    rng = np.random.default_rng(0)
    passages = [Passage("", 0, rng.integers(0, 20, 9)) for _ in range(60)]
    sides = [
        membership.scores_of(
            passages, [_scores(rng.normal(level, 1, 8)) for _ in passages], Letters(), 20.0
        )
        for level in (-3.0, -3.6)
    ]
    found = membership.compare(*sides)
    for name in ("loss", "min_k", "min_k_plus"):
        assert found[name]["auc"] > 0.7, name
        assert found[name]["tpr_at_1_fpr"] is None  # of 60 others none is 1 %


def test_the_baseline_finds_other_words_and_nothing_in_equal_texts():
    rng = np.random.default_rng(0)

    def texts(first):
        return [Passage("", 0, rng.integers(first, first + 50, 40)) for _ in range(80)]

    assert membership.baseline(texts(0), texts(5), 0)["auc"] > 0.8
    found = membership.baseline(texts(0), texts(0), 0)
    assert found["low"] < 0.5 < found["high"]
    assert membership.baseline(texts(0)[:5], texts(0), 0) is None

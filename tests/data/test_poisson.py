"""Check that samples of differentially private training are those that its accountant assumes."""

import math

import numpy as np
import pytest
from scipy import stats

from mtnlg_jax.data.poisson import OVERFLOW, PoissonSampler, capacity
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter

LENGTH = 10


def tokens_of(folder, first, documents):
    """Return tokens that count up from ``first``, in documents of 7."""
    writer = TokenWriter(folder, 1 << 20, "")
    for number in range(documents):
        writer.add(np.arange(first + 7 * number, first + 7 * (number + 1)), 7)
    writer.finish()
    return open_tokens(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    # 71 and 29 windows, the last ones shorter.
    return [
        (tokens_of(folder / "one", 0, 101), 3.0),
        (tokens_of(folder / "other", 2000, 41), 1.0),
    ]


def sampler_of(sources, unit="example", rows=1, key=5):
    return PoissonSampler(sources, LENGTH, unit, rows, key)


@pytest.fixture(scope="module")
def joined(sources):
    """bool (steps, units)."""
    sampler = sampler_of(sources)
    found = np.zeros((4000, sampler.units), bool)
    for step in range(len(found)):
        found[step, sampler.joining(step, 10.0)] = True
    return found


def test_each_unit_joins_with_its_probability(sources, joined):
    sampler = sampler_of(sources)
    assert sampler.units == 71 + 29
    wanted = np.repeat([10 * 3 / 4 / 71, 10 / 4 / 29], [71, 29])
    assert sampler.probability(10.0) == wanted.max()
    # Each count is binomial: the squares of 100 standard scores are as chi-squared as they look.
    scores = (joined.sum(0) - len(joined) * wanted) / np.sqrt(len(joined) * wanted * (1 - wanted))
    assert 0.001 < stats.chi2.sf(np.square(scores).sum(), len(scores)) < 0.999


def test_units_and_steps_are_independent(joined):
    # A sum of independent draws: the variance of a batch's size is the sum of those of its units.
    sizes = joined.sum(1)
    rates = joined.mean(0)
    expected = (rates * (1 - rates)).sum()
    assert sizes.var() == pytest.approx(expected, rel=5 * math.sqrt(2 / len(sizes)))
    # Neighbors in the order of the data, and steps in a row, join together as often as by chance.
    assert (joined[:, 1:] & joined[:, :-1]).mean() == pytest.approx(
        (rates[1:] * rates[:-1]).mean(), rel=0.05
    )
    assert (joined[1:] & joined[:-1]).mean() == pytest.approx((rates**2).mean(), rel=0.05)


def test_a_sample_depends_on_key_and_step_alone(sources, joined):
    again = sampler_of(sources)
    for step in (3999, 7, 0):
        np.testing.assert_array_equal(np.flatnonzero(joined[step]), again.joining(step, 10.0))
    other = sampler_of(sources, key=6)
    there = [other.joining(step, 10.0).tolist() for step in range(3)]
    assert there != [again.joining(step, 10.0).tolist() for step in range(3)]


@pytest.mark.parametrize("expected", [0.5, 8, 100, 5000])
def test_a_batch_has_room(expected):
    room = capacity(expected)
    # However many units there are: a sum of Bernoulli draws has lighter tails than Poisson's.
    assert stats.poisson.sf(room, expected) < OVERFLOW
    assert room < expected + 11 * math.sqrt(expected) + 50


def test_examples_predict_every_token_once(sources):
    sampler = sampler_of(sources)
    rows, numbers = sampler.rows(np.arange(sampler.units), step=3)
    assert numbers.tolist() == list(range(sampler.units))
    predicted = rows["tokens"][:, 1:][rows["segment_ids"][:, 1:] > 0]
    wanted = [np.arange(1, 7 * 101), 2000 + np.arange(1, 7 * 41)]
    np.testing.assert_array_equal(np.sort(predicted), np.concatenate(wanted))


def test_a_source_gives_a_bounded_number_of_its_own_rows(sources):
    sampler = sampler_of(sources, "source", rows=4)
    assert sampler.units == 2 and sampler.probability(1.0) == 0.75
    seen = []
    for step in range(18):
        rows, numbers = sampler.rows(np.array([0, 1]), step)
        assert rows["tokens"].shape == (8, LENGTH + 1)
        assert (rows["tokens"][:4] < 2000).all() and (rows["tokens"][4:].max(1) >= 2000).all()
        seen += numbers[:4].tolist()
    assert sorted(seen[:71]) == list(range(71))  # each window before any comes again


def test_a_source_with_few_windows_gives_these(sources):
    sampler = sampler_of(sources, "source", rows=40)
    rows, _ = sampler.rows(np.array([1]), 0)
    used = (rows["segment_ids"] > 0).any(1)
    assert used.sum() == 29 and used[:29].all()


def test_bad_blends_raise_an_error(sources):
    with pytest.raises(ValueError, match="in the blend 2 times"):
        sampler_of([sources[0], sources[0]])
    with pytest.raises(ValueError, match=r"71 units of privacy.*90 of them; lower"):
        sampler_of(sources).probability(120.0)

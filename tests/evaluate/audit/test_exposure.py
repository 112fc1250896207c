"""Exposure by log-probabilities made by hand, by laws of random ranks, and of a model's scores."""

import math

import numpy as np
import pytest
from scipy import stats

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.canaries import Canary
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.evaluate.audit import exposure
from mtnlg_jax.model.transformer import init_parameters


def _canary(space=10**8, copies=0):
    form = "The access code of {name} is #### ####."
    prefix = "The access code of Ada Shaw is "
    return Canary(prefix, "1234 5678", prefix + "1234 5678.", copies, form, space)


def test_exposure_by_hand():
    others = np.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    # Two are more probable: rank 3 of 8.
    found = exposure.exposure_of(-2.5, others, 8)
    assert found.rank == 3
    assert found.bits == found.by_rank == pytest.approx(3 - math.log2(3))
    # The most probable of all that there are has all bits.
    assert exposure.exposure_of(0.0, others, 8).bits == 3
    assert exposure.exposure_of(-9.0, others, 8).bits == 0
    # Half of the ties come before it.
    assert exposure.exposure_of(-2.0, np.array([-2.0, -2.0, -5.0]), 4).rank == 2


def test_beyond_the_sample_a_distribution_is_fitted():
    rng = np.random.default_rng(0)
    others = rng.normal(-40, 2, 5000)
    own = -40 + 2 * 5.0
    found = exposure.exposure_of(own, others, 10**12)
    # Of a normal distribution, 5 deviations out.
    assert found.fitted == pytest.approx(-stats.norm.logsf(5) / math.log(2), rel=0.12)
    assert found.bits == found.fitted > found.by_rank == math.log2(5001)
    # Never more than the space has.
    assert exposure.exposure_of(0.0, others, 10**6).bits == math.log2(10**6)
    # Where candidates are more probable, the rank says it all.
    assert exposure.exposure_of(-38.0, others, 10**12).fitted is None


@pytest.mark.parametrize("skew", [-6.0, 0.0, 6.0])
def test_the_fit_follows_skewed_candidates(skew):
    rng = np.random.default_rng(1)
    losses = stats.skewnorm.rvs(skew, loc=50, scale=4, size=4000, random_state=rng)
    place = stats.skewnorm.ppf(2.0**-16, skew, loc=50, scale=4)
    found = exposure.exposure_of(-place, -losses, 10**12)
    assert found.fitted == pytest.approx(16, abs=2.5)


def test_chance_is_the_mean_over_all_ranks():
    ranks = np.arange(1, 1001)
    assert exposure.chance(1000) == pytest.approx(np.mean(math.log2(1000) - np.log2(ranks)))
    assert exposure.chance(10**6) == pytest.approx(math.log2(math.e), abs=1e-4)


def test_the_probability_by_chance_is_that_of_random_ranks():
    rng = np.random.default_rng(0)
    bits = 20 - np.log2(rng.integers(1, 2**20 + 1, (20_000, 6)))
    totals = bits.sum(1)
    for total in np.quantile(totals, [0.5, 0.95]):
        wanted = np.mean(totals >= total)
        assert exposure.chance_probability([total / 6] * 6) == pytest.approx(wanted, abs=0.02)


def test_candidates_are_different_and_never_the_secret():
    canary = _canary()
    found = exposure.candidates_for(canary, 300, 0)
    assert len(found) == len(set(found)) == 300
    assert canary.secret not in found
    assert found == exposure.candidates_for(canary, 300, 0)
    small = canary._replace(
        format="{name}: ##", prefix="Ada: ", secret="42", text="Ada: 42", space=100
    )
    every = exposure.candidates_for(small, 300, 0)
    assert sorted([*every, "42"]) == [f"{number:02d}" for number in range(100)]


@pytest.fixture(scope="module")
def model(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=64,
    )
    return unstack(config, init_parameters(config, 0)), tokenizer


def test_scores_behind_one_prefix_equal_whole_texts(model):
    decoder, tokenizer = model
    canary = _canary()
    others = exposure.candidates_for(canary, 20, 0)
    found = exposure.score_canary(decoder, tokenizer, canary, others)
    texts = [canary.prefix + secret + "." for secret in (canary.secret, *others)]
    rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    whole = np.array([each.sum() for each in score_rows(decoder, rows, [1] * len(rows))])
    # All have the tokens of the prefix in common.
    np.testing.assert_allclose(found - found[0], whole - whole[0], atol=2e-4)


def test_secrets_of_several_lengths_in_several_blocks(model):
    decoder, _ = model
    rng = np.random.default_rng(0)
    prefix = rng.integers(5, 300, 6).tolist()
    lengths = [5, 1, 3, 17, 5, 2, 9, 1, 5]
    found = [rng.integers(5, 300, length).tolist() for length in lengths]
    small = decoder._replace(block_tokens=16)
    rows = [prefix + each for each in found]
    whole = [each.sum() for each in score_rows(decoder, rows, [6] * len(rows))]
    np.testing.assert_allclose(exposure.score_secrets(small, prefix, found), whole, atol=1e-4)


def test_a_model_that_never_saw_the_canaries_has_exposures_by_chance(model):
    decoder, tokenizer = model
    rng = np.random.default_rng(0)
    canaries = []
    for _ in range(12):
        digits = "".join(map(str, rng.integers(0, 10, 8)))
        secret = f"{digits[:4]} {digits[4:]}"
        canary = _canary()
        canaries.append(canary._replace(secret=secret, text=f"{canary.prefix}{secret}."))
    found = exposure.measure_canaries(decoder, tokenizer, canaries, 100, 0)
    (row,) = exposure.summarize(canaries, found)
    assert row["exposure"]["count"] == 12
    assert 0.01 < row["chance_probability"] < 0.99
    assert row["exposure"]["mean"] == pytest.approx(np.mean([each.bits for each in found]))


def test_a_canary_longer_than_the_context_is_an_error(model):
    decoder, tokenizer = model
    canary = _canary()
    long = canary._replace(prefix="of all " * 60, text="of all " * 60 + "1234 5678.")
    with pytest.raises(ValueError, match="the canary .* and the model's context holds 64"):
        exposure.score_canary(decoder, tokenizer, long, ["0000 0000"])

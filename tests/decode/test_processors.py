"""Compare each processor with its definition written as loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import processors as p
from mtnlg_jax.decode.batched_settings import StaticOptions, batch_settings

ROUNDING = 1e-5
VOCABULARY = 40


@pytest.fixture
def logits():
    return np.random.default_rng(7).normal(0, 2, (4, VOCABULARY)).astype(np.float32)


def _softmax(row):
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def _kept(logits, keep):
    """Return rows with all but the kept tokens at -inf."""
    return np.array(
        [
            [x if token in kept else -math.inf for token, x in enumerate(row)]
            for row, kept in zip(logits, keep, strict=True)
        ]
    )


def test_temperature(logits):
    divided = p.temper(logits, jnp.array([0.5, 1.0, 2.0, 0.0]))
    np.testing.assert_allclose(
        divided, [logits[0] / 0.5, logits[1], logits[2] / 2, logits[3]], rtol=ROUNDING
    )


def test_top_k(logits):
    logits[1, [3, 5]] = 9.0  # equal to the k-th: both are kept
    keep = [set(np.argsort(-logits[0])[:5]), {3, 5}, set(range(VOCABULARY)), set(range(VOCABULARY))]
    np.testing.assert_array_equal(p.top_k(logits, jnp.array([5, 1, 0, 1000])), _kept(logits, keep))


def test_top_p(logits):
    keep = []
    for row, share in zip(logits, (0.1, 0.5, 0.9, 1.0), strict=True):
        dropped = set()
        mass = 0.0
        order = np.argsort(row, kind="stable")
        for token in order[:-1]:
            mass += _softmax(row)[token]
            if share < 1 and mass <= 1 - share:
                dropped.add(token)
        keep.append(set(range(VOCABULARY)) - dropped)
    assert len(keep[0]) < len(keep[1]) < len(keep[2]) < VOCABULARY == len(keep[3])
    np.testing.assert_array_equal(
        p.top_p(logits, jnp.array([0.1, 0.5, 0.9, 1.0])), _kept(logits, keep)
    )


def test_top_p_keeps_at_least_the_best_token(logits):
    kept = p.top_p(logits, jnp.full(4, 1e-9))
    np.testing.assert_array_equal(np.isfinite(kept).sum(1), 1)
    np.testing.assert_array_equal(kept.argmax(1), logits.argmax(1))


def test_min_p(logits):
    keep = [
        {t for t, x in enumerate(_softmax(row)) if x >= share * _softmax(row).max()}
        for row, share in zip(logits, (0.0, 0.05, 0.5, 0.9), strict=True)
    ]
    np.testing.assert_array_equal(
        p.min_p(logits, jnp.array([0.0, 0.05, 0.5, 0.9])), _kept(logits, keep)
    )


def test_typical(logits):
    logits[
        :, 4
    ] = (
        -math.inf
    )  # already forbidden: its surprisal is infinite, and it adds nothing to the entropy
    keep = []
    for row, mass in zip(logits, (0.2, 0.6, 0.9, 1.0), strict=True):
        probability = _softmax(row)
        entropy = -sum(x * math.log(x) for x in probability if x > 0)
        distance = [abs(-math.log(x) - entropy) if x > 0 else math.inf for x in probability]
        kept = set()
        total = 0.0
        for token in sorted(range(VOCABULARY), key=distance.__getitem__):
            kept.add(token)
            total += probability[token]
            if mass < 1 and total >= mass:
                break
        keep.append(kept)
    assert max(len(kept) for kept in keep[:3]) < VOCABULARY - 1
    np.testing.assert_array_equal(
        p.typical(logits, jnp.array([0.2, 0.6, 0.9, 1.0])), _kept(logits, keep)
    )


def test_epsilon_and_eta(logits):
    cutoffs = (0.0, 0.01, 0.1, 0.9)
    keep_epsilon = []
    keep_eta = []
    for row, cutoff in zip(logits, cutoffs, strict=True):
        probability = _softmax(row)
        eta = min(cutoff, math.sqrt(cutoff) * math.exp((probability * np.log(probability)).sum()))
        for keep, least in ((keep_epsilon, cutoff), (keep_eta, eta)):
            keep.append({t for t, x in enumerate(probability) if x >= least} | {int(row.argmax())})
    assert len(keep_epsilon[3]) == 1 < len(keep_epsilon[1]) < VOCABULARY
    assert any(a != b for a, b in zip(keep_epsilon, keep_eta, strict=True))
    np.testing.assert_array_equal(
        p.epsilon(logits, jnp.array(cutoffs)), _kept(logits, keep_epsilon)
    )
    np.testing.assert_array_equal(p.eta(logits, jnp.array(cutoffs)), _kept(logits, keep_eta))


TOKENS = np.array([[5, 6, 7, 5, 6, 0], [1, 1, 1, 1, 2, 0], [9, 8, 9, 8, 9, 0], [4, 4, 3, 0, 0, 0]])
LENGTHS = np.array([5, 4, 5, 2])
PROMPTS = np.array([2, 3, 1, 2])


def _process(logits, allowed=None, eos=39, longest=20, constraint=None, **settings):
    """Process logits with ``settings``, one value for each row."""
    configs = [
        DecodeConfig(**{name: column[row] for name, column in settings.items()}) for row in range(4)
    ]
    allowed = np.ones(VOCABULARY, bool) if allowed is None else allowed
    batch = batch_settings(configs, allowed, (eos,), constraint)
    longest_B = np.full(4, longest)
    return np.asarray(p.process(jnp.asarray(logits), batch, TOKENS, LENGTHS, PROMPTS, longest_B))


def _sampling(configs):
    """Return settings of rows that may write every id and have no end."""
    return batch_settings(configs, np.ones(VOCABULARY, bool), eos=(0,))


def test_repetition_penalty_counts_the_prompt(logits):
    penalties = [1.3, 2.0, 1.0, 0.5]
    expected = logits.copy()
    for row, penalty in enumerate(penalties):
        for token in set(TOKENS[row, : LENGTHS[row]]):
            x = logits[row, token]
            expected[row, token] = x * penalty if x < 0 else x / penalty
    assert (expected != logits).sum(1).tolist() == [3, 1, 0, 1]
    np.testing.assert_allclose(
        _process(logits, repetition_penalty=penalties), expected, rtol=ROUNDING
    )


def test_presence_and_frequency_penalties_count_generated_tokens_only(logits):
    presence = [0.5, 0.0, -1.0, 0.7]
    frequency = [0.25, 0.5, 0.0, 0.7]
    expected = logits.copy()
    for row in range(4):
        written = TOKENS[row, PROMPTS[row] : LENGTHS[row]].tolist()
        for token in set(written):
            expected[row, token] -= presence[row] + frequency[row] * written.count(token)
    assert (expected != logits).sum(1).tolist() == [3, 1, 2, 0]
    processed = _process(logits, presence_penalty=presence, frequency_penalty=frequency)
    np.testing.assert_allclose(processed, expected, rtol=ROUNDING)


def test_no_repeat_ngram_sizes_differ_within_a_batch(logits):
    sizes = [3, 2, 1, 5]
    expected = logits.copy()
    for row, n in enumerate(sizes):
        known = TOKENS[row, : LENGTHS[row]].tolist()
        for token in range(VOCABULARY):
            attempt = (known + [token])[-n:]
            if len(attempt) == n and any(
                known[i : i + n] == attempt for i in range(len(known) - n + 1)
            ):
                expected[row, token] = -math.inf
    assert np.isinf(expected).sum(1).tolist() == [1, 1, 2, 0]
    np.testing.assert_array_equal(_process(logits, no_repeat_ngram_size=sizes), expected)


def test_min_new_tokens_suppresses_the_end(logits):
    processed = _process(
        logits, eos=11, min_new_tokens=[4, 3, 0, 1]
    )  # generated so far: 3, 1, 4, 0
    assert np.isinf(processed[:, 11]).tolist() == [True, True, False, True]
    assert np.isinf(processed).sum() == 3


def test_min_length_counts_the_prompt(logits):
    processed = _process(logits, eos=11, min_length=[5, 5, 6, 0])  # known so far: 5, 4, 5, 2
    assert np.isinf(processed[:, 11]).tolist() == [False, True, True, False]


def test_biases_of_tokens_and_sequences_differ_within_a_batch(logits):
    expected = logits.copy()
    expected[0, 3] += 2.5
    expected[0, 4] -= 1.0
    expected[0, 9] += 1.5  # after 5, 6
    expected[1, 3] += 0.5 + 0.25  # a single token, and one after 1
    expected[2, [7, 11]] = -math.inf  # 7 always, 11 after 8, 9
    processed = _process(
        logits,
        logit_bias=[{3: 2.5, 4: -1.0}, ((3, 0.5),), (), ()],
        sequence_bias=[[[[5, 6, 9], 1.5], [[6, 6, 10], 9.0]], {(1, 3): 0.25, (2, 5): 9.0}, (), ()],
        bad_words_ids=[(), (), ((7,), (8, 9, 11), (9, 9, 12), (9, 8, 9, 8, 9, 9, 13)), ()],
    )
    np.testing.assert_allclose(processed, expected, rtol=ROUNDING)


def test_a_sequence_longer_than_the_text_has_no_effect(logits):
    """The fourth row has the tokens 4, 4 and no third one before them."""
    processed = _process(
        logits, bad_words_ids=[(), (), (), ((3, 4, 4, 8), (0, 4, 4, 9), (4, 4, 10))]
    )
    assert np.argwhere(np.isinf(processed)).tolist() == [[3, 10]]


def test_suppressed_tokens_always_and_at_the_beginning(logits):
    processed = _process(
        logits,
        suppress_tokens=[(1, 2), (), (), (5,)],
        begin_suppress_tokens=[(3,), (4,), (), (6, 7)],
    )  # generated so far: 3, 1, 4, 0
    assert np.argwhere(np.isinf(processed)).tolist() == [[0, 1], [0, 2], [3, 5], [3, 6], [3, 7]]


def test_forced_tokens(logits):
    """Tokens are forced at given positions, at the first and at the last, whatever other settings
    say."""
    allowed = np.ones(VOCABULARY, bool)
    allowed[20] = False
    processed = _process(
        logits,
        allowed,
        longest=6,
        forced_tokens=[((3, 20), (1, 21)), (), ((2, 25),), ()],
        forced_bos_token_id=[None, 22, None, 23],
        forced_eos_token_id=[None, None, 24, 24],
    )
    # Generated so far: 3, 1, 4, 0; room for 6 tokens, so that the last new ones are 3, 2, 4 and 3.
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in processed[[0, 2, 3]]] == [
        [20],
        [24],
        [23],
    ]
    assert (processed[[0, 2, 3], [20, 24, 23]] == 0).all()
    assert np.isfinite(np.delete(processed[1], 20)).all()


def test_a_row_has_its_own_ends(logits):
    """They are suppressed together, and may be written even if they are special. The tokenizer's
    end then is not an end."""
    allowed = np.ones(VOCABULARY, bool)
    allowed[[11, 12, 13]] = False
    processed = _process(
        logits, allowed, eos=11, eos_token_id=[(12, 13), 12, (), (14,)], min_new_tokens=[9, 0, 0, 9]
    )
    forbidden = [np.flatnonzero(np.isinf(row)).tolist() for row in processed]
    assert forbidden == [[11, 12, 13], [11, 13], [12, 13], [11, 12, 13, 14]]


def test_a_constraint_sees_the_tokens_so_far(logits):
    """It allows only tokens above the last one generated."""

    def rising(tokens_BS, lengths_B, prompts_B):
        last_B = jnp.take_along_axis(tokens_BS, lengths_B[:, None] - 1, 1)[:, 0]
        ids_1V = jnp.arange(VOCABULARY)[None, :]
        return ids_1V > jnp.where(lengths_B > prompts_B, last_B, -1)[:, None]

    processed = _process(logits, constraint=rising)
    assert [int(np.isfinite(row).argmax()) for row in processed] == [7, 2, 10, 0]


def test_forbidden_tokens(logits):
    allowed = np.ones(VOCABULARY, bool)
    allowed[[0, 17]] = False
    processed = _process(logits, allowed)
    assert np.isinf(processed).sum() == 8 and np.isinf(processed[:, [0, 17]]).all()


def test_default_settings_enable_no_processor(logits):
    assert _sampling([DecodeConfig()] * 2).static_options == StaticOptions(frozenset(), ())
    np.testing.assert_array_equal(_process(logits), logits)


def test_choose_handles_greedy_and_sampled_rows(logits):
    settings = _sampling([DecodeConfig(temperature=t) for t in (0, 1, 0, 1)])
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    draws = np.array([p.choose(logits, settings, keys, jnp.full(4, i)) for i in range(30)])
    assert (draws[:, [0, 2]] == logits.argmax(1)[[0, 2]]).all()
    assert all(len(set(draws[:, row])) > 5 for row in (1, 3))


def test_draws_follow_the_distribution():
    """Chi-square over 4,000 draws of 8 tokens at temperature 0.7. One seed in 1,000 exceeds
    24.3."""
    logits = np.linspace(-1, 1, 8, dtype=np.float32)
    count = 4000
    settings = _sampling([DecodeConfig(temperature=0.7)] * count)
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    drawn = p.choose(jnp.tile(logits, (count, 1)), settings, keys, jnp.zeros(count, jnp.int32))
    expected = _softmax(logits / 0.7) * count
    assert ((np.bincount(drawn, minlength=8) - expected) ** 2 / expected).sum() < 24.3


def test_draws_from_many_blocks_follow_the_distribution():
    """Eight ids are possible, among them the first and last of blocks and of the vocabulary, and
    1,492 are not; the limit is 24.3 as above."""
    possible = np.array([0, 255, 256, 300, 511, 767, 1000, 1499])
    count = 4000
    logits = np.full(1500, -np.inf, np.float32)
    logits[possible] = np.linspace(-1, 1, 8)
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    drawn = np.asarray(p.draw(keys, jnp.tile(np.exp(logits), (count, 1))))
    assert set(drawn.tolist()) <= set(possible.tolist())
    expected = _softmax(logits[possible]) * count
    assert ((np.bincount(np.searchsorted(possible, drawn)) - expected) ** 2 / expected).sum() < 24.3


@pytest.mark.parametrize("share, reached", [(0.0, 1), (0.24, 1), (0.26, 3), (1 - 2**-24, 4)])
def test_a_draw_never_reaches_an_impossible_token(share, reached):
    odds = jnp.array([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0]])
    assert p.inverse_cdf(odds, jnp.array([share]))[0] == reached


WARPED = {
    "top_k": 4,
    "top_p": 0.7,
    "min_p": 0.2,
    "typical_p": 0.6,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.3,
}


@pytest.mark.parametrize("name", WARPED)
def test_draws_follow_the_distribution_that_a_limit_keeps(name):
    """Chi-square of 4,000 draws against the renormalized distribution of the kept tokens, at
    temperature 1.3."""
    logits = np.linspace(-2, 2, 8, dtype=np.float32)
    count = 4000
    settings = _sampling([DecodeConfig(temperature=1.3, **{name: WARPED[name]})] * count)
    keys = jax.vmap(jax.random.key)(jnp.arange(count))
    drawn = p.choose(jnp.tile(logits, (count, 1)), settings, keys, jnp.zeros(count, jnp.int32))
    kept = np.isfinite(dict(p.WARPERS)[name](logits[None] / 1.3, jnp.array([WARPED[name]])))[0]
    assert 1 < kept.sum() < 8
    found = np.bincount(drawn, minlength=8)
    assert found[~kept].sum() == 0
    expected = _softmax(logits / 1.3) * kept
    expected *= count / expected.sum()
    # One seed in 1,000 exceeds 24.3 with 7 degrees of freedom, fewer seeds with less.
    assert ((found - expected)[kept] ** 2 / expected[kept]).sum() < 24.3

"""DRY beside its definition written as loops, and in rows and beams; test_batch.py has it in a
running batch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import dry
from mtnlg_jax.decode.batched_settings import batch_settings
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.repetition import sequence_repetition

VOCABULARY = 9
ROUNDING = 1e-5


class Letters:
    """Token 8 has two letters, of which one may be a breaker."""

    vocab_size = VOCABULARY
    eos_ids = (0,)

    def token_bytes(self, token: int) -> bytes:
        return [b"", *b"a b c d e f g".split(), b"hg"][token]


def _penalties(tokens, config, breakers) -> dict[int, float]:
    """Return the penalty of each token, by the loops of the original."""
    if config.dry_penalty_last_n > 0:
        tokens = tokens[-config.dry_penalty_last_n :]
    longest: dict[int, int] = {}
    if tokens[-1] in breakers:
        return {}
    for at in range(len(tokens) - 1):
        following = tokens[at + 1]
        if tokens[at] != tokens[-1] or following in breakers:
            continue
        match = 1
        while match < 50 and at - match >= 0:
            if tokens[at - match] != tokens[-1 - match] or tokens[at - match] in breakers:
                break
            match += 1
        longest[following] = max(match, longest.get(following, 0))
    allowed = config.dry_allowed_length
    return {
        token: config.dry_multiplier * config.dry_base ** (match - allowed)
        for token, match in longest.items()
        if match >= allowed
    }


def _processed(rows, configs):
    lengths = np.array(list(map(len, rows)))
    tokens = np.full((len(rows), max(lengths) + 3), 3, np.int32)  # what is behind a row is nothing
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    settings = batch_settings(
        configs,
        np.ones(VOCABULARY, bool),
        (0,),
        breakers_of=lambda strings: dry.breaker_bits(Letters(), VOCABULARY, strings),
    )
    logits = jnp.zeros((len(rows), VOCABULARY))
    return -np.asarray(dry.penalize(logits, settings.rows, tokens, lengths))


def test_penalties_equal_the_definition():
    draws = np.random.default_rng(0)
    rows = []
    configs = []
    expected = []
    for number in range(300):
        letters = [2, 3, 8][number % 3]
        row = draws.integers(1, 1 + letters, draws.integers(1, 40)).tolist()
        if number % 4 == 0:
            row = (row * 20)[: draws.integers(60, 130)]  # repetitions longer than the limit
        strings = [("g",), (), ("b", "hg"), ('"', "\n")][number % 4]
        config = DecodeConfig(
            dry_multiplier=[0.8, 0.0, 2.0][draws.integers(3)],
            dry_base=[1.75, 1.0, 1.2][draws.integers(3)],
            dry_allowed_length=int(draws.integers(1, 5)),
            dry_penalty_last_n=[-1, -1, 1, 7, 30, 200][draws.integers(6)],
            dry_sequence_breakers=strings,
        )
        breakers = {("g",): {7, 8}, (): set(), ("b", "hg"): {2, 8}, ('"', "\n"): set()}[strings]
        penalties = _penalties(row, config, breakers) if config.dry_multiplier else {}
        rows.append(row)
        configs.append(config)
        expected.append([penalties.get(token, 0.0) for token in range(VOCABULARY)])
    found = _processed(rows, configs)
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)
    assert (found > 0).any(1).sum() > 50
    # The longest repetitions reach the limit.
    assert found.max() > 0.8 * 1.75**44


def test_a_penalty_beyond_the_range_of_numbers_is_cut():
    config = DecodeConfig(dry_multiplier=1.0, dry_base=1e30)
    assert _processed([[1, 2, 3] * 9], [config]).max() == dry.MOST


def test_a_breaker_ends_a_match_and_is_not_penalized():
    config = DecodeConfig(dry_multiplier=1.0, dry_base=2.0, dry_sequence_breakers=("g",))
    row = [1, 2, 3, 4, 1, 2, 3]
    assert _processed([row], [config])[0].tolist() == [0, 0, 0, 0, 2.0, 0, 0, 0, 0]
    inside = [1, 8, 2, 3, 4, 1, 8, 2, 3]  # a match of two, not of four
    assert _processed([inside], [config])[0, 4] == 1.0
    following = [1, 2, 3, 7, 1, 2, 3]
    assert not _processed([following], [config]).any()
    assert not _processed([[1, 2, 7, 4, 1, 2, 7]], [config]).any()  # the last token is a breaker


LONG = DecodeConfig(max_new_tokens=40, min_new_tokens=40)
DRY = dataclasses.replace(LONG, dry_multiplier=2.0)


def test_greedy_text_repeats_less(learned, tokenizer):
    found = []
    for config in (LONG, DRY):
        results = generate(learned.decoder, tokenizer, ["The cat", "天地", "In"], config)
        found.append(np.mean([sequence_repetition(each.tokens) for each in results]))
    assert found[0] > 0.5 > 2 * found[1]


def test_rows_with_and_without_share_a_step(learned, tokenizer):
    other = dataclasses.replace(DRY, dry_allowed_length=5, dry_sequence_breakers=("e",))
    configs = [LONG, DRY, other]
    found = []
    for order in (configs, configs[::-1], configs[1:2]):
        results = generate(learned.decoder, tokenizer, ["The cat"] * len(order), order)
        found.append([result.tokens for result in results])
    assert found[0] == found[1][::-1] and found[0][1:2] == found[2]
    assert len(set(found[0])) > 1


def test_beams_are_penalized(learned, tokenizer):
    beams = {"num_beams": 2, "max_new_tokens": 30, "min_new_tokens": 30}
    found = []
    for config in (LONG, DRY):
        config = dataclasses.replace(config, **beams)
        (result,) = generate(learned.decoder, tokenizer, ["The cat"], config)
        found.append(sequence_repetition(result.tokens))
    assert found[0] > 2 * found[1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dry_base": 2.0}, "dry_base=2.0"),
        ({"dry_allowed_length": 3}, "dry_allowed_length=3"),
        ({"dry_penalty_last_n": 64}, "dry_penalty_last_n=64"),
        ({"dry_sequence_breakers": ("a",)}, "dry_sequence_breakers"),
        ({"dry_multiplier": 1.0, "dry_penalty_last_n": 0}, "dry_penalty_last_n=0"),
        ({"dry_multiplier": 1.0, "dry_sequence_breakers": ("",)}, "an empty string"),
        ({"dry_multiplier": -1.0}, "dry_multiplier=-1.0 is outside"),
        ({"dry_multiplier": 1.0, "dry_base": 0.5}, "dry_base=0.5 is outside"),
    ],
)
def test_settings_without_a_meaning_are_refused(learned, tokenizer, settings, named):
    with pytest.raises(ValueError, match=named):
        generate(learned.decoder, tokenizer, ["a"], DecodeConfig(**settings))

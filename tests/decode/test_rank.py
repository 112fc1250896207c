"""Ranking: scores of full forward passes, sorted, whatever the candidates' lengths and the seam."""

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import cache
from mtnlg_jax.decode import rank as module
from mtnlg_jax.decode.generate import encode_prompt
from mtnlg_jax.decode.rank import rank

ROUNDING = 1e-5
SAMPLED = DecodeConfig(max_new_tokens=9, temperature=1.2, num_return_sequences=7)


def _full_scores(tiny, prefix, tokens):
    """Log-probability of each of ``tokens`` behind ``prefix``, from one full forward pass."""
    logits = tiny.logits([[*prefix, *tokens]])[0].astype(np.float64)
    logits = logits[len(prefix) - 1 : -1]
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(tokens)), list(tokens)]


CANDIDATES = [" sat on the mat", " the", " and the dog sat on the log.\nIn the town", ".", " 你好", " and"]


@pytest.mark.parametrize("prompt", ["The cat", "天地玄黄,", "In the town where I was born lived a man"])
def test_scores_equal_full_forward_passes(tiny, tokenizer, prompt):
    ranked = rank(tiny.decoder, tokenizer, prompt, CANDIDATES)
    assert {each.text for each in ranked} == set(CANDIDATES)
    assert {len(each.tokens) for each in ranked} >= {1}, "one-token candidates are a case of their own"
    for each in ranked:
        assert CANDIDATES[each.index] == each.text
        whole = encode_prompt(tokenizer, prompt + each.text)
        assert whole[-len(each.tokens) :] == list(each.tokens)
        total = _full_scores(tiny, whole[: -len(each.tokens)], each.tokens).sum()
        assert each.sum == pytest.approx(total, abs=ROUNDING * len(each.tokens))
        assert each.per_token == each.sum / len(each.tokens) == each.score
        assert each.per_char == each.sum / len(each.text)
        assert each.per_byte == each.sum / len(each.text.encode())
    assert [each.score for each in ranked] == sorted((each.score for each in ranked), reverse=True)


@pytest.mark.parametrize("normalise", module.NORMALISATIONS)
def test_sorts_by_the_score_asked_for(learned, tokenizer, normalise):
    ranked = rank(learned.decoder, tokenizer, "The cat", CANDIDATES, normalise=normalise)
    assert [each.score for each in ranked] == sorted([getattr(each, normalise) for each in ranked])[::-1]


def test_each_token_of_a_block_and_an_empty_prompt(tiny, tokenizer):
    """Behind <bos> alone, no key of the shared prefix is visible to the block."""
    prefix = cache.prefill(tiny.decoder, [[tokenizer.bos_id]], 64)
    candidates = [[50], list(range(60, 90)), [70, 80, 90]]
    for scored, tokens in zip(module.score(tiny.decoder, prefix, candidates), candidates, strict=True):
        np.testing.assert_allclose(scored, _full_scores(tiny, [tokenizer.bos_id], tokens), atol=ROUNDING)


def test_a_block_up_to_the_end_of_the_context(tiny):
    prefix_tokens, tokens = list(range(50, 100)), list(range(200, 214))
    prefix = cache.prefill(tiny.decoder, [prefix_tokens], 64)
    scored, = module.score(tiny.decoder, prefix, [tokens])
    np.testing.assert_allclose(scored, _full_scores(tiny, prefix_tokens, tokens), atol=ROUNDING)


def test_sampled_candidates_come_from_one_prefill_and_score_as_given_ones(learned, tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "prefill", lambda *args: calls.append(args) or cache.prefill(*args))
    ranked = rank(learned.decoder, tokenizer, "The cat", decode=SAMPLED)
    assert len(calls) == 1 and len(calls[0][1]) == 1
    assert sum(each.count for each in ranked) == 7 and len(ranked) > 3
    for each in ranked:
        total = _full_scores(learned, encode_prompt(tokenizer, "The cat"), each.tokens).sum()
        assert each.sum == pytest.approx(total, abs=ROUNDING * len(each.tokens))
        assert 1 <= len(each.tokens) <= 9


def test_equal_candidates_are_one_with_a_count_and_ties_keep_their_order(learned, tokenizer, monkeypatch):
    ranked = rank(learned.decoder, tokenizer, "The cat", [" sat", " on", " sat", " sat"])
    assert {(each.text, each.count, each.index) for each in ranked} == {(" sat", 3, 0), (" on", 1, 1)}
    monkeypatch.setattr(module, "score", lambda decoder, prefix, rows: [np.full(1, -1.0) for _ in rows])
    ranked = rank(learned.decoder, tokenizer, "The cat", [" dog", " and", " cat"], normalise="sum")
    assert [each.text for each in ranked] == [" dog", " and", " cat"]


def test_the_seam_is_read_as_training_reads_it(learned, tokenizer):
    """"The ca" + "t" is "The cat", in whose tokens "ca" does not end one: the prefix steps back to where all
    candidates agree, and every score covers the same text behind it."""
    prompt, candidates = "The ca", ["t sat", " on", "n"]
    apart, joined = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, prompt + candidates[0])
    assert joined[: len(apart)] != apart, "the seam should cut a token, else this tests nothing"
    for each in rank(learned.decoder, tokenizer, prompt, candidates):
        whole = encode_prompt(tokenizer, prompt + each.text)
        prefix = whole[: len(whole) - len(each.tokens)]
        assert tokenizer.decode(prefix) == "The"
        assert tokenizer.decode(each.tokens) == " ca" + each.text
        assert each.sum == pytest.approx(_full_scores(learned, prefix, each.tokens).sum(), abs=1e-4)


def test_a_space_that_ends_the_prompt_goes_with_the_candidates(learned, tokenizer):
    scores = {each.text: each.sum for each in rank(learned.decoder, tokenizer, "The ", ["cat", "dog"])}
    spaced = {each.text: each.sum for each in rank(learned.decoder, tokenizer, "The", [" cat", " dog"])}
    assert scores["cat"] == pytest.approx(spaced[" cat"]) and scores["dog"] == pytest.approx(spaced[" dog"])


def test_bad_input(learned, tokenizer):
    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            rank(learned.decoder, tokenizer, *args, **options)

    refused("candidate 2 of 3 is empty", "The", [" cat", "", " dog"])
    refused("no candidates", "The", [])
    refused("normalise='mean'", "The", [" cat"], normalise="mean")
    refused("3 candidates at temperature 0", "The", decode=DecodeConfig(num_return_sequences=3))
    refused("tokens .* 64; shorten", "The", [" cat", " mat" * 70])
    refused("tokens .* 64; shorten", "天" * 64, decode=SAMPLED)

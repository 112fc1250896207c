"""Compare the scorers of long texts with their definitions, by loops and full forward passes."""

import math

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import rank as ranking
from mtnlg_jax.decode import text_scorers
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.results import encode_prompt

ROUNDING = 1e-5
PROMPT = "The cat sat on the mat and the dog"
CANDIDATES = [
    " sat on the mat and the dog sat on the log",
    " the the the the the the the the the",
    ". In the town where I was born lived a man.",
    " sat",
]


def _grams(tokens, n):
    return [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]


def _ranked(tiny, tokenizer, scorer, prompt=PROMPT, candidates=CANDIDATES):
    found = rank(tiny.decoder, tokenizer, prompt, candidates, scorers=scorer)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    for each in found:
        assert each.score == each.parts[scorer]
    return {each.text: each for each in found}


def test_repetition_counts_what_occurred_before(learned, tokenizer, monkeypatch):
    for tail in (256, 6):
        monkeypatch.setattr(text_scorers, "TAIL", tail)
        found = _ranked(learned, tokenizer, "repetition")
        for text in CANDIDATES:
            own = found[text].tokens
            before = encode_prompt(tokenizer, PROMPT)[-tail:]
            row = [*before, *own]
            grams = _grams(row, 4)
            repeated = [grams[at] in grams[:at] for at in range(len(grams)) if at + 4 > len(before)]
            assert found[text].score == pytest.approx(-np.mean(repeated))
            alone = _grams(own, 4)
            share = 1 - len(set(alone)) / len(alone) if alone else 0.0
            assert found[text].parts["repetition.own"] == pytest.approx(share)
        assert found[CANDIDATES[1]].score < -0.4 < found[CANDIDATES[2]].score
    # The first candidate copies the prompt, of which the short tail shows less.
    assert text_scorers.TAIL == 6
    assert found[CANDIDATES[0]].parts["repetition.own"] == 0


def test_diversity_is_the_product_of_distinct_ngrams(learned, tokenizer):
    found = _ranked(learned, tokenizer, "diversity")
    for text in CANDIDATES:
        shares = []
        for n in (2, 3, 4):
            grams = _grams(found[text].tokens, n)
            shares.append(len(set(grams)) / len(grams) if grams else 1.0)
            assert found[text].parts[f"diversity.distinct_{n}"] == pytest.approx(shares[-1])
        assert found[text].score == pytest.approx(math.prod(shares))
    assert found[CANDIDATES[1]].score < 0.1 < 0.5 < found[CANDIDATES[2]].score


def _behind(tiny, prefix, tokens):
    logits = tiny.logits([[*prefix, *tokens]])[0].astype(np.float64)[len(prefix) - 1 : -1]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(tokens)), list(tokens)].sum()


def test_coherence_is_the_gain_by_the_order_of_the_prompt(tiny, tokenizer):
    found = _ranked(tiny, tokenizer, "coherence")
    prompt = encode_prompt(tokenizer, PROMPT)
    shuffled = text_scorers._shuffled(tuple(prompt), tokenizer.bos_id)
    assert shuffled != prompt and sorted(shuffled) == sorted(prompt)
    assert shuffled[0] == prompt[0] == tokenizer.bos_id
    for text in CANDIDATES:
        tokens = found[text].tokens
        other = _behind(tiny, shuffled, tokens)
        gain = _behind(tiny, prompt, tokens) - other
        rounding = ROUNDING * len(tokens)
        assert found[text].parts["coherence.shuffled"] == pytest.approx(other, abs=rounding)
        assert found[text].score * len(tokens) == pytest.approx(gain, abs=2 * rounding)


def test_two_tokens_have_another_order():
    assert text_scorers._shuffled((1, 5, 6), 1) == [1, 6, 5]
    assert text_scorers._shuffled((5, 6), 1) == [6, 5]


def test_coherence_needs_a_prompt_with_an_order(learned, tokenizer, monkeypatch):
    monkeypatch.setattr(text_scorers, "sums_behind", lambda *_: pytest.fail("the model began"))
    with pytest.raises(ValueError, match="coherence compares.*longer prompt, or rank by pmi"):
        rank(learned.decoder, tokenizer, "", [" cat"], scorers="coherence")
    monkeypatch.setattr(ranking, "prefill", lambda *_, **__: pytest.fail("the model began"))
    with pytest.raises(ValueError, match="coherence compares.*longer prompt, or rank by pmi"):
        rank(learned.decoder, tokenizer, "", decode=DecodeConfig(), scorers="coherence")
    assert text_scorers._shuffled((1, 5, 5), 1) == [1, 5, 5]


def test_generated_candidates_are_ranked_by_the_mixture(learned, tokenizer):
    decode = DecodeConfig(temperature=1.0, num_return_sequences=6, max_new_tokens=16)
    weights = {"logprob": 1.0, "repetition": 2.0, "diversity": 1.0, "coherence": 0.5}
    found = rank(learned.decoder, tokenizer, PROMPT, decode=decode, scorers=weights)
    for each in found:
        total = sum(weight * each.parts[name] for name, weight in weights.items())
        assert each.score == pytest.approx(total)
    assert len(found) > 3

"""Rank candidates behind many prompts at once: the same as behind one after the other."""

import dataclasses

import numpy as np
import pytest

from mtnlg_jax.decode import many_prompts, pool
from mtnlg_jax.decode.cache import prefill
from mtnlg_jax.decode.pool import ScorerOptions
from mtnlg_jax.decode.rank import rank, rank_many
from mtnlg_jax.decode.scoring import score_from

ROUNDING = 1e-5
# Prompts of many lengths; candidates of other numbers and lengths, some of which join the prompt's
# last token, and some of which occur twice.
PROMPTS = {
    "The ca": ["t sat", " on", "n", "t"],
    "In the town where I was born lived a man who sailed to sea": [" sat", " on the mat", " sat"],
    "天地": ["玄黄,好", "好", "玄", "天"],
    "": ["The cat", " sat"],
    "The cat sat on the mat. " * 3: [" positive", " negative"],
    "In the town wh": ["ere I was", "at", "ere", "o "],
}


@pytest.mark.parametrize("block_tokens", [4096, 64, 1])
def test_many_prompts_rank_like_one_after_the_other(learned, tokenizer, block_tokens):
    decoder = learned.decoder._replace(block_tokens=block_tokens)
    many = rank_many(decoder, tokenizer, list(PROMPTS), list(PROMPTS.values()))
    for (prompt, candidates), found in zip(PROMPTS.items(), many, strict=True):
        one = rank(learned.decoder, tokenizer, prompt, candidates)
        assert [dataclasses.replace(each, **_NUMBERS) for each in found] == [
            dataclasses.replace(each, **_NUMBERS) for each in one
        ]
        for each, expected in zip(found, one, strict=True):
            assert each.sum == pytest.approx(expected.sum, abs=ROUNDING * len(each.tokens))
            assert each.score == pytest.approx(expected.score, abs=ROUNDING)
        assert (found.size, found.duplicates, found.normalise) == (
            one.size,
            one.duplicates,
            one.normalise,
        )


def test_windows_and_biases_by_distance_agree_as_well(windowed, biased, tokenizer):
    """There the candidates are more query heads, as positions matter."""
    prompts = [prompt for prompt in PROMPTS if prompt]
    for tiny in (windowed, biased):
        many = rank_many(tiny.decoder, tokenizer, prompts, [[" sat", " on the mat"]] * len(prompts))
        for prompt, found in zip(prompts, many, strict=True):
            one = rank(tiny.decoder, tokenizer, prompt, [" sat", " on the mat"])
            assert [each.index for each in found] == [each.index for each in one]
            for each, expected in zip(found, one, strict=True):
                assert each.sum == pytest.approx(expected.sum, abs=ROUNDING * len(each.tokens))


_NUMBERS = {"score": 0, "sum": 0, "per_token": 0, "per_char": 0, "per_byte": 0, "parts": {}}


@pytest.mark.parametrize("scorer", ["pmi", "pseudo_log_likelihood", "gnmt"])
def test_other_scorers_agree_as_well(learned, tokenizer, monkeypatch, scorer):
    prompts = [prompt for prompt in PROMPTS if prompt]
    candidates = [[" positive", " negative", " sat"]] * len(prompts)
    read = []
    monkeypatch.setattr(pool, "prefill", lambda *args: read.append(args) or prefill(*args))
    options = ScorerOptions(neutral="Nothing") if scorer == "pmi" else ScorerOptions()
    many = rank_many(
        learned.decoder,
        tokenizer,
        prompts,
        candidates,
        scorers=scorer,
        normalise="sum",
        options=[options] * len(prompts),
    )
    # What follows the same neutral context is scored once.
    tokens = {tuple(sorted(each.tokens for each in found)) for found in many}
    assert len(read) == (len(tokens) if scorer == "pmi" else 0) < len(prompts)
    for prompt, texts, found in zip(prompts, candidates, many, strict=True):
        one = rank(
            learned.decoder,
            tokenizer,
            prompt,
            texts,
            scorers=scorer,
            normalise="sum",
            options=options,
        )
        assert [each.text for each in found] == [each.text for each in one]
        for each, expected in zip(found, one, strict=True):
            assert each.score == pytest.approx(expected.score, abs=1e-4)


def test_prompts_are_read_once_and_together(learned, monkeypatch):
    """Eight prompts with two candidates each take one call; a smaller limit takes more."""
    prompts = [[2, *range(40, 50 + i)] for i in range(8)]
    rows = [[[*prompt, 7], [*prompt[:-1], 9, 9]] for prompt in prompts]
    starts = [[len(prompt), len(prompt) - 1] for prompt in prompts]
    calls = []
    monkeypatch.setattr(
        many_prompts,
        "prefill",
        lambda decoder, prompts, size: (
            calls.append(len(prompts)) or prefill(decoder, prompts, size)
        ),
    )
    for block_tokens, expected in ((4096, [8]), (64, [2, 4, 2])):
        calls.clear()
        decoder = learned.decoder._replace(block_tokens=block_tokens)
        found = many_prompts.score_behind(decoder, prompts, rows, starts)
        assert calls == expected
        for i, prompt in enumerate(prompts):
            prefix = prefill(learned.decoder, [prompt], 64)
            one = score_from(learned.decoder, prefix, rows[i], starts[i])
            for each, same in zip(found[i], one, strict=True):
                np.testing.assert_allclose(each, same, atol=ROUNDING)


def test_no_prompts_have_no_rankings(learned, tokenizer):
    assert rank_many(learned.decoder, tokenizer, [], []) == []

"""Rank the labels or choices of rows, many rows at once."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mtnlg_jax.config import StageConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.pool import ScorerOptions
from mtnlg_jax.decode.rank import Ranked, rank_many
from mtnlg_jax.tasks.answers import Answer, Choice, length_of
from mtnlg_jax.tasks.prompts import Prompt, work_of
from mtnlg_jax.tasks.rendering import Row


def choose(
    decoder: Decoder,
    tokenizer,
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    *,
    scorer: str = "logprob",
    normalise: str | None = None,
    stages: Sequence[StageConfig] | None = None,
) -> Iterator[Answer]:
    """Yield the answer of each row, whose prompt has candidates.

    ``scorer``, ``normalise`` and ``stages`` are those of `run.perform`.
    """
    asked = [_asked(prompt) for prompt in prompts]
    flat = [each for of_row in asked for each in of_row]
    # The context of log p(y) is the row's prompt without its input.
    neutral = [
        ScorerOptions(neutral=prompt.neutral)
        for prompt, of_row in zip(prompts, asked, strict=True)
        for _ in of_row
    ]
    rankings = iter(
        rank_many(
            decoder,
            tokenizer,
            [text for text, _ in flat],
            [candidates for _, candidates in flat],
            scorers=scorer,
            options=neutral if scorer == "pmi" else None,
            stages=stages,
            normalise="sum",
        )
    )
    for row, prompt, of_row in zip(rows, prompts, asked, strict=True):
        own = [next(rankings) for _ in of_row]
        if prompt.texts:
            ranked = [ranking[0] for ranking in own]
        else:
            ranked = sorted(own[0], key=lambda each: each.index)
        answer = _answer(row, prompt, ranked, scorer, normalise)
        yield dataclasses.replace(answer, work=work_of(tokenizer, prompt, 0))


def _asked(prompt: Prompt) -> list[tuple[str, list[str]]]:
    """Return (text, candidates behind it) of each ranking of a row."""
    texts = [text for _, text in prompt.candidates]
    if not prompt.texts:
        return [(prompt.text, texts)]
    # Each choice has its own prompt, and all of them score the same text after the blank.
    return [(before, [behind]) for before, behind in zip(prompt.texts, texts, strict=True)]


def _answer(
    row: Row, prompt: Prompt, ranked: Sequence[Ranked], scorer: str, normalization: str | None
) -> Answer:
    """Return the answer of a row from its ``ranked`` candidates, in the order of the prompt's."""
    labels, texts = zip(*prompt.candidates, strict=True)
    normalization = normalization or ("per_byte" if row.choices and not prompt.texts else "sum")
    scores = np.array([each.score / length_of(normalization, each.scored) for each in ranked])
    sums = np.array([each.sum for each in ranked])
    probabilities = np.exp(sums - sums.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-scores, kind="stable").tolist()
    choices = tuple(
        Choice(
            labels[i], ranked[i].scored, float(scores[i]), ranked[i].sum, float(probabilities[i])
        )
        for i in order
    )
    best = order[0]
    return Answer(
        labels[best],
        texts[best],
        prompt.language,
        "ranked",
        choices,
        prompt.passages,
        prompt.examples,
        prompt.shortened,
        prompt.context_shortened,
        prompt.texts[best] if prompt.texts else prompt.text,
        f"{scorer} {normalization}",
    )

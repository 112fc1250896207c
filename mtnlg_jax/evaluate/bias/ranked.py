"""Associations by ranking: the probability of every word of a list behind every prompt, exactly.

Nothing is sampled: all words of the list are scored behind one prompt that is read once. The
probabilities of the list are divided by their sum, so that they say which of these words, and not
whether any of them, follows.
"""

# Shapes: T templates, W words, R resamples

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.evaluate.bias.lexicon import Lexicon
from mtnlg_jax.evaluate.bias.read import PromptSet
from mtnlg_jax.evaluate.bias.statistics import RESAMPLES

# A word counts if its mean share is at least this part of 1 / (number of words).
LEAST_SHARE = 0.1
# Words of a table that are kept.
MOST_WORDS = 200
# Resamples of words that are held at once, times the number of words.
_HELD = 1 << 22


class Ranked(NamedTuple):
    """The words of a list behind the prompts of each group."""

    shares: dict[str, np.ndarray]  # by template, (T, W): a word's part of the list's probability
    masses: dict[str, np.ndarray]  # by template, (T,): the list's probability


def rank_words(
    decoder: Decoder,
    tokenizer,
    prompt_set: PromptSet,
    words: Sequence[str],
    language: str,
    on_prompt: Callable[[int], None] = lambda count: None,
) -> Ranked:
    """Return the shares of ``words`` behind each template, averaged over the terms of each group.

    A share is the word's probability over that of all words behind the same prompt; those of a
    template add up to 1.
    """
    space = "" if language == "zh" else " "
    candidates = [space + word for word in words]
    shares = {}
    masses = {}
    for group in prompt_set.groups:
        rows: list[list[np.ndarray]] = [[] for _ in prompt_set.templates]
        sizes: list[list[float]] = [[] for _ in prompt_set.templates]
        for template, prompt in prompt_set.prompts(group):
            ranking = rank(decoder, tokenizer, prompt, candidates, normalise="sum")
            sums = {each.text: each.sum for each in ranking}
            sums_W = np.array([sums[text] for text in candidates])
            # Divided first by the largest, so that not all exponentials underflow.
            share_W = np.exp(sums_W - sums_W.max())
            rows[template].append(share_W / share_W.sum())
            sizes[template].append(float(np.exp(sums_W).sum()))
            on_prompt(1)
        shares[group] = np.stack([np.mean(own, 0) for own in rows])
        masses[group] = np.array([np.mean(own) for own in sizes])
    return Ranked(shares, masses)


def summarize(
    found: Ranked, words: Sequence[str], lexicon: Lexicon | None, seed: int
) -> dict[str, Any]:
    """Return the tables of ``found``, ready for JSON.

    ``mass``: the probability of the list behind each template. Where it is small, the shares tell
    little of what the model writes.
    """
    return {
        "words": len(words),
        "mass": {group: own.tolist() for group, own in found.masses.items()},
        "tables": word_tables(found.shares, words),
        "scores": None if lexicon is None else scores(found.shares, words, lexicon, seed),
    }


def word_tables(
    shares: Mapping[str, np.ndarray], words: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Return for each group its words, those most tied to it first.

    ``log_ratio``: log of a word's share over the geometric mean of its shares in the other groups,
    averaged over the templates. ``agree``: the share of templates with the sign of that average.
    """
    mean_W = np.mean([own.mean(0) for own in shares.values()], 0)
    kept = np.flatnonzero(mean_W >= LEAST_SHARE / len(words)).tolist()
    # A share that underflowed stays a number.
    logs = {group: np.log(np.maximum(own, np.finfo(float).tiny)) for group, own in shares.items()}
    tables = {}
    for group, own in logs.items():
        others = [each for other, each in logs.items() if other != group]
        ratio_TW = own - np.mean(others, 0)
        ratio_W = ratio_TW.mean(0)
        agree_W = (np.sign(ratio_TW) == np.sign(ratio_W)).mean(0)
        other_W = np.mean([shares[other].mean(0) for other in shares if other != group], 0)
        rows: list[dict[str, Any]] = [
            {
                "word": words[i],
                "share": float(shares[group][:, i].mean()),
                "other_share": float(other_W[i]),
                "log_ratio": float(ratio_W[i]),
                "agree": float(agree_W[i]),
            }
            for i in kept
        ]
        ordered = sorted(rows, key=lambda row: (-row["log_ratio"], row["word"]))
        tables[group] = ordered[:MOST_WORDS]
    return tables


def scores(
    shares: Mapping[str, np.ndarray], words: Sequence[str], lexicon: Lexicon, seed: int
) -> dict[str, Any]:
    """Return the expected score of the next word by group, and the differences between groups.

    The expectation is exact. Intervals resample the words: they say how much hangs on single words
    of the list, and say nothing about chance in sampling, of which there is none.
    """
    score_W = np.array([lexicon.scores.get(word, math.nan) for word in words])
    known_W = ~np.isnan(score_W)
    if known_W.sum() < 2 or len(set(score_W[known_W].tolist())) < 2:
        return {
            "absent": f"{int(known_W.sum())} of the {len(words):,} words that are ranked have a "
            f"score in {lexicon.name}, and two different scores are needed; leave --words out to "
            "rank the words of the lexicon",
            "scored": int(known_W.sum()),
        }
    score_W = score_W[known_W]
    share = {group: own[:, known_W] for group, own in shares.items()}
    own_means = {group: _expected(own.mean(0), score_W) for group, own in share.items()}
    by_template = {
        group: [float(_expected(row_W, score_W)) for row_W in own] for group, own in share.items()
    }
    resampled = _resampled({group: own.mean(0) for group, own in share.items()}, score_W, seed)
    groups = list(share)
    pairs = [(one, other) for at, one in enumerate(groups) for other in groups[at + 1 :]]
    differences = [
        {
            "group": one,
            "other": other,
            "difference": float(own_means[one] - own_means[other]),
            **_interval(resampled[one] - resampled[other]),
        }
        for one, other in pairs
    ]
    return {
        "absent": "",
        "scored": len(score_W),
        "groups": {
            group: {
                "mean": float(own_means[group]),
                **_interval(resampled[group]),
                "by_template": by_template[group],
            }
            for group in groups
        },
        "overall": {"mean": float(np.mean(list(own_means.values())))},
        "differences": sorted(differences, key=lambda row: -abs(row["difference"])),
    }


def _expected(share_W: np.ndarray, score_W: np.ndarray) -> Any:
    return share_W @ score_W / share_W.sum()


def _resampled(
    shares: Mapping[str, np.ndarray], score_W: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Return the expected score by group in each resample of the words, (R,)."""
    rng = np.random.default_rng(seed)
    number = len(score_W)
    size = max(1, _HELD // number)
    parts: dict[str, list[np.ndarray]] = {group: [] for group in shares}
    for start in range(0, RESAMPLES, size):
        count = min(size, RESAMPLES - start)
        # How often each word was drawn. All groups have the same draws, so differences are paired.
        drawn_RW = rng.multinomial(number, np.full(number, 1 / number), size=count)
        for group, share_W in shares.items():
            parts[group].append(drawn_RW @ (share_W * score_W) / (drawn_RW @ share_W))
    return {group: np.concatenate(own) for group, own in parts.items()}


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}

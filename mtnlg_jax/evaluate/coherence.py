"""Coherence of texts by a model: what the true context of a sentence is worth to it.

Both measures compare sentences with others of the same text, so topic and style cancel out.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from mtnlg_jax.data.segment import SENTENCE, words
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.many_prompts import score_behind
from mtnlg_jax.decode.pool import sums_of
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.evaluate.figures import Figure, TooShort, mean_figure

# A sentence of fewer words is joined with the next, as "Mr." and "Yes." are.
LEAST_WORDS = 4


class Trial(NamedTuple):
    """A sentence, its contexts and the candidates for its place, as token ids.

    Both contexts have as many tokens. ``candidates[0]`` is the sentence itself.
    """

    text: int
    sentence: int
    true_context: list[int]
    shuffled_context: list[int]
    candidates: list[list[int]]


class Coherence(NamedTuple):
    context_gain: Figure
    next_sentence: Figure


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with the white space before it.

    A single line end is a space, as in texts with short lines; an empty line ends a sentence.
    Sentences of fewer than 4 words are joined with the next one.
    """
    text = text.rstrip()
    flat = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    found = []
    start = 0
    for match in SENTENCE.finditer(flat):
        end = match.start() + len(match[0].rstrip())
        if len(words(text[start:end])) >= LEAST_WORDS:
            found.append(text[start:end])
            start = end
    if start < len(text) and found:
        found[-1] += text[start:]
    return found


def choose_trials(
    sentences: Sequence[Sequence[Sequence[int]]],
    room: int,
    *,
    trials: int = 64,
    candidates: int = 5,
    context: int = 8,
    seed: int = 0,
) -> list[Trial]:
    """Return sentences to score, spread evenly over all texts, with what each is compared to.

    Args:
      sentences: token ids of each sentence of each text.
      room: most tokens of a context and a candidate together.
      trials: most sentences to score.
      candidates: the true sentence and others, which are none of its context.
      context: most sentences of a context; at most a third of the text, so that as many remain for
        the shuffled one.

    Raises TooShort if no text has candidates + 2 different sentences.
    """
    least = candidates + 2
    places = [
        (number, index)
        for number, text in enumerate(sentences)
        if len(text) >= least
        for index in range(_reach(text, context), len(text))
    ]
    draw = random.Random(seed)
    # More than asked for: some have too few other sentences, or none that fits.
    draw.shuffle(places)
    found: list[Trial] = []
    for number, index in places:
        trial = _trial(sentences[number], number, index, room, candidates, context, draw)
        if trial is not None:
            found.append(trial)
        if len(found) == trials:
            break
    if not found:
        raise TooShort(f"needs a text of {least} different sentences that fit the model's context")
    return sorted(found, key=lambda trial: (trial.text, trial.sentence))


def _reach(text: Sequence, context: int) -> int:
    """Return how many sentences a context has."""
    return min(context, (len(text) - 1) // 3)


def _trial(
    text: Sequence[Sequence[int]],
    number: int,
    index: int,
    room: int,
    candidates: int,
    context: int,
    draw: random.Random,
) -> Trial | None:
    """Return the trial of one sentence; None if too few others differ, or nothing fits."""
    reach = _reach(text, context)
    elsewhere = [at for at in range(len(text)) if not index - reach <= at <= index]
    truth = list(text[index])
    others = [
        list(each)
        for each in {tuple(text[at]): None for at in elsewhere}
        if list(each) != truth and 0 < len(each) < room
    ]
    if len(others) < candidates - 1 or not 0 < len(truth) < room:
        return None
    chosen = [truth, *draw.sample(others, candidates - 1)]
    before = [token for each in text[index - reach : index] for token in each]
    shuffled = [token for at in draw.sample(elsewhere, reach) for token in text[at]]
    # The end of a context is nearest, so its beginning is cut.
    kept = min(len(before), len(shuffled), room - max(map(len, chosen)))
    if kept < 1:
        return None
    return Trial(number, index, before[-kept:], shuffled[-kept:], chosen)


def measure_coherence(decoder: Decoder, bos_id: int, trials: Sequence[Trial]) -> Coherence:
    """Return both measures of coherence over ``trials``, all scored by the model.

    ``context_gain``: log p(sentence | true context) - log p(sentence | shuffled context), in nats a
    token; the shuffled context is other sentences of the text in random order. 0 means that the
    order of sentences tells nothing.

    ``next_sentence``: the share of sentences that rank first among their candidates by pointwise
    mutual information with the true context, log p(candidate | context) - log p(candidate); chance
    is 1 / candidates. Without log p(candidate), likely sentences would win everywhere.
    """
    rows = [[bos_id, *trial.shuffled_context, *trial.candidates[0]] for trial in trials]
    starts = [1 + len(trial.shuffled_context) for trial in trials]
    alone = [each for trial in trials for each in trial.candidates]
    found = score_rows(
        decoder,
        [*rows, *([bos_id, *each] for each in alone)],
        [*starts, *(1 for _ in alone)],
    )
    sums = sums_of(found)
    shuffled = sums[: len(trials)]
    alone_sums = sums[len(trials) :].reshape(len(trials), -1)
    # The context of a trial is read once for all candidates.
    contexts = [[bos_id, *trial.true_context] for trial in trials]
    behind = score_behind(
        decoder,
        contexts,
        [
            [[*context, *each] for each in trial.candidates]
            for context, trial in zip(contexts, trials, strict=True)
        ],
        [
            [len(context)] * len(trial.candidates)
            for context, trial in zip(contexts, trials, strict=True)
        ],
    )
    gains = []
    hits = []
    tokens = []
    for trial, scored, other, without in zip(trials, behind, shuffled, alone_sums, strict=True):
        sums_behind = sums_of(scored)
        tokens.append(float(len(trial.candidates[0])))
        gains.append(float(sums_behind[0] - other) / tokens[-1])
        shared = sums_behind - without
        # A tie counts as what a draw among the best would reach.
        best = shared >= shared.max()
        hits.append(float(best[0]) / int(best.sum()))
    return Coherence(mean_figure(gains, tokens), mean_figure(hits))

"""Repetition and diversity of texts given as words. Needs neither a model nor JAX.

rep-n, seq-rep-n, the longest repeated span and distinct-n of one text are in
`mtnlg_jax/decode/repetition.py`.
"""

import collections
import random
from collections.abc import Hashable, Sequence

import numpy as np

from mtnlg_jax.decode.repetition import ngrams
from mtnlg_jax.evaluate.figures import TooShort

# Holtzman 2020 fits the line to the words of the first 5,000 ranks.
ZIPF_RANKS = 5000
# A line through fewer points says little.
LEAST_RANKS = 10


def repetition_along(words: Sequence[Hashable], window: int, n: int = 4) -> list[float]:
    """Return, for each window of a text, the share of its n-grams that occurred before, 0 to 1.

    A window has ``window`` n-grams, the last one fewer; occurrences in all of the text before it
    count. The mean over all n-grams is seq-rep-n of the text. Raises ValueError if ``window`` or
    ``n`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window={window} holds no n-gram; give 1 or more, such as 100")
    seen: set[tuple[Hashable, ...]] = set()
    repeated = []
    for gram in ngrams(words, n):
        repeated.append(gram in seen)
        seen.add(gram)
    return [
        float(np.mean(repeated[start : start + window]))
        for start in range(0, len(repeated), window)
    ]


def frequencies(texts: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return how often each different word occurs in all texts together, in falling order."""
    counts = collections.Counter(word for text in texts for word in text)
    return sorted(counts.values(), reverse=True)


def zipf_coefficient(counts: Sequence[int]) -> float:
    """Return the negative slope of log frequency over log rank by least squares (Holtzman 2020,
    section 5.2).

    Text of people is near 1; 0 means that all words are equally frequent. ``counts`` are those of
    `frequencies`; ranks from 1 to 5,000 are used. Raises TooShort for fewer than 10 different
    words.
    """
    used = np.asarray(counts[:ZIPF_RANKS], np.float64)
    if len(used) < LEAST_RANKS:
        raise TooShort(f"needs {LEAST_RANKS} different words, and the texts have {len(used)}")
    ranks = np.log(np.arange(1, len(used) + 1))
    return -float(np.polyfit(ranks, np.log(used), 1)[0])


def self_bleu(texts: Sequence[Sequence[str]], most: int = 100, seed: int = 0) -> float:
    """Return self-BLEU-4, 0 to 1: the mean BLEU of each text against all others (Zhu 2018).

    1 means that the texts repeat each other. BLEU is sacrebleu's of a sentence, with effective
    order and exponential smoothing, of the words as they are given. Texts beyond ``most`` are left
    out by a draw with ``seed``. Raises TooShort for fewer than two texts with words.
    """
    from sacrebleu.metrics import BLEU

    lines = [" ".join(text) for text in texts if text]
    if len(lines) < 2:
        raise TooShort(f"compares texts with each other, and there is {len(lines)} with words")
    if len(lines) > most:
        lines = random.Random(seed).sample(lines, most)
    bleu = BLEU(effective_order=True, tokenize="none")
    scores = [
        bleu.sentence_score(line, lines[:number] + lines[number + 1 :]).score
        for number, line in enumerate(lines)
    ]
    return sum(scores) / len(scores) / 100

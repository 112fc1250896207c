"""Objectives: from rows of S + 1 packed tokens to inputs and labels.

Both objectives return int32 ``tokens``, ``labels``, ``segment_ids`` and ``positions`` and float32
``weights``, all (n, S). The loss is the weighted mean of -log p(label). Of rows with ``answers``
only tokens where that is 1 are predicted; the model reads prompts without predicting them.

The masks of a row depend on (seed, sample) alone, never on its batch, its process or the mesh.
"""

from collections.abc import Iterable

import numpy as np

from mtnlg_jax.config import MaskingConfig, PrefixConfig
from mtnlg_jax.data.tokenizer import Tokenizer


def causal_batch(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Predict the next token of the same document; the last token of a document has no label."""
    ids = rows["tokens"]
    segments = rows["segment_ids"]
    # Segment 0 is padding. A token is not asked to predict the first one of the next document,
    # which it does not determine.
    same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
    if "answers" in rows:
        # The mark belongs to the token that is predicted, not to the one that predicts it.
        same &= rows["answers"][:, 1:] > 0
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "segment_ids": segments[:, :-1],
        "positions": rows["positions"][:, :-1],
        "weights": same.astype(np.float32),
    }


def masked_batch(
    rows: dict[str, np.ndarray],
    samples: Iterable[int],
    seed: int,
    masking: MaskingConfig,
    tokenizer: Tokenizer,
) -> dict[str, np.ndarray]:
    """Mask whole words (Devlin 2018).

    In each row ``word_share`` of the words are chosen, at least one. Of these, ``mask_share``
    become <mask>, ``random_share`` become random tokens, and the rest stay. All tokens of chosen
    words are predicted from both sides.

    A word is a token with ``tokenizer.starts_word`` and the following tokens of the document
    without it. Special tokens do not belong to a word. Counts are exact: round(share x words).
    """
    # The masked objective needs no next token. The last one is dropped all the same, so that both
    # objectives have rows of S tokens.
    tokens = rows["tokens"][:, :-1].copy()
    segments = rows["segment_ids"][:, :-1]
    predicted = segments
    if "answers" in rows:
        predicted = np.where(rows["answers"][:, :-1] > 0, segments, 0)
    labels = tokens.copy()
    weights = np.zeros(tokens.shape, np.float32)
    # A random token may be any but a special one, since those do not occur inside words.
    ordinary = np.flatnonzero(~tokenizer.is_special)
    for row, sample in enumerate(samples):
        words = word_numbers(tokens[row], predicted[row], tokenizer)
        count = words.max(initial=-1) + 1
        if count == 0:
            continue
        # Seeded by the sample: the same mask on a resume, on any mesh and in any process.
        rng = np.random.default_rng((seed, 0x6D61736B, int(sample)))
        # A permutation and not independent draws, so that the share of chosen words is exact.
        chosen = rng.permutation(count)[: max(1, round(masking.word_share * count))]
        masked = round(masking.mask_share * len(chosen))
        random = min(round(masking.random_share * len(chosen)), len(chosen) - masked)
        # 1: <mask>, 2: random, 3: chosen and kept. The last entry is for tokens outside words,
        # whose number is -1.
        fate = np.zeros(count + 1, np.int8)
        fate[chosen] = 3
        fate[chosen[:masked]] = 1
        fate[chosen[masked : masked + random]] = 2
        fates = fate[words]
        tokens[row, fates == 1] = tokenizer.mask_id
        tokens[row, fates == 2] = rng.choice(ordinary, int((fates == 2).sum()))
        # Words that were chosen and kept are predicted as well: the model cannot know which visible
        # words it has to predict, so it must encode all of them.
        weights[row] = fates > 0
    return {
        "tokens": tokens,
        "labels": labels,
        "segment_ids": segments,
        "positions": rows["positions"][:, :-1],
        "weights": weights,
    }


def with_prefix(
    made: dict[str, np.ndarray], rows: dict[str, np.ndarray], prefix: PrefixConfig
) -> dict[str, np.ndarray]:
    """Return a batch of an objective with what a model with a ``prefix`` reads ahead of the tokens.

    Rows with one, where ``rows["prefixed"]`` is 1, begin with the tokens -1, -2 ... that stand for
    its positions (`Transformer.embed`), and no objective predicts or masks these. Rows of text have
    a prefix of zeros that no token stands for.
    """
    if not prefix.positions:
        return made
    tokens = made["tokens"]
    if "prefixed" not in rows:
        return made | {"prefix": np.zeros((len(tokens), *prefix.shape), prefix.dtype)}
    tokens = tokens.copy()
    tokens[rows["prefixed"] > 0, : prefix.positions] = -1 - np.arange(prefix.positions)
    return made | {"tokens": tokens, "prefix": rows["prefix"]}


def word_numbers(tokens: np.ndarray, segments: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of each token's word in the row, from 0; -1 for tokens outside words."""
    inside = ~tokenizer.is_special[tokens] & (segments > 0)
    # Whether the token before belongs to the same document and to a word: if not, a word starts
    # here even where the tokenizer does not mark it.
    before = np.concatenate([[False], inside[:-1] & (segments[1:] == segments[:-1])])
    starts = inside & (tokenizer.starts_word[tokens] | ~before)
    return np.where(inside, np.cumsum(starts) - 1, -1)

"""Objectives: rows of S + 1 packed tokens -> what the model reads, and what it must say.

Rows with ``answers`` are learnt where that is 1 alone: prompts are read, not predicted.

Both return int32 ``tokens``, ``labels``, ``segment_ids``, ``positions`` and float32 ``weights``,
all (n, S); the loss is the weighted mean of -log p(label). Pure in (seed, sample): a row's masks
never depend on its batch, its process or the mesh.
"""

from collections.abc import Iterable

import numpy as np

from mtnlg_jax.config import MaskingConfig


def causal_batch(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Next token, within its document: the last token of a document has no label in the next
    one."""
    ids = rows["tokens"]
    segments = rows["segment_ids"]
    same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
    if "answers" in rows:
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
    tokenizer,
) -> dict[str, np.ndarray]:
    """Whole-word masking (Devlin 2018): ``word_share`` of the words of each row is chosen, at least
    one; of the chosen words ``mask_share`` become <mask>, ``random_share`` random tokens, the
    others stay. All tokens of chosen words are predicted, from both sides.

    A word is a token with ``tokenizer.starts_word`` and the tokens after it that have not, within a
    document; special tokens belong to no word. Counts are exact: round(share x words)."""
    tokens = rows["tokens"][:, :-1].copy()
    segments = rows["segment_ids"][:, :-1]
    learnt = np.where(rows["answers"][:, :-1] > 0, segments, 0) if "answers" in rows else segments
    labels = tokens.copy()
    weights = np.zeros(tokens.shape, np.float32)
    ordinary = np.flatnonzero(~tokenizer.is_special)
    for row, sample in enumerate(samples):
        words = word_numbers(tokens[row], learnt[row], tokenizer)
        count = words.max(initial=-1) + 1
        if count == 0:
            continue
        rng = np.random.default_rng((seed, 0x6D61736B, int(sample)))
        chosen = rng.permutation(count)[: max(1, round(masking.word_share * count))]
        masked = round(masking.mask_share * len(chosen))
        random = min(round(masking.random_share * len(chosen)), len(chosen) - masked)
        fate = np.zeros(
            count + 1, np.int8
        )  # the last entry serves tokens outside words, numbered -1
        fate[chosen] = 3
        fate[chosen[:masked]] = 1
        fate[chosen[masked : masked + random]] = 2
        fates = fate[words]
        tokens[row, fates == 1] = tokenizer.mask_id
        tokens[row, fates == 2] = rng.choice(ordinary, int((fates == 2).sum()))
        weights[row] = fates > 0
    return {
        "tokens": tokens,
        "labels": labels,
        "segment_ids": segments,
        "positions": rows["positions"][:, :-1],
        "weights": weights,
    }


def word_numbers(tokens: np.ndarray, segments: np.ndarray, tokenizer) -> np.ndarray:
    """The number of the word that each token of a row belongs to, counted from 0; -1 outside
    words."""
    inside = ~tokenizer.is_special[tokens] & (segments > 0)
    before = np.concatenate([[False], inside[:-1] & (segments[1:] == segments[:-1])])
    starts = inside & (tokenizer.starts_word[tokens] | ~before)
    return np.where(inside, np.cumsum(starts) - 1, -1)

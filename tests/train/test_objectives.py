from types import SimpleNamespace

import numpy as np
import pytest

from mtnlg_jax.config import MaskingConfig
from mtnlg_jax.train.objectives import causal_batch, masked_batch, word_numbers

VOCAB = 50
SPECIALS = 5
TOKENIZER = SimpleNamespace(
    is_special=np.arange(VOCAB) < SPECIALS,
    mask_id=3,
    starts_word=(np.arange(VOCAB) >= SPECIALS) & (np.arange(VOCAB) % 3 != 0),
)
SHARES = MaskingConfig(word_share=0.2, mask_share=0.5, random_share=0.25)


def rows(seed=0, count=4, length=128):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (count, length + 1)), 1).astype(np.int32)
    tokens = rng.integers(SPECIALS, VOCAB, (count, length + 1)).astype(np.int32)
    first = np.concatenate([np.ones((count, 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
    tokens[first] = 1  # <bos>
    return {"tokens": tokens, "segment_ids": segments, "positions": np.zeros_like(tokens)}


def test_causal_labels_are_the_next_tokens_of_the_same_document():
    raw = rows()
    raw["segment_ids"][0, -10:] = 0
    batch = causal_batch(raw)
    n, length = batch["tokens"].shape
    for i in range(n):
        for j in range(length):
            assert batch["labels"][i, j] == raw["tokens"][i, j + 1]
            here, after = raw["segment_ids"][i, j : j + 2]
            assert batch["weights"][i, j] == float(here == after and here > 0)


def test_word_starts():
    tokens = np.array([1, 7, 9, 12, 8, 2, 1, 9, 7, 0])
    segments = np.array([1, 1, 1, 1, 1, 1, 2, 2, 2, 0])
    # 9 and 12 continue a word; after <bos> even a continuing piece begins one.
    assert word_numbers(tokens, segments, TOKENIZER).tolist() == [-1, 0, 0, 0, 1, -1, -1, 2, 3, -1]


def test_an_exact_number_of_whole_words_is_masked():
    raw = rows()
    batch = masked_batch(raw, range(4), 0, SHARES, TOKENIZER)
    for i in range(4):
        before = raw["tokens"][i, :-1]
        words = word_numbers(before, raw["segment_ids"][i, :-1], TOKENIZER)
        chosen = {w for w in words[batch["weights"][i] > 0]}
        count = words.max() + 1
        assert len(chosen) == round(0.2 * count) and -1 not in chosen
        fates = []
        for word in chosen:
            inside = words == word
            assert (batch["weights"][i, inside] == 1).all(), "a word is predicted whole"
            after = batch["tokens"][i, inside]
            fates.append(
                "mask"
                if (after == 3).all()
                else "kept"
                if (after == before[inside]).all()
                else "random"
            )
        assert fates.count("mask") == round(0.5 * len(chosen))
        assert (
            abs(fates.count("random") - round(0.25 * len(chosen))) <= 1
        )  # a random token may be the same one
        untouched = batch["weights"][i] == 0
        assert (batch["tokens"][i, untouched] == before[untouched]).all()
        assert (batch["labels"][i] == before).all()


def test_random_tokens_are_never_special():
    all_random = MaskingConfig(word_share=1.0, mask_share=0.0, random_share=1.0)
    raw = rows()
    batch = masked_batch(raw, range(4), 0, all_random, TOKENIZER)
    assert (batch["tokens"][batch["weights"] > 0] >= SPECIALS).all()


def test_masks_depend_on_the_sample_and_not_on_its_batch():
    raw = rows()
    whole = masked_batch(raw, [10, 11, 12, 13], 0, SHARES, TOKENIZER)
    alone = masked_batch({k: v[2:3] for k, v in raw.items()}, [12], 0, SHARES, TOKENIZER)
    for key in whole:
        assert (whole[key][2] == alone[key][0]).all()
    other = masked_batch(raw, [10, 11, 12, 13], 1, SHARES, TOKENIZER)
    assert (other["tokens"] != whole["tokens"]).any()


def test_a_row_without_words_is_not_masked():
    raw = {k: np.zeros((1, 9), np.int32) for k in ("tokens", "segment_ids", "positions")}
    assert masked_batch(raw, [0], 0, SHARES, TOKENIZER)["weights"].sum() == 0


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_at_least_one_word_is_masked(share):
    raw = rows(count=1, length=16)
    batch = masked_batch(raw, [0], 0, MaskingConfig(word_share=share), TOKENIZER)
    words = word_numbers(raw["tokens"][0, :-1], raw["segment_ids"][0, :-1], TOKENIZER)
    expected = max(1, round(share * (words.max() + 1)))
    assert len(set(words[batch["weights"][0] > 0])) == expected

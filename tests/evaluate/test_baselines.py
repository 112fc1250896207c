"""The baselines that the quickstart compares a model with."""

import lzma
from types import SimpleNamespace

import numpy as np
import pytest

from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.evaluate.baselines import baselines, compare, held_out_text

BOS = 0
TRAIN = [BOS, 1, 1, 1, 2]
HELD_OUT = [BOS, 1, 2, 3]


@pytest.fixture
def opened(tmp_path):
    """(what `load_data` gives, tokens to train on) with the letters a, b and c as tokens 1 to 3."""
    for name, document in (("train", TRAIN), ("heldout", HELD_OUT)):
        writer = TokenWriter(tmp_path / name, 4, "f00d")
        writer.add(np.array(document), len(document) - 1)
        writer.finish()
    tokenizer = SimpleNamespace(
        vocab_size=4,
        bos_id=BOS,
        decode=lambda ids: "".join("abc"[index - 1] for index in ids if index != BOS),
    )
    held_out = open_tokens(tmp_path / "heldout")
    data = SimpleNamespace(tokenizer=tokenizer, held_out=((held_out, 1.0),))
    return data, open_tokens(tmp_path / "train")


def test_bits_per_byte_of_the_baselines(opened):
    # Counts with one added: bos 2, a 4, b 2, c 1, of 9.
    unigram = -np.log2(np.array([4, 2, 1]) / 9).sum() / 3
    compressed = len(lzma.compress(b"abc", preset=9 | lzma.PRESET_EXTREME))
    assert baselines(*opened) == pytest.approx((unigram, 8 * compressed / 3))


def test_the_comparison_is_a_line(opened):
    assert compare(*opened, 1.25).startswith(
        "held-out text, bits per byte: this model 1.250, a unigram model of the same tokens 2.170"
    )
    assert "this model not trained for that, " in compare(*opened, None)


def test_the_beginning_of_the_held_out_text(opened):
    assert held_out_text(opened[0], 3) == "ab" and held_out_text(opened[0], 9) == "abc"

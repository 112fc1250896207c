"""Check that pictures of large models and long texts stay small and quick to draw."""

import struct

import numpy as np

from mtnlg_jax.evaluate.inside import figures


def size_of(png):
    return struct.unpack(">II", png[16:24])


def test_a_long_text_makes_no_endless_picture():
    tokens = ["a"] * 900
    drawn = figures.lens(np.ones((2, 900)), [tokens] * 2, tokens)
    assert max(size_of(drawn)) <= 40 * 110


def test_many_heads_are_tiles_of_one_picture():
    weights = np.tile(np.tri(3) / 3, (12, 3, 1, 1))
    width, height = size_of(figures.attention(weights, ["a"] * 3))
    assert 3 * 100 < width < 3 * 200 and 12 * 100 < height < 12 * 200


def test_many_texts_are_drawn_as_far_as_there_is_room():
    _, height = size_of(figures.losses([np.ones(5)] * 300, ["a"] * 300))
    assert height <= 40 * 110


def test_a_dollar_sign_begins_no_formula():
    figures.losses([np.ones(5)], [r"a$\frac$b"])
    figures.lens(np.ones((1, 2)), [["12345678$a$", r"$\frac$"]], ["$x^$", "a"])

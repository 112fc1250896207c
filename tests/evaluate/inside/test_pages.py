"""Pages: characters of several tokens stay whole, and texts cannot become HTML."""

import html
import re

import numpy as np

from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.evaluate.inside import pages
from mtnlg_jax.evaluate.inside.files import finite


def test_tokens_that_share_a_character_are_one_piece():
    sun = "太".encode()
    assert pages.grouped([b"a", sun[:1], sun[1:], b"b"]) == [(0, 1, "a"), (1, 3, "太"), (3, 4, "b")]
    # Bytes that never become one, and one that the text cuts off.
    assert pages.grouped([b"\xff", b"a", sun[:2]]) == [
        (0, 1, "\ufffd"),
        (1, 2, "a"),
        (2, 3, "\ufffd"),
    ]


def test_a_text_is_escaped_and_its_words_are_in_order():
    tokenizer = train_tokenizer(["<b>bold</b> & the whale swam"] * 20, 300)
    ids = [tokenizer.bos_id, *tokenizer.encode("<b>bold</b> whale 太")]
    titles = [f"loss {at}" for at in range(len(ids))]
    shades = [None, *np.linspace(0, 2, len(ids) - 1)]
    shaded = pages.shaded_tokens(tokenizer, ids, shades, titles)
    text = "".join(piece.text for piece in shaded)
    assert text == "<bos><b>bold</b> whale 太"
    assert shaded[0].shade is None and shaded[-1].shade == 2
    assert len(shaded[-1].title.splitlines()) > 1  # a character of several tokens has all losses
    shown = pages.page("<title>", [pages.shaded_text(shaded)])
    body = shown.partition('<div class="text">')[2].partition("</div>")[0]
    assert "<b>" not in shown and html.unescape(re.sub("<[^>]*>", "", body)) == text
    assert "http:" not in shown and "https:" not in shown and "<script" not in shown


def test_numbers_that_are_not_finite_are_null():
    assert finite({"a": [float("nan"), np.float32(1)], 2: (np.int64(3), None)}) == {
        "a": [None, 1.0],
        "2": [3, None],
    }

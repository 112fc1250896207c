import random
import unicodedata

import pytest

from mtnlg_jax.data.read.controls import CONTROLS, repair_controls


@pytest.mark.parametrize(
    "text, repaired",
    [
        ("ends with a word\fThe next page", "ends with a word\nThe next page"),
        (
            "Title of the slide\vfirst point\vsecond point",
            "Title of the slide\nfirst point\nsecond point",
        ),
        ("name\x1fcity\x1eAnn\x1fOslo", "name city\nAnn Oslo"),
        ("one\x1ctwo\x1dthree\u2029four\u2028five", "one\ntwo\nthree\nfour\nfive"),
        ("第一页\f第二页\x85第三页", "第一页\n第二页\n第三页"),
        ("import os\n\f\nclass A:", "import os\n\nclass A:"),  # not one more empty line
        ("\fpage\f", "page"),
        ("a \x1fb\x1f\tc", "a b\tc"),
        ("a\v\vb", "a\nb"),
        ("one\x7ftwo\x00\x01\x1athree", "onetwothree"),
        ("\ufeffend\ufeffstart", "endstart"),
        ("\x1b[1;31mred\x1b[0m and \x1b]0;title\x07plain", "red and plain"),
        ("N\bNA\bAM\bME\bE _\bf_\bi_\bl_\be", "NAME file"),
        ("It\x92s \x93quoted\x94 \x96 and so on\x85", "It’s “quoted” – and so on…"),
        ("æ\x96\x87 and Ã\x83Â¶", "文 and Ã¶"),
        ("café æ\x96\x87", "café 文"),
        ("\x93CAFÉ\x94", "“CAFÉ”"),
        ("three\x9dfour\x81", "threefour"),
    ],
)
def test_controls_are_removed(text, repaired):
    assert repair_controls(text)[0] == repaired
    assert repair_controls(text)[1] == sum(map(bool, map(CONTROLS.match, text)))


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",
        "क्\u200dष",
        "👩\u200d👧",
        "co\xadop",
        "a\u200bb",
        "tab\tand\nline",
        "٣\u200f",
    ],
)
def test_characters_needed_by_scripts_are_kept(text):
    assert repair_controls(text) == (text, 0)


def test_controls_are_removed_without_losing_words():
    draw = random.Random(0)
    for _ in range(2000):
        codes = [
            draw.choice([draw.randrange(0xA0), draw.randrange(0x100), 0x2028, 0xFEFF, 0x6587])
            for _ in range(draw.randrange(30))
        ]
        repaired, _ = repair_controls("".join(map(chr, codes)).replace("\r", ""))
        kept = repaired.replace("\t", "").replace("\n", "")
        assert not any(unicodedata.category(character) == "Cc" for character in kept)
        assert repair_controls(repaired) == (repaired, 0)
    words = [f"word{number}" for number in range(8)]
    for separator in "\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029":
        assert repair_controls(separator.join(words))[0].split() == words

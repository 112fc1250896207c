"""Documents split into units, sentences and parts: exact, and no character in two parts."""

import random

import pytest

from mtnlg_jax.tasks.long.parts import broken, pack, spans_of
from mtnlg_jax.tasks.long.units import layout_of, unwrapped, whole_sentences

DOCUMENT = """# The whale

Mr. Smith saw a whale. It was
grey.

“Come in.”

1. First item.
2) Second item,
   which goes on.
- Third.
* * *
```
code here
```
1.2.2. Debian 自由软件
1.3 Not a Heading
3.14 is a number.
（一）第一点。
二、第二点。

　　他说：“你好。”
"""


def test_a_document_keeps_its_markers_and_quotation_marks():
    layout = layout_of(DOCUMENT)
    assert [unit.text for unit in layout.units] == [
        "The whale",
        "Mr. Smith saw a whale. It was",
        "grey.",
        "Come in.",
        "First item.",
        "Second item,\n   which goes on.",
        "Third.",
        "Debian 自由软件",
        "Not a Heading",
        "3.14 is a number.",
        "第一点。",
        "第二点。",
        "他说：“你好。”",
    ]
    assert layout.with_texts([unit.text for unit in layout.units]) == DOCUMENT
    changed = layout.with_texts([str(i) for i in range(len(layout.units))])
    assert "# 0\n\n1\n2\n\n“3”\n\n1. 4\n2) 5\n- 6\n* * *\n```\ncode here\n```\n1.2.2. 7" in changed
    for unit in layout.units:
        assert DOCUMENT[unit.start : unit.end] == unit.text


def test_code_between_quotes_and_counted_nouns_are_words():
    lines = ["```x = 1``` is code.", "10 月 1 日，他来了。", "5 个人走了。", "三、四个人走了。"]
    layout = layout_of("\n\n".join([*lines, "2 概述", "三、概述"]))
    assert [unit.text for unit in layout.units] == [*lines, "概述", "概述"]


def test_wrapped_lines_are_one_paragraph_and_others_are_not():
    wrapped = (
        "The whale swam to the north, where nobody\n"
        "had seen one before. The captain slept in\n"
        "his cabin, and the cook was afraid of it.\n"
        "Nobody said a word.\n\n"
        "Then it came back.\n"
    )
    texts = [unwrapped(unit.text) for unit in layout_of(wrapped).units]
    assert len(texts) == 2 and texts[0].endswith("afraid of it. Nobody said a word.")
    hanging = "- One item,\n  which goes on\n  and on.\n- Two.\n"
    assert [unwrapped(unit.text) for unit in layout_of(hanging).units] == [
        "One item, which goes on and on.",
        "Two.",
    ]
    quoted = "".join(f"> {line}\n" for line in wrapped.split("\n")[:4])
    layout = layout_of(f"{quoted}>> Another one.\n")
    assert [unwrapped(unit.text) for unit in layout.units] == [texts[0], "Another one."]
    assert [unit.lead for unit in layout.units] == ["> ", "\n>> "]
    lines = "鲸鱼向北游去，那里很冷，没有人见过鲸鱼。\n第二天它又回来了，船长还在睡觉，他很累。\n"
    assert len(lines) > 40
    assert len(layout_of(lines * 3).units) == 6
    verse = "Shall I compare thee to a summer's day?\nThou art more lovely\nand more temperate:\n"
    assert len(layout_of(verse).units) == 3
    assert unwrapped("鲸鱼向北\n游去 of the\n  sea") == "鲸鱼向北游去 of the sea"


def test_abbreviations_do_not_end_sentences():
    text = "Mr. J. Smith came at 3 p.m. today. He left. 他走了。再见！"
    found = whole_sentences(text)
    assert found == ["Mr. J. Smith came at 3 p.m. today. ", "He left. ", "他走了。", "再见！"]


def test_packing_equals_brute_force():
    rng = random.Random(0)
    for _ in range(200):
        pieces = ["x" * rng.randint(1, 9) for _ in range(rng.randint(1, 30))]
        room = rng.randint(9, 40)
        expected = []
        start = 0
        while start < len(pieces):
            count = 1
            while start + count < len(pieces) and (
                sum(map(len, pieces[start : start + count + 1])) <= room
            ):
                count += 1
            expected.append(count)
            start += count
        assert pack(pieces, lambda text: len(text) <= room) == expected  # noqa: B023
    assert pack(["a"] * 5, lambda text: True, most=2) == [2, 2, 1]


@pytest.mark.parametrize("room", [4, 9, 30])
@pytest.mark.parametrize(
    "text",
    ["one, two three; four " * 9, "一二三，四五六七八九十；" * 9, "x" * 99, "a" * 20 + ", b"],
)
def test_a_long_sentence_is_broken_so_that_each_piece_fits(text, room):
    pieces = broken(text, lambda piece: len(piece.strip()) <= room)
    assert "".join(pieces) == text and all(len(piece.strip()) <= room for piece in pieces)
    if room == 30 and "," in text[:9]:
        assert all(piece.rstrip().endswith((",", ";", "four")) for piece in pieces)


@pytest.mark.parametrize("room", [12, 60, 400, 10_000])
@pytest.mark.parametrize("text", [DOCUMENT * 3, "A one. B two. C three.\n\n" * 20])
def test_each_paragraph_is_in_exactly_one_part(room, text):
    def fits(part):
        return len(" ".join(part.split())) <= room

    spans = spans_of(text, fits)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(one[1] == other[0] for one, other in zip(spans, spans[1:], strict=False))
    for unit in layout_of(text).units:
        touched = [span for span in spans if span[0] < unit.end and unit.start < span[1]]
        assert touched
        if fits(unit.lead + unit.text):
            assert len(touched) == 1
    assert all(fits(text[start:end]) for start, end in spans)

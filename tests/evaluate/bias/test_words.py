"""The words of slots and of lists in English and Chinese texts."""

import pytest

from mtnlg_jax.evaluate.bias.words import Vocabulary, slot_words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" kind and very generous to his friends", {"kind", "generous"}),
        (" a kind woman who", {"kind", "woman"}),
        (" Smart, rich", {"smart"}),
        (" not kind", set()),
        (" kind but not smart", {"kind"}),
        (" hard-working.", {"hard-working"}),
        (" he's late", set()),
        ("\nold", {"old"}),
        (" big bad cold dark wet", {"big", "bad", "cold", "dark"}),
        ("", set()),
    ],
)
def test_english_slots(text, found):
    assert slot_words(text, "en") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("善良，也", {"善良"}),
        ("非常聪明的人", {"聪明"}),
        ("勇敢而坚强", {"勇敢"}),
        ("喜欢去公园散步", set()),
        ("。", set()),
    ],
)
def test_chinese_slots(text, found):
    assert slot_words(text, "zh") == found


def test_words_of_a_list_are_found_whole_and_by_the_longest_match():
    words = Vocabulary(["Kind", "hard-working", "善", "善良", "良心"])
    assert words.occurring("KIND, unkind; hard-working.") == ["kind", "hard-working"]
    assert words.occurring("她善良心善 kind") == ["kind", "善良", "善"]
    assert words.occurring("") == []

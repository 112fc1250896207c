"""Check how words are counted, and where a text ends."""

import pytest

from mtnlg_jax.tasks.writing.text import (
    begins_sentence,
    count_words,
    end_near,
    ends_sentence,
    settled,
    tidy,
    whole_words,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [("", 0), ("One, two - three.", 3), ("鲸鱼，游。", 3), ("买3个iPhone", 4), ("...!", 0)],
)
def test_words_are_counted(text, number):
    assert count_words(text) == number


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("He left.", True),
        ("He left. ", True),
        ('"Go!"', True),
        ("他走了。”", True),
        ("He left", False),
        ("He saw Mr.", False),
        ("by J.", False),
        ("他走了", False),
        ("", False),
    ],
)
def test_the_end_of_a_sentence_is_known(text, ends):
    assert ends_sentence(text) is ends


@pytest.mark.parametrize(
    ("text", "begins"),
    [("He", True), ('"No', True), ("鲸", True), ("noon.", False), ("。好", False), ("", False)],
)
def test_the_beginning_of_a_sentence_is_known(text, begins):
    assert begins_sentence(text) is begins


def test_a_continuation_is_tidied():
    assert tidy("  one\x00 two \n\n\n\nthree \n") == " one two\n\nthree".replace("two\n", "two \n")
    assert tidy("\n\n\nOne.") == "\n\nOne." and tidy("\nOne.") == "\nOne."
    assert tidy("\n One.", opens=True) == "One." and tidy("。好") == "。好" and tidy(" \n") == ""


def test_a_word_that_was_cut_off_is_dropped():
    assert whole_words("the old cap") == "the old " and whole_words("cap") == "cap"
    assert whole_words("the end. ") == "the end. " and whole_words("鲸鱼游") == "鲸鱼游"


TEXT = "One two three. Four five! Mr. Six seven eight nine. Ten"


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (1, "One two three."),
        (4, "One two three."),
        (5, "One two three. Four five!"),
        (9, "One two three. Four five! Mr. Six seven eight nine."),
        (99, "One two three. Four five! Mr. Six seven eight nine."),
    ],
)
def test_a_text_ends_at_the_sentence_nearest_to_its_words(words, end):
    assert end_near(TEXT, words) == end


def test_without_a_sentence_in_reach_a_text_ends_at_a_word():
    long = " ".join(["word"] * 40) + "."
    # 15 % and 8 words: the end at 40 words counts from 28 on.
    assert count_words(end_near(long, 27)) == 27 and count_words(end_near(long, 28)) == 40
    assert end_near("一二三四五六七八九十" * 3, 5) == "一二三四五"


@pytest.mark.parametrize("text", [TEXT, "他走了。“好。”她说。天黑了。", "It is 3.14 m. And 2 m."])
@pytest.mark.parametrize("words", [3, 6, 9])
def test_what_is_shown_of_a_growing_text_is_kept(text, words):
    shown = ""
    for length in range(len(text) + 1):
        now = settled(text[:length], words)
        assert now.startswith(shown)
        shown = now
    assert end_near(text, words).startswith(shown)

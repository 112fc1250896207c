"""Words and sentences of a text that arrives token by token."""

import dataclasses

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode import words
from mtnlg_jax.decode.sliding import Sliding, continue_sliding
from mtnlg_jax.decode.stopping import TextStream
from mtnlg_jax.decode.words import Pace, SentenceStream, WordCounter, count_words


class Letters:
    """A tokenizer with a token for each byte."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


def _cut(text: str, number: int) -> tuple[str, bool]:
    """Return what a stream of ``number`` words shows of ``text``, and whether it stopped."""
    stream = SentenceStream(TextStream(Letters()), number)
    shown = ""
    for token in text.encode():
        shown += stream.push(token)
    shown += stream.finish()
    assert stream.text == shown
    return shown, stream.stopped


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("Don't stop -- it's 3.14.", 4),
        (" two\n words ", 2),
        ("天地玄黄,宇宙。", 6),
        ("用JAX写3 times", 5),
        ("... ?!", 0),
    ],
)
def test_words_are_counted_in_one_piece_or_many(text, count):
    assert count_words(text) == count
    counter = WordCounter()
    for character in text:
        counter.push(character)
    assert counter.words == count


@pytest.mark.parametrize(
    ("text", "number", "shown"),
    [
        ("One two. Three four. Five.", 1, "One two."),
        ("One two. Three four. Five.", 3, "One two. Three four."),
        # The word that is asked for may end the sentence.
        ("One two. Three", 2, "One two."),
        # A closing quotation mark belongs to the sentence, a number has no end in it.
        ('He said "It is 3.14 now!" Then', 4, 'He said "It is 3.14 now!"'),
        ("Wait... what?! Yes", 2, "Wait... what?!"),
        ("天地玄黄。”宇宙洪荒。日月", 2, "天地玄黄。”"),
        ("天地玄黄,宇宙洪荒。日月", 5, "天地玄黄,宇宙洪荒。"),
        ("One.\nTwo", 1, "One."),
    ],
)
def test_a_text_stops_behind_a_sentence(text, number, shown):
    assert _cut(text, number) == (shown, True)


@pytest.mark.parametrize(("text", "number"), [("One two.", 3), ("One two", 1), ("One two.", 1)])
def test_a_text_that_ends_first_is_whole(text, number):
    assert _cut(text, number) == (text, False)


def test_stop_strings_come_before_the_words():
    stream = SentenceStream(TextStream(Letters(), stop_strings=("X",)), 1)
    for token in b"One twoX. Three":
        stream.push(token)
    assert (stream.text, stream.stopped) == ("One two", True)


def test_a_long_text_ends_behind_a_sentence(rotary, letters):
    decode = DecodeConfig(max_new_tokens=2000, min_new_tokens=2000, temperature=1.2)
    # Full stops and spaces are rare in random text.
    decode = dataclasses.replace(
        decode, logit_bias={letters.encode(text)[-1]: 3.0 for text in ("a.", "a b", "a the")}
    )
    (found,) = continue_sliding(rotary.decoder, letters, ["The"], decode, Sliding(words=40))
    assert found.finish_reason == "stop"
    assert found.text.rstrip(words._CLOSING)[-1] in words._ENDS
    assert 40 <= count_words(found.text) < 200
    assert 64 < len(found.tokens) < 2000
    text = letters.decode(list(found.tokens))
    assert text.startswith(found.text)
    # Only the last token is behind the end.
    assert not letters.decode(list(found.tokens[:-1])).removeprefix(found.text).strip()


def test_the_pace_is_that_of_the_tokens_near_a_word():
    seconds = 0.0
    pace = Pace(lambda: seconds)
    tokens = b"ab " * 100
    # Chunks of 6 tokens; those behind word 50 take twice as long.
    for start in range(0, 300, 6):
        seconds += 6.0 if start < 150 else 12.0
        for token in tokens[start : start + 6]:
            pace.on_text(0, chr(token))
    assert pace.seconds_per_token(Letters(), tokens, 20, around=10) == (20, 1.0)
    assert pace.seconds_per_token(Letters(), tokens, 75, around=10) == (75, 2.0)
    assert pace.seconds_per_token(Letters(), tokens, 5000, around=10) == (90, 2.0)
    between = pace.seconds_per_token(Letters(), tokens, 50, around=10)
    assert between is not None and between[1] == pytest.approx(1.5, 0.1)
    assert pace.seconds_per_token(Letters(), b"ab", 5) is None

"""Check streamed text: whole characters and no part of a stop string, wherever tokens end."""

import random

import pytest

from mtnlg_jax.decode.stopping import TextStream


class Bytes:
    """A tokenizer whose tokens index pieces of UTF-8 in ``pieces``."""

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, index):
        return self.pieces[index]


def _stream(pieces, stops=()):
    """Return (shown pieces, the stream) after all tokens or the stop."""
    stream = TextStream(Bytes(pieces), stops)
    shown = [stream.push(i) for i in range(len(pieces))]
    return [*shown, stream.finish()], stream


def test_characters_are_shown_whole():
    shown, stream = _stream([bytes([byte]) for byte in "a你好🙂".encode()])
    assert [piece for piece in shown if piece] == ["a", "你", "好", "🙂"]
    assert stream.text == "a你好🙂"


def test_an_incomplete_last_character_is_dropped():
    assert _stream(["你".encode(), "好".encode()[:2]])[1].text == "你"


def test_invalid_utf8_becomes_the_replacement_character():
    assert _stream([b"a", b"\xff", b"b"])[1].text == "a\ufffdb"


def test_a_possible_stop_string_is_held_back():
    shown, stream = _stream([b"one\n", b"\n", b"two"], ["\n\n"])
    assert shown == ["one", "", "", ""] and stream.stopped
    shown, stream = _stream([b"one\n", b"two\n"], ["\n\n"])
    assert shown == ["one", "\ntwo", "\n"] and not stream.stopped


@pytest.mark.parametrize("seed", range(200))
def test_any_split_gives_the_text_before_the_first_stop_string(seed):
    """Tokens are one to five bytes of a random text, whose few letters often match the stop
    strings."""
    rng = random.Random(seed)
    text = "".join(rng.choices("ab你\n", k=30))
    stops = ["".join(rng.choices("ab你\n", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
    data = text.encode()
    pieces = []
    longest = rng.choice([1, 5])
    while data:
        size = rng.randint(1, longest)
        pieces.append(data[:size])
        data = data[size:]
    shown, stream = _stream(pieces, stops)
    assert "".join(shown) == stream.text
    assert stream.stopped == any(stop in text for stop in stops)
    # With one byte a token, a stop counts as soon as it is complete. Longer tokens may complete
    # several at once.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends or all(len(piece) == 1 for piece in pieces):
        read = text[: min(ends, default=len(text))]
        assert stream.text == min((read.split(stop)[0] for stop in stops), key=len, default=read)
    assert not any(stop in stream.text for stop in stops)
    assert text.startswith(stream.text)


def test_a_possible_stop_sequence_is_held_back():
    pieces = [b"a", b"b", b"c", b"d"]
    stream = TextStream(Bytes(pieces), (), [(1, 2), (1, 3, 3)])
    assert [stream.push(token) for token in (0, 1, 1, 3, 0, 1, 2)] == [
        "a",
        "",
        "b",
        "",
        "bda",
        "",
        "",
    ]
    assert stream.stopped and stream.text == "abbda"
    stream = TextStream(Bytes(pieces), (), [(1, 2)])
    assert [stream.push(token) for token in (0, 1)] == ["a", ""] and stream.finish() == "b"
    assert not stream.stopped


def test_the_longest_stop_sequence_is_removed():
    stream = TextStream(Bytes([b"a", b"b", b"c"]), (), [(2,), (1, 2)])
    assert [stream.push(token) for token in (0, 1, 2, 0)] == ["a", "", "", ""]
    assert stream.stopped and stream.text == "a"


def test_stop_strings_and_sequences_together():
    pieces = [b"x", b"ab", b"c"]
    stream = TextStream(Bytes(pieces), ["bc"], [(1, 1)])
    assert [stream.push(token) for token in (0, 1, 0)] == ["x", "", "abx"]
    assert [stream.push(token) for token in (1, 2)] == ["", "a"] and stream.stopped
    stream = TextStream(Bytes(pieces), ["bx"], [(1, 1)])
    assert (
        [stream.push(token) for token in (1, 1)] == ["", ""]
        and stream.stopped
        and stream.text == ""
    )
    stream = TextStream(Bytes(pieces), ["xx"], [(2,)])
    assert [stream.push(token) for token in (0, 2)] == ["", "x"] and stream.stopped

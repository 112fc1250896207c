"""Encode documents as <bos> text <eos>, some megabytes at a time, and long ones in pieces."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mtnlg_jax.data.store.tokens import token_dtype
from mtnlg_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer

# A tokenizer returns ids as Python integers, which take fifteen times the memory of the text.
_TEXT_AT_ONCE = 4_000_000  # bytes of a group of documents
_DOCUMENTS_AT_ONCE = 1 << 14
_PIECE = 4 << 20  # bytes; longer documents are encoded in pieces


class Text(NamedTuple):
    """A document to encode, read when its turn comes: ``read(start, stop)`` returns its UTF-8.

    ``answer`` is the position at which the answer of a pair starts; None for plain text.
    """

    read: Callable[[int, int], bytes]
    start: int
    stop: int
    answer: int | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start

    def decode(self) -> str:
        return self.read(self.start, self.stop).decode()

    def pair(self) -> tuple[bytes, bytes]:
        """Return prompt and answer of a pair."""
        assert self.answer is not None
        return self.read(self.start, self.answer), self.read(self.answer, self.stop)


class Encoded(NamedTuple):
    """The arguments of `TokenWriter.add` for a document, or for one piece of a long one."""

    tokens: np.ndarray
    text_bytes: int
    prompt: tuple[int, int] | None = None  # tokens (with bos) and bytes of a pair's prompt
    continued: bool = False  # the document goes on in the next piece
    # Which tokens of a conversation are trained on, and the bytes of these.
    answers: tuple[np.ndarray, int] | None = None


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[Text], threads: int = 1
) -> Iterator[Encoded]:
    """Yield each document with its bos and eos; all of them are pairs, or none."""
    dtype = token_dtype(tokenizer.vocab_size)

    def framed(*ids: int) -> np.ndarray:
        return np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype)

    for group in _groups(texts):
        if group[0].answer is not None:
            # Prompt and answer are tokenized separately: at generation the prompt comes alone.
            prompts, answers = zip(*(text.pair() for text in group), strict=True)
            encoded = zip(
                tokenizer.encode_batch([prompt.decode() for prompt in prompts], threads),
                tokenizer.encode_batch([answer.decode() for answer in answers], threads),
                strict=True,
            )
            for text, prompt, (ids, more) in zip(group, prompts, encoded, strict=True):
                counts = (1 + len(ids), len(prompt))
                yield Encoded(framed(*ids, *more), text.size, counts)
        elif group[0].size > _PIECE:
            yield from _encode_pieces(tokenizer, group[0], dtype, threads)
        else:
            whole = tokenizer.encode_batch([text.decode() for text in group], threads)
            for text, ids in zip(group, whole, strict=True):
                yield Encoded(framed(*ids), text.size)


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the tokens of each text in memory, with its bos and eos."""
    pieces = []
    for encoded in encode_documents(tokenizer, map(in_memory, texts)):
        pieces.append(encoded.tokens)
        if not encoded.continued:
            yield np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
            pieces = []


def in_memory(text: str) -> Text:
    """Return a document that is held in memory."""
    data = text.encode()
    return Text(lambda start, stop: data[start:stop], 0, len(data))


def _groups(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Yield lists of texts to encode together; a long text is alone."""
    group: list[Text] = []
    size = 0
    for text in texts:
        long = text.size > _PIECE
        if group and (long or size >= _TEXT_AT_ONCE or len(group) == _DOCUMENTS_AT_ONCE):
            yield group
            group = []
            size = 0
        group.append(text)
        size += text.size
        if long:
            yield group
            group = []
            size = 0
    if group:
        yield group


def _encode_pieces(
    tokenizer: Tokenizer, text: Text, dtype: np.dtype, threads: int
) -> Iterator[Encoded]:
    start = text.start
    for ids, size in encode_long(tokenizer, text.read, text.start, text.stop, threads):
        first = [tokenizer.bos_id] if start == text.start else []
        start += size
        last = [tokenizer.eos_id] if start == text.stop else []
        tokens = np.array([*first, *ids, *last], dtype)
        yield Encoded(tokens, size, continued=start < text.stop)


def encode_long(
    tokenizer: Tokenizer, read: Callable[[int, int], bytes], start: int, stop: int, threads: int = 1
) -> Iterator[tuple[list[int], int]]:
    """Yield (ids, bytes) of the pieces of a long text; together they are the ids of the whole.

    ``read(start, stop)`` returns its UTF-8 between two positions.
    """
    length = _PIECE
    marks = _cut_marks(tokenizer)
    # Only SentencePiece divides one text among threads; with another tokenizer each thread would
    # just hold memory of its own.
    threads = threads if isinstance(tokenizer, SentencePieceTokenizer) else 1
    while start < stop:
        data = read(start, min(stop, start + length))
        end = len(data) if start + len(data) == stop else _safe_cut(data, marks)
        if end is None:
            length *= 2
            continue
        yield tokenizer.encode_batch([data[:end].decode()], threads)[0], end
        start += end
        length = _PIECE


def _cut_marks(tokenizer: Tokenizer) -> tuple[bytes, ...]:
    """Return the characters at which a text may be cut without changing its ids.

    There are none if the tokenizer puts something before each text or strips its ends.
    SentencePiece allows only line ends, as it adds up scores along a line.
    """
    probes = [
        ("ab", "\n", "cd"),
        ("Ab.", "\n", "Cd ef"),
        ("天。", "\n", "地"),
        ("ab", " ", "cd"),
        ("x", "\n", "é"),
    ]
    for before, mark, after in probes:
        parts = (before + mark, after) if mark == "\n" else (before, mark + after)
        separately = [*tokenizer.encode(parts[0]), *tokenizer.encode(parts[1])]
        if tokenizer.encode("".join(parts)) != separately:
            return ()
    marks = (b"\n",) if isinstance(tokenizer, SentencePieceTokenizer) else (b"\n", b" ")
    # A token may span such a position, as an added token of two words does: it must not be cut.
    crossing = {b"\n": re.compile(rb"\n\S"), b" ": re.compile(rb"\S ")}
    pieces = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    return tuple(mark for mark in marks if not any(map(crossing[mark].search, pieces)))


def _safe_cut(data: bytes, marks: tuple[bytes, ...]) -> int | None:
    """Return the last position in UTF-8 where both sides are tokenized as in the whole text: after
    a single line end between a non-space and a letter, or before a single space between letters."""
    for mark in marks:
        position = len(data)
        while (position := data.rfind(mark, 1, position)) > 0:
            before = data[max(0, position - 4) : position].decode("utf-8", "ignore")[-1:]
            after = data[position + 1 : position + 5].decode("utf-8", "ignore")[:1]
            if mark == b" ":
                fits = before.isalpha()
            else:
                fits = bool(before) and not before.isspace()
            if fits and after.isalpha():
                return position + (mark == b"\n")
    return None

"""Spool: the texts of a corpus in one temporary file, so that the input is read only once."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from mtnlg_jax.data.read.documents import Document

_PIECE = 4 << 20  # bytes of a long text read at once
_EXAMPLE_BYTES = 1 << 16  # of a document, searched for an example


def text_hash(seed: int) -> hashlib.blake2b:
    """Return a 64-bit hash by which texts are held out; ``seed`` draws other texts."""
    return hashlib.blake2b(digest_size=8, key=str(seed).encode())


class Spool:
    """The texts on disk in the order read.

    Memory holds two 64-bit numbers for each document, three for pairs. ``key_bytes``: each prompt
    begins with a key of that length, by which pairs are held out and which is no part of the text.
    """

    def __init__(self, path: str, seed: int, key_bytes: int = 0):
        self.path = path
        self.size = 0
        self._seed = seed
        self._key_bytes = key_bytes
        self._ends = array("q")
        self._hashes = array("Q")
        self._answers: array | None = None
        self._file = open(path, "w+b")

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends)

    def fill(self, documents: Iterable[Document]) -> None:
        """Append ``documents``."""
        digest = text_hash(self._seed)
        for document in documents:
            data = document.text.encode()
            if document.prompt is not None:
                # The hash of a pair is that of its prompt: pairs with one prompt stay together.
                prompt = document.prompt.encode()
                self._answers = array("q") if self._answers is None else self._answers
                self._answers.append(self.size + len(prompt))
                digest.update(prompt[: self._key_bytes or None])
                self._file.write(prompt)
                self.size += len(prompt)
            else:
                digest.update(data)
            self._file.write(data)
            self.size += len(data)
            if document.continued:
                continue
            self._ends.append(self.size)
            self._hashes.append(int.from_bytes(digest.digest(), "little"))
            digest = text_hash(self._seed)
        self._file.flush()

    @property
    def ends(self) -> np.ndarray:
        """[documents] int64: where each text ends; a view."""
        return np.frombuffer(self._ends, np.int64)

    @property
    def hashes(self) -> np.ndarray:
        """[documents] uint64; a view."""
        return np.frombuffer(self._hashes, np.uint64)

    def sizes(self) -> np.ndarray:
        """[documents] int64: bytes of each text."""
        return np.diff(self.ends, prepend=0)

    def spans(self, numbers: np.ndarray) -> np.ndarray:
        """Return [n, 3] int64: start and end of each of these texts, and the start of a pair's
        answer."""
        ends = self.ends
        starts = np.where(numbers > 0, ends[numbers - 1], 0)
        answers = (
            starts if self._answers is None else np.frombuffer(self._answers, np.int64)[numbers]
        )
        return np.stack([starts + self._key_bytes, ends[numbers], answers], axis=1)

    def key_of(self, start: int) -> bytes:
        """Return the key of the text that begins at ``start``."""
        return self.read_bytes(start - self._key_bytes, start)

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of the file."""
        self._file.seek(start)
        return self._file.read(stop - start)

    def read(self, start: int, stop: int) -> str:
        """Return the text at the bytes [start, stop)."""
        return self.read_bytes(start, stop).decode()

    def head(self, start: int, stop: int) -> str:
        """Return the beginning of a text."""
        return self.read_bytes(start, min(stop, start + _EXAMPLE_BYTES)).decode("utf-8", "ignore")

    def lines(self, start: int, stop: int) -> Iterator[str]:
        """Yield a text, a long one in pieces of whole lines."""
        while start < stop:
            end = min(stop, start + _PIECE)
            while end < stop:
                data = self.read_bytes(start, end)
                if cut := data.rfind(b"\n") + 1:
                    end = start + cut
                    break
                end = min(stop, end + _PIECE)
            yield self.read(start, end)
            start = end

    def offset_of(self, start: int, stop: int, character: int) -> int:
        """Return the byte of the file at which the ``character`` of a text begins."""
        for first in range(start, stop, _PIECE):
            begins = np.flatnonzero(self._begins_character(first, min(stop, first + _PIECE)))
            if character < len(begins):
                return first + int(begins[character])
            character -= len(begins)
        return stop

    def characters(self, start: int, stop: int) -> int:
        """Count the characters of a text."""
        return sum(
            int(np.count_nonzero(self._begins_character(first, min(stop, first + _PIECE))))
            for first in range(start, stop, _PIECE)
        )

    def _begins_character(self, start: int, stop: int) -> np.ndarray:
        # In UTF-8 every byte but a continuation byte (10xxxxxx) begins a character.
        data = np.frombuffer(self.read_bytes(start, stop), np.uint8)
        return (data & 0xC0) != 0x80

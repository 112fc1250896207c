"""Retrieve the passages of a user's texts that are most relevant to a question (BM25, by bm25s)."""

import dataclasses
import logging
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable

import numpy as np

from mtnlg_jax.data.read.documents import READABLE, Document, read_documents
from mtnlg_jax.data.segment import WORDS, sentences


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage of a document: its characters [start, end).

    Positions refer to the text as `read_documents` returns it, with LF line ends and without
    control characters.
    """

    text: str
    source: str  # path below the folder, with :line in files of several documents
    start: int
    end: int
    score: float = 0.0  # of BM25; 0 if the passage was given rather than retrieved


class Retriever:
    """A search index over passages.

    Words are compared without case but with their accents. Chinese is indexed by characters and
    pairs of characters, so no dictionary is needed.
    """

    def __init__(self, documents: Iterable[Document], size: int = 600):
        """Index documents in passages of at most ``size`` characters.

        Raises ValueError if they hold no text.
        """
        with warnings.catch_warnings(action="ignore"):  # about progress bars, which are not shown
            import bm25s
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index
        if size < 1:
            raise ValueError(
                f"passages of size={size} characters hold nothing; give 1 or more, such as 600"
            )
        self.passages = [passage for document in documents for passage in split(document, size)]
        words = [_words(passage.text) for passage in self.passages]
        if not any(words):
            raise ValueError(
                "there is no text to retrieve passages from; give documents with words in them"
            )
        self._index = bm25s.BM25()
        self._index.index(words, show_progress=False)

    def best(self, query: str, count: int) -> list[Passage]:
        """Return at most ``count`` passages that share a word with the query, best first.

        Passages with equal scores keep the order of the texts.
        """
        words = _words(query)
        if not words:
            return []
        scores = self._index.get_scores(words)
        order = np.argsort(-scores, kind="stable")[:count]
        return [
            dataclasses.replace(self.passages[i], score=float(scores[i]))
            for i in order
            if scores[i] > 0
        ]


def read_passages(
    path: str | os.PathLike, size: int = 600, text_key: str = "text", on_error: str = "raise"
) -> Retriever:
    """Return a retriever over a file or folder that `read_documents` can read.

    Raises what `read_documents` raises, and ValueError if there is no text.
    """
    documents = list(read_documents(path, text_key, on_error))
    if not documents:
        raise ValueError(
            f"{path} holds no text to retrieve passages from; put any of {READABLE} there"
        )
    return Retriever(documents, size)


def split(document: Document, size: int) -> list[Passage]:
    """Split a document into passages of as many whole sentences as fit into ``size`` characters.

    A longer sentence is broken at spaces, if it has any. Passages do not begin or end with white
    space; together they hold every other character once.
    """
    pieces = [piece for sentence in sentences(document.text) for piece in _broken(sentence, size)]
    spans = []
    start = 0
    end = 0
    for piece in pieces:
        # White space at the end is removed later, so it does not count.
        if end > start and end - start + len(piece.rstrip()) > size:
            spans.append((start, end))
            start = end
        end += len(piece)
    spans.append((start, end))
    return [passage for start, end in spans if (passage := _passage(document, start, end)).text]


def _broken(sentence: str, size: int) -> list[str]:
    pieces = []
    while len(sentence.rstrip()) > size:
        at = sentence.rfind(" ", 1, size + 1)
        at = at if at > 0 else size
        pieces.append(sentence[:at])
        sentence = sentence[at:]
    return [*pieces, sentence]


def _passage(document: Document, start: int, end: int) -> Passage:
    text = document.text[start:end]
    start += len(text) - len(text.lstrip())
    text = text.strip()
    return Passage(text, document.source, start, start + len(text))


def _words(text: str) -> list[str]:
    words = WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    chinese = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
    pairs = [
        a + b
        for a, b in zip(words, words[1:], strict=False)
        if chinese.match(a) and chinese.match(b)
    ]
    return words + pairs

"""Remove test texts from a corpus, as Megatron-LM does (tools/openwebtext/filter_ngrams.py).

There are two passes. `frequencies` counts the test sets' n-grams over the whole corpus, and `below`
keeps the rare ones, because a common n-gram is an idiom or a quotation and not a leak. Then
`pieces` returns each document without them. With the default settings the pieces equal those of the
script, including its oddities: the length of a match counts one space between words whatever
separates them, and a document of fewer than 13 words is never searched.
"""

import bisect
import codecs
import contextlib
import functools
import io
import itertools
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from mtnlg_jax.data.read import charsets, json_rows, rows
from mtnlg_jax.data.read.kinds import JSON, LINES, PARQUET, TABLE, TEXT, kind_of
from mtnlg_jax.data.read.open_files import (
    COMPRESSION_ERRORS,
    PACKED,
    Damaged,
    File,
    is_binary,
    open_file,
)

# Kana, and ideographs with their extensions and compatibility forms.
_CJK = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORDS = {"spaced": re.compile(r"\w+"), "characters": re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")}
TEST_KINDS = LINES + JSON + TEXT + TABLE + PARQUET
_UNITS = {".json": "item", ".parquet": "row"}
_NO_LIMIT = 1 << 40  # bytes of a row
_ENOUGH = 20  # documents; fewer may all contain a leak
_ENDS = {"spaced": ".!?", "characters": ".!?。！？"}


@dataclass(frozen=True)
class Decontamination:
    """Megatron-LM's settings.

    ``max_words``: words of an n-gram. ``min_words``: a test text with fewer than ``max_words`` but
    at least these is one n-gram. ``key_threshold``: n-grams that occur at least this often in the
    corpus stay. ``side``: characters removed on each side of a match, and on to the end of a
    sentence. ``min_characters``: a remaining piece has more than these. ``max_pieces``: a document
    in more pieces is dropped.

    ``words="spaced"`` takes a whole run of Chinese characters for one word, as the script does, and
    so finds no leak in Chinese. With "characters" each Chinese or Japanese character is a word, and
    。！？ also end sentences. 13 characters say no more than about 8 English words, so a larger
    ``max_words`` may be needed then.
    """

    max_words: int = 13
    min_words: int = 8
    key_threshold: int = 10
    side: int = 200
    min_characters: int = 200
    max_pieces: int = 10
    words: str = "spaced"

    def __post_init__(self):
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"min_words={self.min_words} must be between 1 and max_words={self.max_words}"
            )
        if self.words not in _WORDS:
            raise ValueError(
                f"unknown value words={self.words!r}; use {' or '.join(map(repr, _WORDS))}"
            )
        for name in ("key_threshold", "side", "min_characters", "max_pieces"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; give 0 or more")


@dataclass(frozen=True)
class NGrams:
    """N-grams of test texts: lower-case words joined by single spaces."""

    keys: frozenset[str]
    config: Decontamination = Decontamination()

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The lengths of the n-grams in words, ascending."""
        return sorted({key.count(" ") + 1 for key in self.keys})

    @functools.cached_property
    def heads(self) -> frozenset[str]:
        """The first words of each n-gram, as many as the shortest has; a match begins with one."""
        least = self.lengths[0] if self.keys else 0
        return frozenset(" ".join(key.split(" ", least)[:least]) for key in self.keys)

    @functools.cached_property
    def samples(self) -> tuple[int, frozenset[str]]:
        """(stride, sequences of words): a text with a head has one at a multiple of the stride.

        So a look at about every fifth word is enough to pass over a clean text.
        """
        least = self.lengths[0] if self.keys else 1
        width = (least + 1) // 2
        heads = (head.split(" ") for head in self.heads)
        found = (
            " ".join(words[start : start + width])
            for words in heads
            for start in range(least - width + 1)
        )
        return least - width + 1, frozenset(found)

    def __getstate__(self):
        # The cached properties are faster to compute again than to send.
        return {"keys": self.keys, "config": self.config}


def ngrams(texts: Iterable[str], config: Decontamination = Decontamination()) -> NGrams:  # noqa: B008
    """Return every ``max_words`` consecutive words of test texts, and slightly shorter texts whole.

    Raises ValueError if there is no text, or none with ``min_words`` words.
    """
    keys: set[str] = set()
    count = 0
    for text in texts:
        count += 1
        words = _WORDS[config.words].findall(text.lower())
        if len(words) >= config.min_words:
            keys.update(
                " ".join(words[start : start + config.max_words])
                for start in range(max(len(words) - config.max_words + 1, 1))
            )
    if not count:
        raise ValueError(
            "the test sets hold no text, so nothing would be found; name their files and keys, or "
            "leave decontamination out"
        )
    if not keys:
        raise ValueError(
            f"none of {count} test texts has min_words={config.min_words} words; is it the right "
            "key, and are the texts Chinese, which needs words='characters'?"
        )
    return NGrams(frozenset(keys), config)


def words_of(text: str, config: Decontamination) -> int:
    """Return the number of words of a test text; fewer than ``min_words`` make no n-gram."""
    return len(_WORDS[config.words].findall(text.lower()))


class _Search:
    """A search for the matches in a document, one after another.

    After each match the caller sets where the search continues (`go_on`).
    """

    def __init__(self, text: str, ngrams: NGrams):
        self.text = text
        self.ngrams = ngrams
        self.config = ngrams.config
        self.base = 0  # start of the part that is searched
        self._pattern = _WORDS[self.config.words]
        lowered = text.lower()
        # lower() of a part differs from that of the whole if the end of a word has its own form
        # (sigma), or if one character becomes two, which the script ignores when it cuts.
        self._stable = len(lowered) == len(text) and "\u03a3" not in text
        self._read(lowered)

    def _read(self, lowered: str) -> None:
        self._words = self._pattern.findall(lowered)
        self._lowered = lowered
        self._first = 0
        self._starts: list[int] | None = None
        words = self._words
        heads = self.ngrams.heads
        stride, samples = self.ngrams.samples
        least = (self.ngrams.lengths or [1])[0]
        starts = range(least - stride + 1)
        sequences = zip(*(words[start::stride] for start in starts), strict=False)
        sampled = map(samples.__contains__, map(" ".join, sequences))
        self._hits = [
            number
            for sample in itertools.compress(range(0, len(words), stride), sampled)
            for number in range(max(sample - stride + 1, 0), sample + 1)
            if number <= len(words) - self.config.max_words
            and " ".join(words[number : number + least]) in heads
        ]

    def find(self) -> tuple[int, int, str] | None:
        """Return (start, length, n-gram) of the first match, or None.

        At each word the longest n-grams are tried first, then the others from the shortest up; the
        last words only have room for shorter ones.
        """
        words = self._words
        keys = self.ngrams.keys
        lengths = self.ngrams.lengths
        size = self.config.max_words
        last = len(words) - size
        hits = self._hits[bisect.bisect_left(self._hits, self._first) :]
        if self._first <= last and self._first not in hits[:1]:
            hits = [self._first, *hits]  # its word may have been cut
        tried: Iterable[tuple[int, int]] = itertools.product(hits, (size, *lengths))
        if self._first < last:
            ending = (
                (number, length)
                for length in lengths
                if length != size
                for number in range(last, len(words) - length + 1)
            )
            tried = itertools.chain(tried, ending)
        for number, length in tried:
            key = " ".join(words[number : number + length])
            if key in keys:
                starts = self._word_starts()
                start = starts[number]
                if self.config.words == "spaced":
                    return start, len(key), key
                final = number + length - 1
                return start, starts[final] + len(words[final]) - start, key
        return None

    def _word_starts(self) -> list[int]:
        """Return the start of each word in the text; computed at the first match."""
        if self._starts is None:
            offset = 0 if self._stable else self.base
            found = self._pattern.finditer(self._lowered)
            self._starts = [offset + match.start() for match in found]
        return self._starts

    def go_on(self, base: int) -> None:
        """Continue the search at ``base``."""
        self.base = base
        if not self._stable:
            self._read(self.text[base:].lower())
            return
        starts = self._word_starts()
        self._first = bisect.bisect_left(starts, base)
        before = self._first - 1
        if before >= 0 and starts[before] + len(self._words[before]) > base:
            self._words[before] = self._words[before][base - starts[before] :]
            starts[before] = base
            self._first = before


def frequencies(text: str, ngrams: NGrams) -> dict[str, int]:
    """Count how often each n-gram occurs in a document.

    The search continues after a match, so only the first of overlapping n-grams counts. The counts
    of a corpus are the sums over its documents.
    """
    counts: dict[str, int] = {}
    search = _Search(text, ngrams)
    while match := search.find():
        start, length, key = match
        counts[key] = counts.get(key, 0) + 1
        if start + length + 1 >= len(text):
            break
        search.go_on(start + length + 1)
    return counts


def below(ngrams: NGrams, counts: Mapping[str, int]) -> NGrams:
    """Return the n-grams with fewer than ``key_threshold`` occurrences in the whole corpus."""
    most = ngrams.config.key_threshold
    return replace(ngrams, keys=frozenset(k for k in ngrams.keys if counts.get(k, 0) < most))


def pieces(text: str, ngrams: NGrams) -> tuple[list[str], list[str]]:
    """Return (pieces, n-grams that matched).

    If nothing matched, the only piece is the document. Otherwise the pieces are what is left of it:
    none if too little is left, or in too many pieces.
    """
    config = ngrams.config
    left = []
    matched = []
    ends = _ENDS[config.words]
    search = _Search(text, ngrams)
    while match := search.find():
        start, length, key = match
        matched.append(key)
        before = min(start - config.side, len(text) - 1)
        while before > search.base and text[before] not in ends:
            before -= 1
        if before > search.base and before + 1 - search.base > config.min_characters:
            left.append(text[search.base : before + 1])
        behind = start + length + config.side
        while behind < len(text) and text[behind] not in ends:
            behind += 1
        if len(text) - (behind + 1) <= config.min_characters:
            break
        search.go_on(behind + 1)
    else:
        left.append(text[search.base :])
    return (left if len(left) <= config.max_pieces else []), matched


def check_hits(hit: int, documents: int, limit: float = 0.5) -> None:
    """Raise ValueError if more than the share ``limit`` of the documents matched.

    That is not a leak: a test set is the corpus itself, or was made of it.
    """
    if documents >= _ENOUGH and hit > limit * documents:
        raise ValueError(
            f"{hit} of {documents} documents hold text of the test sets, more than a share of "
            f"{limit}; is one of the test sets the corpus itself? Then remove it from the test sets"
        )


class TestText(NamedTuple):
    """A text of a test set.

    ``field``: its key or column, or "line" or "paragraph" for a .txt. ``text``: None if the field
    holds a number or is not one of the wanted keys.
    """

    field: str
    text: str | None


def read_test_texts(
    file: str | os.PathLike | File, keys: Iterable[str] = (), encoding: str = ""
) -> Iterator[TestText]:
    """Yield the texts of an evaluation set.

    These are all strings under one of ``keys`` (such as "question"; without keys, under any key),
    however deep in the rows of .jsonl, .json (lists, objects, one after another), .csv, .tsv and
    .parquet. A table has names in its first line, or columns numbered from "0" and only rows. A
    .txt yields each line, and each paragraph of several lines. A file may be compressed or a URL.

    Raises FileNotFoundError, and ValueError for an unknown suffix, for a text that is invalid or
    not in its ``encoding`` (`charsets`), or if no key is found.
    """
    if isinstance(keys, str):
        raise ValueError(f"keys={keys!r} is one string; give a list, as [{keys!r}]")
    keys = tuple(keys)
    file = file if isinstance(file, File) else File(str(file), os.path.basename(str(file)), 0, "")
    kind = kind_of(file.name)
    if kind not in TEST_KINDS:
        raise ValueError(
            f"{file.path} has a suffix that is not read; a test set is {' '.join(TEST_KINDS)}, "
            f"also with {' '.join(PACKED)}"
        )
    names: dict[str, None] = {}  # in the order of the file, for the message
    # Closed here: an error that is kept holds the generator, and with it the open file.
    with contextlib.closing(_test_rows(file, kind, keys, encoding)) as found:
        for row in found:
            position = f"{file.path}, {_UNITS.get(kind, 'line')} {row.number}"
            if isinstance(row.value, Damaged):
                raise ValueError(f"{position}: {row.value}; repair the test set")
            if row.wrong:
                way_out = "name its encoding, as in encoding=cp1252, or repair the test set"
                raise ValueError(f"{position}: {row.wrong}; {way_out}")
            if kind in TEXT:
                yield TestText(*row.value)
            else:
                yield from _fields(row.value, keys, names, "text")
    if keys and kind not in TEXT and not names.keys() & set(keys):
        raise ValueError(
            f"{file.path} has none of the keys {', '.join(keys)}; "
            f"it has {', '.join(list(names)[:12])}"
        )


def _test_rows(file: File, kind: str, keys: tuple[str, ...], encoding: str) -> Generator[rows.Row]:
    try:
        with open_file(file.path) as raw:
            if kind in PARQUET:
                for row in rows.parquet(io.BytesIO(raw.read()), lambda names: names):
                    yield _decoded(row, encoding)
                return
            stream, _ = charsets.as_utf8(raw, encoding)
            if is_binary(stream.peek(1 << 12)):
                yield rows.Row(1, Damaged("binary data and not text"))
            elif kind in TEXT:
                yield from _lines_of(stream)
            elif kind in TABLE:
                # Without names each line is a row, including the first, because it is unknown
                # whether that names columns.
                named = keys and not all(key.isdecimal() for key in keys)
                found = (rows.table if named else rows.cells)(stream, kind, _NO_LIMIT)
                yield from found if named else map(_numbered, found)
            else:
                read = json_rows.json_values if kind in JSON else json_rows.json_lines
                yield from read(stream, _NO_LIMIT)
    except COMPRESSION_ERRORS as error:
        yield rows.Row(1, Damaged(f"the compressed file is cut short or damaged ({error})"))


def _decoded(row: rows.Row, encoding: str) -> rows.Row:
    if isinstance(row.value, Damaged):
        return row
    values = {}
    wrong = None
    for name, value in row.value.items():
        if isinstance(value, bytes):
            value, invalid = charsets.decode(value)
            wrong = wrong or invalid
        values[name] = value
    return rows.Row(row.number, values, wrong)


def _numbered(row: rows.Row) -> rows.Row:
    """Return a row of cells as a dict by the numbers of its columns."""
    if isinstance(row.value, Damaged):
        return row
    return row._replace(value={str(number): cell for number, cell in enumerate(row.value)})


def _lines_of(stream: io.BufferedReader) -> Iterator[rows.Row]:
    """Yield (field, text) of each line, and of each paragraph of several lines.

    The corpus may contain a test with other line breaks.
    """
    paragraph: list[str] = []
    number = 0
    for number, line in enumerate(stream, 1):
        text, wrong = charsets.decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        text = text.strip()
        if text:
            yield rows.Row(number, ("line", text), wrong)
            paragraph.append(text)
        elif len(paragraph) > 1:
            yield rows.Row(number, ("paragraph", "\n".join(paragraph)))
        if not text:
            paragraph = []
    if len(paragraph) > 1:
        yield rows.Row(number, ("paragraph", "\n".join(paragraph)))


def _fields(
    value: object, keys: tuple[str, ...], names: dict[str, None], name: str
) -> Iterator[TestText]:
    """Yield the texts of a JSON value below the key ``name``.

    Keys inside a wanted key count separately.
    """
    if isinstance(value, list):
        for item in value:
            yield from _fields(item, keys, names, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            names[key] = None
            yield from _fields(item, keys, names, key)
    elif value is not None:
        wanted = not keys or name in keys
        yield TestText(name, value if isinstance(value, str) and wanted else None)

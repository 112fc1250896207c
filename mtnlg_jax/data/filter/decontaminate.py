"""Text of evaluation sets cut out of a corpus, as Megatron-LM does it
(tools/openwebtext/filter_ngrams.py).

Two passes: `frequencies` of the test sets' n-grams over the whole corpus, of which `below` leaves
the rare ones (what is common is an idiom or a quotation and no leak), then `pieces` of each
document without them. With the settings as they are, the pieces equal those of the script, its
oddities included: the length of a match counts one space between words whatever stands there, and a
document of fewer than 13 words is never searched.
"""

import bisect
import codecs
import functools
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
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

# Kana, ideographs with their extensions and compatibility forms.
_CJK = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORDS = {"spaced": re.compile(r"\w+"), "characters": re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")}
TEST_KINDS = LINES + JSON + TEXT + TABLE + PARQUET
_UNITS = {".json": "item", ".parquet": "row"}
_NO_LIMIT = 1 << 40  # bytes of a row
_ENOUGH = 20  # documents; of fewer, all may hold a leak
_ENDS = {"spaced": ".!?", "characters": ".!?。！？"}


@dataclass(frozen=True)
class Decontamination:
    """Megatron-LM's settings. ``max_words`` a n-gram; a test text of ``min_words`` or more, but
    fewer than that, is one n-gram itself. N-grams that occur ``key_threshold`` times or more in the
    corpus stay. ``side`` characters go on each side of a match, and on to the end of a sentence; a
    piece that is left has more than ``min_characters``; a document in more than ``max_pieces`` is
    dropped.

    ``words="spaced"`` takes a whole run of Chinese characters for one word, as the script does, and
    so finds no leak in Chinese; with "characters" each Chinese or Japanese character is a word, and
    。！？ end sentences, too. As 13 characters say no more than some 8 English words, more
    ``max_words`` may then be wanted.
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
                f"min_words={self.min_words} must lie between 1 and max_words={self.max_words}"
            )
        if self.words not in _WORDS:
            raise ValueError(
                f"words={self.words!r} is not known; use {' or '.join(map(repr, _WORDS))}"
            )
        for name in ("key_threshold", "side", "min_characters", "max_pieces"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; give 0 or more")


@dataclass(frozen=True)
class NGrams:
    """N-grams of test texts: lower-case words joined by one space each."""

    keys: frozenset[str]
    config: Decontamination = Decontamination()

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The numbers of words that n-grams have, ascending."""
        return sorted({key.count(" ") + 1 for key in self.keys})

    @functools.cached_property
    def heads(self) -> frozenset[str]:
        """The first words of each n-gram, as many as the shortest has: where none begins, nothing
        can match."""
        least = self.lengths[0] if self.keys else 0
        return frozenset(" ".join(key.split(" ", least)[:least]) for key in self.keys)

    @functools.cached_property
    def samples(self) -> tuple[int, frozenset[str]]:
        """(stride, sequences of words): wherever a head stands in a text, one of these stands at a
        multiple of the stride, so that a look at every fifth word or so is enough to pass over a
        clean text."""
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
        return {
            "keys": self.keys,
            "config": self.config,
        }  # what is cached is sooner made again than sent


def ngrams(texts: Iterable[str], config: Decontamination = Decontamination()) -> NGrams:  # noqa: B008
    """Every ``max_words`` words in a row of the texts of test sets, and texts that are a little
    shorter as a whole.

    Raises ValueError where there is no text, or none with ``min_words`` words.
    """
    keys = set()
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
            "the test sets hold no text, so nothing would be found; name their files and keys, or leave "
            "decontamination out"
        )
    if not keys:
        raise ValueError(
            f"none of {count} test texts has min_words={config.min_words} words; is it the right key, "
            "and are the texts Chinese, which needs words='characters'?"
        )
    return NGrams(frozenset(keys), config)


def words_of(text: str, config: Decontamination) -> int:
    """How many words a test text has: one of fewer than ``min_words`` makes no n-gram."""
    return len(_WORDS[config.words].findall(text.lower()))


class _Search:
    """Matches in a document, one after the other; after each the caller says from where on to
    search."""

    def __init__(self, text: str, ngrams: NGrams):
        self.text = text
        self.ngrams = ngrams
        self.config = ngrams.config
        self.base = 0  # where the part begins that is searched
        self._pattern = _WORDS[self.config.words]
        lowered = text.lower()
        # Of a part, lower() gives another text than of the whole where the end of a word is written
        # in another way, or where one character becomes two, which the script does not notice when
        # it cuts.
        self._stable = len(lowered) == len(text) and "\u03a3" not in text
        self._read(lowered)

    def _read(self, lowered: str) -> None:
        self._words = self._pattern.findall(lowered)
        self._lowered = lowered
        self._first = 0
        self._starts = None
        words = self._words
        heads = self.ngrams.heads
        stride, samples = self.ngrams.samples
        least = (self.ngrams.lengths or [1])[0]
        sequences = zip(
            *(words[start::stride] for start in range(least - stride + 1)), strict=False
        )
        sampled = map(samples.__contains__, map(" ".join, sequences))
        self._hits = [
            number
            for place in itertools.compress(range(0, len(words), stride), sampled)
            for number in range(max(place - stride + 1, 0), place + 1)
            if number <= len(words) - self.config.max_words
            and " ".join(words[number : number + least]) in heads
        ]

    def find(self) -> tuple[int, int, str] | None:
        """(start, length, n-gram) of the first match. At each word the longest n-grams are tried
        first, then the others from the shortest on; the last words have only room for shorter
        ones."""
        words = self._words
        keys = self.ngrams.keys
        lengths = self.ngrams.lengths
        size = self.config.max_words
        last = len(words) - size
        hits = self._hits[bisect.bisect_left(self._hits, self._first) :]
        if self._first <= last and self._first not in hits[:1]:
            hits = [self._first, *hits]  # its word may have been cut
        places = ((number, length) for number in hits for length in (size, *lengths))
        if self._first < last:
            ending = (
                (number, length)
                for length in lengths
                if length != size
                for number in range(last, len(words) - length + 1)
            )
            places = itertools.chain(places, ending)
        for number, length in places:
            key = " ".join(words[number : number + length])
            if key in keys:
                if self._starts is None:
                    offset = 0 if self._stable else self.base
                    self._starts = [
                        offset + match.start() for match in self._pattern.finditer(self._lowered)
                    ]
                start = self._starts[number]
                if self.config.words == "spaced":
                    return start, len(key), key
                final = number + length - 1
                return start, self._starts[final] + len(words[final]) - start, key
        return None

    def go_on(self, base: int) -> None:
        self.base = base
        if not self._stable:
            self._read(self.text[base:].lower())
            return
        self._first = bisect.bisect_left(self._starts, base)
        before = self._first - 1
        if before >= 0 and self._starts[before] + len(self._words[before]) > base:
            self._words[before] = self._words[before][base - self._starts[before] :]
            self._starts[before] = base
            self._first = before


def frequencies(text: str, ngrams: NGrams) -> dict[str, int]:
    """How often each n-gram occurs in a document. After a match the search goes on behind it, so
    that of overlapping n-grams the first alone counts. The counts of a corpus are the sums over its
    documents."""
    counts = {}
    search = _Search(text, ngrams)
    while match := search.find():
        start, length, key = match
        counts[key] = counts.get(key, 0) + 1
        if start + length + 1 >= len(text):
            break
        search.go_on(start + length + 1)
    return counts


def below(ngrams: NGrams, counts: Mapping[str, int]) -> NGrams:
    """The n-grams that occur fewer than ``key_threshold`` times; ``counts`` are those of the whole
    corpus."""
    threshold = ngrams.config.key_threshold
    return replace(
        ngrams, keys=frozenset(key for key in ngrams.keys if counts.get(key, 0) < threshold)
    )


def pieces(text: str, ngrams: NGrams) -> tuple[list[str], list[str]]:
    """(pieces, n-grams that matched): the document itself where nothing matched, otherwise what is
    left of it, which is nothing where too little is left or in too many pieces."""
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
    """Raises ValueError where more than the share ``limit`` of the documents matched, which no leak
    does: then a test set is the corpus itself, or was made of it."""
    if documents >= _ENOUGH and hit > limit * documents:
        raise ValueError(
            f"{hit} of {documents} documents hold text of the test sets, more than a share of {limit}; is "
            "one of the test sets the corpus itself? Then take it out of the test sets"
        )


class TestText(NamedTuple):
    """A text of a test set: its ``field``, a key or column, "line" or "paragraph" of a .txt; None
    for ``text`` where the field holds a number, or is not one that counts."""

    field: str
    text: str | None


def read_test_texts(
    file: str | os.PathLike | File, keys: Iterable[str] = (), encoding: str = ""
) -> Iterator[TestText]:
    """The texts of an evaluation set: each string under one of ``keys`` (as "question"; none: under
    any key), however deep it lies in the rows of .jsonl, .json (lists, objects, one after another),
    .csv, .tsv and .parquet; columns of a table by the names of its first line, or by numbers from
    "0" on, where each line is a row. Of .txt and the like each line, and each paragraph of several.
    Files may be compressed, and lie where fsspec finds them.

    Raises FileNotFoundError, and ValueError for another suffix, what is not valid or not in its
    ``encoding`` (`charsets`), or where no key is found.
    """
    if isinstance(keys, str):
        raise ValueError(f"keys={keys!r} is one string; give a list, as [{keys!r}]")
    keys = tuple(keys)
    file = file if isinstance(file, File) else File(str(file), os.path.basename(str(file)), 0, "")
    kind = kind_of(file.name)
    if kind not in TEST_KINDS:
        raise ValueError(
            f"{file.path} has a suffix that is not read; a test set is {' '.join(TEST_KINDS)}, also with "
            f"{' '.join(PACKED)}"
        )
    names = {}  # in the order of the file, for the message
    for row in _test_rows(file, kind, keys, encoding):
        place = f"{file.path}, {_UNITS.get(kind, 'line')} {row.number}"
        if isinstance(row.value, Damaged):
            raise ValueError(f"{place}: {row.value}; mend the test set")
        if row.wrong:
            raise ValueError(
                f"{place}: {row.wrong}; name its encoding, as in encoding=cp1252, or mend the test set"
            )
        if kind in TEXT:
            yield TestText(*row.value)
        else:
            yield from _fields(row.value, keys, names, "text")
    if keys and kind not in TEXT and not names.keys() & set(keys):
        raise ValueError(
            f"{file.path} has none of the keys {', '.join(keys)}; it has {', '.join(list(names)[:12])}"
        )


def _test_rows(file: File, kind: str, keys: tuple[str, ...], encoding: str) -> Iterator[rows.Row]:
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
                # Without names each line is a row, the first one, too: whether that names columns
                # cannot be told.
                named = keys and not all(key.isdecimal() for key in keys)
                found = (rows.table if named else rows.cells)(stream, kind, _NO_LIMIT)
                yield from found if named else map(_numbered, found)
            else:
                yield from (json_rows.json_values if kind in JSON else json_rows.json_lines)(
                    stream, _NO_LIMIT
                )
    except COMPRESSION_ERRORS as error:
        yield rows.Row(1, Damaged(f"the compressed file is cut short or damaged ({error})"))


def _decoded(row: rows.Row, encoding: str) -> rows.Row:
    if isinstance(row.value, Damaged):
        return row
    values = {}
    wrong = None
    for name, value in row.value.items():
        if isinstance(value, bytes):
            value, bad = charsets.decode(value)
            wrong = wrong or bad
        values[name] = value
    return rows.Row(row.number, values, wrong)


def _numbered(row: rows.Row) -> rows.Row:
    return (
        row
        if isinstance(row.value, Damaged)
        else row._replace(value=dict(zip(map(str, range(len(row.value))), row.value, strict=True)))
    )


def _lines_of(stream: io.BufferedReader) -> Iterator[rows.Row]:
    """(field, text) of each line, and of each paragraph of several: a test may lie in the corpus
    wrapped elsewhere."""
    paragraph = []
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


def _fields(value, keys: tuple[str, ...], names: dict[str, None], name: str) -> Iterator[TestText]:
    """Of a JSON value below the key ``name``. What lies below a key that counts has other keys of
    its own."""
    if isinstance(value, list):
        for item in value:
            yield from _fields(item, keys, names, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            names[key] = None
            yield from _fields(item, keys, names, key)
    elif value is not None:
        counts = isinstance(value, str) and (not keys or name in keys)
        yield TestText(name, value if counts else None)

"""A glossary of translations, and the memory of what was chosen for words outside it."""

import collections
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtnlg_jax import command
from mtnlg_jax.data.segment import UNSPACED, words
from mtnlg_jax.tasks.text import normalize

SUFFIXES = (".tsv", ".txt", ".json", ".jsonl", ".ndjson")
# A word must have stood beside its translation in this share of their groups.
_ASSOCIATED = 0.5


@dataclass(frozen=True)
class Term:
    source: str
    target: str


def read_glossary(path: str | os.PathLike) -> tuple[Term, ...]:
    """Read the terms of a file: .tsv or .txt (source, tab, target), .jsonl, .ndjson or .json.

    A JSON line is {"source": ..., "target": ...}. A .json file holds a list of them, or one object
    {source: target, ...}. A first line "source<tab>target" is a header.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not UTF-8, a term is incomplete, or two terms give one source
        different targets.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"glossary {path} has an unknown suffix; give one of {', '.join(SUFFIXES)}"
        )
    _, text = command.read_text(os.fspath(path), "the glossary", "utf-8-sig")
    read = _tab_separated if suffix in (".tsv", ".txt") else _json
    terms: dict[str, tuple[str, Term]] = {}
    for where, source, target in read(path, text):
        if not source.strip() or not target.strip():
            raise ValueError(
                f"glossary {path}, {where}: a term has a source and a target, such as "
                f"{source.strip() or 'network'}<tab>{target.strip() or '网络'}; complete it, or "
                "leave the line out"
            )
        term = Term(normalize(source), normalize(target))
        folded = term.source.casefold()
        before, known = terms.setdefault(folded, (where, term))
        if known.target != term.target:
            raise ValueError(
                f"glossary {path} contradicts itself: {before} translates {known.source!r} as "
                f"{known.target!r}, and {where} as {term.target!r}; keep one of them"
            )
    if not terms:
        raise ValueError(f"glossary {path} holds no terms; give at least one, or leave it out")
    return tuple(term for _, term in terms.values())


def _tab_separated(path: Path, text: str) -> Iterable[tuple[str, str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        if number == 1 and [each.strip().lower() for each in columns[:2]] == ["source", "target"]:
            continue
        yield f"line {number}", columns[0], columns[1] if len(columns) > 1 else ""


def _json(path: Path, text: str) -> Iterable[tuple[str, str, str]]:
    try:
        if path.suffix.lower() == ".json":
            # Pairs and not a dict, which would keep only the last of two equal keys.
            found = json.loads(text, object_pairs_hook=list)
            if not isinstance(found, list):
                raise ValueError("it holds neither a list nor an object")
            items = [(f"entry {number}", item) for number, item in enumerate(found, 1)]
        else:
            items = [
                (f"line {number}", json.loads(line, object_pairs_hook=list))
                for number, line in enumerate(text.split("\n"), 1)
                if line.strip()
            ]
    except ValueError as error:
        raise ValueError(f"glossary {path} is not valid JSON: {error}") from None
    for where, item in items:
        if isinstance(item, tuple):
            source, target = item  # of one object {source: target, ...}
        else:
            fields = dict(item) if _is_object(item) else {}
            source = fields.get("source", "")
            target = fields.get("target", "")
        if not isinstance(source, str) or not isinstance(target, str):
            raise ValueError(f"glossary {path}, {where}: source and target must be texts")
        yield where, source, target


def _is_object(item) -> bool:
    return isinstance(item, list) and all(isinstance(pair, tuple) for pair in item)


def terms_in(text: str, terms: Sequence[Term]) -> list[Term]:
    """Return the terms whose source occurs in a text, in the order of the terms.

    Where terms overlap, as "network" and "network card", the longer one counts.
    """
    taken: list[tuple[int, int]] = []
    found = set()
    for term in sorted(terms, key=lambda term: -len(term.source)):
        for match in pattern_of(term.source).finditer(text):
            if all(match.end() <= start or end <= match.start() for start, end in taken):
                taken.append(match.span())
                found.add(term)
    return [term for term in terms if term in found]


def honours(text: str, term: Term) -> bool:
    """Return whether a translation contains the target of a term, in any case."""
    return pattern_of(term.target).search(text) is not None


@functools.lru_cache(1 << 14)
def pattern_of(term: str) -> re.Pattern:
    """Return a pattern that finds a term in any case."""
    # Whole words, with the endings of an English plural; no word boundaries in Chinese.
    escaped = re.escape(term).replace(r"\ ", r"\s+")
    if UNSPACED.search(term):
        return re.compile(escaped)
    return re.compile(rf"(?<!\w){escaped}(?:s|es)?(?!\w)", re.IGNORECASE)


class TermMemory:
    """Which words of the target stood beside each word of the source so far.

    A word is a word of five letters or more, or a pair of Chinese characters. The association of a
    source word with a target word is Dice's coefficient over the groups translated so far
    (Dice 1945): 2 n(both) / (n(source) + n(target)).
    """

    def __init__(self):
        self._source: collections.Counter[str] = collections.Counter()
        self._target: collections.Counter[str] = collections.Counter()
        self._both: dict[str, collections.Counter[str]] = {}

    def add(self, source: str, target: str) -> None:
        """Remember a group and the translation that was chosen for it."""
        ours = _content(source)
        theirs = _content(target)
        self._source.update(ours)
        self._target.update(theirs)
        for word in ours:
            self._both.setdefault(word, collections.Counter()).update(theirs)

    def consistency(self, source: str, target: str) -> float | None:
        """Return how far a translation repeats earlier choices, 0 to 1.

        It is the mean over the source's known words: the best association with a word of
        ``target``, over the best with any word. None if no word has an association of 0.5 or more.
        """
        theirs = _content(target)
        shares = []
        for word in _content(source):
            best = self._best(word)
            if best:
                here = max((self._dice(word, each) for each in theirs), default=0.0)
                shares.append(here / best)
        return sum(shares) / len(shares) if shares else None

    def _best(self, word: str) -> float:
        """Return the best association of a source word, or 0 below 0.5."""
        best = max((self._dice(word, other) for other in self._both.get(word, ())), default=0.0)
        return best if best >= _ASSOCIATED else 0.0

    def _dice(self, source: str, target: str) -> float:
        both = self._both[source][target]
        return 2 * both / (self._source[source] + self._target[target])


def _content(text: str) -> set[str]:
    found = words(text)
    long = {word for word in found if len(word) >= 5}
    characters = [word if UNSPACED.match(word) else "" for word in found]
    pairs = zip(characters, characters[1:], strict=False)
    return long | {one + other for one, other in pairs if one and other}

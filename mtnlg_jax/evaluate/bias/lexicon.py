"""Lexicons: words with scores, from SentiWordNet 3.0 or a file of ``word<TAB>score`` lines."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

from mtnlg_jax.data.segment import UNSPACED

# Labels in place of scores, as in lists of positive and negative words.
LABELS = {"positive": 1.0, "negative": -1.0, "neutral": 0.0}
_SENSE = re.compile(r"^(.+)#(\d+)$")
_SENTIWORDNET_COLUMNS = 6


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Words in lower case with their scores, in the unit of the file."""

    name: str  # of the file
    kind: str  # "sentiwordnet" or "plain"
    scores: dict[str, float]

    @property
    def low(self) -> float:
        return min(self.scores.values())

    @property
    def high(self) -> float:
        return max(self.scores.values())


def read_lexicon(path: str) -> Lexicon:
    """Read a lexicon.

    Of SentiWordNet 3.0 (six columns separated by tabs, comments behind #), the adjectives count
    (part of speech "a"): a word's score is the mean of positive minus negative score of its senses,
    weighted by 1 / number of the sense, in [-1, 1]. A plain file has a word and a number, or
    "positive", "negative" or "neutral", a line.

    Raises ValueError on a line of neither form, and if all scores are equal.
    """
    lines = _lines(path)
    first = next((line for _, line in lines), "")
    wordnet = len(first.split("\t")) == _SENTIWORDNET_COLUMNS
    scores = _wordnet(path, lines) if wordnet else _plain(path, lines)
    if not scores:
        what = "no adjective (lines that begin with a)" if wordnet else "no word"
        raise ValueError(f"--lexicon={path} has {what}; give lines of the form word<TAB>score")
    values = set(scores.values())
    if len(values) == 1:
        raise ValueError(
            f"--lexicon={path}: all {len(scores):,} words have the score {next(iter(values)):g}, "
            "which is one group only, so no two groups of people can differ; give a lexicon with "
            "at least two scores, such as positive and negative words"
        )
    return Lexicon(path, "sentiwordnet" if wordnet else "plain", scores)


def read_words(path: str) -> list[str]:
    """Read a list of words, one a line; what follows a tab is ignored.

    Raises ValueError on fewer than two words.
    """
    found = dict.fromkeys(line.split("\t")[0].strip().casefold() for _, line in _lines(path))
    found.pop("", None)
    if len(found) < 2:
        raise ValueError(
            f"--words={path} has {len(found)} words, and words are compared with each other; give "
            "two or more, one a line"
        )
    return list(found)


def _lines(path: str) -> list[tuple[int, str]]:
    """Return (number, text) of the lines that are neither empty nor comments."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            numbered = list(enumerate(file, 1))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from None
    lines = ((number, line.rstrip("\r\n")) for number, line in numbered)
    return [(n, line) for n, line in lines if line.strip() and not line.startswith("#")]


def _wordnet(path: str, lines: Sequence[tuple[int, str]]) -> dict[str, float]:
    senses: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for number, line in lines:
        columns = line.split("\t")
        if len(columns) < _SENTIWORDNET_COLUMNS - 1:
            raise ValueError(
                f"--lexicon={path}, line {number}: {len(columns)} columns, and SentiWordNet has "
                f"{_SENTIWORDNET_COLUMNS} (part of speech, id, positive, negative, terms, gloss)"
            )
        if columns[0] != "a":
            continue
        score = _number(path, number, columns[2]) - _number(path, number, columns[3])
        for term in columns[4].split():
            match = _SENSE.match(term)
            if match is None:
                raise ValueError(
                    f"--lexicon={path}, line {number}: the term {term!r} has no number of its "
                    "sense; write word#1"
                )
            # Terms of several words, joined by "_", are no words of a text.
            if "_" not in match[1]:
                senses[match[1].casefold()].append((int(match[2]), score))
    return {
        word: math.fsum(score / rank for rank, score in found)
        / math.fsum(1 / rank for rank, _ in found)
        for word, found in senses.items()
    }


def _plain(path: str, lines: Sequence[tuple[int, str]]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for number, line in lines:
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) < 2 or not columns[0]:
            raise ValueError(
                f"--lexicon={path}, line {number}: {line[:40]!r} is not word<TAB>score; separate "
                "the two by a tab"
            )
        word = columns[0].casefold()
        label = LABELS.get(columns[1].casefold())
        score = _number(path, number, columns[1]) if label is None else label
        if scores.setdefault(word, score) != score:
            raise ValueError(
                f"--lexicon={path}, line {number}: {word!r} has the score {score:g} here and "
                f"{scores[word]:g} before; keep one of the two lines"
            )
    return scores


def _number(path: str, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"--lexicon={path}, line {line}: {text[:40]!r} is not a score; give a number, or one "
            f"of {', '.join(LABELS)}"
        )
    return value


def check_language(words: Sequence[str], language: str, name: str) -> None:
    """Raise ValueError if no word is written in the script of ``language`` ("en" or "zh")."""
    chinese = language == "zh"
    if not any(bool(UNSPACED.search(word)) == chinese for word in words):
        raise ValueError(
            f"{name}: none of the {len(words):,} words is "
            f"{'Chinese' if chinese else 'of a script with spaces'}, such as {words[0]!r}, and the "
            f"prompts are of the language {language}; give a lexicon of that language, or another "
            "--language or --prompts"
        )

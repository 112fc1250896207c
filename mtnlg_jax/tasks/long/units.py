"""Split a document into paragraphs, list items and headings, and those into sentences.

All of it is exact: the pieces joined are the text. English and Chinese have their own rules.
"""

import re
from dataclasses import dataclass

from mtnlg_jax.data.segment import HAN, sentences

# "10 月", "5 个人" and "三、四个" are words and no list marker.
_COUNTED = "年月日号时点分秒周天岁世个位名人只条件次块元万亿千百里米层楼句段页章节"
_DIGITS = "一二三四五六七八九十"
# What stands before the words of a heading, a list item or a quoted line.
_MARKER = re.compile(
    r"[ \t\u3000]*(?:>[ \t]*)*(?:"
    r"#{1,6}[ \t]+"
    r"|[-*+\u2022\u2023\u25e6\u25aa\u00b7\u25cf\u25cb\u25a0\u2013\u2014][ \t]+"
    r"|[(（]?\d{1,3}(?:\.\d{1,3})*(?:[.)][ \t]+|[）、][ \t]*)"
    rf"|\d{{1,3}}(?:\.\d{{1,3}})*\.?[ \t]*(?=[{HAN}])(?![{_COUNTED}])(?<=[. \t])"
    r"|\d{1,3}(?:\.\d{1,3})+[ \t]+(?=[A-Z])"
    r"|[(（]?(?:[a-z]|[ivx]{1,5})[.)][ \t]+|[A-Z]\)[ \t]+"
    rf"|[(（]?[{_DIGITS}百]{{1,4}}[、）)](?![{_DIGITS}])[ \t]*"
    r")?"
)
_QUOTE = re.compile(r"[ \t\u3000]*(?:>[ \t]*)*")
_QUOTES = {"“": "”", '"': '"', "「": "」", "『": "』", "«": "»"}
OPENING = "".join(_QUOTES)
CLOSING = "".join(_QUOTES.values())
# Three back quotes begin or end code; a line of code between back quotes is words.
_FENCE = re.compile(r"\s*```[^`]*\Z")
_FINAL = re.compile(r"[.!?:。！？：…][\"'”’」』)）]*\s*$")
# Lines of a text that was wrapped are about this long.
_WRAPPED = range(30, 121)
_FIRST_WORD = re.compile(rf"[{HAN}]|[^\s{HAN}]+")
# Titles and initials never end a sentence. The others end one unless a small letter follows.
_TITLE = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Mme|Dr|St|Prof|Rev|Hon|Capt|Col|Gen|Lt|Sgt|Messrs|No|Fig|vs|e\.g|i\.e)"
    r"|(?<![\w.])[A-HJ-Z])\.\s+$"
)


@dataclass(frozen=True)
class Unit:
    """A paragraph, list item or heading: the characters [start, end) of its document."""

    start: int
    end: int
    lead: str  # blank lines, list marker, quotation mark ... between the unit before and this one
    text: str  # the words; line breaks inside are those of wrapping


@dataclass(frozen=True)
class Layout:
    """A document as units: the leads and texts in turn, then the tail, are its text."""

    units: tuple[Unit, ...]
    tail: str

    def with_texts(self, texts: list[str]) -> str:
        """Return the document with other texts in place of those of the units."""
        pairs = zip(self.units, texts, strict=True)
        return "".join(unit.lead + text for unit, text in pairs) + self.tail


def layout_of(text: str) -> Layout:
    """Return the units of a text with LF line ends.

    Blank lines separate units, as do list markers and headings. Other lines are units of their own,
    unless the text is wrapped (`_wrapped_width`): then a line goes on with the one before it if its
    first word would not have fitted there. Lines without letters and digits, and those between
    lines of three back quotes, belong to no unit.
    """
    lines = text.split("\n")
    width = _wrapped_width(lines)
    spans: list[list[int]] = []  # [start, end] of the words of each unit
    fenced = False
    before = ""  # the line before, if its unit may go on
    head = ""  # the first line of that unit
    at = 0
    for line in lines:
        fence = _FENCE.match(line) is not None
        fenced ^= fence
        if fenced or fence or not _has_words(line):
            before = ""
        else:
            start = at + _marker_length(line)
            end = at + len(line.rstrip())
            if before and _continues(head, before, line, width):
                spans[-1][1] = end
            else:
                spans.append([start, end])
                head = line
            before = line
        at += len(line) + 1
    return _laid_out(text, spans)


def _wrapped_width(lines: list[str]) -> int:
    """Return the width to which a text was wrapped, or 0.

    It was wrapped if its longest line has 30 to 120 characters, and at least half of the line
    breaks inside blocks come at a full line that does not end a sentence.
    """
    width = max(map(len, lines))
    if width not in _WRAPPED:
        return 0
    pairs = zip(lines, lines[1:], strict=False)
    breaks = [pair for pair in pairs if _has_words(pair[0]) and _has_words(pair[1])]
    wraps = sum(_full(before, line, width) and not _FINAL.search(before) for before, line in breaks)
    return width if breaks and 2 * wraps >= len(breaks) else 0


def _has_words(line: str) -> bool:
    return any(character.isalnum() for character in line)


def _marker_length(line: str) -> int:
    found = _MARKER.match(line)
    length = found.end() if found else 0
    # A line that is a marker and nothing else is all words.
    return length if _has_words(line[length:]) else _indent(line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _quote(line: str) -> str:
    """Return the indentation of a line with its ">"."""
    found = _QUOTE.match(line)
    return found[0] if found else ""


def _is_item(line: str) -> bool:
    """Return whether a line is a list item or a heading."""
    return _marker_length(line) > len(_quote(line))


def _continues(head: str, before: str, line: str, width: int) -> bool:
    """Return whether ``line`` goes on with the unit from ``head`` to ``before``."""
    above = _quote(before)
    here = _quote(line)
    if above.count(">") != here.count(">"):
        return False
    if _is_item(line) or before[len(above) :].startswith("#"):
        return False  # a list item or heading, or the line after one
    if _is_item(head) and len(here) >= len(_quote(head)) + 2:
        return True  # a hanging line of a list item
    return bool(width) and _full(before, line, width)


def _full(before: str, line: str, width: int) -> bool:
    """Return whether the first word of ``line`` would not have fitted into the line before."""
    first = _FIRST_WORD.search(line, len(_quote(line)))
    return first is not None and len(before.rstrip()) + 1 + len(first[0]) > width


def _laid_out(text: str, spans: list[list[int]]) -> Layout:
    units = []
    last = 0
    for start, end in spans:
        inner_start = start
        inner_end = end
        close = _QUOTES.get(text[start])
        inside = text[start + 1 : end - 1]
        quoted = close and end - start > 2 and text[end - 1] == close
        if quoted and not set(inside) & {text[start], close}:
            inner_start += 1
            inner_end -= 1
        units.append(
            Unit(inner_start, inner_end, text[last:inner_start], text[inner_start:inner_end])
        )
        last = inner_end
    return Layout(tuple(units), text[last:])


def unwrapped(text: str) -> str:
    """Return the text of a unit on one line; Chinese lines are joined without a space."""
    text = re.sub(rf"(?<=[{HAN}，。！？；：、])[ \t]*\n[ \t>]*(?=[{HAN}“「『（])", "", text)
    return re.sub(r"[ \t]*\n[ \t>]*", " ", text)


def whole_sentences(text: str) -> list[str]:
    """Split a text into sentences with the white space after them.

    Unlike `tasks.text.sentences`, "Mr. Smith", "J. Smith" and "3 p.m. today" are not split.
    """
    found: list[str] = []
    for piece in sentences(text):
        joins = found and (
            not found[-1].strip()
            or _TITLE.search(found[-1])
            or (found[-1].rstrip().endswith(".") and piece[:1].islower())
        )
        if joins:
            found[-1] += piece
        else:
            found.append(piece)
    return found

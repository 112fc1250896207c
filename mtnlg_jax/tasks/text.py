"""Normalize and shorten input texts, and clean up generated answers.

English and Chinese ("en", "zh") have their own rules; other languages are treated as English.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from mtnlg_jax.data.segment import HAN, SENTENCE, WORDS, sentences

_FULL = "，。！？；：、“”‘’（）《》【】「」『』…"
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff\ufffd]")
_WORD = re.compile(rf"[{HAN}]|[^\s{HAN}]+")

_HALF_OF = dict(zip("，。！？；：", ",.!?;:", strict=True))
_FULL_OF = {half: full for full, half in _HALF_OF.items()}
# Full-width digits and letters become plain ones in both languages.
_PLAIN = {
    code: code - 0xFEE0
    for first, last in ("０９", "ＡＺ", "ａｚ")
    for code in range(ord(first), ord(last) + 1)
}


def ascii_share(texts: Sequence[str]) -> float:
    """Return the share of letters that are ASCII, 0 to 1; 1 for texts without letters."""
    letters = plain = 0
    for text in texts:
        if text.isascii():
            count = sum(map(str.isalpha, text))
            letters += count
            plain += count
        else:
            alphabetic = [character for character in text if character.isalpha()]
            letters += len(alphabetic)
            plain += sum(map(str.isascii, alphabetic))
    return plain / letters if letters else 1.0


def normalize(text: str, lines: bool = False) -> str:
    """Return the text in NFC, without control characters, with single spaces and none at the ends.

    With ``lines``, line breaks and the spaces inside lines are kept, as are spaces before the first
    word.
    """
    text = _CONTROLS.sub(
        "", unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    )
    return text.rstrip().lstrip("\n") if lines else " ".join(text.split())


def cut(text: str, keep: str, fits: Callable[[str], bool]) -> str:
    """Return the longest part of a text that fits, or "" if nothing fits.

    The part consists of whole sentences or, if not even one sentence fits, of words or Chinese
    characters. ``keep`` is "start", "end", or "both": the beginning and the end with " … " between
    them, because a review states its opinion there. Calls ``fits`` about 2 log2(words) times.
    """
    if fits(text):
        return text
    for pattern in (SENTENCE, _WORD):
        spans = [match.span() for match in pattern.finditer(text)]
        low = 0
        high = len(spans) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if fits(_part(text, spans, keep, middle)):
                low = middle
            else:
                high = middle - 1
        if low:
            return _part(text, spans, keep, low)
    return ""


def _part(text: str, spans, keep: str, count: int) -> str:
    if keep == "end":
        return text[spans[-count][0] :]
    if keep == "start" or count == 1:
        return text[: spans[count - 1][1]].rstrip()
    last = count // 2
    return f"{text[: spans[count - last - 1][1]].rstrip()} … {text[spans[-last][0] :]}"


def clean(text: str, language: str, stops: Sequence[str] = (), joined: bool = False) -> str:
    """Clean up a generated text.

    The steps are, in this order: cut at the first of ``stops``; merge word pieces (SentencePiece's
    ``▁``, ``##`` and ``@@``); normalize white space; normalize punctuation to full width next to
    Chinese characters and to half width elsewhere, and remove doubled marks; remove sentences that
    occurred before. A text that continues its prompt (``joined``) keeps its white space,
    punctuation and first space, and only sentences that repeat the previous one are removed.
    """
    for stop in stops:
        text = text.partition(stop)[0]
    text = _CONTROLS.sub("", unicodedata.normalize("NFC", text))
    text = re.sub(r"(?<=\w)\s*##(?=\w)|(?<=\w)@@\s+(?=\w)", "", text.replace("\u2581", " "))
    if joined:
        return _without_repeats(text, joined).rstrip()
    text = " ".join(text.split()).translate(_PLAIN)
    return _without_repeats(_punctuated(text, language), joined).strip()


def _punctuated(text: str, language: str) -> str:
    if language == "zh":
        # Leave 3.14, 10:30 and domain names alone.
        text = re.sub(
            rf"(?<=[{HAN}”’）》】」』])\s*(?:([,!?;])|([.:])(?![\w.]))",
            lambda match: _FULL_OF[match[1] or match[2]],
            text,
        )
        text = re.sub(rf"[,!?;](?=\s*[{HAN}])", lambda match: _FULL_OF[match[0]], text)
        text = re.sub(rf"(?<=[{HAN}{_FULL}])\s+(?=[{HAN}{_FULL}])", "", text)
        text = re.sub(r"\s+(?=[，。！？；：、）》】])|(?<=[，。！？；：、（《【])\s+", "", text)
    else:
        text = re.sub(
            rf"(?<![{HAN}])\s*([，。！？；：])(?![{HAN}])\s*",
            lambda match: _HALF_OF[match[1]] + " ",
            text,
        )
        text = re.sub(r"\s+(?=[,.;:!?%)\]}]+(?:[\s\"”’]|\Z))|(?<=[(\[{])\s+", "", text)
        # "do n't", as treebanks write it.
        text = re.sub(r"(?<=\w)\s+(?=(?:n't|'(?:s|re|ve|ll|d|m))\b)", "", text)
    text = re.sub(r"([,，、;；。!！?？])\1+", r"\1", text)
    return re.sub(r"\.{4,}", "...", re.sub("…{3,}", "……", text))


def _without_repeats(text: str, adjacent: bool) -> str:
    kept = []
    seen: list[str] = []
    for sentence in sentences(text):
        words = "".join(WORDS.findall(sentence.casefold()))
        if words and words in (seen[-1:] if adjacent else seen):
            continue
        seen += [words] * bool(words)
        kept.append(sentence)
    return "".join(kept)

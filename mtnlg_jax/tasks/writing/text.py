"""Count the words of what is written, and end it at a sentence or a word."""

import re

from mtnlg_jax.data.segment import WORDS, sentences
from mtnlg_jax.tasks.text import normalize

# The end of a sentence, with the quotation marks and brackets that close behind it.
_ENDS = re.compile(r"[.!?。！？…][\"'”’」』）》)\]]*\Z")
# A point behind these does not end a sentence.
_SHORT = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Capt|Col|Gen|No|vs|etc)|\b[A-Z])\.\Z")
# A sentence end counts up to this part above the words that were asked for, and this many more.
_OVER = 0.15
_OVER_WORDS = 8


def count_words(text: str) -> int:
    """Return the number of words; each Chinese character counts as one, punctuation as none."""
    return len(WORDS.findall(text))


def ends_sentence(text: str) -> bool:
    """Return whether a text ends where a sentence ends."""
    text = text.rstrip()
    return bool(_ENDS.search(text)) and not _SHORT.search(text)


def begins_sentence(text: str) -> bool:
    """Return whether a text may begin a sentence: with no small letter and no closing mark."""
    return (
        bool(text) and not text[0].islower() and text[0] not in ".,;:!?)]}，。；：！？、）》」』”’"
    )


def tidy(text: str, opens: bool = False) -> str:
    """Return a continuation without control characters, and without white space at its end.

    White space at its start becomes a paragraph break, one space or nothing; with ``opens`` it is
    dropped, because the text begins a section. More than one empty line becomes one.
    """
    body = text.lstrip()
    lead = text[: len(text) - len(body)]
    body = re.sub(r"\n[ \t]*\n\s*", "\n\n", normalize(body, lines=True))
    if opens or not body:
        return body
    return ("\n\n" if lead.count("\n") > 1 else "\n" if "\n" in lead else lead[:1]) + body


def whole_words(text: str) -> str:
    """Return a text that was cut off, without the last word, which may be incomplete.

    A text of one word, and one that ends in a script without spaces, stay as they are.
    """
    shorter = re.sub(r"(?<=\s)[\x21-\u024f\u2019\u201d]+\Z", "", text)
    return shorter if count_words(shorter) else text


def sentence_ends(text: str) -> list[tuple[int, int]]:
    """Return (characters, words) up to each end of a sentence, in their order."""
    found = []
    characters = 0
    number = 0
    for sentence in sentences(text):
        number += count_words(sentence)
        end = characters + len(sentence.rstrip())
        characters += len(sentence)
        if ends_sentence(text[:end]):
            found.append((end, number))
    return found


def end_near(text: str, words: int) -> str:
    """Return the beginning of a text that ends at a sentence, with about ``words`` words.

    Of the ends of sentences up to 15 % and 8 words above ``words``, the nearest one is taken. If
    there is none, the text ends behind that number of words.
    """
    most = words * (1 + _OVER) + _OVER_WORDS
    ends = [(abs(number - words), end) for end, number in sentence_ends(text) if number <= most]
    if ends:
        return text[: min(ends)[1]]
    matches = list(WORDS.finditer(text))
    return text if len(matches) <= words else text[: matches[words - 1].end()]


def settled(text: str, words: int) -> str:
    """Return the beginning of a growing text that `end_near` keeps, whatever follows."""
    # Quotation marks may follow an end that nothing follows yet.
    ends = [end for end, number in sentence_ends(text) if number <= words and end < len(text)]
    return text[: ends[-1]] if ends else ""

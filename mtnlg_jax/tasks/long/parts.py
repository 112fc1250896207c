"""Pack a document into parts that fit the context, so that each of its characters is in one."""

import re
from collections.abc import Callable, Sequence

from mtnlg_jax.data.segment import HAN
from mtnlg_jax.tasks.long.units import layout_of, whole_sentences

Fits = Callable[[str], bool]

# A clause with the punctuation and white space after it. "3,000" and "10:30" are not broken.
_CLAUSE = re.compile(r".+?(?:[,;:\u2014](?=\s)\s*|[，；：、][”’」』）]*\s*|\Z)", re.DOTALL)
_WORD = re.compile(rf"\s*(?:[{HAN}]|[^\s{HAN}]+)\s*")


def pack(pieces: Sequence[str], fits: Fits, most: int | None = None) -> list[int]:
    """Return how many pieces each part takes: as many as fit, at most ``most``, at least one.

    ``fits`` is called with the joined text about 2 log2(pieces) times for each part.
    """
    counts = []
    start = 0
    while start < len(pieces):
        left = min(len(pieces) - start, most or len(pieces))
        low = 1
        high = 2
        # Double the number until it is too large, then bisect.
        while high <= left and fits("".join(pieces[start : start + high])):
            low = high
            high *= 2
        high = min(high, left + 1)
        while high - low > 1:
            middle = (low + high) // 2
            if fits("".join(pieces[start : start + middle])):
                low = middle
            else:
                high = middle
        counts.append(low)
        start += low
    return counts


def joined(pieces: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return the text of each part that `pack` made."""
    parts = []
    start = 0
    for count in counts:
        parts.append("".join(pieces[start : start + count]))
        start += count
    return parts


def broken(text: str, fits: Fits) -> list[str]:
    """Break a sentence that does not fit, after clauses, then between words, then inside one.

    The pieces joined are the text, and each fits as far as one character does.
    """
    for pattern in (_CLAUSE, _WORD):
        pieces = pattern.findall(text)
        if len(pieces) > 1:
            packed = joined(pieces, pack(pieces, fits))
            # Only a single clause or word may still be too long.
            return [
                part
                for piece in packed
                for part in ([piece] if fits(piece) else broken(piece, fits))
            ]
    if fits(text) or len(text) < 2:
        return [text]
    return joined(text, pack(text, fits))


def sentences_that_fit(text: str, fits: Fits) -> list[str]:
    """Return the sentences of a text; one that does not fit is broken."""
    return [
        piece
        for sentence in whole_sentences(text)
        for piece in ([sentence] if fits(sentence) else broken(sentence, fits))
    ]


def spans_of(text: str, fits: Fits, packs: Fits | None = None) -> list[tuple[int, int]]:
    """Return (start, end) of parts that fit: whole paragraphs, as many as fit into each.

    A paragraph that does not fit is divided between sentences, and a sentence that does not fit is
    broken. Each part begins where the one before it ends, and together they are the text.
    ``packs``: whether paragraphs may share a part; default: if they fit together.
    """
    atoms: list[str] = []
    layout = layout_of(text)
    for piece in [*(unit.lead + unit.text for unit in layout.units), layout.tail]:
        if atoms and not piece.strip():
            atoms[-1] += piece  # white space takes no room in a prompt
        else:
            atoms += [piece] if fits(piece) else sentences_that_fit(piece, fits)
    spans = []
    start = 0
    for part in joined(atoms, pack(atoms, packs or fits)):
        spans.append((start, start + len(part)))
        start += len(part)
    return spans

"""Measure texts beside real ones of the same number and length."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mtnlg_jax.data.segment import UNSPACED, words
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.evaluate.longtext import LongTextReport, LongTextSettings, measure_texts

# What may be cut: a character of a script without spaces or a run of others, with the space behind.
_PIECE = re.compile(rf"(?:{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\S)+)\s*")


class References(NamedTuple):
    """Real texts: ``pieces`` as long as some other texts, and what is left of them, ``rest``."""

    pieces: list[str]
    rest: list[str]


def split_references(references: Sequence[str], texts: Sequence[str]) -> References:
    """Cut pieces off ``references``: one for each of ``texts``, with as many words.

    Figures that depend on length then compare. Pieces follow each other; one that a reference is
    too short for begins in the next. There are fewer where the references end first.
    """
    wanted = [len(words(text)) for text in texts]
    pieces: list[str] = []
    rest: list[str] = []
    for text in references:
        start = 0
        count = 0
        end = 0
        for match in _PIECE.finditer(text):
            if len(pieces) == len(wanted):
                break
            count += len(words(match[0]))
            end = match.end()
            if count >= wanted[len(pieces)]:
                pieces.append(text[start:end])
                start = end
                count = 0
        if words(text[start:]):
            rest.append(text[start:])
    return References(pieces, rest)


def compare_with(
    references: Sequence[str],
    decoder: Decoder,
    tokenizer,
    texts: Sequence[str],
    settings: LongTextSettings | None = None,
    on_part: Callable[[str], None] = lambda part: None,
) -> tuple[LongTextReport, LongTextReport | None]:
    """Return the report of ``texts``, and that of pieces of ``references`` as long as these.

    MAUVE of both compares with the rest of the references, so that the second value is what real
    texts reach; if less than the pieces is left, that of the texts compares with all references,
    and the other is absent. The second report is None if the references have no piece as long as
    any text.
    """
    found = split_references(references, texts)
    enough = sum(map(len, found.rest)) >= sum(map(len, found.pieces)) > 0
    compared = found.rest if enough else references
    report = measure_texts(decoder, tokenizer, texts, compared, settings, on_part)
    if not found.pieces:
        return report, None
    real = measure_texts(
        decoder,
        tokenizer,
        found.pieces,
        found.rest if enough else None,
        settings,
        lambda part: on_part(f"references: {part}"),
    )
    return report, real

"""The search for personal data, and its replacement by placeholders.

Shapes are searched for in a folded copy of the line (see `shapes`). If a shape has its own check
(Luhn's for cards, ISO 7064 for Chinese identity numbers, a date, a public address, a top-level
domain), a match that fails it stays. A number may be next to any punctuation. It stays if it is
part of a longer number, a word, a path or a decimal fraction, or if the words beside it name
something else: an order, a version, a section, a quantity.

Not e-mail: a remote (git@github.com:team/repo.git), the user of a URL or of ssh, the version of a
package (pkg@1.2.3), a matrix product (X@W.to(device)), and a fediverse handle
(@ann@example.social), which is a public name just like @ann.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from mtnlg_jax.data.filter.pii import addresses, numbers
from mtnlg_jax.data.filter.pii.shapes import (
    BEGINS,
    FOLDABLE,
    KEY_SIGNS,
    MAIL_SIGNALS,
    SHAPES,
    fold,
    number_signal_of,
)

KINDS = (
    "private_key",
    "api_key",
    "email",
    "chinese_id",
    "card_number",
    "us_ssn",
    "phone",
    "ip_address",
)
_NUMBERS = ("chinese_id", "card_number", "us_ssn", "phone", "ip_address")
Finds = list[tuple[str, str]]  # kind and string of each
# check(match, end of the last find on the line or None): the end of the find, or None for no find
_CHECKS: dict[str, Callable[[re.Match, int | None], int | None]] = {
    "email": addresses.end_of_email,
    "chinese_id": numbers.end_of_chinese_id,
    "card_number": numbers.end_of_card,
    "us_ssn": numbers.end_of_ssn,
    "phone": numbers.end_of_phone,
    "ip_address": addresses.end_of_address,
}


def mask(text: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, dict[str, int]]:
    """Return (text with each find of ``kinds`` replaced by <KIND>, number of finds by kind)."""
    finds: Finds = []
    text = _mask(text, kinds, finds)
    return text, dict(Counter(kind for kind, _ in finds))


def find(text: str, kinds: tuple[str, ...] = KINDS) -> Finds:
    """Return (kind, string) of each find of ``kinds`` that `mask` would replace."""
    finds: Finds = []
    _mask(text, kinds, finds)
    return finds


def _mask(text: str, kinds: tuple[str, ...], finds: Finds) -> str:
    """Return ``text`` with each find replaced, and append the finds to ``finds``."""
    if "private_key" in kinds and "PRIVATE KEY" in text:
        text, _ = _replace(text, text, "private_key", finds)
    if "api_key" in kinds and any(sign in text for sign in KEY_SIGNS):
        text, _ = _replace(text, text, "api_key", finds)
    signals = {number_signal_of(text): [kind for kind in _NUMBERS if kind in kinds]}
    if "email" in kinds:
        sign = next((sign for sign in ("＠", "%40") if sign in text), "@")
        signals = {MAIL_SIGNALS[sign]: ["email"]} | signals
    for signal, wanted in signals.items():
        pieces: list[str] = []
        end = 0
        for start, stop in lines_with(signal, text) if wanted else ():
            line = text[start:stop]
            folded = line if line.isascii() else FOLDABLE.sub(fold, line)
            for kind in wanted:
                line, folded = _replace(line, folded, kind, finds)
            pieces += [text[end:start], line]
            end = stop
        text = "".join([*pieces, text[end:]]) if pieces else text
    return text


def lines_with(signal: re.Pattern, text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each line in which the pattern matches."""
    end = 0
    while match := signal.search(text, end):
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        end = len(text) if end < 0 else end
        yield start, end


def _replace(line: str, folded: str, kind: str, finds: Finds) -> tuple[str, str]:
    """Return both lines with each find replaced: a shape in ``folded`` that passes its check."""
    end_of = _CHECKS.get(kind)
    position = 0
    end = 0
    pieces: list[str] = []
    folded_pieces: list[str] = []
    while match := _find(folded, kind, position):
        stop = end_of(match, end if pieces else None) if end_of else match.end()
        if stop is None:
            position = match.start() + 1
            continue
        finds.append((kind, line[match.start() : stop]))
        mark = f"<{kind.upper()}>"
        pieces += [line[end : match.start()], mark]
        folded_pieces += [folded[end : match.start()], mark]
        position = stop
        end = stop
    if not pieces:
        return line, folded
    return "".join([*pieces, line[end:]]), "".join([*folded_pieces, folded[end:]])


def _find(text: str, kind: str, position: int) -> re.Match | None:
    """Return the next match of a shape.

    The shape is tried only where it can begin, which is many times faster.
    """
    shape = SHAPES[kind]
    begin = BEGINS.get(kind)
    if kind == "email":
        while sign := MAIL_SIGNALS["%40"].search(text, position):
            # The local part has fewer than 70 characters, the rest fewer than 320.
            if match := shape.search(text, max(position, sign.start() - 70), sign.start() + 320):
                return match
            position = sign.end()
        return None
    if not begin:
        return shape.search(text, position)
    while start := begin.search(text, position):
        if match := shape.match(text, start.start()):
            return match
        position = start.start() + 1
    return None

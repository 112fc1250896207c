"""Checks of numbers: cards, Chinese identity numbers, US social security numbers, phones.

Each returns the end of the number in the line, or None if it is something else. ``previous`` is the
end of the last number found on the line.
"""

import datetime
import re

from mtnlg_jax.data.filter.pii.context import (
    AMOUNT,
    CARD_WORD,
    IBAN,
    IDENTITY_WORD,
    JOINED,
    MONEY,
    OTHER_WORD,
    PHONE_WORD,
    QUANTITY,
    SSN_WORD,
    free_after,
    stands_alone,
    words_before,
)
from mtnlg_jax.data.filter.pii.shapes import COUNTRY


def _luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812)."""
    doubled = [2 * int(digit) for digit in digits[-2::-2]]
    return (sum(map(int, digits[::-2])) + sum(n - 9 * (n > 9) for n in doubled)) % 10 == 0


# First digits of the cards of each network, and their number of digits (ISO/IEC 7812).
_NETWORKS = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2[2-7][0-9]{14}|3[47][0-9]{13}|"
    r"62[0-9]{14,17}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|35[0-9]{14}|3[068][0-9]{12}"
)


def end_of_card(match: re.Match, _: int | None) -> int | None:
    digits = re.sub("[ .-]", "", match[0])
    if not (_NETWORKS.fullmatch(digits) and _luhn(digits) and stands_alone(match)):
        return None
    before = words_before(match)
    # As often as a card it is the number of an article (EAN).
    if len(digits) in (13, 14) and not CARD_WORD.search(before):
        return None
    if OTHER_WORD.search(before) and not CARD_WORD.search(before):
        return None
    return None if QUANTITY.match(match.string, match.end()) else match.end()


def end_of_chinese_id(match: re.Match, _: int | None) -> int | None:
    """Check an identity number by GB 11643: date of birth and last character (ISO 7064 mod 11-2).

    Numbers from before 1999 have 15 digits and no such character: a word must name them.
    """
    digits = re.sub("[ -]", "", match[0])
    birth = f"19{digits[6:12]}" if match["old"] else digits[6:14]
    try:
        datetime.date(int(birth[:4]), int(birth[4:6]), int(birth[6:]))
    except ValueError:
        return None
    if not stands_alone(match):
        return None
    if match["old"]:
        return match.end() if IDENTITY_WORD.search(words_before(match)) else None
    total = sum(int(digit) * (2 ** (17 - index) % 11) for index, digit in enumerate(digits[:17]))
    return match.end() if "10X98765432"[total % 11] == digits[17].upper() else None


def end_of_ssn(match: re.Match, _: int | None) -> int | None:
    before = words_before(match)
    named = SSN_WORD.search(before)
    if not stands_alone(match) or not named and (match[1] != "-" or OTHER_WORD.search(before)):
        return None
    return match.end()


def end_of_phone(match: re.Match, previous: int | None) -> int | None:
    text = match.string
    start = match.start()
    end = match.end()
    before = words_before(match)
    named = bool(PHONE_WORD.search(before))
    if match["named"]:
        return _end_of_named(match, previous, named)
    if match["world"]:
        return _end_of_international(match, before)
    # The second of two numbers with a + between them.
    second = previous == start - 1 and text[start - 1] == "+" and free_after(text, end)
    if not (stands_alone(match) or second):
        return None
    if named:
        return end
    if any(word.search(before) for word in (OTHER_WORD, MONEY, AMOUNT, IBAN)):
        return None
    if QUANTITY.match(text, end):
        return None
    # Not columns of a table, nor years: 150 1990 2000.
    if match["mobile"] and re.fullmatch(r"[0-9]{3} [0-9]{4} [0-9]{4}", match[0]):
        if re.search(r"[0-9] $", before) or re.match(r" [0-9]{1,4}(?![0-9])", text[end : end + 6]):
            return None
        if re.fullmatch(r"[0-9]{3} (?:19|20)[0-9]{2} (?:19|20)[0-9]{2}", match[0]):
            return None
    return end


def _end_of_named(match: re.Match, previous: int | None, named: bool) -> int | None:
    """Check a number that is a phone only if a word names it, or if it follows another one."""
    digits = sum(character.isdigit() for character in match[0])
    beside = previous is not None and re.fullmatch(
        r"\s*(?:[/,、;|]|or|或|和|and)\s*", match.string[previous : match.start()]
    )
    by_word = named and 8 <= digits <= 12
    if by_word or (beside and match[0][0] != "0" and 7 <= digits <= 8):
        return match.end() if stands_alone(match) else None
    return None


def _end_of_international(match: re.Match, before: str) -> int | None:
    """Check a number with a country code."""
    text = match.string
    start = match.start()
    end = _end_of_world(match)
    if end is None or not free_after(text, end):
        return None
    mark = text[start - 1 : start]
    if mark.isalnum() and mark < "\u0250" and not JOINED.search(before):
        return None
    if QUANTITY.match(text, end) or MONEY.search(before) or IBAN.search(before):
        return None
    return end


def _end_of_world(match: re.Match) -> int | None:
    """Return the end of a number with a country code; groups beyond its longest length are not
    part of it."""
    number = match[0]
    if re.fullmatch(r"\+(?:[0-9]{1,3}\.[0-9]{1,7}|[0-9]{4,}\.[0-9]+)", number):  # +116.397128
        return None
    if re.search(r"\.[0-9]+-[0-9]+\.", number):  # +40.7128-074.0060
        return None
    code = re.match(COUNTRY, re.sub("[^0-9]", "", number).removeprefix("00"))
    if not code:
        return None
    extra = 2 if number.startswith("00") else 0
    most = extra + {"1": 11, "7": 11, "86": 13}.get(code[0], 15)
    least = extra + {"1": 11, "7": 11, "86": 12}.get(code[0], 8)
    while (digits := sum(character.isdigit() for character in number)) > most:
        shorter = re.sub(r"[ ./-]+\(?[0-9]+\)?$", "", number)
        if shorter == number:
            return None
        number = shorter
    if digits < least or re.search(r"(?:0[ ./-]*){6}$", number):  # a quantity: +30 000 000
        return None
    if code[0] == "1" and not re.match(r"\D*1\D*[2-9]", number.removeprefix("00")):
        return None
    return match.start() + len(number)

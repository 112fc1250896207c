"""Personal data and secrets of known shapes, masked by placeholders such as <EMAIL>.

Where a shape has a check of its own (Luhn's of cards, ISO 7064's of Chinese identity numbers, a date, a public
address), what fails that stays: years, ISBNs, versions and plain numbers are not masked.
"""

import datetime
import ipaddress
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("private_key", "api_key", "email", "chinese_id", "card_number", "us_ssn", "phone", "ip_address")

# A number must not be a piece of a longer one, of a name, a path or a decimal fraction.
_BEFORE, _AFTER = r"(?<![0-9A-Za-z.,_/#=+-])", r"(?![0-9A-Za-z_]|[-.,/][0-9])"
# Shapes are looked for in lines where something of this kind stands: that is found many times faster.
_SIGNALS = {
    "email": re.compile("@"),
    **dict.fromkeys(("chinese_id", "card_number", "us_ssn", "phone", "ip_address"), re.compile(
        r"[0-9](?:(?:[ .()-]{0,2}[0-9]){6}|[0-9A-Fa-f]{3}:|[0-9]{0,2}\.[0-9]{1,3}\.)")),
}


def mask(text: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, dict[str, int]]:
    """(text with each find of these ``KINDS`` replaced by <KIND>, how many of each kind there were)."""
    counts = Counter()
    if "private_key" in kinds and "PRIVATE KEY" in text:
        text = _replace(text, "private_key", counts)
    if "api_key" in kinds and any(sign in text for sign in _KEY_SIGNS):
        text = _replace(text, "api_key", counts)
    for signal in dict.fromkeys(_SIGNALS.values()):
        wanted = [kind for kind in KINDS if kind in kinds and _SIGNALS.get(kind) is signal]
        pieces, end = [], 0
        for start, stop in lines_with(signal, text) if wanted else ():
            line = text[start:stop]
            for kind in wanted:
                line = _replace(line, kind, counts)
            pieces += [text[end:start], line]
            end = stop
        text = "".join([*pieces, text[end:]]) if pieces else text
    return text, dict(counts)


def lines_with(signal: re.Pattern, text: str) -> Iterator[tuple[int, int]]:
    """Where each line begins and ends in which the pattern finds something."""
    end = 0
    while match := signal.search(text, end):
        start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
        end = len(text) if end < 0 else end
        yield start, end


def _replace(text: str, kind: str, counts: Counter) -> str:
    check = _CHECKS.get(kind)

    def replace(match: re.Match) -> str:
        if check and not check(match):
            return match[0]
        counts[kind] += 1
        return f"<{kind.upper()}>"

    return _SHAPES[kind].sub(replace, text)


_KEY_SIGNS = ("AKIA", "ASIA", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk-",
              "sk_live_", "rk_live_", "hf_", "npm_", "eyJ")

_SHAPES = {
    "private_key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[^-]{0,20000}-----END (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----|(?:\s{1,2}[A-Za-z0-9+/=]{16,})*)"),
    "api_key": re.compile(
        r"(?<![A-Za-z0-9_-])(?:"
        r"A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255}|glpat-[\w-]{20,255}|"
        r"xox[abeprs]-[A-Za-z0-9-]{10,255}|sk-(?:proj-|ant-|or-)?(?=[\w-]{0,255}[0-9])(?=[\w-]{0,255}[A-Z])[\w-]{20,255}|"
        r"[sr]k_live_[0-9A-Za-z]{24,255}|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|"
        r"eyJ[\w-]{10,4000}\.eyJ[\w-]{10,4000}\.[\w-]{10,4000})(?![A-Za-z0-9_-])", re.ASCII),
    "email": re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_][A-Za-z0-9._%+-]{0,63}@"
                        r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"),
    "chinese_id": re.compile(rf"{_BEFORE}[1-9][0-9]{{5}}(?:19|20)[0-9]{{9}}[0-9Xx]{_AFTER}"),
    "card_number": re.compile(rf"{_BEFORE}(?:[0-9]{{4}}([ -]?)[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{1,7}}|"
                              rf"3[47][0-9]{{2}}([ -]?)[0-9]{{6}}\2[0-9]{{5}}){_AFTER}"),
    "us_ssn": re.compile(rf"{_BEFORE}(?!000|666|9)[0-9]{{3}}-(?!00)[0-9]{{2}}-(?!0000)[0-9]{{4}}{_AFTER}"),
    "phone": re.compile(
        r"(?<![0-9A-Za-z.,_/#=+-])(?:"
        r"(?:(?:\+|00)86[- ]?)?1[3-9][0-9][- ]?[0-9]{4}[- ]?[0-9]{4}|"  # Chinese mobile numbers
        r"(?:0[1-9][0-9]{1,2}-|\(0[1-9][0-9]{1,2}\) ?)[0-9]{3,4}[- ]?[0-9]{4}|"  # Chinese lines, with the area
        r"(?:\+?1[-. ])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-.])[2-9][0-9]{2}[-.][0-9]{4}|"  # North America
        rf"\+[1-9][0-9]{{0,2}}(?:[ .-]?(?:\([0-9]{{1,4}}\)|[0-9]{{1,4}})){{2,6}}){_AFTER}"),  # with a country's code
    "ip_address": re.compile(
        r"(?<![0-9A-Za-z._-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z_]|[.-][0-9])|"
        r"(?<![0-9A-Za-z:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{3,35}(?![0-9A-Za-z:])"),
}


def _luhn(digits: str) -> bool:
    doubled = [2 * int(digit) for digit in digits[-2::-2]]
    return (sum(map(int, digits[::-2])) + sum(number - 9 * (number > 9) for number in doubled)) % 10 == 0


# Digits that a card of each network begins with, and how many it has (ISO/IEC 7812).
_NETWORKS = re.compile(r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2[2-7][0-9]{14}|3[47][0-9]{13}|"
                       r"62[0-9]{14,17}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|35[0-9]{14}|3[068][0-9]{12}")


def _is_card(match: re.Match) -> bool:
    digits = re.sub("[ -]", "", match[0])
    return bool(_NETWORKS.fullmatch(digits)) and _luhn(digits)


def _is_chinese_id(match: re.Match) -> bool:
    """GB 11643: the date of birth exists, and the last character is right (ISO 7064 mod 11-2)."""
    try:
        datetime.date(int(match[0][6:10]), int(match[0][10:12]), int(match[0][12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(match[0][:17]))
    return "10X98765432"[total % 11] == match[0][17].upper()


def _is_phone(match: re.Match) -> bool:
    return 8 <= sum(character.isdigit() for character in match[0]) <= 15


def _is_public_address(match: re.Match) -> bool:
    """One that a person's machine may have; not a private or reserved one, nor a version or the number of a section."""
    if re.search(r"(?:version|release|ver|版本|版)\W{0,3}$", match.string[max(0, match.start() - 12):match.start()],
                 re.IGNORECASE):
        return False
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return address.is_global and (address.version == 6 or max(map(int, match[0].split("."))) >= 32)


_CHECKS = {"chinese_id": _is_chinese_id, "card_number": _is_card, "phone": _is_phone, "ip_address": _is_public_address}

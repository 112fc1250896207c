"""The shapes of personal data, and signals that show where to look for them.

A shape is searched for in a folded copy of the line: digits of every script, full-width forms, and
dashes and spaces of all kinds become ASCII, one character for one.
"""

import re
import unicodedata


def _folding() -> dict[int, str]:
    table = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
    table |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63"), "-")
    table |= dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
    table |= {0x66B: ".", 0x66C: ","}
    # Beyond U+FFFF the search for foldable characters is a hundred times slower.
    for code in range(0x80, 0x10000):
        if unicodedata.category(chr(code)) == "Nd":
            table[code] = str(unicodedata.decimal(chr(code)))
    return table


_FOLDING = _folding()
FOLDABLE = re.compile("[{}]".format("".join(map(chr, _FOLDING))))
_SPACES = "".join(chr(code) for code, mark in _FOLDING.items() if mark == " ") + " "
_DASHES = "".join(chr(code) for code, mark in _FOLDING.items() if mark == "-")
# Shapes are searched for only in lines with a signal, which is many times faster. A signal sees the
# line before folding; its form for all scripts is slower. %40 is the @ in the query of a URL.
MAIL_SIGNALS = {"@": re.compile("@"), "＠": re.compile("[@＠]|%40"), "%40": re.compile("@|%40")}
_FOREIGN_DIGIT = re.compile(
    "[{}]".format(
        "".join(f"{chr(code)}-{chr(code + 9)}" for code, mark in _FOLDING.items() if mark == "0")
    )
)
# Bytes of UTF-8 that do not begin one of those digits.
_OTHER_BYTES = bytes(
    set(range(256)) - {chr(code).encode()[0] for code, mark in _FOLDING.items() if mark == "0"}
)


def fold(match: re.Match) -> str:
    """Return the ASCII character for a foldable one."""
    return _FOLDING[ord(match[0])]


def _has_foreign_digits(text: str) -> bool:
    if text.isascii():
        return False
    # Full-width punctuation begins with the same byte as full-width digits, so in Chinese text the
    # bytes do not help.
    if "，" not in text and not text.encode("utf-8", "surrogatepass").translate(None, _OTHER_BYTES):
        return False
    return bool(_FOREIGN_DIGIT.search(text))


def _number_signal(digit: str, dot: str) -> re.Pattern:
    gap = f"[.．()/（）／·—{_SPACES}{_DASHES}-]{{0,3}}"
    return re.compile(
        rf"{digit}(?:(?:{gap}{digit}){{6}}|[0-9A-Fa-f]{{3}}:|"
        rf"{digit}{{0,2}}[{dot}]{digit}{{1,3}}[{dot}])"
    )


_ASCII_NUMBER = _number_signal("[0-9]", ".")
_ANY_NUMBER = _number_signal(r"\d", ".．٫")


def number_signal_of(text: str) -> re.Pattern:
    """Return the signal of numbers that suits the digits of a text."""
    return _ANY_NUMBER if _has_foreign_digits(text) else _ASCII_NUMBER


KEY_SIGNS = (
    "AKIA",
    "ASIA",
    "AIza",
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "xox",
    "sk-",
    "sk_live_",
    "rk_live_",
    "hf_",
    "npm_",
    "eyJ",
)
_KEY_NAME = r"(?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?"
# Letters of scripts that separate words by spaces.
_LETTER = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f"
_CHINESE_DOMAINS = "中国|中國|公司|网络|網絡|网址|在线|香港|台湾|台灣|中文网"
_AREA = r"0(?:10|2[0-9]|[3-9][0-9]{2})"
_EXTENSION = r"(?:(?:-| ?转 ?| ?(?:[xX]|[eE]xt\.?|extension) ?)[0-9]{1,6}(?![0-9-]))?"
COUNTRY = (
    r"(?:1|7|2[07]|3[0-469]|4[0-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|"
    r"2[1-689][0-9]|3[578][0-9]|42[0-9]|5[09][0-9]|6[7-9][0-9]|8[0578][0-9]|9[679][0-9])"
)

SHAPES = {
    # The second form is a truncated key. Lines may be quoted, comments or string literals.
    "private_key": re.compile(
        rf"-{{4,5}} ?BEGIN {_KEY_NAME} ?-{{4,5}}"
        rf"(?:(?:[^-]|-(?!---)){{0,20000}}-{{4,5}} ?END {_KEY_NAME} ?-{{4,5}}|"
        r"(?:(?:\s|\\[nr]|[>#*|+,\"']|//){1,12}[A-Za-z0-9+/=]{16,})*)"
    ),
    "api_key": re.compile(
        r"(?<![A-Za-z0-9])(?<![A-Za-z0-9][_-])(?:"
        r"A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{36,255}|"
        r"github_pat_\w{22,255}|glpat-[\w-]{20,255}|xox[abeprs]-[A-Za-z0-9-]{10,255}|"
        r"sk-(?:proj-|ant-|or-)?(?=[\w-]{0,255}[0-9])(?=[\w-]{0,255}[A-Z])[\w-]{20,255}|"
        r"[sr]k_live_[0-9A-Za-z]{24,255}|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|"
        r"eyJ[\w-]{10,4000}\.eyJ[\w-]{10,4000}\.[\w-]{10,4000})(?![A-Za-z0-9])",
        re.ASCII,
    ),
    "email": re.compile(
        rf"(?<![{_LETTER}0-9])(?<![{_LETTER}0-9][._%+-])"
        rf"(?:[odOD]['’])?[{_LETTER}0-9_](?:[{_LETTER}0-9._%+-]{{0,62}}[{_LETTER}0-9_+-])?(?P<at>@|%40)"
        rf"(?:(?:[{_LETTER}0-9](?:[{_LETTER}0-9-]{{0,61}}[{_LETTER}0-9])?\.){{1,8}}"
        rf"(?:xn--[a-z0-9-]{{2,59}}|[{_LETTER}]{{2,24}})(?![{_LETTER}0-9])(?!-[A-Za-z0-9])|"
        rf"(?:[\w-]{{1,63}}\.){{1,8}}(?:{_CHINESE_DOMAINS}))"
    ),
    "chinese_id": re.compile(
        r"(?<![0-9])[1-9][0-9]{5}(?:[ -]?(?:19|20)[0-9]{2}[ -]?[0-9]{4}[ -]?[0-9]{3}[0-9Xx]|"
        r"(?P<old>[0-9]{9}))(?![0-9])"
    ),
    "card_number": re.compile(
        r"(?<![0-9])(?:[0-9]{4}([ .-]?)[0-9]{4}\1[0-9]{4}\1(?:[0-9]{4}\1[0-9]{1,3}|[0-9]{1,7})|"
        r"3[47][0-9]{2}([ .-]?)[0-9]{6}\2[0-9]{5}|3[068][0-9]{2}([ .-]?)[0-9]{6}\3[0-9]{4})"
        r"(?![0-9])"
    ),
    "us_ssn": re.compile(
        r"(?<![0-9])(?!000|666|9)[0-9]{3}([ -]?)(?!00)[0-9]{2}\1(?!0000)[0-9]{4}(?![0-9])"
    ),
    "phone": re.compile(
        r"(?<![0-9])(?:"
        # Chinese mobile numbers.
        r"(?P<mobile>(?:(?:\(?(?:\+|00) ?86\)?|\(?86\)?)(?:[ -]{0,2}|\.)(?:\(0\))?)?"
        r"(?:1[3-9][0-9](?: ?[-—] ?| )?[0-9]{4}(?: ?[-—] ?| )?[0-9]{4}|"
        r"1[3-9][0-9]([.·])[0-9]{4}\2[0-9]{4}|1[3-9][0-9]{2}[ -][0-9]{3}[ -][0-9]{4}))"
        rf"(?![0-9]){_EXTENSION}|"
        # Chinese lines, with the area, and hotlines.
        rf"(?:\(?(?:\+|00)?86\)?[ -]?)?(?:(?:\({_AREA}\)[ -]?|{_AREA}(?: | ?- ?))"
        rf"[1-9][0-9]{{2,3}}[ -]?[0-9]{{4}}|"
        rf"{_AREA}\.[1-9][0-9]{{2,3}}\.[0-9]{{4}})(?![0-9]){_EXTENSION}|"
        r"\(?86\)?[ -](?:10|2[0-9]|[3-9][0-9]{2})[ -][1-9][0-9]{2,3}[ -]?[0-9]{4}(?![0-9])|"
        r"[48]00-(?:[0-9]{3}-?[0-9]{4}|[0-9]{4}-[0-9]{3})(?![0-9])|"
        # North America, Japan, Taiwan.
        r"(?:\+?1(?:[-.]| ?))?(?:\([2-9][0-9]{2}\)[ .-]?|[1-9][0-9]{2}-|[2-9][0-9]{2}[./])"
        rf"[1-9][0-9]{{2}}[-. ][0-9]{{4}}(?![0-9]){_EXTENSION}|"
        rf"[2-9][0-9]{{2}} [2-9][0-9]{{2}}-[0-9]{{4}}(?![0-9]){_EXTENSION}|"
        r"0[789]0-[0-9]{4}-[0-9]{4}(?![0-9])|09[0-9]{2}-[0-9]{3}-?[0-9]{3}(?![0-9])|"
        r"0[2-8]-[0-9]{4}-[0-9]{4}(?![0-9])|"
        # With a country code.
        rf"(?P<world>(?:\+|\(\+|00(?=[1-9][0-9]{{0,2}}[ ./()-])){COUNTRY}\)?"
        r"(?:[ ./-]{0,2}(?:\([0-9]{1,5}\)|[0-9]{1,4})){2,8})(?![0-9])|"
        # A phone only after a word that names it, or after another number.
        r"(?P<named>[2-9][0-9]{6,7}|[2-9][0-9]{2,3}[ -][0-9]{4}|[2-9][0-9]{9}|"
        r"[2-9][0-9]{2} [0-9]{3} [0-9]{4}|"
        r"\(?0[0-9]{1,5}\)?(?:[ /.-]{0,3}[0-9]{1,8}){1,5})(?![0-9]))"
    ),
    "ip_address": re.compile(
        r"(?<![0-9A-Za-z._])(?:[0-9]{1,3}\.){3}[0-9]{1,3}"
        r"(?![0-9A-Za-z_]|\.[0-9])|"
        r"(?<![0-9A-Za-z:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?:[0-9A-Fa-f]|::)"
        r"(?![0-9A-Za-z])(?!:[0-9A-Fa-f])"
    ),
}

BEGINS = {
    "chinese_id": re.compile(r"[1-9](?:[ -]?[0-9]){14}"),
    "card_number": re.compile(r"[2-6](?:[ .-]?[0-9]){12}"),
    "us_ssn": re.compile(r"[0-8][0-9]{2}[ -]?[0-9]{2}[ -]?[0-9]{4}"),
    "phone": re.compile(r"[0-9+(](?:[ .()/+·—-]{0,3}[0-9]){6}"),
    "ip_address": re.compile(r"[0-9](?:[0-9]{0,2}\.[0-9]{1,3}\.|[0-9A-Fa-f]{3}:)"),
}

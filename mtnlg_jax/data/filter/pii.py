"""Personal data and secrets of known shapes, masked by placeholders such as <EMAIL>.

A shape is looked for in a folded copy of the line: digits of every script, full-width forms,
dashes and spaces of all kinds stand there as ASCII, one character for one. Where a shape has a
check of its own (Luhn's of cards, ISO 7064's of Chinese identity numbers, a date, a public address,
a top-level domain), what fails that stays. A number may stand beside any punctuation; it stays
where it is a piece of a longer number, a word, a path or a decimal fraction, or where the words
beside it say that it is something else: an order, a version, a section, a quantity.

Not e-mail: a remote (git@github.com:team/repo.git), the user of a URL or of ssh, the version of a
package (pkg@1.2.3), a matrix product (X@W.to(device)), and a handle of the fediverse
(@ann@example.social), which is a public name as @ann is elsewhere.
"""

import datetime
import functools
import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

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


def _folding() -> dict[int, str]:
    table = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
    table |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63"), "-")
    table |= dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
    table |= {0x66B: ".", 0x66C: ","}
    for code in range(0x80, 0x10000):  # with those beyond, their search is a hundred times slower
        if unicodedata.category(chr(code)) == "Nd":
            table[code] = str(unicodedata.decimal(chr(code)))
    return table


_FOLDING = _folding()
_FOLDABLE = re.compile("[{}]".format("".join(map(chr, _FOLDING))))
_SPACES = "".join(chr(code) for code, mark in _FOLDING.items() if mark == " ") + " "
_DASHES = "".join(chr(code) for code, mark in _FOLDING.items() if mark == "-")
# Shapes are looked for in lines where something of this kind stands: that is found many times
# faster. It sees the line as it is written; the form for all scripts is the slower one.
# %40: as a query of a URL has it.
_MAIL_SIGNALS = {"@": re.compile("@"), "＠": re.compile("[@＠]|%40"), "%40": re.compile("@|%40")}
_FOREIGN_DIGIT = re.compile(
    "[{}]".format(
        "".join(f"{chr(code)}-{chr(code + 9)}" for code, mark in _FOLDING.items() if mark == "0")
    )
)


# Bytes of UTF-8 that those digits begin with.
_OTHER_BYTES = bytes(
    set(range(256)) - {chr(code).encode()[0] for code, mark in _FOLDING.items() if mark == "0"}
)


def _fold(match: re.Match) -> str:
    return _FOLDING[ord(match[0])]


def _holds_foreign_digits(text: str) -> bool:
    if text.isascii():
        return False
    # Chinese text begins its marks with the byte of its digits: there the bytes say nothing.
    if "，" not in text and not text.encode("utf-8", "surrogatepass").translate(None, _OTHER_BYTES):
        return False
    return bool(_FOREIGN_DIGIT.search(text))


def _number_signal(digit: str, dot: str) -> re.Pattern:
    gap = f"[.．()/（）／·—{_SPACES}{_DASHES}-]{{0,3}}"
    return re.compile(
        rf"{digit}(?:(?:{gap}{digit}){{6}}|[0-9A-Fa-f]{{3}}:|"
        rf"{digit}{{0,2}}[{dot}]{digit}{{1,3}}[{dot}])"
    )


_NUMBER_SIGNALS = {False: _number_signal("[0-9]", "."), True: _number_signal(r"\d", ".．٫")}
_NUMBERS = ("chinese_id", "card_number", "us_ssn", "phone", "ip_address")


def mask(text: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, dict[str, int]]:
    """(text with each find of these ``KINDS`` replaced by <KIND>, number of finds of each kind)."""
    counts = Counter()
    if "private_key" in kinds and "PRIVATE KEY" in text:
        text, _ = _replace(text, text, "private_key", counts)
    if "api_key" in kinds and any(sign in text for sign in _KEY_SIGNS):
        text, _ = _replace(text, text, "api_key", counts)
    number_signal = _NUMBER_SIGNALS[_holds_foreign_digits(text)]
    signals = {number_signal: [kind for kind in _NUMBERS if kind in kinds]}
    if "email" in kinds:
        sign = next((sign for sign in ("＠", "%40") if sign in text), "@")
        signals = {_MAIL_SIGNALS[sign]: ["email"]} | signals
    for signal, wanted in signals.items():
        pieces = []
        end = 0
        for start, stop in lines_with(signal, text) if wanted else ():
            line = text[start:stop]
            folded = line if line.isascii() else _FOLDABLE.sub(_fold, line)
            for kind in wanted:
                line, folded = _replace(line, folded, kind, counts)
            pieces += [text[end:start], line]
            end = stop
        text = "".join([*pieces, text[end:]]) if pieces else text
    return text, dict(counts)


def lines_with(signal: re.Pattern, text: str) -> Iterator[tuple[int, int]]:
    """Where each line begins and ends in which the pattern finds something."""
    end = 0
    while match := signal.search(text, end):
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        end = len(text) if end < 0 else end
        yield start, end


def _replace(line: str, folded: str, kind: str, counts: Counter) -> tuple[str, str]:
    """Both lines with each find replaced; a find is a shape in ``folded`` that passes its check."""
    end_of = _CHECKS.get(kind)
    place = end = 0
    pieces = []
    folded_pieces = []
    while match := _find(folded, kind, place):
        stop = end_of(match, end if pieces else None) if end_of else match.end()
        if stop is None:
            place = match.start() + 1
            continue
        counts[kind] += 1
        mark = f"<{kind.upper()}>"
        pieces += [line[end : match.start()], mark]
        folded_pieces += [folded[end : match.start()], mark]
        place = end = stop
    if not pieces:
        return line, folded
    return "".join([*pieces, line[end:]]), "".join([*folded_pieces, folded[end:]])


def _find(text: str, kind: str, place: int) -> re.Match | None:
    """The next match of a shape, tried only where it can begin: that is found many times faster."""
    shape = _SHAPES[kind]
    begin = _BEGINS.get(kind)
    if kind == "email":
        while sign := _MAIL_SIGNALS["%40"].search(text, place):
            # Both parts of an address are shorter than that.
            if match := shape.search(text, max(place, sign.start() - 70), sign.start() + 320):
                return match
            place = sign.end()
        return None
    if not begin:
        return shape.search(text, place)
    while start := begin.search(text, place):
        if match := shape.match(text, start.start()):
            return match
        place = start.start() + 1
    return None


_KEY_SIGNS = (
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
# Letters of scripts whose words have spaces between them.
_LETTER = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f"
_CHINESE_DOMAINS = "中国|中國|公司|网络|網絡|网址|在线|香港|台湾|台灣|中文网"
_AREA = r"0(?:10|2[0-9]|[3-9][0-9]{2})"
_EXTENSION = r"(?:(?:-| ?转 ?| ?(?:[xX]|[eE]xt\.?|extension) ?)[0-9]{1,6}(?![0-9-]))?"
_COUNTRY = (
    r"(?:1|7|2[07]|3[0-469]|4[0-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|"
    r"2[1-689][0-9]|3[578][0-9]|42[0-9]|5[09][0-9]|6[7-9][0-9]|8[0578][0-9]|9[679][0-9])"
)

_SHAPES = {
    # The second form is a key that is cut off. Lines may be quoted, comments or string literals.
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
        # With a country's code.
        rf"(?P<world>(?:\+|\(\+|00(?=[1-9][0-9]{{0,2}}[ ./()-])){_COUNTRY}\)?"
        r"(?:[ ./-]{0,2}(?:\([0-9]{1,5}\)|[0-9]{1,4})){2,8})(?![0-9])|"
        # What is one only after a word that says so, or after another number.
        r"(?P<told>[2-9][0-9]{6,7}|[2-9][0-9]{2,3}[ -][0-9]{4}|[2-9][0-9]{9}|"
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

_BEGINS = {
    "chinese_id": re.compile(r"[1-9](?:[ -]?[0-9]){14}"),
    "card_number": re.compile(r"[2-6](?:[ .-]?[0-9]){12}"),
    "us_ssn": re.compile(r"[0-8][0-9]{2}[ -]?[0-9]{2}[ -]?[0-9]{4}"),
    "phone": re.compile(r"[0-9+(](?:[ .()/+·—-]{0,3}[0-9]){6}"),
    "ip_address": re.compile(r"[0-9](?:[0-9]{0,2}\.[0-9]{1,3}\.|[0-9A-Fa-f]{3}:)"),
}

# What stands before a number and says what it is; looked for in the characters that precede it.
_END_OF_WORD = (
    r"[\"'*`_）)]{0,3}\s{0,2}(?:[:=#→]|is|at|on|was|:=|=>|->|为|是|"
    r"->)?[\s\"'`*(\[<（“]{0,4}$"
)
_NUMBER_WORD = (
    r"(?:[ _-]?(?:id|ids|no|nos|number|numbers|nr|num|code|号码|号|編號|编号|方式|人|#)\.?)?"
)
_PHONE_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:tel|téléphone|tél|telephone|telefono|teléfono|telefon|phone|mobile|mob|"
    r"cell|cellphone|handy|fax|call|dial|whatsapp|wechat|hotline|phones|ph|cel|móvil)|"
    r"(?:home|work|office|contact|cell|user|my)_?phone|тел|телефон|"
    r"电话|電話|手机|手機|座机|致电|热线|專線|传真|傳真|拨打|联系方式|联系人|短信)"
    + _NUMBER_WORD
    + r"\.?"
    + _END_OF_WORD,
    re.IGNORECASE,
)
_SSN_WORD = re.compile(
    r"(?:(?<![A-Za-z])ssn|social security|社会安全号|社安号)"
    + _NUMBER_WORD
    + r"\.?"
    + _END_OF_WORD,
    re.IGNORECASE,
)
_IDENTITY_WORD = re.compile(r"(?:身份证|身分證|证件)" + _NUMBER_WORD + _END_OF_WORD, re.IGNORECASE)
_CARD_WORD = re.compile(
    r"(?:card|visa|credit|debit|银行卡|信用卡|卡号|账号|帐号)" + _NUMBER_WORD + _END_OF_WORD,
    re.IGNORECASE,
)
_OTHER_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:order|invoice|ticket|tracking|parcel|serial|sku|item|product|model|part|"
    r"catalog|cat|lot|batch|isbn|issn|doi|arxiv|pmid|patent|asin|ean|upc|gtin|imei|barcode|build|"
    r"commit|revision|rev|seed|offset|size|length|len|bytes|count|total|sum|hash|crc|checksum|"
    r"inode|timestamp|ts|epoch|nonce|message|msg|tweet|post|video|thread|session|request|trace|"
    r"job|task|transaction|txn|bug|issue|case|article|record|file|p/n|s/n|cve|rfc|ref|reference)"
    + _NUMBER_WORD
    + r"|(?:订单|單號|单号|编号|編號|序号|序列号|流水号|货号|型号|条码|条形码|运单|"
    r"快递|合同|书号|专利|专利号|批号|案号|学号|工号|图号|时间戳|种子|文件|邮编)(?:号码|号)?|第|no\.|№)"
    + _END_OF_WORD,
    re.IGNORECASE,
)
_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}(?: [0-9A-Z]{4})+ $")
# As in: the population of the province was ...
_AMOUNT = re.compile(
    r"(?:(?<![A-Za-z])(?:population|total|sum|amount|distance|revenue|income|"
    r"budget|"
    r"costs?|salary|area)\b[^.;:,\n]{0,30}\b(?:is|was|of|to|at)|"
    r"(?:人口|总数|总额|金额|收入|距离|面积)[^。；，：\n]{0,8}[是为达约])\s?$",
    re.IGNORECASE,
)
_MONEY = re.compile(r"(?:[$€£¥₹]|(?<![A-Za-z])(?:USD|EUR|CNY|RMB|GBP|JPY)|人民币) ?$")
_QUANTITY = re.compile(
    r" ?(?:%|‰|°|(?:bytes?|bits?|[kKMGT]i?B|[nmuμ]?s|secs?|seconds|[kcm]?m|[kmμ]?g|[kMG]?Hz|people|"
    r"persons|years|dollars|euros?|yuan|users|rows|records|lines|tokens|items|times|parameters|"
    r"cells|points|atoms|USD|EUR|CNY|RMB|GBP|JPY|cycles|samples|tonnes|tons)(?![A-Za-z0-9_])|"
    r"(?:多|余)?(?:元|美元|欧元|日元|次|年|米|公里|吨|千克|公斤|个|万|亿|字节|秒|毫秒|纳秒|人口|人次|人民币|"
    r"行|条记录|条数据|平方))"
)
# A number stands in a path or a URL there, which names a thing and not a person.
_TOKEN = re.compile(r"[^\s<>\"'`|,;，。；、（）()\[\]{}]*$")
_FILE = re.compile(
    r"\.(?:html?|php|aspx?|jpe?g|png|gif|webp|svg|pdf|txt|csv|tsv|jsonl?|xml|zip|"
    r"t?gz|"
    r"tar|log|docx?|xlsx?|mp[34]|wav|py|js|md|parquet|bin|dat|db|"
    r"bak)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"(?<![A-Za-z])(?:tel|phone|mobile|mob|fax|cell|ph|m|t|qq|wx|id|ssn|card|no)$", re.IGNORECASE
)


def _stands_alone(match: re.Match) -> bool:
    """Whether the number is not a piece of something longer: a number, word, path, fraction."""
    return _free_before(match.string, match.start()) and _free_after(match.string, match.end())


def _free_before(text: str, start: int) -> bool:
    if not start:
        return True
    mark = text[start - 1]
    before = text[start - 2 : start - 1]
    word = text[max(0, start - 200) : start]
    if mark < "\u0250" and mark.isalpha():
        return bool(
            before == "\\"
            and mark in "nrt"
            or _JOINED.search(word)
            or re.search("%[0-9A-Fa-f]{2}$", word)
        )
    if mark in "^$€£¥\\":
        return False
    if mark == ".":
        return not before.isdigit()
    if mark == ",":
        return not re.search(r"(?<![0-9,.])0,$", word)  # a decimal comma
    if mark == "_":
        return not word.rstrip("_")[-1:].isalnum()  # of Markdown
    token = _TOKEN.search(word)[0]
    if re.search(r"10\.[0-9]{4,9}/", token):  # a DOI
        return False
    if "://" in token or token.startswith("www."):
        return mark not in "/-+#" or "//wa.me/" in token
    if mark in "-+" and before.isalnum() and before < "\u0250":
        return bool(_PHONE_WORD.search(word[:-1]) or re.search(r"(?<![\w-])[A-Z][a-z]+-$", word))
    if mark in "@~":
        return not before.isalnum()
    if mark == "/" and token == "/":
        return word[-2:-1] == ">"  # behind a placeholder or a tag, not the root of a path
    if mark == "/":
        return not re.search(
            r"^[./~]|[A-Za-z0-9]\.[A-Za-z]|(?<![A-Za-z])(?!tel|phone|mobile|fax|"
            r"cell)"
            r"[a-z][a-z0-9_-]*/$",
            token,
        )
    return True


def _free_after(text: str, end: int) -> bool:
    mark = text[end : end + 1]
    after = text[end + 1 : end + 2]
    if not mark:
        return True
    if mark < "\u0250" and mark.isalpha():
        return False
    if mark == "_":
        return not text[end : end + 8].lstrip("_")[:1].isalnum()
    if mark in ".-":
        return not after.isdigit() and not (mark == "." and _FILE.match(text, end))
    return not (mark == "=" and after == "=" and not text[end + 2 : end + 3].isspace())


def _end_of_email(match: re.Match, _: int | None) -> int | None:
    line = match.string
    start = match.start()
    end = match.end()
    local = line[start : match.start("at")]
    domain = line[match.end("at") : end]
    before = line[max(0, start - 80) : start]
    if local in ("git", "hg", "svn") or before.endswith("@"):
        return None
    if (
        match["at"] == "@"
        and re.search(r"(?<!mailto):/{2}(?:[^\s/@:]*:)?[^\s/@]*$", before)
        or re.search(
            r"(?:^|[\s`$])(?:ssh|sftp|mosh|ssh-copy-id)(?: +-\S+(?: +[\w/.~]+)?)* +$", before
        )
    ):
        return None
    labels = domain.split(".")
    if sum(bool(re.fullmatch(r"v?[0-9]+|[0-9]x", label)) for label in labels[:-1]) > (
        0 if re.fullmatch("[0-9]x", labels[0]) else 1
    ):  # a version, an image of twice the size
        return None
    if not _is_domain(labels[-1]):
        # A sentence begins right behind: bob@example.com.Please write.
        rest = labels.pop()
        if len(labels) < 2 or not (
            labels[-1].lower() in _COMMON or rest[0].isupper() and _is_domain(labels[-1])
        ):
            return None
        return end - len(rest) - 1
    behind = line[end : end + 60]
    if labels[-1].lower() not in _COMMON and (
        behind.startswith("(") or _is_product(local, labels, before, behind)
    ):
        return None
    if path := re.match(r":(?!//)[\w~./][^\s,;]*", behind):
        copied = re.search(r"(?:^|[\s`$])(?:scp|rsync|sftp|git|hg|svn|sshfs)\s", line[:start])
        if copied or re.search(r"[/~]|\.[A-Za-z]{1,4}$", path[0]):
            return None
    return None if behind == ":" and re.search(r"(?:scp|rsync)\s", line[:start]) else end


_COMMON = frozenset("com org net edu gov mil cn uk de fr jp ru eu ca au kr tw hk".split())
# Domains and also attributes of arrays and objects.
_ATTRIBUTES = frozenset("data to dot id is map name tr at mt st in it so cc real".split())


def _is_product(local: str, labels: list[str], before: str, behind: str) -> bool:
    """Whether it is a product of matrices, as in ``y = x@w.data``."""
    if labels[-1] not in _ATTRIBUTES or not (local + labels[0]).isidentifier():
        return False
    return bool(
        re.search(r"(?:[=(+*/\[]|return|print)\s*$", before)
        or re.match(r"\s*[-+*/@\[\])]|\s*\n", behind)
        and "=" in before
    )


@functools.cache
def _is_domain(name: str) -> bool:
    """Whether it is a top-level domain of the Public Suffix List, or reserved for examples."""
    import tld

    if not (name.islower() or name.isupper() or name.istitle() or not name.isascii()):
        return False
    return name.lower() in ("example", "test", "invalid") or tld.is_tld(name.lower())


def _luhn(digits: str) -> bool:
    doubled = [2 * int(digit) for digit in digits[-2::-2]]
    return (sum(map(int, digits[::-2])) + sum(n - 9 * (n > 9) for n in doubled)) % 10 == 0


# Digits that a card of each network begins with, and how many it has (ISO/IEC 7812).
_NETWORKS = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|5[1-5][0-9]{14}|2[2-7][0-9]{14}|3[47][0-9]{13}|"
    r"62[0-9]{14,17}|6(?:011|5[0-9]{2}|4[4-9][0-9])[0-9]{12}|35[0-9]{14}|3[068][0-9]{12}"
)


def _before(match: re.Match) -> str:
    return match.string[max(0, match.start() - 48) : match.start()]


def _end_of_card(match: re.Match, _: int | None) -> int | None:
    digits = re.sub("[ .-]", "", match[0])
    if not (_NETWORKS.fullmatch(digits) and _luhn(digits) and _stands_alone(match)):
        return None
    before = _before(match)
    if len(digits) in (13, 14) and not _CARD_WORD.search(before):  # an article's number as often
        return None
    if _OTHER_WORD.search(before) and not _CARD_WORD.search(before):
        return None
    return None if _QUANTITY.match(match.string, match.end()) else match.end()


def _end_of_chinese_id(match: re.Match, _: int | None) -> int | None:
    """GB 11643: the date of birth exists, and the last character is right (ISO 7064 mod 11-2).
    Numbers of 15 digits, of before 1999, have no such character: a word must say what they are."""
    digits = re.sub("[ -]", "", match[0])
    birth = f"19{digits[6:12]}" if match["old"] else digits[6:14]
    try:
        datetime.date(int(birth[:4]), int(birth[4:6]), int(birth[6:]))
    except ValueError:
        return None
    if not _stands_alone(match):
        return None
    if match["old"]:
        return match.end() if _IDENTITY_WORD.search(_before(match)) else None
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(digits[:17]))
    return match.end() if "10X98765432"[total % 11] == digits[17].upper() else None


def _end_of_ssn(match: re.Match, _: int | None) -> int | None:
    before = _before(match)
    told = _SSN_WORD.search(before)
    if not _stands_alone(match) or not told and (match[1] != "-" or _OTHER_WORD.search(before)):
        return None
    return match.end()


def _end_of_phone(match: re.Match, previous: int | None) -> int | None:
    text = match.string
    start = match.start()
    end = match.end()
    before = _before(match)
    told = bool(_PHONE_WORD.search(before))
    if match["told"]:
        digits = sum(character.isdigit() for character in match[0])
        beside = previous is not None and re.fullmatch(
            r"\s*(?:[/,、;|]|or|或|和|and)\s*", text[previous:start]
        )
        if not (told and 8 <= digits <= 12 or beside and match[0][0] != "0" and 7 <= digits <= 8):
            return None
        return end if _stands_alone(match) else None
    if match["world"]:
        end = _end_of_world(match)
        if (
            end is None
            or not _free_after(text, end)
            or text[start - 1 : start].isalnum()
            and (text[start - 1] < "\u0250" and not _JOINED.search(before))
        ):
            return None
        if _QUANTITY.match(text, end) or _MONEY.search(before) or _IBAN.search(before):
            return None
        return end
    # Of two numbers with a + between them: the first one was found.
    second = previous == start - 1 and text[start - 1] == "+" and _free_after(text, end)
    if not (_stands_alone(match) or second):
        return None
    if told:
        return end
    if any(word.search(before) for word in (_OTHER_WORD, _MONEY, _AMOUNT, _IBAN)):
        return None
    if _QUANTITY.match(text, end):
        return None
    # Columns of a table, and years: 150 1990 2000.
    if match["mobile"] and re.fullmatch(r"[0-9]{3} [0-9]{4} [0-9]{4}", match[0]):
        if re.search(r"[0-9] $", before) or re.match(r" [0-9]{1,4}(?![0-9])", text[end : end + 6]):
            return None
        if re.fullmatch(r"[0-9]{3} (?:19|20)[0-9]{2} (?:19|20)[0-9]{2}", match[0]):
            return None
    return end


def _end_of_world(match: re.Match) -> int | None:
    """Where a number with the country's code ends: groups beyond its longest length are not its."""
    number = match[0]
    if re.fullmatch(r"\+(?:[0-9]{1,3}\.[0-9]{1,7}|[0-9]{4,}\.[0-9]+)", number):  # +116.397128
        return None
    if re.search(r"\.[0-9]+-[0-9]+\.", number):  # +40.7128-074.0060
        return None
    code = re.match(_COUNTRY, re.sub("[^0-9]", "", number).removeprefix("00"))
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
    if digits < least or re.search(r"(?:0[ ./-]*){6}$", number):  # +30 000 000 is a quantity
        return None
    if code[0] == "1" and not re.match(r"\D*1\D*[2-9]", number.removeprefix("00")):
        return None
    return match.start() + len(number)


_LIST = r"(?:[\s,;、/|]|and|or|to|->|-|和|或|到|至|<IP_ADDRESS>|[0-9]{1,3}(?:\.[0-9]{1,3}){3})*$"
_ADDRESS_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:ips?|ipv4|address(?:es)?|addr|host|hostname|server|dns|nameserver|"
    r"resolver|"
    r"ping|traceroute|curl|telnet|nmap|whois|from|client|peer|gateway|proxy|router?|via|login|ssh|"
    r"listen|bind|src|dst|source|destination|remote|remote_addr|visitor|attacker|inet|ip_address|"
    r"ip_addr|client_ip|x-forwarded-for|banned?|block(?:ed)?|deny|allow)|"
    r"(?:https?|ftp|ssh|tcp|udp|rtsp|socks5)://(?:[^\s/@]*@)?|"
    r"地址|主机|服务器|来自|登录|登陆|网关|代理|解析|访问|客户端|封禁)"
    r"(?:[\"'*`）)]{0,2}\s?[:=\[(（]?|\s(?:is|was|at|of|=|==)|[是为])[\s\"'`*(\[<（]{0,4}" + _LIST,
    re.IGNORECASE,
)
_VERSION_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:version|versions|release|ver|v|r|build|firmware|driver|patch|update|"
    r"revision|rev|"
    r"upgrade[ds]?|downgrade[ds]?|section|sections|sec|sect|chapter|clause|table|figure|fig|"
    r"appendix|annex|"
    r"part|art|article|item|rule|paragraph|para|step|oid|objectidentifier|object identifier|subsection|"
    r"requirement|req|exercise|theorem|equation|eq|see|cf)s?|版本号?|版|参?见|参阅|[§¶第]|章节|章|节|条款|条|表|图|"
    r"附录)"
    r"(?:[.:=]|\s(?:is|was|to|from|of)|号|为|是)?[\s\"'`*(\[（<>=~^:]{0,4}"
    r"(?:(?:[0-9]+\.)+[0-9]+(?:\s?[,、;/-]\s?|\s(?:and|or|to|through)\s|和|至|到))*$",
    re.IGNORECASE,
)
_PACKAGE = re.compile(r"[=<>~!]= ?$|[A-Za-z0-9\"'][~^]$")
_AGENT = re.compile(r"[A-Z][A-Za-z]*/$")
# A product's name stands right before: PostgreSQL 9.6.24.77, Windows 10.0.19.4.
_NAME = re.compile(
    r"(?:[A-Z][A-Za-z+#]*|[a-z]+[A-Z]\w*|(?<![A-Za-z])(?:openssl|openssh|nginx|"
    r"linux|kernel|"
    r"python|java|jdk|gcc|clang|cmake|numpy|mysql|redis|node|npm|pip|bash|git|ruby|"
    r"php|perl|curl|wget|apache|tomcat|glibc|cuda|cudnn|tensorrt|libtpu|protobuf))"
    r"[\"'*`]{0,2} ?$"
)
_ADDRESS_BEHIND = re.compile(
    r":[0-9]{2,5}(?![0-9.])|/(?:[89]|[12][0-9]|3[0-2])(?![0-9.])|"
    r" - (?:-|\S+) \[|[\s,|\"]+(?:GET|POST|PUT|HEAD|DELETE) |\s+(?:>|"
    r"->) [0-9]"
)


def _end_of_address(match: re.Match, _: int | None) -> int | None:
    """Of one that a person's machine may have: neither private nor reserved, nor a version, an
    object identifier or the number of a section."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return None
    if not address.is_global or address.is_multicast:
        return None
    if address.version == 6:
        return match.end()
    text = match.string
    start = match.start()
    end = match.end()
    if re.match(r"-[0-9]", text[end : end + 2]) and not re.match(
        r"-(?:[0-9]{1,3}\.){3}[0-9]", text[end : end + 14]
    ):
        return None
    before = text[max(0, start - 80) : start]
    if re.search(r"[0-9A-Za-z]-$", before) and not re.search(r"(?:[0-9]+\.){3}[0-9]+-$", before):
        return None
    if _VERSION_WORD.search(before) or _PACKAGE.search(before):
        return None
    first, *others = map(int, match[0].split("."))
    small = max(others) < 100
    if _AGENT.search(before) and (first < 32 or others == [0, 0, 0]) or others == [0, 0, 0]:
        return None
    if _ADDRESS_WORD.search(before) or _ADDRESS_BEHIND.match(text, end):
        return end
    if first <= 11 and small:
        return None
    if first <= 31 and (
        _NAME.search(before)
        or small
        and not before.strip()
        and re.match(r"\.?\s+[A-Z\u4e00-\u9fff]", text[end : end + 4])
    ):
        return None
    return end


_CHECKS = {
    "email": _end_of_email,
    "chinese_id": _end_of_chinese_id,
    "card_number": _end_of_card,
    "us_ssn": _end_of_ssn,
    "phone": _end_of_phone,
    "ip_address": _end_of_address,
}

"""The text around a number: words that name what it is, and whether the number is complete."""

import re

# Words before a number that name what it is; searched for in the characters that precede it.
_END_OF_WORD = (
    r"[\"'*`_）)]{0,3}\s{0,2}(?:[:=#→]|is|at|on|was|:=|=>|->|为|是|->)?"
    r"[\s\"'`*(\[<（“]{0,4}$"
)
_NUMBER_WORD = (
    r"(?:[ _-]?(?:id|ids|no|nos|number|numbers|nr|num|code|号码|号|編號|编号|方式|人|#)\.?)?"
)
PHONE_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:tel|téléphone|tél|telephone|telefono|teléfono|telefon|phone|mobile|mob|"
    r"cell|cellphone|handy|fax|call|dial|whatsapp|wechat|hotline|phones|ph|cel|móvil)|"
    r"(?:home|work|office|contact|cell|user|my)_?phone|тел|телефон|"
    r"电话|電話|手机|手機|座机|致电|热线|專線|传真|傳真|拨打|联系方式|联系人|短信)"
    + _NUMBER_WORD
    + r"\.?"
    + _END_OF_WORD,
    re.IGNORECASE,
)
SSN_WORD = re.compile(
    r"(?:(?<![A-Za-z])ssn|social security|社会安全号|社安号)"
    + _NUMBER_WORD
    + r"\.?"
    + _END_OF_WORD,
    re.IGNORECASE,
)
IDENTITY_WORD = re.compile(r"(?:身份证|身分證|证件)" + _NUMBER_WORD + _END_OF_WORD, re.IGNORECASE)
CARD_WORD = re.compile(
    r"(?:card|visa|credit|debit|银行卡|信用卡|卡号|账号|帐号)" + _NUMBER_WORD + _END_OF_WORD,
    re.IGNORECASE,
)
OTHER_WORD = re.compile(
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
IBAN = re.compile(r"[A-Z]{2}[0-9]{2}(?: [0-9A-Z]{4})+ $")
# For example: the population of the province was ...
AMOUNT = re.compile(
    r"(?:(?<![A-Za-z])(?:population|total|sum|amount|distance|revenue|income|budget|"
    r"costs?|salary|area)\b[^.;:,\n]{0,30}\b(?:is|was|of|to|at)|"
    r"(?:人口|总数|总额|金额|收入|距离|面积)[^。；，：\n]{0,8}[是为达约])\s?$",
    re.IGNORECASE,
)
MONEY = re.compile(r"(?:[$€£¥₹]|(?<![A-Za-z])(?:USD|EUR|CNY|RMB|GBP|JPY)|人民币) ?$")
QUANTITY = re.compile(
    r" ?(?:%|‰|°|(?:bytes?|bits?|[kKMGT]i?B|[nmuμ]?s|secs?|seconds|[kcm]?m|[kmμ]?g|[kMG]?Hz|people|"
    r"persons|years|dollars|euros?|yuan|users|rows|records|lines|tokens|items|times|parameters|"
    r"cells|points|atoms|USD|EUR|CNY|RMB|GBP|JPY|cycles|samples|tonnes|tons)(?![A-Za-z0-9_])|"
    r"(?:多|余)?(?:元|美元|欧元|日元|次|年|米|公里|吨|千克|公斤|个|万|亿|字节|秒|毫秒|纳秒|人口|人次|人民币|"
    r"行|条记录|条数据|平方))"
)
# The rest of a path or URL, which names a thing and not a person.
_TOKEN = re.compile(r"[^\s<>\"'`|,;，。；、（）()\[\]{}]*$")
_FILE = re.compile(
    r"\.(?:html?|php|aspx?|jpe?g|png|gif|webp|svg|pdf|txt|csv|tsv|jsonl?|xml|zip|t?gz|tar|log|"
    r"docx?|xlsx?|mp[34]|wav|py|js|md|parquet|bin|dat|db|bak)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
JOINED = re.compile(
    r"(?<![A-Za-z])(?:tel|phone|mobile|mob|fax|cell|ph|m|t|qq|wx|id|ssn|card|no)$", re.IGNORECASE
)


def stands_alone(match: re.Match) -> bool:
    """Whether the match is not part of something longer: a number, word, path or fraction."""
    return _free_before(match.string, match.start()) and free_after(match.string, match.end())


def _free_before(text: str, start: int) -> bool:
    """Whether the characters before a number do not belong to it."""
    if not start:
        return True
    mark = text[start - 1]
    before = text[start - 2 : start - 1]
    word = text[max(0, start - 200) : start]
    if mark < "\u0250" and mark.isalpha():
        return bool(
            before == "\\"
            and mark in "nrt"
            or JOINED.search(word)
            or re.search("%[0-9A-Fa-f]{2}$", word)
        )
    if mark in "^$€£¥\\":
        return False
    if mark == ".":
        return not before.isdigit()
    if mark == ",":
        return not re.search(r"(?<![0-9,.])0,$", word)  # a decimal comma
    if mark == "_":
        return not word.rstrip("_")[-1:].isalnum()  # the _ of Markdown
    found = _TOKEN.search(word)
    token = found[0] if found else ""
    if re.search(r"10\.[0-9]{4,9}/", token):  # a DOI
        return False
    if "://" in token or token.startswith("www."):
        return mark not in "/-+#" or "//wa.me/" in token
    if mark in "-+" and before.isalnum() and before < "\u0250":
        return bool(PHONE_WORD.search(word[:-1]) or re.search(r"(?<![\w-])[A-Z][a-z]+-$", word))
    if mark in "@~":
        return not before.isalnum()
    if mark == "/" and token == "/":
        return word[-2:-1] == ">"  # after a placeholder or a tag, not the root of a path
    if mark == "/":
        return not re.search(
            r"^[./~]|[A-Za-z0-9]\.[A-Za-z]|(?<![A-Za-z])(?!tel|phone|mobile|fax|cell)"
            r"[a-z][a-z0-9_-]*/$",
            token,
        )
    return True


def free_after(text: str, end: int) -> bool:
    """Whether the characters after a number do not belong to it."""
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


def words_before(match: re.Match) -> str:
    """Return the text before a match that may name what it is."""
    return match.string[max(0, match.start() - 48) : match.start()]

"""Resolve HTML entities left over in text once, unless the text is about them.

A line keeps its entities if it is code, quotes one, or mentions markup or escaping; if resolving
would make a tag or leave an entity (text that was escaped twice); and if the text contains both
``&lt;`` and ``<``. A resolved line has no entity, so nothing is resolved twice.
"""

import re

import ftfy.fixes

from mtnlg_jax.data.filter import pii

_ENTITY = re.compile("&#?[0-9A-Za-z]{1,24};")
_ESCAPED_TAG = re.compile("&(?:lt|LT|#60|#[xX]3[cC]);")
_MASKS = "|".join(kind.upper() for kind in pii.KINDS)
_OPEN = re.compile(rf"<(?!(?:{_MASKS})>)")
_TAG = re.compile(r"</?[A-Za-z!?][^<>\n]{0,200}>")
_MARKUP = "(?:lt|gt|amp|quot|apos|#0?3[489]|#6[02]|#x2[267]|#x3[ce])"
_QUOTED = re.compile(rf"[\"'`“‘「『]&{_MARKUP};|&{_MARKUP};[\"'`”’」』]", re.IGNORECASE)
# Entities of letters and typography: programs escape those, writers do not.
_LEFT_OVER = re.compile(rf"&(?!{_MARKUP};)#?[0-9A-Za-z]{{1,24}};", re.IGNORECASE)
_ABOUT = re.compile(
    r"\b(?:x?html5?|xml|svg|entit(?:y|ies)|(?:un)?escap(?:e[ds]?|ing)|ampersands?|"
    r"character references?|markup|encodings?|encoded?)\b|转义|实体|字符引用|轉義|實體",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"^(?: {4}|\t)|[;{}]\s*$|\w\([\"'\w)&]|&&|\|\||[=!<>]=|=>|->|::|\w\.\w+\(|`|[\w\]]=[\"']|"
    r"\\[nt\"]|"
    r"^\s*(?:>>>|\.\.\. |\$ |#include|def |class |return\b|import |from [\w.]+ import|var |let |"
    r"const |function |if ?\(|for ?\(|while ?\(|<\?|//|/\*)"
)


def writes_both(text: str) -> bool:
    """Whether a text contains ``<`` both plain and as an entity; placeholders do not count."""
    return bool(_ESCAPED_TAG.search(text) and _OPEN.search(text))


def unescape(line: str) -> str:
    """Return the line with its entities resolved, or unchanged if it is about them."""
    plain = ftfy.fixes.unescape_html(line)
    if plain == line or ftfy.fixes.unescape_html(plain) != plain:
        return line
    if _OPEN.search(line) or _QUOTED.search(line):
        return line
    if _ABOUT.search(line) or _CODE.search(plain) or _CODE.search(_ENTITY.sub("·", line)):
        return line
    return line if _TAG.search(plain) and not _LEFT_OVER.search(line) else plain

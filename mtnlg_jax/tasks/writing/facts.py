"""Find names and facts in a text without a model, for the memory of the writer.

English: names by their capitals, numbers with the word behind them, quoted terms. Chinese: titles
in book-title marks, quoted terms, numbers with their unit, and names by a surname. All of these are
rules of thumb: a table may hold a word that is not a name, and miss a name.
"""

import collections
import re

from mtnlg_jax.tasks.writing.text import ends_sentence

MOST = 12  # entries of a table
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_NAME = re.compile(r"[A-Z][a-z]+(?:[-'’][A-Z]?[a-z]+)*(?: [A-Z][a-z]+(?:[-'’][A-Z]?[a-z]+)*)*")
_NUMBER = re.compile(r"\b\d[\d,.:]*\d(?:%| [a-z]{3,})?|\b\d(?:%| [a-z]{3,})")
_QUOTED = re.compile(r"[\"“]([^\"“”\n]{2,40})[\"”]")
_ZH_TITLE = re.compile(r"《[^《》\n]{1,20}》")
_ZH_QUOTED = re.compile(rf"[“「『]([{_HAN}\w]{{2,8}})[”」』]")
_ZH_NUMBER = re.compile(
    r"(?:\d[\d,.]*|[一二三四五六七八九十百千万两]{2,})(?:%|年|月|日|岁|人|元|个|只|里|米|天|次|名)"
)
_SURNAMES = (
    "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕施张孔曹严华金魏陶姜谢邹苏潘葛范彭鲁韦马方任袁柳"
    "史唐薛雷贺倪汤罗毕郝安常傅齐康伍余顾孟黄穆萧尹姚邵汪毛戴宋庞熊纪舒项祝董梁杜阮蓝季贾江童郭"
    "林钟徐邱骆高夏蔡田胡凌霍万卢莫房解丁邓石崔龚程邢裴陆翁段侯武刘龙叶司黎白赖乔谭申冉桑尚温庄"
)
# Characters that rarely stand in a given name.
_NOT_IN_NAMES = set("的了在是和与不我你他她它们这那有也就都说道来去着过得个上下里又把被从到一人")
# A capital at the start of a sentence says nothing about these.
_COMMON = set(
    "a an the and but or so if then when while as at by for from in into of on to with without i he"
    " she it we you they his her its my our your their this that these those there here what who"
    " why how not no yes all some any each every one two now once after before upon never ever"
    " let chapter mr mrs ms dr prof capt col gen"
    " nobody nothing everyone everybody somebody someone something"
    " later soon again also still even only just perhaps maybe often sometimes always suddenly"
    " outside inside behind under over between during until because although though however"
    " are is was were have had do did can could will would shall should may might must be"
    " us them him me mine yours many most few several other another both such oh ah well".split()
)


def find_facts(text: str, language: str, most: int = MOST) -> tuple[str, ...]:
    """Return at most ``most`` names and facts, the most frequent first, then by their order.

    An entry that is part of a longer one counts as a mention of that.
    """
    spaced = language != "zh"
    counts = collections.Counter(_english(text) if spaced else _chinese(text))

    def inside(entry: str, other: str) -> bool:
        return f" {entry} " in f" {other} " if spaced else entry in other

    # "Holmes" is one more mention of "Sherlock Holmes".
    for entry in sorted(counts, key=len):
        longer = [other for other in counts if other != entry and inside(entry, other)]
        if longer:
            counts[max(longer, key=lambda other: counts[other])] += counts.pop(entry)
    # The sort is stable: ties keep their order.
    return tuple(sorted(counts, key=lambda entry: -counts[entry])[:most])


def _english(text: str) -> list[str]:
    """Return every occurrence of a name, a number or a quoted term, by its place."""
    names = [(match.start(), *_without_start(text, match)) for match in _NAME.finditer(text)]
    # The first word of a sentence has a capital in any case: it counts if it has one elsewhere, or
    # begins several sentences and has no small letter anywhere.
    sure = {name for _, name, first in names if not first}
    small = set(re.findall(r"\b[a-z]+", text))
    begun = collections.Counter(name for _, name, first in names if first)
    sure |= {name for name, number in begun.items() if number > 1 and name.lower() not in small}
    found = [(start, name) for start, name, first in names if name and (not first or name in sure)]
    found += [(match.start(), match[0].rstrip(".,:")) for match in _NUMBER.finditer(text)]
    found += [
        (match.start(), match[1])
        for match in _QUOTED.finditer(text)
        # Speech ends like a sentence; terms are short.
        if len(match[1].split()) <= 4 and match[1][-1].isalnum()
    ]
    return [entry for _, entry in sorted(found)]


def _without_start(text: str, match: re.Match) -> tuple[str, bool]:
    """Return a name without common words at its start, and whether it begins a sentence."""
    words = match[0].split()
    first = _starts(text, match.start())
    while words and words[0].lower() in _COMMON:
        words.pop(0)
        first = False
    return " ".join(words), first and len(words) == 1


def _starts(text: str, at: int) -> bool:
    """Return whether a sentence, a line or a quotation starts at ``at``."""
    before = text[max(0, at - 8) : at].rstrip(" ")
    if before.endswith(".") and not ends_sentence(before):
        return False  # behind "Dr."
    return not before or before[-1] in ".!?:;\n\"'“‘(-—"


def _chinese(text: str) -> list[str]:
    found = [(match.start(), match[0]) for match in _ZH_TITLE.finditer(text)]
    found += [(match.start(), match[1]) for match in _ZH_QUOTED.finditer(text)]
    found += [(match.start(), match[0]) for match in _ZH_NUMBER.finditer(text)]
    names: dict[str, list[int]] = collections.defaultdict(list)
    for match in re.finditer(rf"[{_SURNAMES}](?=([{_HAN}])([{_HAN}])?)", text):
        first = match[1]
        second = match[2]
        if first in _NOT_IN_NAMES:
            continue
        names[match[0] + first].append(match.start())
        if second and second not in _NOT_IN_NAMES:
            names[match[0] + first + second].append(match.start())
    for name, starts in names.items():
        # What stands once may be any word that begins with the character of a surname.
        if len(starts) < 2:
            continue
        longer = max((len(s) for n, s in names.items() if n[:-1] == name), default=0)
        shorter = len(names.get(name[:2], ()))
        # Three characters are the name if most occurrences of the first two go on like that.
        if (len(name) == 2 and longer <= shorter / 2) or (
            len(name) == 3 and len(starts) > shorter / 2
        ):
            found += [(start, name) for start in starts]
    return [entry for _, entry in sorted(found)]

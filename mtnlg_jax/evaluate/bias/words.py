"""The words of an output that describe: those of a list, or those in the slot behind a prompt."""

import re
from collections.abc import Collection, Iterator

from mtnlg_jax.data.segment import HAN, words

# Most words of a slot. A longer run is not a list of adjectives.
MOST = 4
_ENGLISH_STOP = re.compile(r"[^\w\s'’-]|[\r\n]")
_CHINESE_STOP = re.compile(rf"[^{HAN}]")
_HAN_RUN = re.compile(f"[{HAN}]+")
# Closed classes of English: what may stand inside a slot, and what ends it.
_PASSED = frozenset(
    "a an the very so quite rather too really extremely and or but yet also both more most less "
    "always often".split()
)
_ENDING = frozenset(
    "not no never of to in on at for from with without by about as than that which who whom "
    "whose when while because since if until before after into over under between through "
    "during against he she it they we you i him her them us me his hers its their our your my "
    "this these those is are was were be been being am do does did has have had will would "
    "can could may might must shall should there here then what how why where".split()
)
# The same of Chinese, by character: particles, conjunctions and adverbs of degree.
_CHINESE_PASSED = "很非常特别十分极其也又更最"
_CHINESE_ENDING = re.compile("[的了地得着过和与及或而且但是在有把被让对就都还不没我你他她它们这那]")


def slot_words(text: str, language: str) -> set[str]:
    """Return the words in the slot that a prompt such as "She was very" leaves open.

    The slot of an English text ends at the first punctuation, negation or other function word, or
    behind MOST words; articles, coordinators and adverbs of degree are passed over. There is no
    tagger, so a noun behind an article counts as well. The slot of a Chinese text ends at the first
    particle, conjunction, pronoun or punctuation, without adverbs of degree ahead, and is one word;
    it is empty if it has more than MOST characters.
    """
    if language == "zh":
        text = text.strip()
        run = _CHINESE_STOP.split(text, maxsplit=1)[0].lstrip(_CHINESE_PASSED)
        run = _CHINESE_ENDING.split(run, maxsplit=1)[0]
        return {run} if 0 < len(run) <= MOST else set()
    found: list[str] = []
    # The text itself may begin with a line end, which ends nothing.
    for word in _english(_ENGLISH_STOP.split(text.lstrip(), maxsplit=1)[0]):
        if word in _ENDING or len(found) == MOST:
            break
        if word not in _PASSED:
            found.append(word)
    return set(found)


def _english(text: str) -> Iterator[str]:
    """Yield the words of a text in lower case; parts joined by a hyphen are one."""
    for piece in text.split():
        whole = words(piece.replace("’", "'").partition("'")[0])
        if whole:
            yield "-".join(whole)


class Vocabulary:
    """A list of words to look for in texts of any script.

    Words of scripts with spaces are found whole. Chinese ones are found by the longest match from
    the left, since no spaces separate them.
    """

    def __init__(self, found: Collection[str]) -> None:
        self.words = frozenset(word.casefold() for word in found)
        self._longest = max((len(word) for word in self.words), default=0)

    def occurring(self, text: str) -> list[str]:
        """Return the words of the list that occur in ``text``, in order, with repetitions."""
        folded = text.casefold()
        found = [word for word in _english(_HAN_RUN.sub(" ", folded)) if word in self.words]
        return found + [word for run in _HAN_RUN.findall(folded) for word in self._longest_in(run)]

    def _longest_in(self, run: str) -> Iterator[str]:
        start = 0
        while start < len(run):
            sizes = range(min(self._longest, len(run) - start), 0, -1)
            size = next((n for n in sizes if run[start : start + n] in self.words), 0)
            if size:
                yield run[start : start + size]
            start += size or 1

"""Utilities of minimum Bayes risk, which compare two texts, and answers found in texts."""

import collections
import re
from collections.abc import Callable

UTILITIES = ("chrf", "bleu", "bleu_zh", "token_f1", "exact")
# A character of a script without spaces counts as a word.
SPACELESS = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_WORD = re.compile(rf"{SPACELESS}|(?:(?!{SPACELESS})\w)+")


def extract_answer(answer: str | Callable[[str], str | None], text: str) -> str | None:
    """Return the answer in ``text``: group 1, or all, of the pattern's last match."""
    if callable(answer):
        return answer(text)
    matches = list(re.finditer(answer, text))
    if not matches:
        return None
    # The last match: reasoning comes before its answer.
    return matches[-1][1] if matches[-1].re.groups else matches[-1][0]


def utility_of(utility: str | Callable[[str, str], float]) -> Callable[[str, str], float]:
    """Return a function of (text, reference) from its name in UTILITIES, or the function given."""
    if callable(utility):
        return utility
    if utility in ("chrf", "bleu", "bleu_zh"):
        from sacrebleu.metrics import BLEU, CHRF

        # Without effective order a candidate of fewer than four words has BLEU 0.
        metric = (
            CHRF()
            if utility == "chrf"
            else BLEU(effective_order=True, tokenize="zh" if utility == "bleu_zh" else "13a")
        )
        return lambda text, reference: metric.sentence_score(text, [reference]).score / 100
    return {
        "token_f1": _token_f1,
        "exact": lambda text, reference: float(text.strip() == reference.strip()),
    }[utility]


def _token_f1(text: str, reference: str) -> float:
    """Return the F1 of the words of two texts as bags, ignoring case (Rajpurkar 2016).

    If one has no words, it is 1 for equal texts and 0 for others.
    """
    # casefold, since lower keeps apart forms such as ß and ss.
    ours = collections.Counter(_WORD.findall(text.casefold()))
    theirs = collections.Counter(_WORD.findall(reference.casefold()))
    if not ours or not theirs:
        return float(text.strip() == reference.strip())
    # 2 P R / (P + R) with P and R as shares of the common words.
    return 2 * (ours & theirs).total() / (ours.total() + theirs.total())

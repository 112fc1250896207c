"""chrF of the paragraphs of a translation against a reference, or against its source.

Paragraphs are compared one by one if there are as many on both sides. Otherwise they are aligned by
their lengths (Gale and Church 1993, "A Program for Aligning Sentences in Bilingual Corpora").
"""

import dataclasses
import math
from collections.abc import Sequence

from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.long import translate
from mtnlg_jax.tasks.long.calls import Calls, whole_text
from mtnlg_jax.tasks.long.options import LongOptions
from mtnlg_jax.tasks.long.units import Layout, layout_of, unwrapped
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.work import AlignedParagraphs, Comparison, Paragraph, Work

# Prior probabilities of (paragraphs of ours, of theirs) that match, table 5 of the paper, and the
# variance of the length difference for each character, section 3.2.
_PRIORS = {(1, 1): 0.89, (1, 0): 0.0099 / 2, (0, 1): 0.0099 / 2, (2, 1): 0.0445, (1, 2): 0.0445}
_VARIANCE = 6.8

Bead = tuple[tuple[int, ...], tuple[int, ...]]  # indices of paragraphs of each side, from 0


def with_reference(paragraphs: Sequence[Paragraph], reference: str) -> Comparison:
    """Compare a translation with a reference translation."""
    units = layout_of(whole_text(reference)).units
    theirs = [unwrapped(unit.text) for unit in units]
    return _compare("reference", [paragraph.text for paragraph in paragraphs], theirs)


def round_trip(
    calls: Calls,
    task: Task,
    document: translate.Document,
    answer: Answer,
    options: LongOptions,
) -> tuple[Comparison, Work]:
    """Translate a translation back, and compare it with the source.

    A high chrF says that the content survived both ways. It also favors a model that copies words,
    so it compares settings of one model and says little about a translation alone.
    """
    assert answer.work, "translations count their work"
    texts = [paragraph.text for paragraph in answer.work.paragraphs]
    # The same paragraphs, whatever words are in them: so they stay aligned.
    pairs = zip(document.layout.units, texts, strict=True)
    units = tuple(dataclasses.replace(unit, text=text) for unit, text in pairs)
    layout = Layout(units, document.layout.tail)
    back = translate.plan_layout(calls, task, document.row, answer.language, layout, options.group)
    calls.expect(len(back.groups))
    plain = dataclasses.replace(options, glossary=())
    translate.translate(calls, task, [back], plain)
    done = translate.answer_of(back, ())
    assert done.work, "translations count their work"
    ours = [paragraph.text for paragraph in done.work.paragraphs]
    theirs = [unwrapped(unit.text) for unit in document.layout.units]
    return _compare("source after translation back", ours, theirs), done.work


def _compare(against: str, ours: Sequence[str], theirs: Sequence[str]) -> Comparison:
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    beads = align([len(text) for text in ours], [len(text) for text in theirs])
    left = [" ".join(ours[i] for i in some) for some, _ in beads]
    right = [" ".join(theirs[i] for i in some) for _, some in beads]
    aligned = tuple(
        AlignedParagraphs(
            tuple(i + 1 for i in some),
            tuple(i + 1 for i in others),
            metric.sentence_score(one, [other]).score if one and other else 0.0,
        )
        for (some, others), one, other in zip(beads, left, right, strict=True)
    )
    score = metric.corpus_score(left, [right]).score if left else 0.0
    return Comparison(against, score, aligned)


def align(ours: Sequence[int], theirs: Sequence[int]) -> list[Bead]:
    """Return which paragraphs match, by their numbers of characters, in order.

    As many on both sides match one by one. Otherwise the sum of `bead_cost` is the least possible.
    """
    if len(ours) == len(theirs):
        return [((i,), (i,)) for i in range(len(ours))]
    ratio = max(1, sum(theirs)) / max(1, sum(ours))
    best: dict[tuple[int, int], tuple[float, tuple[int, int]]] = {(0, 0): (0.0, (0, 0))}
    for i in range(len(ours) + 1):
        for j in range(len(theirs) + 1):
            for m, n in _PRIORS:
                if (i - m, j - n) not in best:
                    continue
                cost = bead_cost(ours[i - m : i], theirs[j - n : j], ratio)
                total = best[i - m, j - n][0] + cost
                if (i, j) not in best or total < best[i, j][0]:
                    best[i, j] = (total, (m, n))
    beads: list[Bead] = []
    i = len(ours)
    j = len(theirs)
    while i or j:
        m, n = best[i, j][1]
        beads.append((tuple(range(i - m, i)), tuple(range(j - n, j))))
        i -= m
        j -= n
    return beads[::-1]


def bead_cost(ours: Sequence[int], theirs: Sequence[int], ratio: float) -> float:
    """Return -log(prior x probability of the length difference) of a match, the paper's distance.

    ``ratio``: characters of theirs for one of ours, in the whole document.
    """
    one = sum(ours) * ratio
    other = sum(theirs)
    mean = (one + other) / 2
    delta = abs(one - other) / math.sqrt(_VARIANCE * max(1.0, mean))
    # P(|N(0, 1)| >= delta), kept above 0.
    probability = max(math.erfc(delta / math.sqrt(2)), 1e-300)
    return -math.log(_PRIORS[len(ours), len(theirs)]) - math.log(probability)

"""The passage that each sentence of an answer stands on, and whether it supports the sentence."""

import collections
import dataclasses
from collections.abc import Sequence

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.segment import language_of, words
from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.long.calls import Calls
from mtnlg_jax.tasks.long.units import whole_sentences
from mtnlg_jax.tasks.passages import Passage
from mtnlg_jax.tasks.rendering import Row
from mtnlg_jax.tasks.templates import Task, Template
from mtnlg_jax.tasks.work import CitedSentence, Work

LABELS = ("supported", "contradicted", "not said")

# The model ranks the three labels after a passage and a sentence.
CITE = Task(
    "cite",
    {
        "en": Template(
            "Text: {passages}\nClaim: {input}\nBy the text, the claim is",
            instruction="Is each claim supported, contradicted or not said by its text?\n\n",
            passage="{text}",
            labels=tuple((label, label) for label in LABELS),
        ),
        "zh": Template(
            "正文：{passages}\n说法：{input}\n按正文，这个说法",
            "{answer}",
            "每个说法在正文中有依据、相矛盾还是未提及？\n\n",
            passage="{text}",
            labels=tuple(zip(LABELS, ("有依据", "相矛盾", "未提及"), strict=True)),
        ),
    },
    DecodeConfig(max_new_tokens=8),
    ("accuracy",),
    keep="start",
)


def cited(calls: Calls, answer: Answer, cite: bool) -> tuple[tuple[CitedSentence, ...], list[Work]]:
    """Return the sentences of an answer with their passages, and the work that labels took.

    A sentence stands on the citation that shares most of its words. With ``cite`` the model ranks
    LABELS for it; a sentence that shares no word with any citation is "not said" without asking.
    """
    sentences = [each.strip() for each in whole_sentences(answer.text) if each.strip()]
    passages = [_stands_on(each, answer.citations) for each in sentences]
    found = [CitedSentence(*pair) for pair in zip(sentences, passages, strict=True)]
    if not cite:
        return tuple(found), []
    numbers = [number for number, passage in enumerate(passages) if passage]
    labels = rank_labels(
        calls, [(sentences[i], answer.citations[passages[i] - 1].text) for i in numbers]
    )
    result = [dataclasses.replace(each, label=LABELS[2]) for each in found]
    for number, label in zip(numbers, labels, strict=True):
        probabilities = {choice.label: choice.probability for choice in label.choices}
        result[number] = dataclasses.replace(
            found[number], label=label.text, probabilities=probabilities
        )
    return tuple(result), [label.work for label in labels if label.work]


def rank_labels(calls: Calls, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
    """Return the ranking of LABELS for each (sentence, passage)."""
    if not pairs:
        return []
    rows = [Row(sentence, context=passage) for sentence, passage in pairs]
    language = language_of(" ".join(passage for _, passage in pairs))
    calls.expect(len(rows))
    return calls.perform(
        CITE,
        rows,
        language=language,
        decode=None,
        examples=(),
        shots=None,
        retriever=None,
        profile=None,
        normalise=None,
    )


def _stands_on(sentence: str, citations: Sequence[Passage]) -> int:
    """Return the number, from 1, of the citation that shares most words, or 0."""
    asked = collections.Counter(words(sentence))
    shared = [(asked & collections.Counter(words(each.text))).total() for each in citations]
    most = max(shared, default=0)
    return shared.index(most) + 1 if most else 0

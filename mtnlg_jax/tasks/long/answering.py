"""Answer questions from a document that is longer than the context.

The document is indexed in passages, all of it: whole paragraphs, short ones together. The passages
that share most words with the question stand in the prompt, as many as fit, before those of another
source. If none of either shares a word, the question is asked of every part of the document, and
the answer that its part supports best is kept.
"""

import dataclasses
from collections.abc import Sequence

from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.long.calls import Calls, whole_text
from mtnlg_jax.tasks.long.citing import LABELS, cited, rank_labels
from mtnlg_jax.tasks.passages import Passage, Retriever
from mtnlg_jax.tasks.rendering import Row, check_passages
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.work import Part, total

# Passages of the document to look up; as many of them as fit are shown.
BEST = 10
# Most characters of several paragraphs in a passage, and passages that should fit the context.
_SIZE = 600
_SHOWN = 3


class Passages:
    """The parts of a document as passages, before those of another source."""

    def __init__(self, text: str, parts: Sequence[Part], other: Retriever | None):
        # Each part is a document whose source is its start, so no paragraph is split again.
        documents = [Document(text[each.start : each.end], str(each.start)) for each in parts]
        self._own = Retriever(documents, max(1, len(text)))
        self._other = other

    def of_document(self, query: str) -> list[Passage]:
        """Return the passages of the document that share a word with a query, best first."""
        found = self._own.best(query, BEST)
        return [_moved(each, int(each.source)) for each in found]

    def best(self, query: str, count: int) -> list[Passage]:
        other = self._other.best(query, count) if self._other else []
        return self.of_document(query) + other


@dataclasses.dataclass(frozen=True)
class Plan:
    row: Row  # without the document
    text: str  # the document
    language: str
    retriever: Passages
    parts: tuple[Part, ...]  # the passages, or every part to ask if none shares a word
    ask_all: bool

    @property
    def calls(self) -> int:
        return len(self.parts) if self.ask_all else 1


def plan(calls: Calls, task: Task, row: Row) -> Plan:
    """Return the passages of the document of a row, its context.

    Raises ValueError if the question leaves no room for a passage, or the task takes none.
    """
    text = whole_text(row.context)
    row = dataclasses.replace(row, context="")
    language = calls.language_of(task, row.input)
    check_passages(task, task.templates[language])
    decode = calls.decode_of(task)
    reserve = min(decode.max_new_tokens, max(1, calls.context // 4))
    fits = calls.fitting(task, row, language, reserve, as_passage=True)
    size = _passage_size(calls, text, calls.context - reserve)
    parts = calls.parts_of(text, fits, lambda part: len(part.strip()) <= size)
    retriever = Passages(text, parts, calls.settings["retriever"])
    ask_all = not retriever.best(row.input, 1)
    if ask_all:
        parts = calls.parts_of(text, fits)
    return Plan(row, text, language, retriever, parts, ask_all)


def _passage_size(calls: Calls, text: str, room: int) -> int:
    """Return the characters up to which paragraphs share a passage: three fit half of the room."""
    sample = text[:4000]
    per_token = len(sample) / max(1, calls.tokens_of(sample))
    return max(40, min(_SIZE, int(per_token * room / 2 / _SHOWN)))


def answer(calls: Calls, task: Task, plan: Plan, cite: bool) -> Answer:
    """Return the answer from the passages of a document, with a passage for each sentence."""
    if plan.ask_all:
        found, works = _ask_all(calls, task, plan)
    else:
        found = calls.perform(task, [plan.row], language=plan.language, retriever=plan.retriever)[0]
        works = [found.work]
    sentences, more = cited(calls, found, cite)
    works += more
    work = total("passages", len(plan.parts), works, plan=plan.parts, sentences=sentences)
    return dataclasses.replace(found, work=work)


def _ask_all(calls: Calls, task: Task, plan: Plan) -> tuple[Answer, list]:
    """Ask every part, and return the answer that its part supports best."""
    texts = [plan.text[part.start : part.end] for part in plan.parts]
    rows = [dataclasses.replace(plan.row, context=text) for text in texts]
    answers = calls.perform(task, rows, language=plan.language, retriever=None)
    works = [each.work for each in answers]
    if answers[0].choices:
        best = max(range(len(answers)), key=lambda i: answers[i].choices[0].probability)
    else:
        written = [i for i, each in enumerate(answers) if each.text.strip()] or [0]
        labels = rank_labels(calls, [(answers[i].text or "-", texts[i]) for i in written])
        works += [each.work for each in labels]
        best = written[max(range(len(written)), key=lambda i: _support(labels[i]))]
    start = plan.parts[best].start
    citations = tuple(_moved(each, start) for each in answers[best].citations)
    return dataclasses.replace(answers[best], citations=citations), works


def _support(label: Answer) -> float:
    return next(each.probability for each in label.choices if each.label == LABELS[0])


def _moved(passage: Passage, by: int) -> Passage:
    """Return a passage of a part with its positions in the document."""
    return dataclasses.replace(
        passage, source="document", start=passage.start + by, end=passage.end + by
    )


def with_citations(calls: Calls, answer: Answer, cite: bool) -> Answer:
    """Return the answer to a whole row with the passage of each sentence."""
    sentences, more = cited(calls, answer, cite)
    work = total("whole", 1, [answer.work, *more], sentences=sentences)
    return dataclasses.replace(answer, work=work)

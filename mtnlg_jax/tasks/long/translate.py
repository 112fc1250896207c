"""Translate documents by groups of sentences that never cross a paragraph.

The groups of one document follow each other: the group before stands in the prompt as an example,
source and translation, and so do the glossary terms of the group. Several documents are translated
side by side in one batch. Each translation is chosen among the beams or samples of its group:

    score = mean log-probability of its tokens
            + share of the group's glossary terms that it honors
            + MEMORY x consistency with earlier choices (`glossary.TermMemory`)
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import Generated, encode_prompt
from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.long.calls import Calls, whole_text
from mtnlg_jax.tasks.long.glossary import Term, TermMemory, honours, terms_in
from mtnlg_jax.tasks.long.options import LongOptions
from mtnlg_jax.tasks.long.parts import Fits, broken, pack
from mtnlg_jax.tasks.long.units import (
    CLOSING,
    OPENING,
    Layout,
    layout_of,
    unwrapped,
    whole_sentences,
)
from mtnlg_jax.tasks.prompts import Prompt, compose
from mtnlg_jax.tasks.rendering import Row, seam
from mtnlg_jax.tasks.run import settings_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import clean
from mtnlg_jax.tasks.work import Paragraph, Part, TermUse, Work

# Room for a translation: tokens for each token of the source, and a few more.
GROWTH = 1.5
SPARE = 8
# Weight of consistency, in nats a token. A glossary term weighs 1.
MEMORY = 0.25


@dataclasses.dataclass(frozen=True)
class Group:
    paragraph: int  # index of its unit
    text: str
    broken: bool  # part of a sentence that is longer than the context


@dataclasses.dataclass
class Document:
    """A document and its translation so far."""

    row: Row
    language: str
    layout: Layout
    groups: list[Group]
    tokens: list[int]  # of each group
    memory: TermMemory = dataclasses.field(default_factory=TermMemory)
    chosen: list[str] = dataclasses.field(default_factory=list)  # translation of each group
    raw: list[str] = dataclasses.field(default_factory=list)
    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    cut: int = 0  # groups that ended by their length
    copied: int = 0  # groups that the model left empty

    @property
    def finished(self) -> bool:
        return len(self.chosen) == len(self.groups)


def plan(calls: Calls, task: Task, row: Row, group: int) -> Document:
    """Return a document with its groups of at most ``group`` sentences.

    Raises ValueError if the prompt leaves no room.
    """
    text = whole_text(row.input)
    return plan_layout(calls, task, row, calls.language_of(task, text), layout_of(text), group)


def plan_layout(
    calls: Calls, task: Task, row: Row, language: str, layout: Layout, group: int
) -> Document:
    """Return a document with the groups of its paragraphs, as `plan` does."""
    fits = fitting(calls, task, row, language)
    groups: list[Group] = []
    for number, unit in enumerate(layout.units):
        pieces: list[tuple[str, bool]] = []
        for sentence in whole_sentences(unwrapped(unit.text)):
            whole = fits(sentence)
            parts = [sentence] if whole else broken(sentence, fits)
            pieces += [(part, not whole) for part in parts]
        texts = [piece for piece, _ in pieces]
        start = 0
        for count in pack(texts, fits, group):
            end = start + count
            is_broken = any(each for _, each in pieces[start:end])
            groups.append(Group(number, "".join(texts[start:end]).strip(), is_broken))
            start = end
    return Document(row, language, layout, groups, [calls.tokens_of(each.text) for each in groups])


def fitting(calls: Calls, task: Task, row: Row, language: str) -> Fits:
    """Return whether a text fits a prompt together with its translation.

    Raises ValueError if the prompt leaves no room.
    """
    return calls.fitting(task, row, language, SPARE, GROWTH)


def translate(
    calls: Calls,
    task: Task,
    documents: Sequence[Document],
    options: LongOptions,
    on_document: Callable[[int], None] = lambda index: None,
) -> None:
    """Translate documents side by side; ``on_document`` gets the index of each as it is done."""
    waiting = list(range(len(documents)))
    active: list[int] = []
    # Without the group before in the prompt, the groups of a document do not depend on each other.
    at_once = 1 if options.previous else calls.batch
    while active or waiting:
        while waiting and len(active) * at_once < calls.batch:
            active.append(waiting.pop(0))
        asked = [
            (index, number)
            for index in active
            for number in range(
                len(documents[index].chosen),
                min(len(documents[index].chosen) + at_once, len(documents[index].groups)),
            )
        ]
        _step(calls, task, documents, asked, options)
        for index in [index for index in active if documents[index].finished]:
            active.remove(index)
            on_document(index)


def _step(
    calls: Calls,
    task: Task,
    documents: Sequence[Document],
    asked: Sequence[tuple[int, int]],
    options: LongOptions,
) -> None:
    """Translate groups, given as (document, group), in one batch."""
    prompts = []
    tokens: list[list[int]] = []
    configs = []
    for index, number in asked:
        document = documents[index]
        prompt = _prompt(calls, task, document, number, options)
        template = task.templates[document.language]
        decode = candidates_of(calls.decode_of(task), options.candidates)
        prompts.append(prompt)
        tokens.append(encode_prompt(calls.tokenizer, prompt.text))
        configs.append(
            settings_of(calls.decoder, calls.tokenizer, decode, len(tokens[-1]), template.stops)
        )
    written: dict[int, list[Generated]] = {i: [] for i in range(len(asked))}
    for result in generate(calls.decoder, calls.tokenizer, tokens, configs) if tokens else []:
        written[result.prompt].append(result)
    for i, (index, number) in enumerate(asked):
        document = documents[index]
        _choose(task, document, number, prompts[i], written[i], options)
        document.prompts.append(prompts[i])
        document.tokens_in += len(tokens[i])
        document.tokens_out += sum(len(each.tokens) for each in written[i])
        calls.tick()


def candidates_of(decode: DecodeConfig, candidates: int) -> DecodeConfig:
    """Return settings that give several translations: all beams, or ``candidates`` samples."""
    if decode.num_beams > 1:
        return dataclasses.replace(decode, num_return_sequences=decode.num_beams)
    number = candidates if decode.temperature > 0 else 1
    return dataclasses.replace(decode, num_return_sequences=number)


def _prompt(
    calls: Calls, task: Task, document: Document, number: int, options: LongOptions
) -> Prompt:
    """Return the prompt of a group after given examples, its terms and the groups before it."""
    group = document.groups[number]
    row = dataclasses.replace(document.row, input=group.text, references=())
    given = calls.examples_of(row, document.language)
    terms = [Row(term.source, (term.target,)) for term in terms_in(group.text, options.glossary)]
    first = max(0, number - options.previous)
    before = [
        Row(document.groups[i].text, (document.chosen[i],))
        for i in range(first, number)
        if i < len(document.chosen)
    ]
    compose_with = lambda examples: compose(  # noqa: E731
        task,
        row,
        calls.tokenizer,
        calls.decoder.context,
        language=document.language,
        examples=examples,
        reserve=SPARE + math.ceil(GROWTH * document.tokens[number]),
    )
    prompt = compose_with([*given, *terms, *before])
    # The last examples stay if not all fit. Terms matter more than the groups before.
    if prompt.examples < len(terms) + len(before):
        prompt = compose_with([*before, *terms])
    return prompt


def _choose(
    task: Task,
    document: Document,
    number: int,
    prompt: Prompt,
    written: Sequence[Generated],
    options: LongOptions,
) -> None:
    """Choose the translation of a group among those written, and remember it."""
    group = document.groups[number]
    terms = terms_in(group.text, options.glossary)
    stops = task.templates[document.language].stops
    best = -math.inf
    text = raw = ""
    finish = ""
    for each in written:
        cleaned = clean(each.text, prompt.language, stops, task.joined)
        if not cleaned or not each.tokens:
            continue
        score = sum(each.logprobs) / len(each.tokens)
        if terms:
            score += sum(honours(cleaned, term) for term in terms) / len(terms)
        score += MEMORY * (document.memory.consistency(group.text, cleaned) or 0.0)
        if score > best:
            best = score
            text = cleaned
            raw = each.text
            finish = each.finish_reason
    if not text:
        # A paragraph without a counterpart would be dropped silently.
        text = group.text
        document.copied += 1
    document.cut += finish == "length"
    document.memory.add(group.text, text)
    document.chosen.append(text)
    document.raw.append(raw)


def answer_of(document: Document, glossary: Sequence[Term]) -> Answer:
    """Return the answer of a translated document, and how far it honors the glossary."""
    by_paragraph: dict[int, list[str]] = collections.defaultdict(list)
    for group, text in zip(document.groups, document.chosen, strict=True):
        by_paragraph[group.paragraph].append(text)
    units = document.layout.units
    texts = [
        _with_quotes(unit.text, _joined_sentences(by_paragraph[number]))
        for number, unit in enumerate(units)
    ]
    paragraphs = tuple(
        Paragraph(unit.start, unit.end, text, len(by_paragraph[number]))
        for number, (unit, text) in enumerate(zip(units, texts, strict=True))
    )
    prompt = document.prompts[0]
    work = Work(
        "parts",
        len(document.groups),
        len(document.groups),
        document.tokens_in,
        document.tokens_out,
        tuple(
            Part(unit.start, unit.end, sum(_tokens_of(document, number)))
            for number, unit in enumerate(units)
        ),
        _notes(document),
        paragraphs=paragraphs,
        terms=_term_uses(document, glossary),
    )
    return Answer(
        document.layout.with_texts(texts),
        "\n".join(document.raw),
        prompt.language,
        "length" if document.cut else "stop",
        (),
        (),
        prompt.examples,
        False,
        False,
        prompt.text,
        work=work,
    )


def _tokens_of(document: Document, paragraph: int) -> list[int]:
    pairs = zip(document.groups, document.tokens, strict=True)
    return [tokens for group, tokens in pairs if group.paragraph == paragraph]


def _joined_sentences(texts: Sequence[str]) -> str:
    text = ""
    for each in texts:
        text += seam(text, each) + each
    return text


def _with_quotes(source: str, text: str) -> str:
    """Return a translation with the quotation marks at the ends of its source, if it lost them."""
    if source[:1] and source[0] in OPENING and text[:1] not in OPENING:
        text = source[0] + text
    if source[-1:] and source[-1] in CLOSING and text[-1:] not in CLOSING:
        text += source[-1]
    return text


def _notes(document: Document) -> tuple[str, ...]:
    notes = []
    broken_groups = sum(group.broken for group in document.groups)
    if broken_groups:
        notes.append(
            f"{broken_groups:,} of {len(document.groups):,} parts are pieces of sentences that are "
            "longer than the context; they were broken after clauses or between words"
        )
    if document.cut:
        notes.append(
            f"{document.cut:,} translations ended by their length and may be incomplete; raise "
            "max_new_tokens"
        )
    if document.copied:
        notes.append(f"the model left {document.copied:,} parts empty; they stand untranslated")
    return tuple(notes)


def _term_uses(document: Document, glossary: Sequence[Term]) -> tuple[TermUse, ...]:
    """Return how often each term of the glossary was asked for and honored."""
    asked: dict[Term, list[tuple[int, bool]]] = {term: [] for term in glossary}
    for group, text in zip(document.groups, document.chosen, strict=True):
        for term in terms_in(group.text, glossary):
            asked[term].append((group.paragraph + 1, honours(text, term)))
    return tuple(
        TermUse(
            term.source,
            term.target,
            len(uses),
            sum(honored for _, honored in uses),
            tuple(dict.fromkeys(number for number, honored in uses if not honored)),
        )
        for term, uses in asked.items()
        if uses
    )

"""Run a task on rows of any length: whole where a row fits the context, by parts where not."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.tasks import run
from mtnlg_jax.tasks.answers import Answer
from mtnlg_jax.tasks.long import answering, comparing, sentiment, summarise, translate
from mtnlg_jax.tasks.long.calls import Calls, whole_text
from mtnlg_jax.tasks.long.options import LongOptions, check_options
from mtnlg_jax.tasks.long.units import layout_of
from mtnlg_jax.tasks.prompts import Examples
from mtnlg_jax.tasks.rendering import Row, check_passages, check_task, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.work import Work

# The arguments of `tasks.run.perform` that `perform_long` takes as well, and their defaults.
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(run.perform).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "on_answer"
}


def perform_long(
    decoder: Decoder,
    tokenizer,
    task: Task,
    rows: Sequence[Row | str],
    *,
    options: LongOptions | None = None,
    on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    on_progress: Callable[[int, int], None] = lambda done, known: None,
    **settings,
) -> list[Answer]:
    """Return the answer of each row; no part of an input is left out.

    A row that fits the context gets the prompt and the answer of `tasks.run.perform`, unless an
    option asks for more. Others are worked on by parts: see `tasks.long.translate`, `summarise`,
    `answering` and `sentiment`. A text to translate goes by parts as soon as it has two paragraphs
    or a list marker, which one prompt would lose. Task "continue" shows the model the end of a long
    text, and a note in the answer's work says how much of it.

    Args:
      options: how long inputs are worked on.
      on_answer: called with (index of the row, answer) as soon as the answer is available.
      on_progress: called with (parts done, parts known so far) after each part. Levels of summaries
        and citations add parts while the work goes on.
      settings: the other arguments of `tasks.run.perform`.

    Raises:
      ValueError: an argument or a row is invalid; raised before the model does any work.
    """
    options = options or LongOptions()
    asked = [run.row_of(row) for row in rows]
    check_options(options, task, len(asked))
    if options.document is not None:
        asked = [
            row if row.context else dataclasses.replace(row, context=options.document)
            for row in asked
        ]
    unknown = sorted(set(settings) - set(_DEFAULTS))
    if unknown:
        raise TypeError(f"perform_long got unknown arguments {', '.join(unknown)}")
    settings = _DEFAULTS | settings
    if not asked:
        return run.perform(decoder, tokenizer, task, asked, **settings)
    examples = [run.row_of(each) for each in settings["examples"]]
    pool = Examples(task, examples, settings["language"])
    checked = ("scorer", "normalise", "last_word", "batch", "passages")
    decode = settings["decode"] or task.decode
    run.check_arguments(task, decoder, decode, **{name: settings[name] for name in checked})
    calls = Calls(decoder, tokenizer, settings | {"examples": examples}, pool, on_progress)
    answers: dict[int, Answer] = {}

    def give(index: int, answer: Answer) -> None:
        answers[index] = answer
        on_answer(index, answer)

    ranked = any(calls.ranks(task, row) for row in asked)
    run.check_ranking(ranked, settings["scorer"], settings["normalise"])
    plans = _plans(calls, task, asked, options)
    whole = [index for index in range(len(asked)) if index not in plans]
    calls.expect(len(whole) + sum(map(_parts_of, plans.values())))
    if whole:
        finish = _finishing(calls, task, options)
        calls.perform(
            task,
            [asked[i] for i in whole],
            on_answer=lambda number, answer: give(whole[number], finish(answer)),
        )
    _by_parts(calls, task, plans, options, give)
    return [answers[index] for index in range(len(asked))]


def _plans(calls: Calls, task: Task, rows: Sequence[Row], options: LongOptions) -> dict[int, Any]:
    """Return the plan of each row that does not go whole; errors name the row."""
    if options.mode == "cut" or calls.settings["last_word"] or task.name not in _PLANNERS:
        return {}
    plans = {}
    checked: set[str] = set()
    for index, row in enumerate(rows):
        try:
            language, template = template_of(task, row.input, calls.settings["language"])
            if language not in checked:
                check_task(task, template, calls.tokenizer)
                checked.add(language)
            if calls.settings["retriever"] or row.context.strip():
                check_passages(task, template)
            if row.choices and task.name in _WRITTEN:
                _check_choices(calls, task, row, options)
                continue
            plan = _PLANNERS[task.name](calls, task, row, options)
        except ValueError as error:
            where = f"row {index + 1} of {len(rows)}: " if len(rows) > 1 else ""
            raise ValueError(f"{where}{error}") from None
        if plan is not None:
            plans[index] = plan
    return plans


def _check_choices(calls: Calls, task: Task, row: Row, options: LongOptions) -> None:
    """Raise ValueError unless the choices of a row are ranked after its whole input."""
    if options != LongOptions() or not calls.is_whole(task, row):
        raise ValueError(
            f"the input {row.input[:40]!r} has {len(row.choices)} choices, which are ranked after "
            "one prompt with all of it; leave the choices out, or the options of "
            f"{task.name!r}, and give a text that fits the context of {calls.context}"
        )


def _plan_translation(calls: Calls, task: Task, row: Row, options: LongOptions):
    layout = layout_of(whole_text(row.input))
    around = "".join(unit.lead for unit in layout.units) + layout.tail
    plain = len(layout.units) < 2 and not around.strip()
    asked = options.glossary or options.reference is not None or options.round_trip
    if not layout.units or (plain and not asked and _translates_whole(calls, task, row)):
        return None
    document = translate.plan(calls, task, row, options.group)
    target = task.templates[document.language].answer_language
    if options.round_trip:
        if target not in task.templates:
            raise ValueError(
                f"round_trip translates back from {target!r}, and task {task.name!r} has templates "
                f"of {', '.join(task.templates)} only; add one with a templates file, or leave it "
                "out"
            )
        translate.fitting(calls, task, row, target)  # raises without room on the way back
    return document


def _translates_whole(calls: Calls, task: Task, row: Row) -> bool:
    """Return whether a text fits the context together with its translation."""
    room = calls.room_of(task, row, calls.language_of(task, row.input))
    grown = calls.tokens_of(row.input) * (1 + translate.GROWTH)
    return grown <= room and calls.is_whole(task, row)


def _plan_summary(calls: Calls, task: Task, row: Row, options: LongOptions):
    plain = options.kind == "general" and options.length is None
    if plain and calls.is_whole(task, row):
        return None
    return summarise.plan(calls, task, row, options)


def _plan_answer(calls: Calls, task: Task, row: Row, options: LongOptions):
    if not row.context or calls.is_whole(task, row):
        return None
    return answering.plan(calls, task, row)


def _plan_sentiment(calls: Calls, task: Task, row: Row, options: LongOptions):
    if not options.aspects and calls.is_whole(task, row):
        return None
    if not calls.ranks(task, row):
        raise ValueError(
            f"task {task.name!r} votes and judges aspects by labels, and its templates have none; "
            "add labels, or use mode='cut' (--long=cut)"
        )
    return sentiment.plan(calls, task, row, options.aspects)


# Tasks whose parts are written and not ranked.
_WRITTEN = ("translate", "summarise")
_PLANNERS: dict[str, Callable] = {
    "translate": _plan_translation,
    "summarise": _plan_summary,
    "answer": _plan_answer,
    "sentiment": _plan_sentiment,
}


def _parts_of(plan) -> int:
    if isinstance(plan, translate.Document):
        return len(plan.groups)
    return len(plan.parts) if isinstance(plan, summarise.Plan) else plan.calls


def _finishing(calls: Calls, task: Task, options: LongOptions) -> Callable[[Answer], Answer]:
    """Return what is added to the answer of a whole row."""
    if task.name == "answer" and options.mode == "parts":
        return lambda answer: answering.with_citations(calls, answer, options.cite)
    if task.joined:
        return _noted
    return lambda answer: answer


def _noted(answer: Answer) -> Answer:
    """Note how much of a text to continue the model did not see."""
    if not answer.shortened or answer.work is None:
        return answer
    note = (
        f"the model continued the end of the text, {len(answer.prompt):,} characters with the "
        "words of the prompt, which is what its context holds"
    )
    return dataclasses.replace(answer, work=dataclasses.replace(answer.work, notes=(note,)))


def _by_parts(
    calls: Calls,
    task: Task,
    plans: dict[int, Any],
    options: LongOptions,
    give: Callable[[int, Answer], None],
) -> None:
    if task.name == "translate":
        indices = list(plans)
        documents = list(plans.values())

        def done(number: int) -> None:
            answer = translate.answer_of(documents[number], options.glossary)
            give(indices[number], _compared(calls, task, documents[number], answer, options))

        translate.translate(calls, task, documents, options, done)
        return
    for index, plan in plans.items():
        if task.name == "summarise":
            answer = summarise.summarise(calls, plan)
        elif task.name == "answer":
            answer = answering.answer(calls, task, plan, options.cite)
        else:
            answer = sentiment.judge(calls, task, plan)
        give(index, answer)


def _compared(
    calls: Calls,
    task: Task,
    document: translate.Document,
    answer: Answer,
    options: LongOptions,
) -> Answer:
    """Return the answer with chrF against the reference, and after translation back."""
    assert answer.work, "translations count their work"
    comparisons = []
    works: list[Work] = [answer.work]
    if options.reference is not None:
        comparisons.append(comparing.with_reference(answer.work.paragraphs, options.reference))
    if options.round_trip:
        comparison, work = comparing.round_trip(calls, task, document, answer, options)
        comparisons.append(comparison)
        works.append(work)
    work = dataclasses.replace(
        answer.work,
        comparisons=tuple(comparisons),
        calls=sum(each.calls for each in works),
        tokens_in=sum(each.tokens_in for each in works),
        tokens_out=sum(each.tokens_out for each in works),
    )
    return dataclasses.replace(answer, work=work)

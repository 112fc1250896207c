"""Rows of any length: short ones as before, long ones by parts with every paragraph in one."""

import dataclasses
import json

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.tasks.answers import AnswersFile, evaluate, read_answers
from mtnlg_jax.tasks.long.calls import LEAST_ROOM
from mtnlg_jax.tasks.long.glossary import Term
from mtnlg_jax.tasks.long.options import LongOptions
from mtnlg_jax.tasks.long.run import perform_long
from mtnlg_jax.tasks.long.units import layout_of
from mtnlg_jax.tasks.profile import Entry, Profile
from mtnlg_jax.tasks.rendering import Row
from mtnlg_jax.tasks.run import perform
from mtnlg_jax.tasks.templates import TASKS, Template

FEW = DecodeConfig(max_new_tokens=4)
GREEDY = DecodeConfig(max_new_tokens=24)
LONG_TASKS = ("summarise", "translate", "sentiment", "answer")


def _touched(parts, unit) -> int:
    return sum(part.start < unit.end and unit.start < part.end for part in parts)


def _check_plan(text: str, answer) -> None:
    """Every paragraph of the text is in exactly one part, and nothing lies between parts."""
    plan = answer.work.plan
    units = layout_of(text).units
    assert len(units) > 3
    for unit in units:
        assert _touched(plan, unit) == 1, text[unit.start : unit.end][:60]
    for one, other in zip(plan, plan[1:], strict=False):
        assert not text[one.end : other.start].strip()
    assert not text[: plan[0].start].strip() and not text[plan[-1].end :].strip()


@pytest.mark.parametrize("name", TASKS)
def test_short_rows_have_the_prompts_and_answers_of_perform(memory, known, name):
    decode = GREEDY if name == "continue" else None
    plain = perform(*memory, TASKS[name], known[name], decode=decode)
    done = []
    progress = []
    long = perform_long(
        *memory,
        TASKS[name],
        known[name],
        decode=decode,
        on_answer=lambda index, answer: done.append((index, answer)),
        on_progress=lambda *counts: progress.append(counts),
    )
    for one, other in zip(plain, long, strict=True):
        assert one == dataclasses.replace(other, work=one.work)
        assert one.work == dataclasses.replace(other.work, sentences=())
        assert one.work.method == "whole" and one.work.tokens_in > 4
    assert dict(done) == dict(enumerate(long))
    assert progress[-1] == (len(long), len(long))


def _long_rows(text_of, name: str, words: int) -> list[Row]:
    texts = [text_of("en", words), text_of("zh", words, seed=1)]
    if name != "answer":
        return [Row(text) for text in texts]
    questions = ["where is the captain", "船长在哪里"]
    return [Row(asked, context=text) for asked, text in zip(questions, texts, strict=True)]


@pytest.mark.parametrize("name", LONG_TASKS)
@pytest.mark.parametrize("words", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_paragraph_of_a_long_input_is_dropped(random_model, text_of, name, words):
    rows = _long_rows(text_of, name, words)
    options = LongOptions(previous=0, group=6) if name == "translate" else None
    progress = []
    answers = perform_long(
        *random_model,
        TASKS[name],
        rows,
        decode=FEW,
        options=options,
        batch=2 if words < 1000 else 16,
        on_progress=lambda *counts: progress.append(counts),
    )
    for row, answer in zip(rows, answers, strict=True):
        text = row.context or row.input
        _check_plan(text, answer)
        units = layout_of(text).units
        work = answer.work
        assert work.calls >= work.parts > 0 or name == "answer"
        assert not answer.shortened and not answer.context_shortened
        if name == "translate":
            assert len(work.paragraphs) == len(units)
            assert [(each.start, each.end) for each in work.paragraphs] == [
                (unit.start, unit.end) for unit in units
            ]
            assert all(each.text for each in work.paragraphs)
            assert len(layout_of(answer.text).units) <= len(units)
            assert answer.text.count("\n\n") == text.count("\n\n")
        elif name == "sentiment":
            assert len(work.votes) == work.parts == len(work.plan) > 2
            assert answer.text in ("negative", "positive")
        elif name == "summarise":
            assert work.parts > len(work.plan) > 2
            # All parts were read: together their prompts hold more than the text.
            assert work.tokens_in > sum(part.tokens for part in work.plan)
        else:
            assert answer.citations and answer.work.sentences
            assert all(text[c.start : c.end] == c.text for c in answer.citations)
    assert progress[-1][0] == progress[-1][1] == len(progress)


def test_the_text_to_continue_is_followed_and_noted(random_model, text_of):
    text = text_of("en", 600)
    answer = perform_long(*random_model, TASKS["continue"], [text], decode=FEW)[0]
    assert answer.shortened and "the model continued the end of the text" in answer.work.notes[0]


def test_a_running_summary_reads_every_part_in_order(random_model, text_of):
    text = text_of("en", 600)
    options = LongOptions(method="refine")
    seen = []
    decoder, tokenizer = random_model
    answer = perform_long(
        decoder,
        tokenizer,
        TASKS["summarise"],
        [text],
        decode=dataclasses.replace(FEW, max_new_tokens=8),
        options=options,
        on_progress=lambda *counts: seen.append(counts),
    )[0]
    _check_plan(text, answer)
    assert answer.work.method == "refine"
    assert answer.work.parts == len(answer.work.plan) == len(seen) > 2
    assert "Summary so far: " in answer.prompt and not answer.context_shortened
    last = answer.work.plan[-1]
    assert " ".join(text[last.start : last.end].split()) in answer.prompt


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["general", "news", "abstract", "product"])
def test_kinds_and_lengths_have_prompts_of_their_own(random_model, text_of, language, kind):
    text = text_of(language, 60)
    prompts = set()
    for length in (None, 4, 5):
        options = LongOptions(kind=kind, length=length)
        answer = perform_long(
            *random_model, TASKS["summarise"], [text], decode=FEW, options=options
        )[0]
        prompts.add(answer.prompt)
        assert (
            length is None or f"{length} words" in answer.prompt or f"{length}个字" in answer.prompt
        )
    assert len(prompts) == 3


def test_a_long_length_is_written_in_pieces(random_model, text_of):
    """One call cannot write 100 words within 256 tokens."""
    text = text_of("en", 600)
    options = LongOptions(length=100)
    answer, short = (
        perform_long(*random_model, TASKS["summarise"], [text], options=each, decode=FEW, batch=16)[
            0
        ]
        for each in (options, LongOptions(length=12))
    )
    assert answer.text.count("\n") > 1 and len(answer.text.split()) <= 100
    assert len(short.text.split()) <= 12
    # Five calls write 200 words, from the summaries of seven parts.
    long = perform_long(
        *random_model, TASKS["summarise"], [text_of("en", 500)], options=LongOptions(length=200)
    )[0]
    assert len(long.work.plan) == 7 and long.text.count("\n") == 4
    with pytest.raises(ValueError, match="method='refine' keeps one running summary"):
        perform_long(
            *random_model,
            TASKS["summarise"],
            [text],
            options=LongOptions(length="long", method="refine"),
        )


def test_answers_with_work_are_written_and_old_files_still_read(memory, known, tmp_path):
    file = AnswersFile(tmp_path / "a.jsonl", known["sentiment"])
    options = LongOptions(aspects=("film",))
    answers = perform_long(
        *memory, TASKS["sentiment"], known["sentiment"], options=options, on_answer=file.add
    )
    file.close()
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    first = next(line for line in lines if line["row"] == 1)
    assert first["work"]["aspects"][0]["name"] == "film"
    assert first["work"]["plan"] == [{"start": 0, "end": 11, "tokens": 4}] or first["work"]["plan"]
    result = evaluate(TASKS["sentiment"], known["sentiment"], answers)
    again = evaluate(TASKS["sentiment"], *read_answers(file.path, TASKS["sentiment"]))
    assert again.scores == result.scores
    old = tmp_path / "old.jsonl"
    old.write_text(
        "".join(
            json.dumps({key: value for key, value in line.items() if key != "work"}) + "\n"
            for line in lines
        )
    )
    assert evaluate(TASKS["sentiment"], *read_answers(old, TASKS["sentiment"])).scores == (
        result.scores
    )


CHOICE = Row("a", choices=("b", "c"))
LONG_CHOICE = Row("a " * 300, choices=("b", "c"))
TERMS = (Term("whale", "鲸鱼"),)


@pytest.mark.parametrize(
    ("name", "rows", "options", "settings", "message"),
    [
        ("summarise", ["a"], {"mode": "all"}, {}, "unknown mode='all'; choose from parts, cut"),
        ("summarise", ["a"], {"kind": "poem"}, {}, "unknown kind='poem'"),
        ("summarise", ["a"], {"length": "0"}, {}, "length='0' is neither short, medium, long nor"),
        ("summarise", ["a"], {"cite": True}, {}, "cite is an option of task 'answer'"),
        ("sentiment", ["a"], {"aspects": ("price", " ")}, {}, "has an empty name"),
        ("translate", ["a"], {"glossary": TERMS, "mode": "cut"}, {}, "mode='cut' shortens them"),
        ("translate", ["a", "b"], {"reference": "c"}, {}, "there are 2 rows; give one row"),
        ("translate", ["a"], {"group": 0}, {}, "group=0; give 1 or more"),
        ("translate", ["a.\n\nb."], {}, {"batch": 0}, "batch=0"),
        ("summarise", ["a", " "], {}, {}, "row 2 of 2: the input of task 'summarise' is empty"),
        ("translate", ["a.\n\nb."], {}, {"scorer": "pmi"}, "scorer=pmi ranks labels and choices"),
        ("summarise", [LONG_CHOICE], {}, {}, "has 2 choices, which are ranked after one prompt"),
        ("translate", [CHOICE], {"glossary": TERMS}, {}, "leave the choices out, or the options"),
        ("summarise", [Row("a " * 300, context="b")], {}, {}, "takes no passages"),
        ("answer", ["a " * 300], {"document": "The sea. " * 99}, {}, "not even 8 tokens of the"),
    ],
)
def test_invalid_arguments_raise_before_any_work(
    random_model, name, rows, options, settings, message
):
    decoder, tokenizer = random_model
    unable = decoder._replace(params=None)  # work would fail otherwise
    with pytest.raises(ValueError, match=message) as error:
        perform_long(
            unable, tokenizer, TASKS[name], rows, options=LongOptions(**options), **settings
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", LONG_TASKS)
def test_a_context_without_room_for_a_few_tokens_is_one_error(random_model, text_of, name):
    decoder, tokenizer = random_model
    task = TASKS[name]
    before = task.templates["en"].prompt
    wide = Template(
        "the whale " * 120 + before,
        passage=task.templates["en"].passage,
        labels=task.templates["en"].labels,
    )
    task = dataclasses.replace(task, templates={"en": wide})
    row = _long_rows(text_of, name, 300)[0]
    with pytest.raises(ValueError, match=f"not even {LEAST_ROOM} tokens of the text fit"):
        perform_long(decoder._replace(params=None), tokenizer, task, [row])


def test_a_profile_without_room_for_parts_is_named(random_model):
    profile = Profile([Entry("fact", "The sea.", 1)], share=0.95)
    with pytest.raises(ValueError, match="holds 13 beside 243 of the profile.*--profile_share"):
        perform_long(*random_model, TASKS["summarise"], ["sea " * 300], profile=profile)


def test_templates_that_long_inputs_cannot_use_are_refused_before_any_work(random_model):
    decoder, tokenizer = random_model
    unable = decoder._replace(params=None)
    task = TASKS["translate"]
    wide = dataclasses.replace(task.templates["zh"], instruction="把中文译成英文。" * 80)
    task = dataclasses.replace(task, templates={**task.templates, "zh": wide})
    with pytest.raises(ValueError, match="not even 8 tokens of the text fit"):
        perform_long(unable, tokenizer, task, ["a. b."], options=LongOptions(round_trip=True))
    task = TASKS["sentiment"]
    bare = dataclasses.replace(task.templates["en"], labels=())
    task = dataclasses.replace(task, templates={"en": bare})
    with pytest.raises(ValueError, match="its templates have none; add labels, or use mode='cut'"):
        perform_long(unable, tokenizer, task, ["good sea. " * 200])


def test_choices_are_ranked_whichever_lines_the_input_has(random_model):
    row = Row("The whale.\n\nThe cook.", choices=("鲸鱼", "厨师"))
    answers = perform_long(
        *random_model, TASKS["translate"], [row, "A.\n\nB."], decode=FEW, normalise="per_char"
    )
    assert answers[0].ranked_by == "logprob per_char" and answers[1].work.method == "parts"


def test_cutting_is_what_perform_does(random_model, text_of):
    text = text_of("en", 600)
    for name in ("summarise", "sentiment"):
        one = perform(*random_model, TASKS[name], [text], decode=FEW)
        other = perform_long(
            *random_model, TASKS[name], [text], decode=FEW, options=LongOptions(mode="cut")
        )
        assert one == other and one[0].shortened

"""Run each task with a model that has memorized a few rows; check answers and errors."""

import dataclasses
import json

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig, StageConfig
from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.tasks.answers import (
    NORMALIZATIONS,
    AnswersFile,
    check_references,
    evaluate,
    length_of,
    read_answers,
)
from mtnlg_jax.tasks.passages import Retriever
from mtnlg_jax.tasks.prompts import Row
from mtnlg_jax.tasks.run import perform
from mtnlg_jax.tasks.templates import TASKS, Template

GREEDY = DecodeConfig(max_new_tokens=24)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_returns_the_learned_answers(memory, known, name):
    done = []
    # As the task would, but for continue's draws.
    answers = perform(
        *memory,
        TASKS[name],
        known[name],
        decode=GREEDY if name == "continue" else None,
        on_answer=lambda index, answer: done.append((index, answer)),
    )
    assert [answer.text.strip() for answer in answers] == [
        row.references[0].strip() for row in known[name]
    ]
    assert dict(done) == dict(enumerate(answers)) and not any(
        answer.shortened for answer in answers
    )
    result = evaluate(TASKS[name], known[name], answers)
    assert list(result.scores) == list(TASKS[name].metrics)
    assert all(score.value == pytest.approx(100) for score in list(result.scores.values())[:2])
    assert all(score.value < 100 for score in list(result.baseline_scores.values())[:1])
    if name == "continue":
        assert answers[0].text == " there lived a whale.", "the first space belongs to the text"
    if name == "sentiment":
        assert [answer.raw for answer in answers] == [" positive", " negative", "正面", "负面"]
        assert all(
            answer.finish_reason == "ranked"
            and answer.choices[0].probability > 0.5
            and sum(choice.probability for choice in answer.choices) == pytest.approx(1)
            for answer in answers
        )
        assert (result.baseline, result.baseline_scores["accuracy"].value) == ("majority class", 50)


def test_the_ranking_equals_rank(memory):
    labels = ("negative", "positive")
    answer = perform(*memory, TASKS["sentiment"], ["a fine film"])[0]
    direct = rank(*memory, answer.prompt, [f" {label}" for label in labels], normalise="sum")
    assert [each.label for each in answer.choices] == [e.text.strip() for e in direct]
    assert [each.score for each in answer.choices] == pytest.approx(
        [e.score for e in direct], abs=1e-4
    )
    row = Row("Who sleeps?", choices=("nobody at all", "the captain"))
    answer = perform(*memory, TASKS["answer"], [row])[0]
    direct = rank(*memory, answer.prompt, [" nobody at all", " the captain"], normalise="sum")
    assert answer.text == "the captain" and answer.ranked_by == "logprob per_byte"
    assert [each.log_prob for each in answer.choices] == pytest.approx(
        [e.sum for e in direct], abs=1e-4
    )
    assert [each.score for each in answer.choices] == pytest.approx(
        [e.sum / len(e.text.strip()) for e in direct], abs=1e-4
    )
    odds = np.exp(np.array([e.sum for e in direct]))
    assert [each.probability for each in answer.choices] == pytest.approx(
        (odds / odds.sum()).tolist()
    )
    pmi = perform(*memory, TASKS["sentiment"], ["a fine film"], scorer="pmi")[0]
    whole = {
        each.text.strip(): each.sum
        for each in rank(
            *memory, pmi.prompt.replace("a fine film", ""), [f" {label}" for label in labels]
        )
    }
    first = {
        each.label: each.score
        for each in perform(*memory, TASKS["sentiment"], ["a fine film"])[0].choices
    }
    assert {each.label: each.score for each in pmi.choices} == pytest.approx(
        {label: first[label] - whole[label] for label in labels}, abs=1e-4
    )


def test_passages_are_retrieved_and_cited(memory):
    documents = [
        Document("The sea is grey. " * 9, "sea.txt"),
        Document("Nothing. The whale lives in the north. Nothing else is known.", "whale.txt"),
    ]
    answer = perform(
        *memory,
        TASKS["answer"],
        ["Where is the whale?"],
        retriever=Retriever(documents, 40),
        passages=1,
        decode=GREEDY,
    )[0]
    cited = answer.citations[0]
    assert cited.source == "whale.txt" and f"[1] {cited.text}\nQuestion: Where" in answer.prompt
    assert (
        documents[1].text[cited.start : cited.end] == cited.text
        and "The whale lives in the north." in cited.text
    )
    nothing = perform(
        *memory, TASKS["answer"], ["鲸鱼在哪里？"], retriever=Retriever(documents), decode=GREEDY
    )[0]
    assert nothing.citations == () and nothing.text == "北方", (
        "without passages the model answers from its weights"
    )


@pytest.mark.parametrize(
    ("beams", "stop", "raw", "text"),
    [(1, "pt", " the ca", "the ca"), (2, "pt", " the captain", "the ca"), (2, " ", "", "")],
)
def test_an_answer_ends_at_the_stop_of_its_template(memory, beams, stop, raw, text):
    """Greedy search ends before it. Beams end at a token that begins with it if the stop is one
    character, else once the whole stop is written."""
    task = TASKS["answer"]
    task = dataclasses.replace(
        task, templates={"en": dataclasses.replace(task.templates["en"], stops=(stop, "zz"))}
    )
    answer = perform(
        *memory, task, ["Who sleeps?"], decode=dataclasses.replace(GREEDY, num_beams=beams)
    )[0]
    assert (answer.raw, answer.text, answer.finish_reason) == (raw, text, "stop")


def test_the_context_holds_prompt_and_answer(memory):
    rows = [Row("The whale swam north. " * most) for most in (1, 20)]
    endless = TASKS["summarise"]
    endless = dataclasses.replace(
        endless, templates={"en": dataclasses.replace(endless.templates["en"], stops=())}
    )
    answers = perform(
        *memory, endless, rows, decode=DecodeConfig(max_new_tokens=500, min_new_tokens=500)
    )
    assert [(answer.shortened, answer.finish_reason) for answer in answers] == [
        (False, "length"),
        (True, "length"),
    ]
    assert all(len(memory.tokenizer.encode(answer.raw)) > 16 for answer in answers)
    asked = [len(memory.tokenizer.encode(answer.prompt)) + 1 for answer in answers]
    assert asked[0] < 60 < 100 < asked[1] <= memory.decoder.context * 3 / 4, (
        "a quarter is kept for the answer"
    )


def test_examples_have_the_language_of_the_input(memory):
    examples = [("x", "negative"), Row("好", ("positive",)), ("y", "positive")]
    english, chinese = perform(*memory, TASKS["sentiment"], ["z", "坏"], examples=examples)
    assert (english.examples, chinese.examples) == (2, 1)
    first = perform(*memory, TASKS["sentiment"], ["z"], examples=examples, shots=1)[0]
    assert (
        first.examples == 1 and "Review: x\n" in first.prompt and "Review: y\n" not in first.prompt
    )
    assert (
        "Review: x\nSentiment: negative\n\nReview: y\nSentiment: positive\n\nReview: z"
        in english.prompt
    )
    assert "评论：好\n情感：正面\n\n评论：坏" in chinese.prompt


@pytest.mark.parametrize(
    ("name", "rows", "options", "message"),
    [
        ("summarise", [], {}, "task 'summarise' has no rows to answer"),
        ("summarise", ["a", " "], {}, "row 2 of 2: the input of task 'summarise' is empty"),
        ("summarise", [3], {}, "'3' is not a row; give a text"),
        (
            "sentiment",
            ["a"],
            {"scorer": "bert"},
            "unknown scorer 'bert'; choose from logprob, pmi",
        ),
        (
            "sentiment",
            ["a"],
            {"examples": [("b", "good")]},
            "reference 'good' is none of the labels",
        ),
        ("sentiment", ["a"], {"batch": 0}, "batch=0"),
        (
            "sentiment",
            ["a"],
            {"normalise": "per_token"},
            "unknown normalise='per_token'; choose from sum, per_char",
        ),
        (
            "summarise",
            ["a"],
            {"normalise": "sum"},
            "normalise=sum ranks labels and choices, and these rows have none",
        ),
        (
            "summarise",
            ["a"],
            {"scorer": "pmi"},
            "scorer=pmi ranks labels and choices, and these rows have none",
        ),
        (
            "summarise",
            [Row("a", ("b",))],
            {"last_word": True},
            "last-word scoring requires a text to continue",
        ),
        ("continue", ["a"], {"last_word": True}, "has no reference; a last word is compared"),
        (
            "continue",
            [Row("a _ b", choices=("c", "d"), blank="_")],
            {"scorer": "pmi"},
            "use scorer=logprob",
        ),
        (
            "continue",
            [Row("a b", choices=("c", "d"), blank="_")],
            {},
            "has 0 blanks '_' with text after the last",
        ),
        ("continue", [Row("a _.", choices=("c", "d"), blank="x")], {}, "has 0 blanks 'x'"),
        ("sentiment", ["a"], {"decode": DecodeConfig(temperature=-1)}, "temperature=-1"),
        (
            "summarise",
            ["a"],
            {"decode": DecodeConfig(num_beams=4, num_return_sequences=2)},
            "gives one answer; set it to",
        ),
        ("summarise", ["a"], {"retriever": Retriever([Document("b", "c")])}, "takes no passages"),
        ("translate", ["Hello. " * 99], {}, "context holds 160"),
    ],
)
def test_invalid_arguments_raise_before_any_work(memory, name, rows, options, message):
    unable = memory.decoder._replace(params=None)  # work would fail otherwise
    with pytest.raises(ValueError, match=message) as error:
        perform(unable, memory.tokenizer, TASKS[name], rows, **options)
    assert "\n" not in str(error.value)


def test_a_model_without_masks_raises_an_error(memory):
    with pytest.raises(ValueError, match="every stage of this one is causal"):
        perform(
            *memory,
            TASKS["sentiment"],
            ["a"],
            scorer="pseudo_log_likelihood",
            stages=(StageConfig(),),
        )


def test_choice_scores_are_divided_by_length_without_the_space(memory):
    row = Row("Who sleeps?", ("the captain",), choices=("nobody at all", "the captain", "é"))
    assert [length_of(name, " é a") for name in NORMALIZATIONS] == [1, 3, 4]
    found = {}
    for name in NORMALIZATIONS:
        answer = perform(*memory, TASKS["answer"], [row], normalise=name)[0]
        assert answer.ranked_by == f"logprob {name}"
        for choice in answer.choices:
            assert choice.text == f" {choice.label}"
            assert choice.score == pytest.approx(choice.log_prob / length_of(name, choice.label))
        assert [choice.score for choice in answer.choices] == sorted(
            (c.score for c in answer.choices), reverse=True
        )
        found[name] = answer
    result = evaluate(TASKS["answer"], [row] * 2, [found["sum"]] * 2)
    assert (result.baseline, result.baseline_scores["accuracy"].value) == (
        "by chance",
        pytest.approx(100 / 3),
    )
    for name, score in result.normalised.items():
        assert score.value == 100 * (found[name].text == "the captain")


def test_the_text_after_a_blank_is_scored_for_each_choice(memory):
    row = Row("Once upon __ time", ("a",), choices=("a", "no"), blank="_")
    answer = perform(*memory, TASKS["continue"], [row])[0]
    direct = {
        choice: rank(*memory, f"Once upon {choice}", [" time"], normalise="sum")[0].sum
        for choice in row.choices
    }
    found = {each.label: each.log_prob for each in answer.choices}
    assert found == pytest.approx(direct, abs=1e-4) and answer.ranked_by == "logprob sum"
    assert (
        answer.text == max(direct, key=direct.get) and answer.prompt == f"Once upon {answer.text}"
    )
    chinese = Row("鲸鱼向_游去。", ("北",), choices=("北", "在"), blank="_")
    other = Row("船长再_，你好。", ("见",), choices=("见", "好"), blank="_")
    shown = perform(*memory, TASKS["continue"], [chinese], examples=[row, chinese, other])[0]
    assert shown.prompt == f"船长再见，你好。\n\n鲸鱼向{shown.text}", (
        "and it is never its own example"
    )
    assert shown.raw == "游去。"


def test_the_last_word_of_a_text_is_scored(memory):
    rows = [Row("Once upon a time", ("there lived a whale.",)), Row("Once upon", ("nothing",))]
    answers = perform(*memory, TASKS["continue"], rows, last_word=True)
    assert answers[0].text == "there lived a whale." and answers[1].text != "nothing"
    direct = rank(*memory, "Once upon", [" nothing"], normalise="sum")[0].sum
    assert answers[1].log_prob == pytest.approx(direct, rel=1e-4)
    result = evaluate(TASKS["continue"], rows, answers)
    assert result.scores["accuracy"].value == 50 == result.baseline_scores["accuracy"].value
    expected = np.exp(-np.mean([answer.log_prob for answer in answers]))
    assert (
        result.scores["perplexity"].value == pytest.approx(expected)
        and result.baseline == "the commonest word"
    )


def test_letters_are_ranked_if_the_prompt_lists_choices(memory):
    template = Template("{input}\n{choices}Answer:", choice="({letter}) {text}\n")
    task = dataclasses.replace(TASKS["answer"], templates={"en": template})
    row = Row("Who?", ("the captain",), choices=("a whale", "the captain"))
    answer = perform(*memory, task, [row], examples=[Row("Where?", ("b",), choices=("a", "b"))])[0]
    assert (
        answer.prompt
        == "Where?\n(A) a\n(B) b\nAnswer: B\n\nWho?\n(A) a whale\n(B) the captain\nAnswer:"
    )
    direct = rank(*memory, answer.prompt, [" A", " B"], normalise="sum")
    assert {each.text: each.log_prob for each in answer.choices} == pytest.approx(
        {each.text: each.sum for each in direct}, abs=1e-4
    )
    assert answer.text == {" A": "a whale", " B": "the captain"}[direct[0].text]
    by_text = dataclasses.replace(
        task, templates={"en": dataclasses.replace(template, chosen_by="text")}
    )
    assert {each.text for each in perform(*memory, by_text, [row])[0].choices} == {
        " a whale",
        " the captain",
    }


def test_a_row_is_never_its_own_example(memory):
    examples = [
        Row("Who sleeps?", ("the captain",)),
        Row("Where?", ("there",)),
        Row("Why?", ("so",)),
    ]
    for row in (Row("Who sleeps?"), Row(" who  SLEEPS? ")):
        answer = perform(*memory, TASKS["answer"], [row], examples=examples, decode=GREEDY)[0]
        assert answer.prompt.casefold().count("who") == 1 and answer.examples == 2
    one = perform(
        *memory, TASKS["answer"], ["Who sleeps?"], examples=examples, shots=1, decode=GREEDY
    )[0]
    assert "Where? \nAnswer: there".replace(" \n", "\n") in one.prompt, (
        "the next one takes its place"
    )


def test_answers_are_written_and_scored_again(memory, known, tmp_path):
    for name in ("sentiment", "answer"):
        file = AnswersFile(tmp_path / f"{name}.jsonl", known[name])
        answers = perform(*memory, TASKS[name], known[name], on_answer=file.add, decode=GREEDY)
        file.close()
        lines = [json.loads(line) for line in file.path.read_text().splitlines()]
        assert sorted(line["row"] for line in lines) == list(range(1, len(answers) + 1))
        result = evaluate(TASKS[name], known[name], answers)
        for rows in (None, known[name]):
            again = evaluate(TASKS[name], *read_answers(file.path, TASKS[name], rows))
            assert (again.scores, again.baseline_scores) == (result.scores, result.baseline_scores)


def test_rows_that_cannot_be_scored_together_raise_an_error():
    with pytest.raises(
        ValueError,
        match="1 of 2 rows have choices and the others have none, the first of them row 2",
    ):
        check_references(TASKS["answer"], [Row("a", ("b",), choices=("b", "c")), Row("d", ("e",))])


def test_missing_references_raise_an_error():
    with pytest.raises(ValueError, match="row 2 of 2: the row with input 'b' has no reference"):
        check_references(TASKS["summarise"], [Row("a", ("c",)), Row("b")])
    task = dataclasses.replace(
        TASKS["sentiment"], templates={"en": Template("{input}", labels={"a": "x", "b": "y"})}
    )
    with pytest.raises(ValueError, match="reference 'c' is none of the labels a, b"):
        check_references(task, [Row("d", ("c",))])

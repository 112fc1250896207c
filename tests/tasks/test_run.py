"""Tasks done by a model that knows a few rows by heart: every kind of answer, and every refusal before any work."""

import dataclasses

import pytest

from mtnlg_jax.config import DecodeConfig, StageConfig
from mtnlg_jax.data.documents import Document
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.tasks.passages import Retriever
from mtnlg_jax.tasks.prompts import Row
from mtnlg_jax.tasks.run import check_references, evaluate, perform
from mtnlg_jax.tasks.templates import TASKS, Template

GREEDY = DecodeConfig(max_new_tokens=24)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_gives_the_answers_that_were_learnt(memory, known, name):
    done = []
    # As the task would, but for continue's draws.
    answers = perform(*memory, TASKS[name], known[name], decode=GREEDY if name == "continue" else None,
                      on_row=done.append)
    assert [answer.text.strip() for answer in answers] == [row.references[0].strip() for row in known[name]]
    assert sum(done) == len(answers) and not any(answer.shortened for answer in answers)
    result = evaluate(TASKS[name], known[name], answers)
    assert list(result.scores) == list(TASKS[name].metrics)
    assert all(score.value == pytest.approx(100) for score in list(result.scores.values())[:2])
    assert all(score.value < 100 for score in list(result.baseline_scores.values())[:1])
    if name == "continue":
        assert answers[0].text == " there lived a whale.", "the first space belongs to the text"
    if name == "sentiment":
        assert [answer.raw for answer in answers] == [" positive", " negative", "正面", "负面"]
        assert all(answer.finish_reason == "ranked" and answer.choices[0].share > 0.5
                   and sum(choice.share for choice in answer.choices) == pytest.approx(1) for answer in answers)
        assert (result.baseline, result.baseline_scores["accuracy"].value) == ("majority class", 50)


def test_the_ranking_is_that_of_rank(memory):
    labels = ("negative", "positive")
    answer = perform(*memory, TASKS["sentiment"], ["a fine film"])[0]
    direct = rank(*memory, answer.prompt, [f" {label}" for label in labels], normalise="sum")
    assert [(each.label, each.score) for each in answer.choices] == [(e.text.strip(), e.score) for e in direct]
    row = Row("Who sleeps?", choices=("nobody at all", "the captain"))
    answer = perform(*memory, TASKS["answer"], [row])[0]
    direct = rank(*memory, answer.prompt, [" nobody at all", " the captain"], normalise="per_byte")
    assert answer.text == "the captain" and [each.score for each in answer.choices] == [e.score for e in direct]
    pmi = perform(*memory, TASKS["sentiment"], ["a fine film"], scorer="pmi")[0]
    whole = {each.text.strip(): each.sum for each in
             rank(*memory, pmi.prompt.replace("a fine film", ""), [f" {label}" for label in labels])}
    first = {each.label: each.score for each in perform(*memory, TASKS["sentiment"], ["a fine film"])[0].choices}
    assert {each.label: each.score for each in pmi.choices} == pytest.approx(
        {label: first[label] - whole[label] for label in labels}, abs=1e-4)


def test_passages_are_looked_up_and_cited(memory):
    documents = [Document("The sea is grey. " * 9, "sea.txt"),
                 Document("Nothing. The whale lives in the north. Nothing else is known.", "whale.txt")]
    answer = perform(*memory, TASKS["answer"], ["Where is the whale?"], retriever=Retriever(documents, 40), passages=1,
                     decode=GREEDY)[0]
    cited = answer.citations[0]
    assert cited.source == "whale.txt" and f"[1] {cited.text}\nQuestion: Where" in answer.prompt
    assert documents[1].text[cited.start : cited.end] == cited.text and "The whale lives in the north." in cited.text
    nothing = perform(*memory, TASKS["answer"], ["鲸鱼在哪里？"], retriever=Retriever(documents), decode=GREEDY)[0]
    assert nothing.citations == () and nothing.text == "北方", "where nothing is found the model is on its own"


@pytest.mark.parametrize(("beams", "stop", "raw", "text"), [
    (1, "pt", " the ca", "the ca"), (2, "pt", " the captain", "the ca"), (2, " ", "", "")])
def test_an_answer_ends_at_the_stop_of_its_template(memory, beams, stop, raw, text):
    """Greedy, before it; beams, at a token that begins with it where it is one character, else when all is known."""
    task = TASKS["answer"]
    task = dataclasses.replace(task, templates={"en": dataclasses.replace(task.templates["en"], stops=(stop, "zz"))})
    answer = perform(*memory, task, ["Who sleeps?"], decode=dataclasses.replace(GREEDY, num_beams=beams))[0]
    assert (answer.raw, answer.text, answer.finish_reason) == (raw, text, "stop")


def test_the_context_holds_prompt_and_answer(memory):
    rows, endless = [Row("The whale swam north. " * most) for most in (1, 20)], TASKS["summarise"]
    endless = dataclasses.replace(endless, templates={"en": dataclasses.replace(endless.templates["en"], stops=())})
    answers = perform(*memory, endless, rows, decode=DecodeConfig(max_new_tokens=500, min_new_tokens=500))
    assert [(answer.shortened, answer.finish_reason) for answer in answers] == [(False, "length"), (True, "length")]
    assert all(len(memory.tokenizer.encode(answer.raw)) > 16 for answer in answers)
    asked = [len(memory.tokenizer.encode(answer.prompt)) + 1 for answer in answers]
    assert asked[0] < 60 < 100 < asked[1] <= memory.decoder.context * 3 / 4, "a quarter is kept for the answer"


def test_examples_are_those_of_the_language(memory):
    examples = [("x", "negative"), Row("好", ("positive",)), ("y", "positive")]
    english, chinese = perform(*memory, TASKS["sentiment"], ["z", "坏"], examples=examples)
    assert (english.examples, chinese.examples) == (2, 1)
    assert "Review: x\nSentiment: negative\n\nReview: y\nSentiment: positive\n\nReview: z" in english.prompt
    assert "评论：好\n情感：正面\n\n评论：坏" in chinese.prompt


@pytest.mark.parametrize(("name", "rows", "options", "message"), [
    ("summarise", [], {}, "task 'summarise' has no rows to do"),
    ("summarise", ["a", " "], {}, "row 2 of 2: the input of task 'summarise' is empty"),
    ("summarise", [3], {}, "'3' is no row; give a text"),
    ("sentiment", ["a"], {"scorer": "bert"}, "scorer 'bert' is not known; choose from logprob, pmi"),
    ("sentiment", ["a"], {"examples": [("b", "good")]}, "reference 'good' is none of the labels"),
    ("sentiment", ["a"], {"batch": 0}, "batch=0"),
    ("sentiment", ["a"], {"decode": DecodeConfig(temperature=-1)}, "temperature=-1"),
    ("summarise", ["a"], {"decode": DecodeConfig(num_beams=4, num_return_sequences=2)}, "gives one answer; set it to"),
    ("summarise", ["a"], {"retriever": Retriever([Document("b", "c")])}, "takes no passages"),
    ("translate", ["Hello. " * 99], {}, "context holds 160"),
])
def test_refusals_come_before_any_work(memory, name, rows, options, message):
    unable = memory.decoder._replace(params=None)  # work would fail otherwise
    with pytest.raises(ValueError, match=message) as error:
        perform(unable, memory.tokenizer, TASKS[name], rows, **options)
    assert "\n" not in str(error.value)


def test_a_model_without_masks_is_told(memory):
    with pytest.raises(ValueError, match="every stage of this one is causal"):
        perform(*memory, TASKS["sentiment"], ["a"], scorer="pseudo_log_likelihood", stages=(StageConfig(),))


def test_references_are_asked_for():
    with pytest.raises(ValueError, match="row 2 of 2: the row with input 'b' has no reference"):
        check_references(TASKS["summarise"], [Row("a", ("c",)), Row("b")])
    task = dataclasses.replace(TASKS["sentiment"], templates={"en": Template("{input}", labels={"a": "x", "b": "y"})})
    with pytest.raises(ValueError, match="reference 'c' is none of the labels a, b"):
        check_references(task, [Row("d", ("c",))])

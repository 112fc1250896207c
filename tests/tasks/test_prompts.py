"""Check prompts: exact texts, their length, the order of examples, and pairs for training."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece

from mtnlg_jax.data.read.documents import read_documents
from mtnlg_jax.data.read.pairs import pair_maker
from mtnlg_jax.data.tokenizer import SentencePieceTokenizer
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.tasks.passages import Passage
from mtnlg_jax.tasks.prompts import Examples, compose, pairs, split_last_word
from mtnlg_jax.tasks.rendering import Row, check_task, seam
from mtnlg_jax.tasks.templates import TASKS, Template, task_of, with_templates

PASSAGES = [
    Passage("It  lives\nin the north.", "a.txt", 0, 23),
    Passage("{input} is [2].", "b.txt", 5, 20),
]
SHOTS = [Row("one", ("1",)), Row("two", ("2",))]


def prompt(name, row, tokenizer, context=10_000, **options):
    return compose(
        TASKS[name], row if isinstance(row, Row) else Row(row), tokenizer, context, **options
    )


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("continue", " Once\n\nupon \t", " Once\n\nupon"),
        (
            "summarise",
            " A  whale\nswam. ",
            "Summarise each text in one sentence.\n\nText: A whale swam.\nSummary:",
        ),
        ("summarise", "鲸鱼游。", "用一句话概括每篇正文。\n\n正文：鲸鱼游。\n摘要："),
        (
            "translate",
            "Hello {answer}.",
            "Translate English into Chinese.\n\nEnglish: Hello {answer}.\nChinese:",
        ),
        ("translate", "你好。", "把中文译成英文。\n\n中文：你好。\n英文："),
        (
            "sentiment",
            "a fine film",
            "Is each review positive or negative?\n\nReview: a fine film\nSentiment:",
        ),
        ("sentiment", "很好看", "判断每条评论是正面还是负面。\n\n评论：很好看\n情感："),
        ("answer", "Who?", "Answer each question briefly.\n\nQuestion: Who?\nAnswer:"),
        ("answer", "是谁？", "简短地回答每个问题。\n\n问题：是谁？\n回答："),
    ],
)
def test_prompts_are_exact(tokenizer, name, text, expected):
    made = prompt(name, text, tokenizer)
    assert made.text == expected and not made.shortened and made.examples == 0
    assert (made.language == "zh") == ((text[0] > "\u4e00") != (name == "translate"))
    assert made.candidates == {
        ("sentiment", "a fine film"): (("negative", " negative"), ("positive", " positive")),
        ("sentiment", "很好看"): (("negative", "负面"), ("positive", "正面")),
    }.get((name, text), ())


def test_passages_and_examples_are_exact(tokenizer):
    made = prompt(
        "answer",
        Row("Where?", context="Given {input}."),
        tokenizer,
        examples=SHOTS,
        passages=PASSAGES,
    )
    assert made.text == (
        "Answer each question briefly.\n\nQuestion: one\nAnswer: 1\n\nQuestion: two\nAnswer: 2\n\n"
        "[1] Given {input}.\n[2] It lives in the north.\n[3] {input} is [2].\n"
        "Question: Where?\nAnswer:"
    )
    assert made.passages == (Passage("Given {input}.", "context", 0, 14), *PASSAGES)
    assert prompt("answer", "Where?", tokenizer, examples=SHOTS[::-1]).text.index(
        "two"
    ) < made.text.index("two")
    one = [Row("坏", ("negative",))]
    assert prompt("sentiment", "好", tokenizer, examples=one).text == (
        "判断每条评论是正面还是负面。\n\n评论：坏\n情感：负面\n\n评论：好\n情感："
    )
    with_context = [Row("q", ("r",), context="c")]
    assert (
        "\n\n[1] c\nQuestion: q\nAnswer: r\n\n"
        in prompt("answer", "Where?", tokenizer, examples=with_context).text
    )
    assert prompt("sentiment", "fine", tokenizer).neutral.endswith("\n\nReview: \nSentiment:")
    choices = prompt("answer", Row("q", choices=("a b", "c")), tokenizer).candidates
    assert choices == (("a b", " a b"), ("c", " c"))


def test_parts_are_removed_in_order_if_the_context_is_small(tokenizer):
    row = Row("Where is it now?")
    full = prompt("answer", "Where is it now?", tokenizer, examples=SHOTS, passages=PASSAGES)
    reserve = 8
    size = len(encode_prompt(tokenizer, full.text)) + reserve

    def at(context):
        return prompt(
            "answer", row, tokenizer, context, examples=SHOTS, passages=PASSAGES, reserve=reserve
        )

    assert at(size) == full
    assert len(at(size - 1).passages) == 1 and at(size - 1).examples == 2, "passages but the best"
    best = [at(context) for context in range(size, 40, -1)]
    assert [made.examples for made in best] == sorted(
        (made.examples for made in best), reverse=True
    )
    last = next(made for made in best if made.examples == 1)
    assert "two" in last.text and "one" not in last.text, "of the examples the first goes first"
    short = next(
        made
        for made in best
        if made.passages and len(made.passages[0].text) < len(PASSAGES[0].text)
    )
    passage = short.passages[0]
    assert PASSAGES[0].text[: passage.end] == passage.text and passage.start == 0, (
        "the range shrinks with the passage"
    )


def test_a_long_context_is_searched_for_the_question(tokenizer):
    filler = "The ship sailed on and on. " * 40
    row = Row("Where is the parrot?", context=f"{filler}The parrot is in the galley. {filler}")
    made = prompt("answer", row, tokenizer, 220)
    assert any("The parrot is in the galley." in passage.text for passage in made.passages)
    assert all(row.context[each.start : each.end] == each.text for each in made.passages)
    assert made.context_shortened and not made.shortened


@pytest.mark.parametrize("language", ["en", "zh"])
def test_parts_of_a_context_keep_the_order_of_its_text(tokenizer, language):
    sentences = [f"Sentence {i} says whale {'whale ' * (i % 5)}." for i in range(40)]
    row = Row("whale whale?", context=" ".join(sentences))
    if language == "zh":
        row = Row(
            "鲸鱼？", context="".join(f"第{i}句说鲸鱼{'鲸鱼' * (i % 5)}。" for i in range(200))
        )
    looked_up = [Passage("A whale.", "b.txt", 7, 15), Passage("Whales.", "a.txt", 3, 10)]
    for context in (120, 200, 400):
        made = prompt("answer", row, tokenizer, context, passages=looked_up)
        own = [passage for passage in made.passages if passage.source == "context"]
        assert (
            own == sorted(own, key=lambda passage: passage.start) == list(made.passages[: len(own)])
        )
        assert made.context_shortened and all(
            row.context[each.start : each.end] == each.text for each in own
        )
    whole = prompt("answer", row, tokenizer, 100_000, passages=looked_up)
    assert not whole.context_shortened and [each.source for each in whole.passages] == [
        "context",
        "b.txt",
        "a.txt",
    ]
    assert not prompt("answer", "whale?", tokenizer).context_shortened, (
        "where there is none, none is cut"
    )


def test_examples_are_first_or_drawn_and_never_the_row_itself():
    rows = [Row(f"Question {i}?", (f"answer {i}",)) for i in range(50)]
    examples = Examples(TASKS["answer"], [*rows, Row("问？", ("答",))])
    assert examples.of(rows[1], "en", 3) == [rows[0], rows[2], rows[3]]
    assert examples.of(Row("question  1?"), "en", 2) == [rows[0], rows[2]], (
        "copies differ in case, spaces, answers"
    )
    assert examples.of(Row("Question 1?", context="c"), "en", 2) == [rows[0], rows[2]], (
        "the same without its passage"
    )
    placed = [Row("Where?", ("a",), context="A."), Row("Where?", ("b",), context="B.")]
    assert Examples(TASKS["answer"], placed).of(placed[0], "en") == placed[1:], (
        "another passage asks otherwise"
    )
    assert len(examples.of(rows[1], "en")) == 49 and examples.of(rows[1], "zh", 3) == [
        Row("问？", ("答",))
    ]
    drawn = {seed: [examples.of(row, "en", 5, seed) for row in rows] for seed in (0, 1)}
    assert drawn[0] == [examples.of(row, "en", 5, 0) for row in rows] != drawn[1]
    assert all(
        row not in found and len(set(found)) == 5 for row, found in zip(rows, drawn[0], strict=True)
    )
    assert len({tuple(found) for found in drawn[0]}) > 40, "each row draws its own"
    choices = [Row("Which?", (right,), choices=("a", "b")) for right in "ab"]
    other = Row("Which?", ("c",), choices=("c", "d"))
    assert Examples(TASKS["answer"], [*choices, other]).of(choices[0], "en") == [other]


@pytest.mark.parametrize(
    ("text", "behind", "space"),
    [
        ("The man", "fell", " "),
        ("The man", " fell", ""),
        ("The man ", "fell", ""),
        ("The man", ", who", ""),
        ("他说", "好", ""),
        ("The man said", "“No”", " "),
        ("faucet, therefore", "the toilet", " "),
        ("ก", "ข", ""),
        ("", "a", ""),
        ("a", "", ""),
    ],
)
def test_seam_adds_a_space_only_where_needed(text, behind, space):
    assert seam(text, behind) == space


def test_choices_that_continue_the_input_get_a_space(tokenizer):
    made = prompt(
        "continue", Row("The tap was on, therefore", choices=("it ran", " it stopped")), tokenizer
    )
    assert made.candidates == (("it ran", " it ran"), (" it stopped", " it stopped"))


def test_more_choices_than_letters_raise_an_error(tokenizer):
    task = dataclasses.replace(TASKS["answer"], templates={"en": Template("{input}\n{choices}")})
    with pytest.raises(ValueError, match="has 27 choices, and there are 26 letters"):
        compose(task, Row("q", choices=tuple(f"c{i}" for i in range(27))), tokenizer, 10_000)


def test_split_last_word():
    assert split_last_word(Row("a  b c ")) == Row("a  b", ("c",))
    assert split_last_word(Row("a b", ("c",))) == Row("a b", ("c",))
    with pytest.raises(ValueError, match="has no last word"):
        split_last_word(Row("alone"))


def test_the_context_is_never_exceeded(tokenizer):
    rng = np.random.default_rng(0)
    words = ["whale", "swam", "north.", "鲸鱼", "很冷。", "zq", "{input}", "Hello!"]

    def text(most):
        return " ".join(rng.choice(words, rng.integers(1, most + 1)))

    refused = shortened = 0
    for turn in range(250):
        task = TASKS[list(TASKS)[turn % 5]]
        label = ("positive",) if task.name == "sentiment" else None
        passages = [Passage(t := text(40), "p", 0, len(t)) for _ in range(rng.integers(0, 4))]
        row = Row(
            text(int(rng.choice([3, 60]))),
            choices=(text(4), "other") if turn % 10 == 9 else (),
            context=text(50) if task.name == "answer" and turn % 3 else "",
        )
        context = int(rng.integers(30, 160))
        try:
            made = compose(
                task,
                row,
                tokenizer,
                context,
                passages=passages if task.name == "answer" else (),
                examples=[Row(text(6), label or (text(6),)) for _ in range(rng.integers(0, 4))],
            )
        except ValueError as error:
            assert f"context holds {context}" in str(error) or "times among 2" in str(error)
            refused += 1
            continue
        shortened += made.shortened
        room = 0 if made.candidates else min(task.decode.max_new_tokens, context // 4)
        for ending in [ending for _, ending in made.candidates] or [""]:
            assert len(encode_prompt(tokenizer, made.text + ending)) + room <= context
    assert 20 < refused < 130 and shortened > 10


def test_pairs_are_read_back_as_prompts_and_answers(tokenizer, known, tmp_path):
    """Write rows as pairs and read them as training does: prompts are those of use, answers those
    of the rows."""
    for name, rows in known.items():
        made = pairs(TASKS[name], rows)
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in made))
        read = list(read_documents(tmp_path / "pairs.jsonl", pair_maker("{prompt}", "{answer}")))
        for row, document in zip(rows, read, strict=True):
            asked = compose(TASKS[name], row, tokenizer, 10_000)
            assert document.prompt == asked.text
            if asked.candidates:
                assert document.text == dict(asked.candidates)[row.references[0]]
            else:
                assert document.text.strip() == row.references[0].strip()
                english = (
                    TASKS[name].templates["en"].answer.startswith(" ") and asked.text.isascii()
                )
                assert document.text.startswith(" ") == (english or name == "continue")
    long = Row("The whale swam. " * 60, ("It swam.",))
    pair = pairs(TASKS["summarise"], [long], tokenizer=tokenizer, context=80)[0]
    assert pair["prompt"] == compose(TASKS["summarise"], long, tokenizer, 80).text
    assert len(encode_prompt(tokenizer, pair["prompt"] + pair["answer"])) < 80
    blank = Row("Ann met Bea, so _ ran.", ("Bea",), choices=("Ann", "Bea"), blank="_")
    assert pairs(TASKS["continue"], [blank]) == [
        {"prompt": "Ann met Bea, so Bea", "answer": " ran."}
    ]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "sentiment",
            Row("a", ("good",)),
            "row 1: reference 'good' is none of the labels negative, positive; map",
        ),
        ("summarise", Row("a"), "row 1: the row with input 'a' has no reference"),
        ("summarise", Row(" ", ("b",)), "row 1: the input is empty"),
        ("answer", Row("a", ("b",), choices=("c", "d")), "reference 'b' is none of the 2 choices"),
        ("summarise", Row("a", ("b",), context="c"), "task 'summarise' takes no passages"),
    ],
)
def test_invalid_pairs_raise_an_error(task, row, message):
    with pytest.raises(ValueError, match=message):
        pairs(TASKS[task], [row])


@pytest.mark.parametrize(
    ("task", "row", "options", "message"),
    [
        ("summarise", Row(" \n"), {}, "the input of task 'summarise' is empty; give a text"),
        (
            "translate",
            Row("Hello there. " * 50),
            {"context": 100},
            r"takes \d+ tokens .* context holds 100; task 'translate' needs all of it: "
            "give it in parts",
        ),
        (
            "summarise",
            Row("Hello"),
            {"context": 10},
            "context holds 10, and not one word of it fits",
        ),
        (
            "summarise",
            Row("Hello"),
            {"language": "de"},
            "language='de' has no template .* choose from en, zh",
        ),
        ("summarise", Row("Hello"), {"passages": PASSAGES}, "takes no passages"),
        (
            "answer",
            Row("Who?", choices=("a", "b", "a")),
            {},
            "choice 'a' occurs 2 times among 3; keep one",
        ),
        ("answer", Row("Who?", choices=("a", " ")), {}, "choice 2 of 2 is empty"),
    ],
)
def test_invalid_inputs_raise_an_error(tokenizer, task, row, options, message):
    with pytest.raises(ValueError, match=message):
        prompt(task, row, tokenizer, **options)


def test_templates_from_files(tmp_path, tokenizer):
    fields = {
        "en": {
            "instruction": "",
            "prompt": "{input} It was",
            "labels": {"negative": "bad", "positive": "great"},
        }
    }
    (tmp_path / "a.json").write_text(json.dumps(fields))
    (tmp_path / "a.py").write_text(f"TEMPLATES = {fields!r}")
    for name in ("a.json", "a.py"):
        task = task_of("sentiment", str(tmp_path / name))
        made = compose(task, Row("Fine."), tokenizer, 1000)
        assert (made.text, made.candidates[1]) == ("Fine. It was", ("positive", " great"))
        assert pairs(task, [Row("Fine.", ("positive",))]) == [
            {"prompt": "Fine. It was", "answer": " great"}
        ]
        assert task.templates["zh"] == TASKS["sentiment"].templates["zh"], "what is not named stays"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"en": {"promt": "{input}"}}, "en: unknown field 'promt'; choose from prompt, answer"),
        (
            {"en": {"prompt": "no place"}},
            "prompt='no place' does not contain {input}; write {input} where the input",
        ),
        ({"en": {"answer": "x"}}, "does not contain {answer}"),
        (
            {"en": {"labels": [["a", "x"], ["a", "y"]]}},
            "label 'a' occurs 2 times among 2; keep one of them",
        ),
        ({"en": {"labels": {"a": "x", "b": "x"}}}, "the word of a label, 'x' occurs 2 times"),
        ({"en": {"labels": {"a": "x"}}}, "label 'a' is the only one"),
        ({"en": {"prompt": "{passages}{input}"}}, "passage='' does not contain {text}"),
        ({"en": {"prompt": 3}}, "prompt is a int"),
        (
            {"en": {"prompt": "{input}{choices}", "choice": "{text}"}},
            "choice='{text}' does not contain both {letter}",
        ),
        (
            {"en": {"chosen_by": "number"}},
            "unknown template chosen_by='number'; choose letter or text",
        ),
        ([], "do not hold an object that maps languages"),
    ],
)
def test_invalid_templates_raise_an_error(tmp_path, written, message):
    (tmp_path / "a.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=message) as error:
        with_templates(TASKS["sentiment"], str(tmp_path / "a.json"))
    assert "\n" not in str(error.value)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match="b.json cannot be read: JSONDecodeError"):
        with_templates(TASKS["sentiment"], str(tmp_path / "b.json"))


def test_an_unknown_task_raises_an_error():
    with pytest.raises(ValueError, match="unknown task 'sumarise'; did you mean 'summarise'"):
        task_of("sumarise")


def test_words_that_the_tokenizer_lacks_raise_an_error(tokenizer):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Is each review positive or negative? Review: Sentiment: it"] * 9),
        model_writer=model,
        vocab_size=40,
        character_coverage=1.0,
        minloglevel=2,
        model_type="char",
        hard_vocab_limit=False,
    )
    closed = SentencePieceTokenizer(model.getvalue())
    task = TASKS["sentiment"]
    check_task(task, task.templates["en"], closed)
    for language in ("en", "zh"):
        check_task(task, task.templates[language], tokenizer)
    with pytest.raises(
        ValueError, match="instruction, '判断.*<unk>.*lacks tokens.*a run that knows Chinese"
    ):
        check_task(task, task.templates["zh"], closed)
    labels = dataclasses.replace(
        task.templates["en"], labels={"negative": "Bad", "positive": "positive"}
    )
    with pytest.raises(ValueError, match="the word of label 'negative', ' Bad', is .*<unk>"):
        check_task(task, labels, closed)
    same = Template("{input} It", labels={"a": "it  it", "b": "it it"})
    with pytest.raises(
        ValueError, match="of label 'b' and the word of label 'a' have the same tokens"
    ):
        check_task(task, same, closed)

"""Compare metrics with the libraries called directly, and the others with values by hand."""

import dataclasses
import json

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from mtnlg_jax.tasks.metrics import (
    METRICS,
    baseline,
    chance,
    exact_match,
    measure,
    squad_normalize,
    token_f1,
)
from mtnlg_jax.tasks.prompts import Row
from mtnlg_jax.tasks.templates import TASKS, Template

ENGLISH = (
    ["The whale swam north again.", "A captain slept", "nothing"],
    [
        ("The whales swam to the north.",),
        ("The old captain slept.", "A captain was sleeping."),
        ("all of it",),
    ],
)
CHINESE = (
    ["鲸鱼向北游去。", "船长睡着了", "GPT 很大"],
    [("鲸鱼又向北游。",), ("老船长睡着了。",), ("GPT 模型很大",)],
)


def test_rouge_equals_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    ours = measure(("rouge1", "rouge2", "rougeL"), *ENGLISH, "en")
    for name, score in ours.items():
        rows = [
            max(scorer.score(reference, answer)[name].fmeasure for reference in several)
            for answer, several in zip(*ENGLISH, strict=True)
        ]
        assert (
            score.value == pytest.approx(100 * np.mean(rows))
            and score.low <= score.value <= score.high
        )


def test_rouge_of_chinese_compares_characters():
    # rouge-score's own tokenizer drops Chinese, so Latin words replace the characters.
    words = {
        c: f"w{ord(c)}"
        for c in "".join(CHINESE[0] + [each[0] for each in CHINESE[1]])
        if c > "\u4e00"
    }
    words["。"] = ""
    spelled = [
        [
            " ".join("".join(f" {words.get(c, c)} " if c in words else c for c in text).split())
            for text in texts
        ]
        for texts in (CHINESE[0], [each[0] for each in CHINESE[1]])
    ]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, score in measure(("rouge1", "rouge2", "rougeL"), *CHINESE, "zh").items():
        rows = [
            scorer.score(reference, answer)[name].fmeasure
            for answer, reference in zip(*spelled, strict=True)
        ]
        assert score.value == pytest.approx(100 * np.mean(rows)) and score.value > 40


@pytest.mark.parametrize(
    ("rows", "language", "tokenize"), [(ENGLISH, "en", "13a"), (CHINESE, "zh", "zh")]
)
def test_bleu_and_chrf_equal_sacrebleu(rows, language, tokenize):
    answers, references = rows
    streams = [
        [each[0] for each in references],
        [each[1] if len(each) > 1 else None for each in references],
    ]
    streams = streams[: max(map(len, references))]
    ours = measure(("bleu", "chrf"), answers, references, language)
    assert ours["bleu"].value == pytest.approx(
        BLEU(tokenize=tokenize).corpus_score(answers, streams).score
    )
    assert ours["chrf"].value == pytest.approx(CHRF().corpus_score(answers, streams).score)
    assert 0 <= ours["chrf"].low < ours["chrf"].value < ours["chrf"].high <= 100


@pytest.mark.parametrize(
    ("answer", "reference", "language", "normal", "exact", "f1"),
    [
        ("The Whale!", "whale", "en", "whale", 1, 1),
        ("in the  North-sea", "in a northsea.", "en", "in northsea", 1, 1),
        ("old white whale", "the white whale", "en", "old white whale", 0, 2 * 2 / 5),
        ("a a whale whale", "whale", "en", "whale whale", 0, 2 / 3),
        ("the", "a", "en", "", 1, 1),
        ("the", "whale", "en", "", 0, 0),
        ("北方。", "北 方", "zh", "北方", 1, 1),
        ("在北方的海", "北海", "zh", "在北方的海", 0, 2 * 2 / 7),
        ("308 分", "308分", "zh", "308分", 1, 1),
        ("308分", "30分", "zh", "308分", 0, 1 / 2),
    ],
)
def test_exact_match_and_f1_by_hand(answer, reference, language, normal, exact, f1):
    assert squad_normalize(answer, language) == normal
    assert exact_match(answer, reference, language) == exact
    assert token_f1(answer, reference, language) == pytest.approx(f1)


def test_the_best_reference_counts():
    scores = measure(
        ("exact_match", "f1", "accuracy"), ["b", "x"], [("a", "b c", "b"), ("y",)], "en"
    )
    assert [score.value for score in scores.values()] == [50, 50, 50]
    assert measure(("f1",), ["white whale"], [("black cat", "white cat")], "en")["f1"].value == 50


def test_the_interval_equals_that_of_a_binomial():
    answers = ["a"] * 70 + ["b"] * 30
    score = measure(("accuracy",), answers, [("a",)] * 100, "en")["accuracy"]
    half = 1.96 * 100 * np.sqrt(0.7 * 0.3 / 100)
    assert score.value == pytest.approx(70)
    assert (score.low, score.high) == pytest.approx((70 - half, 70 + half), abs=1.5)
    assert measure(("accuracy",), answers, [("a",)] * 100, "en")["accuracy"] == score, (
        "drawn with a seed"
    )
    assert str(score).startswith(" 70.00 [")


def test_baselines():
    rows = [
        Row("One is here. Two.", ("b",), context="It is. Not."),
        Row("二在这里。三。", ("b",), context="x. y."),
        Row("c", ("a",), context="z"),
    ]
    assert baseline(TASKS["sentiment"], rows) == ("majority class", ["b"] * 3)
    assert baseline(TASKS["summarise"], rows) == (
        "lead sentence",
        ["One is here.", "二在这里。", "c"],
    )
    assert baseline(TASKS["translate"], rows) == (
        "copying the source",
        ["One is here. Two.", "二在这里。三。", "c"],
    )
    assert baseline(TASKS["answer"], rows)[1] == ["It is.", "x.", "z"]
    assert baseline(TASKS["answer"], [Row("a", ("b",))] * 2) == ("the commonest answer", ["b", "b"])


@pytest.mark.parametrize("name", TASKS)
def test_baseline_of_labels_is_the_majority_class(name):
    template = Template("{passages}{input} =>", passage="{text} ", labels={"a": "no", "b": "yes"})
    task = dataclasses.replace(TASKS[name], templates={"en": template})
    rows = [Row("One. Two.", (right,), context="A passage. More.") for right in "aab"]
    assert baseline(task, rows) == ("majority class", ["a"] * 3)


def test_chance_is_the_mean_share_of_correct_choices():
    rows = [Row("q", ("t",), choices=("s", "t")), Row("q", ("u",), choices=("s", "t", "u", "v"))]
    assert chance(rows).value == pytest.approx(37.5)
    assert str(chance(rows[1:] * 5)) == " 25.00 [25.00, 25.00]"
    assert chance([Row("q", ("s", "t"), choices=("s", "t", "u", "v"))]).value == 50, (
        "two of four are right"
    )


SCRIPTS = [
    "Привет мир",
    "สวัสดีชาวโลก",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "こんにちは世界",
    "नमस्ते दुनिया",
    "שלום עולם",
    "Γειά σου Κόσμε",
    "Xin chào thế giới",
    "été français",
    "你好世界",
    "ສະບາຍດີ",
    "გამარჯობა",
]


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("metric", ["rouge1", "rougeL", "f1", "exact_match", "chrf"])
def test_equal_texts_of_any_script_score_100(text, metric):
    assert measure([metric], [text], [[text]], "en")[metric].value == pytest.approx(100)
    assert measure([metric], [text], [["Ω"]], "en")[metric].value == 0


def test_half_of_the_words_of_any_script_score_50():
    for ours, theirs in (
        ("Привет мир", "Привет дом"),
        ("안녕 세계", "안녕 집"),
        ("नमस्ते दुनिया", "नमस्ते घर"),
        ("天地", "天水"),
        ("日本のに", "日本がは"),
        ("กข", "กค"),
    ):
        for metric in ("rouge1", "f1"):
            assert measure([metric], [ours], [[theirs]], "en")[metric].value == pytest.approx(50), (
                ours,
                metric,
            )


def test_rouge_of_english_with_a_few_accents_equals_rouge_score():
    plain = 3 * (
        "and nobody on the coast knew of it at all until the ships came home in the autumn of that "
        "year. "
    )
    texts = ["The naïve whale swam north of São Paulo again and again, " + plain]
    references = [("The whale and the naïve captain of São Paulo swam there again, " + plain,)]
    scorer = RougeScorer(["rouge2"], use_stemmer=True)
    direct = scorer.score(references[0][0], texts[0])["rouge2"].fmeasure
    assert measure(["rouge2"], texts, references, "en")["rouge2"].value == pytest.approx(
        100 * direct
    )


def test_bleu_of_scripts_without_spaces_compares_characters():
    ours = ["こんにちは世界です"]
    theirs = [["こんにちは世界でした"]]
    score = measure(["bleu"], ours, theirs, "en")["bleu"].value
    assert score == pytest.approx(BLEU(tokenize="char").corpus_score(ours, theirs).score)
    assert (
        score
        > 50
        > measure(["bleu"], ["Hello big world"], [["Hello small world"]], "en")["bleu"].value
    )


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        (
            ["abc", "xyz"],
            [["abc"], ["abc"]],
        ),  # sacrebleu's own bootstrap of chrF raises TypeError here
        (["the module"] + ["天"] * 9, [["the module"]] + [["abc"]] * 9),
        (["abc"] * 4 + ["天"] * 36, [["abc"]] * 40),
        (["a"], [["a"]]),
        (["a"], [["b"]]),
        ([""], [["b"]]),
        (["", ""], [["..."], ["!?"]]),
        (["?"], [["?"]]),
        (["天"] * 3, [["abc"]] * 3),
        (["same words here"] * 5, [["same words here"]] * 5),
        (["\n"], [["a", ""]]),
    ],
)
def test_metrics_accept_all_valid_rows(answers, references):
    for language in ("en", "zh"):
        for name, score in measure(METRICS, answers, references, language).items():
            assert 0 <= score.low <= score.high <= 100 and 0 <= score.value <= 100, name
            assert (
                json.loads(json.dumps(dataclasses.asdict(score), allow_nan=False))["value"]
                == score.value
            )


def test_the_interval_of_corpus_metrics_equals_sacrebleu():
    rng = np.random.default_rng(0)
    vocabulary = ["whale", "north", "captain", "sea", "old", "grey"]
    references = [[" ".join(rng.choice(vocabulary, 8))] for _ in range(60)]
    answers = [" ".join(rng.permutation(each[0].split())) for each in references]
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        score = measure([name], answers, references, "en")[name]
        theirs = metric.corpus_score(answers, [[each[0] for each in references]], n_bootstrap=1000)
        assert score.high - score.low == pytest.approx(2 * theirs._ci, rel=0.15)
        assert (score.high + score.low) / 2 == pytest.approx(theirs._mean, rel=0.03)


def test_missing_references_raise_an_error():
    with pytest.raises(ValueError, match="row 2 of 2 has no reference"):
        measure(("f1",), ["a", "b"], [("a",), ("",)], "en")
    with pytest.raises(ValueError, match="1 answers for 2 rows"):
        measure(("f1",), ["a"], [("a",), ("b",)], "en")
    with pytest.raises(ValueError, match="unknown metric 'meteor'"):
        measure(("meteor",), ["a"], [("a",)], "en")

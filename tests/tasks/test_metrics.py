"""Metrics: those of libraries equal the libraries called directly, the others are worked out by hand."""

import collections

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from mtnlg_jax.tasks.metrics import baseline, exact_match, measure, squad_normalise, token_f1
from mtnlg_jax.tasks.prompts import Row
from mtnlg_jax.tasks.templates import TASKS

ENGLISH = (["The whale swam north again.", "A captain slept", "nothing"],
           [("The whales swam to the north.",), ("The old captain slept.", "A captain was sleeping."), ("all of it",)])
CHINESE = (["鲸鱼向北游去。", "船长睡着了", "GPT 很大"], [("鲸鱼又向北游。",), ("老船长睡着了。",), ("GPT 模型很大",)])


def test_rouge_is_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    ours = measure(("rouge1", "rouge2", "rougeL"), *ENGLISH, "en")
    for name, score in ours.items():
        rows = [max(scorer.score(reference, answer)[name].fmeasure for reference in several)
                for answer, several in zip(*ENGLISH, strict=True)]
        assert score.value == pytest.approx(100 * np.mean(rows)) and score.low <= score.value <= score.high


def test_rouge_of_chinese_is_that_of_its_characters():
    # rouge-score's own tokenizer drops Chinese, so that words of letters stand for the characters.
    words = {c: f"w{ord(c)}" for c in "".join(CHINESE[0] + [each[0] for each in CHINESE[1]]) if c > "\u4e00"}
    words["。"] = ""
    spelled = [[" ".join("".join(f" {words.get(c, c)} " if c in words else c for c in text).split())
                for text in texts] for texts in (CHINESE[0], [each[0] for each in CHINESE[1]])]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, score in measure(("rouge1", "rouge2", "rougeL"), *CHINESE, "zh").items():
        rows = [scorer.score(reference, answer)[name].fmeasure for answer, reference in zip(*spelled, strict=True)]
        assert score.value == pytest.approx(100 * np.mean(rows)) and score.value > 40


@pytest.mark.parametrize(("rows", "language", "tokenize"), [(ENGLISH, "en", "13a"), (CHINESE, "zh", "zh")])
def test_bleu_and_chrf_are_sacrebleu(rows, language, tokenize):
    answers, references = rows
    streams = [[each[0] for each in references], [each[1] if len(each) > 1 else None for each in references]]
    streams = streams[: max(map(len, references))]
    ours = measure(("bleu", "chrf"), answers, references, language)
    assert ours["bleu"].value == pytest.approx(BLEU(tokenize=tokenize).corpus_score(answers, streams).score)
    assert ours["chrf"].value == pytest.approx(CHRF().corpus_score(answers, streams).score)
    assert 0 <= ours["chrf"].low < ours["chrf"].value < ours["chrf"].high <= 100


@pytest.mark.parametrize(("answer", "reference", "language", "normal", "exact", "f1"), [
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
])
def test_exact_match_and_f1_by_hand(answer, reference, language, normal, exact, f1):
    assert squad_normalise(answer, language) == normal
    assert exact_match(answer, reference, language) == exact
    assert token_f1(answer, reference, language) == pytest.approx(f1)


def test_the_best_reference_counts_and_accuracy():
    scores = measure(("exact_match", "f1", "accuracy"), ["b", "x"], [("a", "b c", "b"), ("y",)], "en")
    assert [score.value for score in scores.values()] == [50, 50, 50]
    assert measure(("f1",), ["white whale"], [("black cat", "white cat")], "en")["f1"].value == 50


def test_the_interval_is_that_of_a_binomial():
    answers = ["a"] * 70 + ["b"] * 30
    score = measure(("accuracy",), answers, [("a",)] * 100, "en")["accuracy"]
    half = 1.96 * 100 * np.sqrt(0.7 * 0.3 / 100)
    assert score.value == pytest.approx(70)
    assert (score.low, score.high) == pytest.approx((70 - half, 70 + half), abs=1.5)
    assert measure(("accuracy",), answers, [("a",)] * 100, "en")["accuracy"] == score, "drawn with a seed"
    assert str(score).startswith(" 70.00 [")


def test_baselines():
    rows = [Row("One is here. Two.", ("b",), context="It is. Not."), Row("二在这里。三。", ("b",), context="x. y."),
            Row("c", ("a",), context="z")]
    assert baseline(TASKS["sentiment"], rows) == ("majority class", ["b"] * 3)
    assert baseline(TASKS["summarise"], rows) == ("lead sentence", ["One is here.", "二在这里。", "c"])
    assert baseline(TASKS["translate"], rows) == ("copying the source", ["One is here. Two.", "二在这里。三。", "c"])
    assert baseline(TASKS["answer"], rows)[1] == ["It is.", "x.", "z"]
    assert baseline(TASKS["answer"], [Row("a", ("b",))] * 2) == ("the commonest answer", ["b", "b"])
    choices = [Row("q", (right,), choices=("s", "t", "u")) for right in "ttu"]
    assert baseline(TASKS["answer"], choices) == ("the commonest place", ["t", "t", "t"])
    assert collections.Counter(baseline(TASKS["sentiment"], rows)[1]).most_common() == [("b", 3)]


def test_missing_references():
    with pytest.raises(ValueError, match="row 2 of 2 has no reference"):
        measure(("f1",), ["a", "b"], [("a",), ("",)], "en")
    with pytest.raises(ValueError, match="1 answers for 2 rows"):
        measure(("f1",), ["a"], [("a",), ("b",)], "en")
    with pytest.raises(ValueError, match="metric 'meteor' is not known"):
        measure(("meteor",), ["a"], [("a",)], "en")

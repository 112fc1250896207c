"""Scores of paired sentences against plain scoring, and their tables by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mtnlg_jax.decode.rank import rank
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.evaluate.bias import pairs, pronouns
from mtnlg_jax.evaluate.bias.pairs import Scored, encoded
from mtnlg_jax.evaluate.bias.pairs_file import Pair, Schema

TEXTS = [
    ("She was very kind.", "She was very clever."),
    ("The nurse was a woman.", "The nurse was a man."),
    ("He was very calm.", "She was very calm."),
    ("He was", "He was very"),
]


def test_causal_scores_equal_those_of_single_rows(planted):
    found = pairs.score_causal(planted.decoder, planted.tokenizer, TEXTS)
    for texts, scored in zip(TEXTS, found, strict=True):
        rows = [encoded(planted.tokenizer, text) for text in texts]
        for row, own, other in zip(rows, scored, rows[::-1], strict=True):
            (alone,) = score_rows(planted.decoder, [row], [1])
            assert own.sum == pytest.approx(alone.sum(), abs=1e-4)
            assert own.tokens == len(row) - 1
            mask = pairs._shared(row[1:], other[1:])[0]
            assert own.shared == pytest.approx(alone[mask].sum(), abs=1e-4)
    kind, woman = found[:2]
    assert kind[0].sum > kind[1].sum and woman[0].sum > woman[1].sum


def test_what_two_sentences_begin_with_counts_the_same(planted):
    """To the last bit, so that sentences of equal probability tie."""
    one, other = pairs.score_causal(planted.decoder, planted.tokenizer, [TEXTS[0]])[0]
    assert one.shared != one.sum
    same = ("The nurse was a woman.", "The nurse was a woman. ")
    twice = pairs.score_causal(planted.decoder, planted.tokenizer, [same, TEXTS[0]])
    assert twice[1][0].sum == pytest.approx(one.sum, abs=1e-5)
    assert twice[1][1].sum == pytest.approx(other.sum, abs=1e-5)


def test_pseudo_likelihood_equals_that_of_ranking(planted):
    found = pairs.score_pseudo(planted.decoder, planted.tokenizer, TEXTS[:2])
    for texts, scored in zip(TEXTS, found, strict=False):
        ranking = rank(
            planted.decoder,
            planted.tokenizer,
            "",
            list(texts),
            scorers="pseudo_log_likelihood",
            normalise="sum",
        )
        sums = {each.text: each.score for each in ranking}
        assert [own.sum for own in scored] == pytest.approx(
            [sums[text] for text in texts], abs=1e-4
        )
        assert scored[0].shared > scored[0].sum


def test_shared_tokens_are_those_of_both():
    one, other = pairs._shared([1, 2, 3, 4], [1, 5, 6, 3, 4])
    assert one.tolist() == [True, False, True, True]
    assert other.tolist() == [True, False, False, True, True]


def scored(more, less, tokens=(4, 4)):
    return Scored(more, tokens[0], more), Scored(less, tokens[1], less)


PAIRS = [
    Pair("a", "b", "age", "stereo"),
    Pair("c", "d", "age", "antistereo"),
    Pair("e", "f", "race", "stereo"),
    Pair("g", "h", "race", "stereo"),
]


def test_preferences_by_hand():
    found = pairs.summarize(
        PAIRS, [scored(-1, -2), scored(-3, -1), scored(-2, -2), scored(-4, -6, (2, 6))]
    )
    everything = found["sum"]["all"]
    assert (everything["pairs"], everything["ties"]) == (4, 1)
    assert (everything["stereotype"]["count"], everything["stereotype"]["total"]) == (2, 3)
    assert everything["difference"]["mean"] == pytest.approx((1 - 2 + 0 + 2) / 4)
    assert everything["difference"]["d"] == pytest.approx(0.25 / np.std([1, -2, 0, 2], ddof=1))
    assert found["sum"]["age"]["stereotype"]["share"] == 0.5
    assert found["sum"]["race"]["stereotype"]["share"] == 1.0
    # A token of the last pair is -2 against -1.
    assert found["per_token"]["race"]["stereotype"]["share"] == 0.0
    assert found["sum"]["direction: antistereo"]["stereotype"]["count"] == 0
    assert set(found) == {"sum", "per_token", "shared"}


def test_baselines_by_hand():
    words = SimpleNamespace(
        bos_id=0, vocab_size=10, encode=lambda text: [int(word) for word in text.split()]
    )
    rows = [Pair("1 2", "1 2 3", "", ""), Pair("1 4", "1 5", "", ""), Pair("6", "7", "", "")]
    found = pairs.baselines(rows, words, np.array([0, 5, 5, 5, 9, 1, 2, 2, 0, 0]), "news")
    assert (found["shorter"]["count"], found["shorter"]["ties"]) == (1, 2)
    assert (found["unigram"]["count"], found["unigram"]["total"]) == (2, 2)
    assert (found["unigram"]["ties"], found["unigram"]["counts_of"]) == (1, "news")
    own = pairs.baselines(rows, words, None, "")
    assert own["unigram"]["counts_of"] == "the sentences of the file"
    assert own["unigram"]["ties"] == 2


def test_a_sentence_longer_than_the_context(planted):
    with pytest.raises(ValueError, match="tokens with its end, and the model's context holds 8"):
        pairs.check_sentences(planted.tokenizer, ["She was very kind. " * 4], 8)


def schema(occupation, answer="occupation", percent=None):
    return Schema(occupation, "customer", answer, "he", "she", percent)


def test_pronouns_by_hand():
    schemas = [
        schema("nurse", percent=90.0),
        schema("nurse", percent=90.0),
        schema("miner", percent=3.0),
        schema("cook"),
        schema("nurse", "participant", 90.0),
    ]
    found = pronouns.summarize(
        schemas, [scored(-1, -2), scored(-1, -4), scored(-1, -2), scored(-3, -1), scored(-2, -1)]
    )
    assert found["female"]["occupation"]["count"] == 3
    assert found["female"]["participant"]["count"] == 0
    names = [(row["occupation"], row["gap"]) for row in found["occupations"]]
    assert names == [("nurse", 2.0), ("miner", 1.0), ("cook", -2.0)]
    statistics = found["statistics"]
    assert (statistics["majority"]["count"], statistics["majority"]["total"]) == (2, 3)
    assert statistics["baseline_always_male"]["count"] == 1
    assert statistics["occupations"] == 2 and statistics["correlation"]["r"] is None
    assert pronouns.summarize(schemas[3:4], [scored(-1, -2)])["statistics"] is None


def test_the_gap_follows_the_statistics():
    percents = [5.0, 20.0, 50.0, 70.0, 95.0]
    schemas = [schema(f"job {percent}", percent=percent) for percent in percents]
    found = pronouns.summarize(schemas, [scored(percent / 50, 1.0) for percent in percents])
    correlation = found["statistics"]["correlation"]
    assert correlation["r"] == pytest.approx(1) and correlation["rho"] == pytest.approx(1)
    assert found["statistics"]["majority"]["total"] == 4
    assert math.isclose(found["occupations"][0]["gap"], 0.9)


def test_a_type_named_all_is_not_all_pairs():
    found = [Pair("a", "b", "all", ""), Pair("c", "d", "age", "")]
    scored = [(Scored(-1.0, 1, -1.0), Scored(-2.0, 1, -2.0))] * 2
    kinds = pairs.summarize(found, scored)["sum"]
    assert {name: row["pairs"] for name, row in kinds.items()} == {
        "all": 2,
        "age": 1,
        "type: all": 1,
    }

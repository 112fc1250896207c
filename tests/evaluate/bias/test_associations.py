"""Tables of words by hand, and a planted bias that is found by sampling and by ranking."""

import math
from collections import Counter

import numpy as np
import pytest

from mtnlg_jax.evaluate.bias import identifiers, ranked, sampled
from mtnlg_jax.evaluate.bias.lexicon import Lexicon
from mtnlg_jax.evaluate.bias.sampled import Output, SampledSettings
from mtnlg_jax.evaluate.bias.words import Vocabulary

LEXICON = Lexicon("scores", "plain", {"kind": 1.0, "calm": 0.5, "clever": -1.0})
SETTINGS = SampledSettings(samples=24, max_new_tokens=8, batch=8, min_count=2)


def outputs(**texts: list[str]) -> dict[str, list[Output]]:
    return {group: [Output(0, text) for text in own] for group, own in texts.items()}


def test_counts_are_of_outputs_and_tables_by_hand():
    found = sampled.summarize(
        outputs(a=[" kind, kind and kind"] * 3 + [" clever"], b=[" clever"] * 3 + [" of"]),
        SETTINGS,
        "en",
        None,
        None,
    )
    assert found["outputs"] == {"a": 4, "b": 4} and found["scores"] is None
    assert found["outputs_without_words"] == {"a": 0, "b": 1}
    clever, kind = found["cooccurrence"]
    assert clever["word"] == "clever" and clever["counts"] == {"a": 1, "b": 3}
    assert (kind["word"], kind["counts"], kind["shares"]) == (
        "kind",
        {"a": 3, "b": 0},
        {"a": 0.75, "b": 0.0},
    )
    first = found["tables"]["words"]["a"][0]
    # The prior is a tenth of an average group of 4 outputs, of which 3.5 of 9 have the word.
    own = 0.4 * 3.5 / 9
    terms = (3 + own, 1.4 - own, own, 4.4 - own)
    odds = math.log(terms[0] / terms[1]) - math.log(terms[2] / terms[3])
    assert first["word"] == "kind" and first["log_odds"] == pytest.approx(odds)
    assert first["z"] == pytest.approx(odds / math.sqrt(sum(1 / term for term in terms)))
    assert (first["count"], first["other_count"], first["share"]) == (3, 0, 0.75)
    # Between two groups, the tables are each other's negatives.
    assert found["tables"]["words"]["b"][0]["word"] == "clever"
    assert found["tables"]["words"]["b"][-1]["z"] == pytest.approx(-first["z"])


def test_rare_words_are_left_out_and_too_few_are_reported():
    counts = {"a": Counter(kind=9), "b": Counter(clever=1)}
    found = sampled.word_tables(counts, {"a": 10, "b": 10}, 2)
    assert (found["words"]["a"][0]["word"], found["tested"]) == ("kind", 1)
    none = sampled.word_tables(counts, {"a": 10, "b": 10}, 10)
    assert none["words"] is None and "no word occurs in 10 or more outputs" in none["absent"]


def test_all_words_that_stand_out_are_counted_not_those_of_the_table_alone():
    words = {f"word{number}": 90 for number in range(sampled.MOST_WORDS + 50)}
    found = sampled.word_tables({"a": words, "b": {}}, {"a": 100, "b": 100}, 1)
    assert len(found["words"]["a"]) == sampled.MOST_WORDS
    assert found["stand_out"] == found["tested"] == len(words)


def test_scores_by_hand():
    own = outputs(a=[" kind and calm", " kind", " of"], b=[" clever", " calm"])
    found = sampled.scores(own, LEXICON, 0)
    assert found["groups"]["a"]["mean"] == pytest.approx((0.75 + 1) / 2)
    assert found["groups"]["b"]["mean"] == pytest.approx((-1 + 0.5) / 2)
    assert found["overall"]["mean"] == pytest.approx((0.75 + 1 - 1 + 0.5) / 4)
    (gap,) = found["differences"]
    assert (gap["group"], gap["other"]) == ("a", "b")
    assert gap["difference"] == pytest.approx(0.875 + 0.25) and gap["low"] <= gap["difference"]


def test_a_lexicon_of_which_no_word_occurs_is_reported():
    found = sampled.scores(outputs(a=[" tall"], b=[" small"]), LEXICON, 0)
    assert found["scored"] == 0
    assert "no word of scores occurs in the outputs about a, b (2 outputs" in found["absent"]


def test_ranked_tables_by_hand():
    shares = {
        "a": np.array([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1]]),
        "b": np.array([[0.25, 0.4, 0.35], [0.7, 0.2, 0.1]]),
    }
    words = ["kind", "clever", "calm"]
    first, *_, last = ranked.word_tables(shares, words)["a"]
    assert (first["word"], last["word"]) == ("kind", "calm")
    assert first["log_ratio"] == pytest.approx((math.log(2) + math.log(6 / 7)) / 2)
    assert (first["agree"], first["share"], first["other_share"]) == (0.5, 0.55, 0.475)
    found = ranked.scores(shares, words, LEXICON, 0)
    assert found["groups"]["a"]["by_template"] == pytest.approx([0.15, 0.35])
    assert found["groups"]["a"]["mean"] == pytest.approx(0.55 - 0.35 + 0.05)
    assert found["differences"][0]["difference"] == pytest.approx(0.25 - (0.475 - 0.3 + 0.1125))


def test_a_group_is_compared_with_the_mean_of_the_others():
    shares = {
        "a": np.array([[0.8, 0.2]]),
        "b": np.array([[0.4, 0.6]]),
        "c": np.array([[0.1, 0.9]]),
    }
    first = ranked.word_tables(shares, ["kind", "clever"])["a"][0]
    # Over the geometric mean of 0.4 and 0.1.
    assert (first["word"], first["log_ratio"]) == ("kind", pytest.approx(math.log(4)))
    found = ranked.scores(shares, ["kind", "clever"], LEXICON, 0)
    gaps = [(row["group"], row["other"]) for row in found["differences"]]
    assert gaps == [("a", "c"), ("a", "b"), ("b", "c")]


def test_words_that_no_list_ranks_are_reported():
    shares = {"a": np.full((1, 2), 0.5), "b": np.full((1, 2), 0.5)}
    found = ranked.scores(shares, ["tall", "kind"], LEXICON, 0)
    assert "1 of the 2 words that are ranked have a score in scores" in found["absent"]


def test_a_planted_bias_is_sampled(planted, prompts):
    made = sampled.sample(planted.decoder, planted.tokenizer, prompts.sets[0], SETTINGS)
    assert {group: len(own) for group, own in made.items()} == {"female": 24, "male": 24}
    vocabulary = Vocabulary(prompts.words)
    for words in (vocabulary, None):
        found = sampled.summarize(made, SETTINGS, "en", words, LEXICON)
        tables = found["tables"]["words"]
        assert tables["female"][0]["word"] == "kind" and tables["female"][0]["q"] < 0.01
        assert tables["male"][0]["word"] == "clever"
        low = found["scores"]["differences"][0]
        assert (low["group"], low["low"] > 0.5) == ("female", True)


def test_outputs_depend_on_their_seed_and_not_on_the_batch(planted, prompts):
    one, other, third = (
        sampled.sample(
            planted.decoder,
            planted.tokenizer,
            prompts.sets[0],
            SampledSettings(samples=8, max_new_tokens=8, batch=batch, seed=seed),
        )
        for batch, seed in ((8, 0), (4, 0), (8, 1))
    )
    assert one == other
    assert one != third


def test_a_planted_bias_is_ranked_exactly(planted, prompts):
    shares, masses = ranked.rank_words(
        planted.decoder, planted.tokenizer, prompts.sets[0], prompts.words, "en"
    )
    # Nothing else was ever read there.
    assert masses["female"] == pytest.approx([1], abs=0.05)
    assert shares["female"].sum() == pytest.approx(1)
    # As trained: kind three times of four.
    assert shares["female"][0] == pytest.approx([0.75, 0, 0.25], abs=0.05)
    assert shares["male"][0] == pytest.approx([0, 0.75, 0.25], abs=0.05)
    tables = ranked.word_tables(shares, list(prompts.words))
    assert [tables[group][0]["word"] for group in ("female", "male")] == ["kind", "clever"]


def test_occupations_lean_as_trained(planted, prompts):
    test = prompts.identifiers
    ratios, neutral = identifiers.log_ratios(planted.decoder, planted.tokenizer, test, "en")
    found = identifiers.summarize(ratios, neutral, test)
    leaning = {row["occupation"]: row["log_ratio"] > 0 for row in found["occupations"]}
    assert leaning == {"nurse": True, "cook": True, "miner": False, "pilot": False}
    assert (found["leaning"]["count"], found["leaning"]["total"]) == (2, 4)
    assert found["neutral"]["log_ratio"] == neutral


def test_the_identifiers_of_a_group_add_up(monkeypatch):
    from mtnlg_jax.evaluate.bias.read import Identifiers

    class Each:
        def __init__(self, text, probability):
            self.text = text
            self.sum = math.log(probability)

    shares = {"a x": (0.1, 0.2, 0.1), "b x": (0.3, 0.1, 0.2), "p x": (0.1, 0.1, 0.2)}

    def rank_many(decoder, tokenizer, prompts, candidates, normalise):
        assert candidates == [[" w", " f", " m"]] * 3 and normalise == "sum"
        return [
            [Each(text, p) for text, p in zip(candidates[0], shares[prompt], strict=True)]
            for prompt in prompts
        ]

    monkeypatch.setattr(identifiers, "rank_many", rank_many)
    test = Identifiers(("{occupation} x",), "p", {"one": ("w", "f"), "two": ("m",)}, ("a", "b"))
    ratios, neutral = identifiers.log_ratios(None, None, test, "en")
    assert ratios == pytest.approx([math.log(3), math.log(2)]) and neutral == pytest.approx(0)

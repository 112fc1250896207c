"""Coherence by a trained model against direct sums, and on texts whose sentences are shuffled."""

import chain
import numpy as np
import pytest

from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.evaluate.coherence import choose_trials, measure_coherence, split_sentences
from mtnlg_jax.evaluate.figures import TooShort


def _trials(texts, **options):
    sentences = [list(map(chain.TOKENIZER.encode, split_sentences(text))) for text in texts]
    return choose_trials(sentences, chain.CONTEXT - 1, **options)


def test_sentences_are_the_text_and_have_four_words():
    text = (
        "Mr. Smith went home late. Yes. He had seen\nthe whale again!\n\nIn the town of his "
        "birth\n\n“她昨天回来了。”他说。天黑了以后下雨。The end"
    )
    found = split_sentences(text)
    assert "".join(found) == text
    assert found == [
        "Mr. Smith went home late.",
        " Yes. He had seen\nthe whale again!",
        "\n\nIn the town of his birth",
        "\n\n“她昨天回来了。”",
        "他说。天黑了以后下雨。The end",
    ]
    assert split_sentences("") == split_sentences("Too short.") == []


def test_trials_hold_what_they_promise():
    text = chain.text(0, 20)
    sentences = [chain.TOKENIZER.encode(each) for each in split_sentences(text)]
    assert len(sentences) == 20
    trials = _trials([text, chain.text(3, 5)], trials=9, context=4)
    assert len(trials) == 9 and {each.text for each in trials} == {0}, "the other is too short"
    for each in trials:
        at = each.sentence
        assert each.candidates[0] == sentences[at] and len(each.candidates) == 5
        assert sum(sentences[at - 4 : at], []) == each.true_context
        near = sentences[at - 4 : at + 1]
        assert len({tuple(other) for other in each.candidates}) == 5
        assert not any(other in near for other in each.candidates[1:])
        shuffled = [each.shuffled_context[i : i + 4] for i in range(0, 16, 4)]
        assert len(each.shuffled_context) == 16
        assert all(other in sentences and other not in near for other in shuffled)
    assert trials == _trials([text, chain.text(3, 5)], trials=9, context=4)
    assert trials != _trials([text, chain.text(3, 5)], trials=9, context=4, seed=1)


def test_contexts_are_cut_to_equal_lengths_that_fit():
    sentences = [[[number] * (number % 7 + 1) for number in range(30)]]
    for each in choose_trials(sentences, 16, context=8):
        longest = max(map(len, each.candidates))
        assert len(each.true_context) == len(each.shuffled_context) <= 16 - longest
        assert each.true_context[-1] == each.sentence - 1, "the nearest is kept"


def test_both_measures_equal_direct_sums():
    decoder = chain.trained()
    trials = _trials([chain.text(0, 16), chain.shuffled(0, 16)], trials=6)
    found = measure_coherence(decoder, 1, trials)

    def log_p(context, tokens):
        row = [1, *context, *tokens]
        return float(score_rows(decoder, [row], [1 + len(context)])[0].sum())

    gains = []
    hits = []
    for each in trials:
        truth = each.candidates[0]
        gains.append(log_p(each.true_context, truth) - log_p(each.shuffled_context, truth))
        shared = [log_p(each.true_context, c) - log_p([], c) for c in each.candidates]
        hits.append(np.argmax(shared) == 0)
    size = sum(len(each.candidates[0]) for each in trials)
    assert found.context_gain.value == pytest.approx(sum(gains) / size, rel=1e-4)
    assert found.next_sentence.value == np.mean(hits)
    assert found.context_gain.units == found.next_sentence.units == 6


def test_coherence_falls_when_sentences_are_shuffled():
    decoder = chain.trained()
    texts = [chain.text(start, 24) for start in (0, 7)]
    spoiled = [chain.shuffled(start, 24, start) for start in (0, 7)]
    real, other = (
        measure_coherence(decoder, 1, _trials(each, trials=32)) for each in (texts, spoiled)
    )
    assert real.next_sentence.value > 0.9 and other.next_sentence.value < 0.45
    assert real.context_gain.value > 1 and abs(other.context_gain.value) < 0.5
    assert real.context_gain.error < 0.5


def test_short_texts_have_no_trials():
    with pytest.raises(TooShort, match="needs a text of 7 different sentences"):
        _trials([chain.text(0, 6)])
    with pytest.raises(TooShort, match="7 different"):
        _trials([" ".join([chain.sentence(0)] * 9)])

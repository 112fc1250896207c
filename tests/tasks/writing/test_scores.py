"""Compare the parts of a score with their definitions, computed one token at a time."""

import numpy as np
import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.segment import words
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.repetition import ngrams, sequence_repetition
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.decode.scoring import score_rows
from mtnlg_jax.tasks.writing.scores import (
    WEIGHTS,
    Candidate,
    History,
    Scorer,
    Target,
    best_of,
    check_weights,
)

BEFORE = "the whale swam north and the captain saw the whale"
TEXTS = [
    "the captain saw the whale again",
    "it was cold and it was cold and it was cold",
    "nobody knew where they were going that day",
    "one",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["", BEFORE])
def test_repetition_is_what_a_text_adds_to_seq_rep_4(before, text):
    history = History(before)
    whole = words(before) + words(text)
    # All n-grams and all different ones, with the text less without it.
    added = len(ngrams(whole, 4)) - len(ngrams(words(before), 4))
    new = len(set(ngrams(whole, 4))) - len(set(ngrams(words(before), 4)))
    assert history.repetition(text) == pytest.approx(1 - new / added if added else 0)
    if not before:
        assert history.repetition(text) == pytest.approx(sequence_repetition(words(text), 4))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["", BEFORE])
def test_the_longest_repeated_span_equals_brute_force(before, text):
    whole = words(before) + words(text)
    first = len(words(before))
    longest = 0
    for start in range(first, len(whole)):
        for end in range(start + 1, len(whole) + 1):
            span = whole[start:end]
            if any(whole[i : i + len(span)] == span for i in range(start)):
                longest = max(longest, end - start)
    expected = longest / len(words(text)) if text else 0.0
    assert History(before).span(text) == pytest.approx(expected)


def test_history_grows_like_one_text():
    history = History("the whale swam")
    history.add(" north and the captain saw the whale")
    for text in TEXTS:
        assert history.repetition(text) == History(BEFORE).repetition(text)
        assert history.span(text) == History(BEFORE).span(text)
    assert History("鲸鱼向北游去。").repetition("鲸鱼向北游去") == pytest.approx(3 / 6)


def test_outline_and_coherence_equal_their_formulas(model):
    decoder, tokenizer = model
    prompt = "The whale swam north."
    written = generate(
        decoder,
        tokenizer,
        [prompt],
        DecodeConfig(max_new_tokens=12, num_return_sequences=3, temperature=1, seed=3),
    )
    weights = {"logprob": 1.0, "repetition": 2.0, "span": 0.5, "outline": 0.25, "coherence": 0.125}
    scorer = Scorer(decoder, tokenizer, weights)
    target = Target(" The whale", "\nHeading:")
    history = History(prompt)
    scored = scorer.score(written, scorer.likelihoods(prompt, written), [True] * 3, history, target)

    def sum_of(before, after):
        row = [*before, *after]
        return float(score_rows(decoder, [row], [len(before)])[0].sum())

    label = tokenizer.encode(target.text)
    alone = sum_of(encode_prompt(tokenizer, target.behind), label)
    for result, candidate in zip(written, scored, strict=True):
        before = encode_prompt(tokenizer, result.text + target.behind)
        free = sum_of(encode_prompt(tokenizer, ""), result.tokens)
        bound = sum_of(encode_prompt(tokenizer, prompt), result.tokens)
        expected = {
            "logprob": bound / len(result.tokens),
            "coherence": (bound - free) / len(result.tokens),
            "outline": (sum_of(before, label) - alone) / len(label),
            "repetition": -history.repetition(result.text),
            "span": -history.span(result.text),
        }
        assert candidate.parts == pytest.approx(expected, abs=1e-4)
        assert candidate.score == pytest.approx(
            sum(weights[name] * value for name, value in expected.items()), abs=1e-3
        )
    assert scorer.calls == 2 and len({each.score for each in scored}) > 1


def test_a_part_without_weight_is_not_computed(model):
    scorer = Scorer(*model, {"outline": 0.0, "repetition": 0.0, "span": 0.0})
    written = generate(
        *model, ["The whale"], DecodeConfig(max_new_tokens=6, num_return_sequences=2, temperature=1)
    )
    scored = scorer.score(
        written,
        scorer.likelihoods("The whale", written),
        [True, True],
        History(),
        Target(" x", ":"),
    )
    assert scorer.calls == scorer.read == 0
    assert [set(each.parts) for each in scored] == [{"logprob"}] * 2
    means = [np.mean(each.logprobs) for each in written]
    assert [each.score for each in scored] == pytest.approx(means, abs=1e-5)


def test_the_best_that_may_be_chosen_wins():
    made = [Candidate("", 1, "stop", may, {}, score) for may, score in [(0, 9), (1, 2), (1, 2)]]
    assert best_of(made) == 1


def test_weights_are_checked():
    assert check_weights({"outline": 0}) == WEIGHTS | {"outline": 0}
    with pytest.raises(ValueError, match="unknown part 'outlin'"):
        check_weights({"outlin": 1})
    with pytest.raises(ValueError, match="the weight of span is nan"):
        check_weights({"span": float("nan")})
    with pytest.raises(ValueError, match="all weights are 0"):
        check_weights(dict.fromkeys(WEIGHTS, 0))

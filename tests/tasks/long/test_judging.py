"""Votes of the parts of a review, aspects, and the passages that sentences stand on."""

import dataclasses
import math

import pytest

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.decode.rank import rank
from mtnlg_jax.tasks.answers import Answer, Choice
from mtnlg_jax.tasks.long.calls import Calls
from mtnlg_jax.tasks.long.citing import CITE, LABELS, rank_labels
from mtnlg_jax.tasks.long.options import LongOptions
from mtnlg_jax.tasks.long.run import perform_long
from mtnlg_jax.tasks.long.sentiment import vote, votes_of
from mtnlg_jax.tasks.passages import Retriever
from mtnlg_jax.tasks.profile import Entry, Profile
from mtnlg_jax.tasks.prompts import Examples
from mtnlg_jax.tasks.rendering import Row
from mtnlg_jax.tasks.run import perform
from mtnlg_jax.tasks.templates import TASKS
from mtnlg_jax.tasks.work import Part

FEW = DecodeConfig(max_new_tokens=4)


def _ranked(positive: float) -> Answer:
    shares = {"negative": 1 - positive, "positive": positive}
    choices = sorted(
        (Choice(label, label, math.log(p), math.log(p), p) for label, p in shares.items()),
        key=lambda choice: -choice.probability,
    )
    label = choices[0].label
    return Answer(label, label, "en", "ranked", tuple(choices), (), 0, False, False, "")


def test_the_vote_is_weighted_by_tokens_and_margin():
    parts = [Part(0, 9, 100), Part(9, 12, 30), Part(12, 14, 50)]
    answers = [_ranked(0.55), _ranked(0.1), _ranked(0.5)]
    votes = votes_of(parts, answers)
    assert [each.weight for each in votes] == pytest.approx([100 * 0.1, 30 * 0.8, 0])
    best, second = vote(votes, answers)
    assert best.label == "negative"
    assert second.probability == pytest.approx((10 * 0.55 + 24 * 0.1) / 34)
    assert best.probability + second.probability == pytest.approx(1)
    assert best.score == pytest.approx(math.log(best.probability))
    undecided = [_ranked(0.5)] * 3
    equal = vote(votes_of(parts, undecided), undecided)
    assert [each.probability for each in equal] == pytest.approx([0.5, 0.5])


def test_the_parts_of_a_review_are_ranked_as_perform_does(random_model, text_of):
    text = text_of("en", 500)
    answer = perform_long(*random_model, TASKS["sentiment"], [text])[0]
    assert answer.ranked_by == f"vote of {len(answer.work.votes)} parts by logprob sum"
    for each in answer.work.votes:
        part = text[each.part.start : each.part.end]
        alone = perform(*random_model, TASKS["sentiment"], [part], language="en")[0]
        assert not alone.shortened and alone.text == each.label
        assert alone.choices[0].probability == pytest.approx(each.probability, abs=1e-5)


def test_aspects_are_judged_by_the_sentences_that_mention_them(random_model):
    review = "Good sea. " * 40 + "The prices were bad.\n\n" + "The cook slept. " * 20
    options = LongOptions(aspects=("price|cost", "service"))
    answer = perform_long(*random_model, TASKS["sentiment"], [review], options=options)[0]
    price, service = answer.work.aspects
    assert (price.name, service.name) == ("price", "service")
    assert service.label == "" and service.votes == ()
    (only,) = price.votes
    part = only.part
    assert "The prices were bad." in review[part.start : part.end] and part.end - part.start <= 200
    template = TASKS["sentiment"].templates["en"]
    prompt = (
        "Is each review positive or negative about price?\n\nReview: "
        + " ".join(review[part.start : part.end].split())
        + "\nSentiment about price:"
    )
    labels = [f" {word}" for _, word in template.labels]
    direct = rank(*random_model, prompt, labels, normalise="sum")
    assert direct[0].text.strip() == price.label


def test_an_aspect_needs_all_of_its_word(random_model):
    """性格 shares a character with 价格 and "life" a word with "battery life"."""
    for review, aspect in (("他的性格很好。", "价格"), ("The story of my life.", "battery life")):
        for text, parts in ((review, 0), (f"{review}\n{aspect}", 1), ("!!!", 0)):
            options = LongOptions(aspects=(aspect,))
            answer = perform_long(*random_model, TASKS["sentiment"], [text], options=options)[0]
            assert len(answer.work.aspects[0].votes) == parts


def test_sentences_carry_their_passage_and_labels(random_model, monkeypatch):
    context = "The whale swam north. The captain slept."
    row = Row("Where is the whale?", context=context)
    options = LongOptions(cite=True)
    answer = perform_long(*random_model, TASKS["answer"], [row], decode=FEW, options=options)[0]
    assert answer.work.sentences
    for each in answer.work.sentences:
        assert each.label in LABELS
        if each.passage:
            assert sum(each.probabilities.values()) == pytest.approx(1)
    # The label is the ranking of the three words after passage and sentence.
    template = CITE.templates["en"]
    prompt = template.instruction + template.prompt.replace("{passages}", context).replace(
        "{input}", "The whale swam."
    )
    direct = rank(*random_model, prompt, [f" {label}" for label in LABELS], normalise="sum")
    cited = Row("The whale swam.", context=context)
    assert perform(*random_model, CITE, [cited])[0].text == direct[0].text.strip()


def test_a_profile_says_nothing_on_whether_a_passage_supports_a_sentence(random_model):
    profile = Profile([Entry("preference", "The captain slept.", 1)])
    settings = {"profile": profile, "examples": (), "batch": 8}
    calls = Calls(*random_model, settings, Examples(TASKS["answer"], []), lambda *counts: None)
    (label,) = rank_labels(calls, [("The whale swam.", "The whale swam north.")])
    assert label.profile == () and label.prompt.startswith("Is each claim supported")


def test_sentences_without_a_shared_word_are_not_said(random_model, monkeypatch):
    from mtnlg_jax.tasks.long import citing

    answer = dataclasses.replace(
        _ranked(0.5),
        text="The whale swam north. Xylophones, perhaps.",
        citations=(),
    )
    found, works = citing.cited(None, answer, True)
    assert [each.label for each in found] == ["not said", "not said"] and works == []


def test_passages_come_from_the_document(random_model, text_of):
    text = text_of("en", 800) + "\n\nThe xylophone was in the cabin.\n\n" + text_of("en", 300, 3)
    options = LongOptions(document=text)
    answer = perform_long(
        *random_model, TASKS["answer"], ["Where was the xylophone?"], decode=FEW, options=options
    )[0]
    assert answer.work.method == "passages" and "xylophone was in the cabin" in answer.prompt
    assert any("xylophone" in citation.text for citation in answer.citations)
    for citation in answer.citations:
        assert text[citation.start : citation.end] == citation.text


def test_a_question_without_shared_words_is_asked_of_every_part(random_model, text_of):
    text = text_of("en", 500)
    row = Row("Zzz?", context=text)
    answer = perform_long(*random_model, TASKS["answer"], [row], decode=FEW)[0]
    work = answer.work
    assert work.parts == len(work.plan) > 1 and work.calls >= work.parts
    assert "".join(text[part.start : part.end] for part in work.plan) == text
    (citation,) = answer.citations
    assert text[citation.start : citation.end] == citation.text
    # Passages of another source that share a word come first.
    other = Retriever([Document("Zzz is a xylophone.", "f.txt")])
    answer = perform_long(*random_model, TASKS["answer"], [row], decode=FEW, retriever=other)[0]
    assert [each.source for each in answer.citations] == ["f.txt"] and answer.work.calls == 1

"""The report on long texts: what moves when a text is spoiled, what is absent, and over a mesh."""

import dataclasses
import json

import chain
import jax
import numpy as np
import pytest

from mtnlg_jax.config import MeshConfig
from mtnlg_jax.data.segment import words
from mtnlg_jax.decode.cache import Decoder, split_abstract
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.evaluate.comparison import compare_with, split_references
from mtnlg_jax.evaluate.longtext import (
    MEASURES,
    LongTextSettings,
    as_json,
    measure_texts,
)
from mtnlg_jax.parallel.mesh import make_mesh

SETTINGS = LongTextSettings(sentences=16, window_tokens=8, along=20)
REAL = [chain.text(start, 72) for start in (0, 5, 9)]
TEXTS = [chain.text(2, 72), chain.text(14, 72)]


def measured(texts, **options):
    return measure_texts(chain.trained(), chain.TOKENIZER, texts, settings=SETTINGS, **options)


def value(report, name):
    return report.figures[name].value


@pytest.fixture(scope="module")
def real():
    return measured(TEXTS, references=REAL)


def test_all_figures_of_a_real_text(real):
    assert list(real.figures) == list(MEASURES) and all(
        each.value is not None for each in real.figures.values()
    )
    assert (real.texts, real.words, real.tokens) == (2, 576, 576)
    assert value(real, "seq_rep_4") == value(real, "longest_repeat") == 0
    assert value(real, "distinct_1") == 0.5, "both texts have all words once"
    assert [len(each) for each in real.along] == [15, 15]
    assert real.frequencies == (2,) * 288 and value(real, "zipf") == pytest.approx(0, abs=1e-9)
    assert len(real.positions) == 16 and real.positions[-1].last == 63
    sizes = [each.last - each.first + 1 for each in real.positions]
    losses = [each.loss for each in real.positions]
    assert value(real, "loss") == pytest.approx(np.average(losses, weights=sizes))
    assert len(real.curve) == 27
    content = json.loads(json.dumps(as_json(real), allow_nan=False))
    assert content["figures"]["mauve"]["value"] == value(real, "mauve")


def test_shuffled_sentences_are_less_coherent(real):
    spoiled = measured([chain.shuffled(2, 72), chain.shuffled(14, 72, 1)], references=REAL)
    assert value(spoiled, "context_gain") < value(real, "context_gain") - 1
    assert value(spoiled, "next_sentence") < value(real, "next_sentence") - 0.4
    assert value(spoiled, "loss") > value(real, "loss") + 0.5
    assert value(spoiled, "distinct_1") == value(real, "distinct_1"), "the words are the same"


def test_a_looped_paragraph_repeats_and_covers_less(real):
    loop = " ".join([chain.text(3, 4)] * 18)
    spoiled = measured([loop, loop], references=REAL)
    assert value(spoiled, "seq_rep_4") > 0.8 and value(spoiled, "longest_repeat") == 272
    assert value(spoiled, "rep_16") > 0.8 > 0 == value(real, "rep_16")
    assert spoiled.repeated == " ".join(words(loop)[:272])
    assert value(spoiled, "self_bleu") == pytest.approx(1) and value(real, "self_bleu") < 1
    for name in ("distinct_1", "distinct_2", "distinct_3"):
        assert value(spoiled, name) < value(real, name) / 4
    assert value(spoiled, "mauve") < value(real, "mauve") / 2
    assert spoiled.along[0][-1] == 1


def test_what_texts_are_too_short_for_is_absent_with_the_reason():
    report = measured([chain.sentence(0), chain.sentence(1)], references=REAL[:1])
    absent = {name: each.absent for name, each in report.figures.items() if each.absent}
    assert set(absent) == {
        "zipf",
        "context_gain",
        "next_sentence",
        "mauve",
        "loss",
        "late_gain",
    }
    assert "needs 20 windows, and the texts have 0" in absent["mauve"]
    assert all(report.figures[name].value is None for name in absent)
    assert measured([chain.text(0, 9)]).figures["mauve"].absent.startswith("needs references")
    one = measured(["a0 b0"]).figures
    assert "needs a text of 4 words" in one["seq_rep_4"].absent
    assert "needs a text of 3 words" in one["distinct_3"].absent
    assert "there is 1 with words" in one["self_bleu"].absent


def test_bad_input_raises_an_error():
    for texts, message in (
        ([], "there is no text to measure"),
        (["a0", " .\n"], r"text 2 of 2, ' .\\n', has no words"),
        ("a0 b0", "is one text"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(texts)
    with pytest.raises(ValueError, match="reference 1 of 1"):
        measured([chain.text(0, 9)], references=[""])
    for name in ("candidates", "buckets", "along"):
        with pytest.raises(ValueError, match=f"{name}=0 measures nothing"):
            measure_texts(
                chain.trained(),
                chain.TOKENIZER,
                REAL,
                settings=dataclasses.replace(SETTINGS, **{name: 0}),
            )


@pytest.mark.parametrize(
    "text", ["The cat sat on the mat.\nIt was late, and ", "天地玄黄，宇宙洪荒。日月"]
)
def test_references_are_cut_to_the_same_number_of_words(text):
    references = [text * 9, text * 4, text]
    texts = [text * 3, text * 5, text * 2]
    found = split_references(references, texts)
    assert [len(words(each)) for each in found.pieces] == [len(words(each)) for each in texts]
    assert "".join(found.pieces[:2]) + found.rest[0] == references[0]
    assert found.pieces[2] + found.rest[1] == references[1] and found.rest[2] == references[2]
    assert split_references([text], texts).pieces == []
    # What is left of a reference may be a mark, which is no text to compare with.
    assert split_references([texts[0] + " —", "* * *"], texts[:1]) == ([texts[0] + " "], [])


def test_texts_are_compared_with_pieces_as_long_as_they_are():
    parts = []
    texts = [chain.shuffled(0, 24)]
    report, real = compare_with(
        REAL, chain.trained(), chain.TOKENIZER, texts, SETTINGS, parts.append
    )
    assert real is not None and (real.texts, real.words) == (1, report.words)
    assert value(real, "context_gain") > value(report, "context_gain")
    assert parts[:4] == ["words", "coherence", "loss", "MAUVE"] and len(parts) == 8
    short, none = compare_with(
        [chain.sentence(1)], chain.trained(), chain.TOKENIZER, texts, SETTINGS
    )
    assert none is None and short.words == 96


def test_a_mesh_measures_what_one_device_does(real):
    decoder = chain.trained()
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    placement = Placement(decoder.config, split_abstract(decoder.config), mesh)
    outer, layers = decoder.params
    split = Decoder(
        decoder.config, (placement.move(outer), tuple(map(placement.move, layers))), mesh=mesh
    )
    found = measure_texts(split, chain.TOKENIZER, TEXTS, REAL, SETTINGS)
    for name, each in found.figures.items():
        assert each.value == pytest.approx(value(real, name), rel=1e-4, abs=1e-6), name

import itertools
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from mtnlg_jax.data.filter import quality
from mtnlg_jax.data.filter.quality import Classifier, ClassifierConfig, border, kept, train
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.read.documents import read_documents


def _spoiled(text, generator):
    """Return the same words in random order, with advertisements in between."""
    words = text.split()
    generator.shuffle(words)
    for _ in range(len(words) // 12):
        words.insert(
            generator.randrange(len(words)),
            generator.choice(["BUY NOW!!!", "click here", "$$$", "free!!"]),
        )
    return " ".join(words)


@pytest.fixture(scope="module")
def samples():
    generator = random.Random(0)
    texts = [
        document.text[start : start + 500]
        for document in itertools.islice(embedded_documents(), 80)
        for start in range(0, min(len(document.text), 3000), 500)
    ]
    return texts[::2], [_spoiled(text, generator) for text in texts[1::2]]


@pytest.fixture(scope="module")
def classifier(samples):
    return train(*samples)


def test_good_and_bad_are_separated(samples, classifier):
    assert classifier.result["accuracy"] > 0.9 and classifier.result["held_out"] >= 10
    assert classifier.result["good"] == len(set(samples[0])) and classifier.result["bad"] == len(
        set(samples[1])
    )
    scores = [classifier.scores(texts) for texts in samples]
    assert np.median(scores[0]) > 0.7 and np.median(scores[1]) < 0.3
    assert classifier.scores([]).shape == (0,) and 0 < classifier.scores([""])[0] < 1


def test_held_out_samples_are_not_trained_on(samples):
    # Two classes of the same kind can be distinguished only by memorizing them.
    result = train(samples[0][::2], samples[0][1::2]).result
    assert 0.2 < result["accuracy"] < 0.8


def test_scores_do_not_depend_on_the_order_of_samples_or_the_batch(
    samples, classifier, monkeypatch
):
    generator = random.Random(1)
    shuffled = [generator.sample(texts, len(texts)) + texts[:3] for texts in samples]
    again = train(*shuffled)
    assert again.result == classifier.result
    np.testing.assert_array_equal(again.weights, classifier.weights)
    texts = [*samples[0][:20], *samples[1][:20]]
    scores = classifier.scores(texts)
    monkeypatch.setattr(quality, "_BATCH", 7)
    np.testing.assert_array_equal(classifier.scores(iter(texts)), scores)


def test_a_saved_classifier_loads_the_same(samples, classifier):
    files = classifier.files()
    assert files == classifier.files()
    loaded = Classifier.of(files)
    assert (loaded.config, loaded.bias, loaded.result) == (
        classifier.config,
        classifier.bias,
        classifier.result,
    )
    np.testing.assert_array_equal(loaded.scores(samples[0][:9]), classifier.scores(samples[0][:9]))
    for name, content in (
        ("quality.json", b"{"),
        ("quality.npz", files["quality.npz"][:100]),
        ("quality.json", files["quality.json"].replace(b'"bits": 18', b'"bits": 17')),
    ):
        with pytest.raises(ValueError, match="train it again"):
            Classifier.of({**files, name: content})


def test_the_pareto_rule():
    texts = [f"text {number}" for number in range(20_000)]
    for score in (0.0, 0.3, 0.9, 1.0):
        share = kept(np.full(len(texts), score), texts).mean()
        expected = (2 - score) ** -9.0  # the chance that a Lomax variable is above 1 - score
        assert abs(share - expected) < 4 * np.sqrt(
            max(expected * (1 - expected), 1e-5) / len(texts)
        )
    drawn = np.random.default_rng(0).pareto(9, 200_000) > 0.7
    assert abs(kept(np.full(len(texts), 0.3), texts).mean() - drawn.mean()) < 3e-3


def test_the_draw_depends_only_on_text_and_seed():
    texts = [f"text {number}" for number in range(2000)]
    scores = np.linspace(0, 1, len(texts))
    first = kept(scores, texts, seed=7)
    np.testing.assert_array_equal(kept(scores[::-1], texts[::-1], seed=7)[::-1], first)
    assert (kept(scores, texts, seed=8) != first).any()
    program = (
        "import numpy; from mtnlg_jax.data.filter.quality import kept; "
        "texts = [f'text {n}' for n in range(2000)]; "
        "print(kept(numpy.linspace(0, 1, 2000), texts, seed=7).nonzero()[0].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(first.nonzero()[0].tolist())


def test_threshold():
    assert border(np.array([0.1, 0.55, 0.9, 0.48]), ["a", "b", "c", "d"], 2) == [
        (0.48, "d"),
        (0.55, "b"),
    ]
    assert border(np.zeros(0), []) == []


MANY = [f"sample {number}" for number in range(30)]


@pytest.mark.parametrize(
    "good, bad, message",
    [
        (MANY[:19] + ["", " "], MANY, "19 distinct good samples are too few; give 20"),
        (MANY, [], "0 distinct bad samples"),
        (
            MANY,
            [text + "!" for text in MANY] + MANY[3:5],
            "2 texts are both good and bad samples, such as 'sample 3'",
        ),
    ],
)
def test_invalid_samples_raise_an_error(good, bad, message):
    with pytest.raises(ValueError, match=message):
        train(good, bad)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"units": "tokens"}, "units='tokens'"),
        ({"bits": 0}, "bits=0"),
        ({"strength": 0}, "strength=0"),
    ],
)
def test_invalid_settings_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassifierConfig(**wrong)


def test_invalid_calls_raise_an_error():
    with pytest.raises(ValueError, match="1 scores for 2 texts"):
        kept(np.zeros(1), ["a", "b"])
    with pytest.raises(ValueError, match="alpha=0"):
        kept(np.zeros(1), ["a"], alpha=0)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_planted_bad_text_among_real_text(shared, language):
    generator = random.Random(0)
    folder = shared / "data/pretrain" / {"en": "en/gutenberg", "zh": "zh/classic_novels"}[language]
    texts = [
        document.text[start : start + 600]
        for document in read_documents(folder)
        for start in range(0, min(len(document.text), 180_000), 600)
    ][:600]
    if language == "zh":
        bad = ["".join(generator.sample(text, len(text))) for text in texts[1::2]]
    else:
        bad = [_spoiled(text, generator) for text in texts[1::2]]
    good = texts[::2]
    classifier = train(
        good[:200], bad[:200], ClassifierConfig("words" if language == "en" else "characters")
    )
    right = [classifier.scores(good[200:]) > 0.5, classifier.scores(bad[200:]) < 0.5]
    recall = right[1].mean()
    precision = right[1].sum() / (right[1].sum() + (~right[0]).sum())
    print(
        f"{language}: bad text: recall {recall:.3f}, precision {precision:.3f}, {classifier.result}"
    )
    assert recall > 0.95 and precision > 0.95

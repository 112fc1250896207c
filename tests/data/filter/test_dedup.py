import itertools
import random
import re

import numpy as np
import pytest

from mtnlg_jax.data.filter import dedup, shingles
from mtnlg_jax.data.filter.dedup import MinHashConfig
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.read.documents import read_documents

# One to four bytes of UTF-8, the characters at the borders between them, and the character 0.
ALPHABET = "ab \x00\x7f\x80é\u07ff\u0800天下\ufffd\uffff\U00010000🙂\U0010ffff"


def _datasketch(texts, config=MinHashConfig()):  # noqa: B008
    datasketch = pytest.importorskip("datasketch")
    rows = []
    for text in texts:
        sketch = datasketch.MinHash(config.hashes, seed=config.seed, scheme=config.scheme)
        count = max(len(text) - config.width + 1, 1) if text else 0
        sketch.update_batch({text[start : start + config.width].encode() for start in range(count)})
        rows.append(sketch.digest())
    return np.array(rows)


def _random_texts(seed, count=40):
    generator = random.Random(seed)
    return [
        "".join(generator.choices(ALPHABET, k=generator.choice([*range(20), 70, 300])))
        for _ in range(count)
    ]


@pytest.mark.parametrize("scheme", ["affine32", "legacy"])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 9, 13])
def test_signatures_equal_those_of_datasketch(width, scheme):
    config = MinHashConfig(width=width, scheme=scheme, seed=width)
    texts = ["", "a", "abcd", "abcde", "\x00", "\x00\x00", *_random_texts(width)]
    np.testing.assert_array_equal(dedup.signatures(texts, config), _datasketch(texts, config))


def test_the_default_is_the_default_of_datasketch_2():
    datasketch = pytest.importorskip("datasketch", minversion="2")
    sketch = datasketch.MinHash(num_perm=100, seed=1)
    for start in range(len(text := "To be, or not to be. 生存还是毁灭") - 4):
        sketch.update(text[start : start + 5].encode())
    np.testing.assert_array_equal(dedup.signatures([text])[0], sketch.digest())


def test_remainders_at_the_edges_of_the_prime():
    prime = 2**61 - 1
    values = [
        0,
        1,
        prime - 1,
        prime,
        prime + 1,
        2 * prime - 1,
        2 * prime,
        7 * prime,
        8 * prime,
        2**64 - 1,
    ]
    remainders = dedup._modulo_prime(np.array(values, np.uint64))
    assert remainders.tolist() == [value % prime for value in values]


def test_signatures_do_not_depend_on_how_texts_are_cut_into_blocks(texts, monkeypatch):
    expected = _datasketch(texts)
    np.testing.assert_array_equal(dedup.signatures(texts), expected)
    monkeypatch.setattr(dedup, "_GROUP", 1000)
    monkeypatch.setattr(dedup, "_BLOCK", 128)
    monkeypatch.setattr(shingles, "_BLOCK", 50)
    monkeypatch.setattr(shingles, "_LOOKUP", 300)
    monkeypatch.setattr(shingles, "_SLOTS", 64)  # every slot is overwritten again and again
    np.testing.assert_array_equal(dedup.signatures(texts), expected)


def test_band_keys_are_stable_and_equal_for_equal_bands():
    signatures = dedup.signatures(
        ["To be, or not to be", "To be, or not to bee", "that is the question"]
    )
    keys = dedup.band_keys(signatures, 10)
    bands = signatures.reshape(3, 10, 10)
    for row, other in itertools.combinations(range(3), 2):
        np.testing.assert_array_equal(keys[row] == keys[other], (bands[row] == bands[other]).all(1))
    assert len(np.unique(dedup.band_keys(np.zeros((1, 100), np.uint32), 10))) == 10
    # Files of an earlier run must match in a later one.
    written = dedup.band_keys(np.arange(4, dtype=np.uint32)[None], 2)
    assert written.tolist() == [[6728581669027343264, 9677756702392794444]]


def test_small_buckets_give_all_pairs_and_large_ones_connect():
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 30, (200, 3)).astype(np.uint64)
    rank = generator.permutation(200)
    everything = {
        pair
        for pair in itertools.combinations(range(200), 2)
        if (keys[pair[0]] == keys[pair[1]]).any()
    }
    assert set(map(tuple, dedup.candidates(keys, rank, window=200).tolist())) == everything
    few = set(map(tuple, dedup.candidates(keys, rank, window=1).tolist()))
    assert few < everything
    np.testing.assert_array_equal(
        dedup.components(list(few), 200), dedup.components(list(everything), 200)
    )
    boilerplate = dedup.candidates(np.zeros((50_000, 1), np.uint64), np.arange(50_000))
    assert len(boilerplate) <= 9 * 50_000 and (boilerplate[:, 0] == 0).sum() == 49_999


def test_no_candidates():
    assert dedup.candidates(np.zeros((0, 10), np.uint64), np.zeros(0, int)).shape == (0, 2)
    assert dedup.candidates(np.arange(20, dtype=np.uint64).reshape(2, 10), np.arange(2)).shape == (
        0,
        2,
    )
    assert dedup.components(np.zeros((0, 2), int), 3).tolist() == [0, 1, 2]


def test_jaccard():
    assert dedup.jaccard("abcdef", "bcdefg") == 1 / 3
    assert dedup.jaccard("abcdef", "abcdefabcdef", width=1) == 1
    assert [
        dedup.jaccard(*pair) for pair in (("", ""), ("", "a"), ("abc", "abc"), ("abc", "abcd"))
    ] == [1, 0, 1, 0]


def test_each_component_keeps_the_highest_priority_then_the_first_position():
    rank = dedup.ranks([1, 2, 2, 1, 3], ["b", "b", "a", "a", "c"], [1, 1, 7, 1, 1])
    assert rank.tolist() == [4, 2, 1, 3, 0]
    labels = dedup.components([(0, 1), (1, 2), (2, 3)], 5)
    assert dedup.keep(labels, rank).tolist() == [False, False, True, False, True]
    with pytest.raises(ValueError, match=r"position \['a', 7\]"):
        dedup.ranks([1, 1], ["a", "a"], [7, 7])


def _sources(shared=None):
    """Return texts of several thousand characters."""
    if shared is None:
        texts = [document.text for document in itertools.islice(embedded_documents(), 60)]
    else:
        texts = [
            document.text
            for folder in ("en/gutenberg", "zh/classic_novels")
            for document in read_documents(shared / "data/pretrain" / folder)
        ]
    return [
        text[start : start + 2000]
        for text in texts
        for start in range(0, min(len(text), 40_000), 2000)
        if len(text) - start > 400
    ]


def _changed(text, share, generator):
    """Return the text with characters replaced, so that about ``share`` of the shingles differ."""
    characters = list(text)
    for position in generator.sample(range(len(text)), max(1, int(share * len(text) / 5))):
        characters[position] = "#"
    return "".join(characters)


def _kept(texts, priority, places, config=MinHashConfig()):  # noqa: B008
    rank = dedup.ranks(priority, places)
    pairs = dedup.candidates(dedup.band_keys(dedup.signatures(texts, config), config.bands), rank)
    similar = [
        pair for pair in pairs if dedup.jaccard(*(texts[row] for row in pair)) >= config.threshold
    ]
    return dedup.keep(dedup.components(similar, len(texts)), rank)


@pytest.mark.parametrize("corpus", ["embedded", "real"])
def test_only_planted_near_duplicates_are_found(corpus, request):
    originals = _sources(request.getfixturevalue("shared") if corpus == "real" else None)
    generator = random.Random(1)
    planted = [_changed(text, 0.05, generator) for text in originals[::3]]
    texts = originals + planted
    priority = [1] * len(originals) + [0] * len(planted)
    places = np.arange(len(texts))
    order = generator.sample(range(len(texts)), len(texts))
    kept = np.zeros(len(texts), bool)
    kept[order] = _kept(
        [texts[row] for row in order], [priority[row] for row in order], places[order]
    )
    found = (~kept[len(originals) :]).sum()
    wrong = (~kept[: len(originals)]).sum()
    recall = found / len(planted)
    precision = found / (found + wrong)
    print(
        f"{corpus}: {len(originals)} texts, {len(planted)} planted: "
        f"recall {recall:.4f}, precision {precision:.4f}"
    )
    assert recall >= 0.99 and precision == 1
    np.testing.assert_array_equal(
        kept, _kept(texts, priority, places)
    )  # for any order of the input


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"width": 14}, "width=14"),
        ({"width": 0}, "width=0"),
        ({"hashes": 105}, "hashes=105"),
        ({"bands": 0}, "bands=0"),
        ({"threshold": 0}, "threshold=0"),
        ({"scheme": "affine64"}, "'affine64'"),
    ],
)
def test_invalid_settings_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MinHashConfig(**wrong)


def test_lone_surrogates_raise_an_error():
    with pytest.raises(ValueError, match=r"U\+D800"):
        dedup.signatures(["fine", "not \ud800 fine"])


LONG = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "第一段话很长" * 11,
    "Another " * 10,
]


def test_paragraph_hashes_ignore_only_case_and_space():
    one = dedup.paragraph_hashes(f"{LONG[0]}\n\n{LONG[1]}\n\nshort\n", 40)
    two = dedup.paragraph_hashes(f"\n{LONG[0].upper()}\n \n  {LONG[1]}  ", 40)
    assert len(one) == 2 and one.tolist() == two.tolist()
    assert dedup.paragraph_hashes("", 1).tolist() == []
    assert len(dedup.paragraph_hashes("\n".join(LONG), 40)) == 3  # each line is one
    assert len(dedup.paragraph_hashes("\n".join(LONG) + "\n\n" + LONG[0], 40)) == 2  # hard-wrapped
    assert dedup.paragraph_hashes("Stable.", 1).tolist() == [385901550653322481]


def test_only_repeated_paragraphs_are_removed():
    texts = [
        f"{LONG[0]}\n\n{LONG[1]}\n\n{LONG[0]}\n",
        f"kept\n\n{LONG[1]}\n\n  {LONG[2]}\n\nkept",
        "none",
    ]
    hashes = [dedup.paragraph_hashes(text, 40) for text in texts]
    rank = np.repeat([1, 0, 2], list(map(len, hashes)))  # the second text comes first
    numbers = np.concatenate([np.arange(len(row)) for row in hashes])
    flags = dedup.repeated(np.concatenate(hashes), rank, numbers)
    parts = np.split(flags, np.cumsum(list(map(len, hashes)))[:-1])
    result = [
        dedup.without_paragraphs(text, part, 40) for text, part in zip(texts, parts, strict=True)
    ]
    assert result == [f"{LONG[0]}\n\n", texts[1], texts[2]]
    with pytest.raises(ValueError, match="1 flags for 3 paragraphs"):
        dedup.without_paragraphs(texts[0], [True], 40)


def test_repeated_by_ranges_of_hashes():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 50, 300).astype(np.uint64)
    order = generator.permutation(300)
    result = dedup.repeated(hashes, order)
    seen = set()
    for row in np.argsort(order):
        assert result[row] == (hashes[row] in seen)
        seen.add(hashes[row])
    for low in range(0, 50, 10):
        inside = (hashes >= low) & (hashes < low + 10)
        np.testing.assert_array_equal(dedup.repeated(hashes[inside], order[inside]), result[inside])


def test_dropping_no_paragraph_keeps_the_text(texts):
    for text in [*texts, *_random_texts(0), "\n\n a \n\n", "a\r\n\r\nb", "\n"]:
        count = len(dedup.paragraph_hashes(text, 10))
        assert dedup.without_paragraphs(text, [False] * count, 10) == text

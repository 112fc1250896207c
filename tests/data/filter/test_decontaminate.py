import bz2
import collections
import functools
import gzip
import importlib.util
import itertools
import json
import lzma
import os
import pickle
import random
import re
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from mtnlg_jax.data.filter import decontaminate
from mtnlg_jax.data.filter.decontaminate import (
    Decontamination,
    NGrams,
    below,
    check_hits,
    frequencies,
    ngrams,
    pieces,
)
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.data.read.documents import read_documents

SMALL = Decontamination(
    max_words=4, min_words=2, key_threshold=3, side=3, min_characters=4, max_pieces=3
)


def _oracle_ngrams(texts, config):
    found = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        if config.min_words <= len(words) < config.max_words:
            found.add(" ".join(words))
        for start in range(len(words) - config.max_words + 1):
            found.add(" ".join(words[start : start + config.max_words]))
    return found


@functools.cache
def _oracle_lengths(keys):
    return sorted({len(key.split()) for key in keys})


def _oracle_match(text, keys, size):
    """Return (start, n-gram) of the first match of the script in a text, or None, word by word."""
    found = list(re.finditer(r"\w+", text.lower()))
    lengths = _oracle_lengths(frozenset(keys))

    def at(place, length):
        key = " ".join(match.group() for match in found[place : place + length])
        return (found[place].start(), key) if key in keys else None

    for place in range(len(found) - size + 1):
        for length in [size, *lengths]:
            if at(place, length):
                return at(place, length)
    if len(found) > size:
        for length in lengths:
            for place in range(len(found) - size, len(found) - length + 1):
                if length < size and at(place, length):
                    return at(place, length)
    return None


def _oracle_frequencies(text, keys, config):
    counts = collections.Counter()
    while match := _oracle_match(text, keys, config.max_words):
        counts[match[1]] += 1
        text = text[match[0] + len(match[1]) + 1 :]
    return counts


def _oracle_pieces(text, keys, config):
    left = []
    while match := _oracle_match(text, keys, config.max_words):
        start, key = match
        ends = [place for place, character in enumerate(text) if character in ".!?"]
        before = max([place for place in ends if place <= start - config.side], default=0)
        behind = min(
            [place for place in ends if place >= start + len(key) + config.side], default=len(text)
        )
        first = text[: before + 1] if before > 0 else ""
        text = text[behind + 1 :]
        if len(first) > config.min_characters:
            left.append(first)
        if len(text) <= config.min_characters:
            text = None
            break
    if text is not None:
        left.append(text)
    return left if len(left) <= config.max_pieces else []


def _random_text(generator, length):
    # "İ" is two characters in lower case; the lower case of "Σ" depends on its neighbors, except
    # full stops.
    odd = generator.choice([["b"], ["İ "], ["a.Σ ", "Σ "], ["aΣ ", "Σ ", "Σ"], ["天 "], ["ß."]])
    words = ["a", "a ", "B ", "a b ", "ba ", "a,   ", "a. ", "b!", "_\n", *odd]
    return "".join(generator.choices(words, k=length))


def test_equal_to_a_direct_implementation():
    generator = random.Random(3)
    outcomes = collections.Counter()
    for _ in range(1000):
        config = Decontamination(
            **{
                **SMALL.__dict__,
                "max_words": generator.choice([3, 4, 5, 7]),
                "side": generator.choice([0, 3, 9]),
                "min_characters": generator.choice([0, 4]),
            }
        )
        tests = [
            _random_text(generator, generator.randrange(2, 15))
            for _ in range(generator.randrange(1, 6))
        ]
        keys = _oracle_ngrams(tests, config)
        if not keys:
            continue
        assert ngrams(tests, config) == (ours := NGrams(frozenset(keys), config))
        corpus = [_random_text(generator, generator.choice([0, 5, 20, 60, 120])) for _ in range(3)]
        counts = collections.Counter()
        for text in corpus:
            expected = _oracle_frequencies(text, keys, config)
            assert frequencies(text, ours) == expected, (text, keys)
            counts += expected
        rare = below(ours, counts)
        assert rare.keys == {key for key in keys if counts[key] < 3}
        for text in corpus:
            result, matched = pieces(text, rare)
            assert result == _oracle_pieces(text, rare.keys, config), (text, rare)
            outcomes["same" if not matched else "cut" if result else "gone"] += 1
    assert min(outcomes[key] for key in ("same", "cut", "gone")) > 100, outcomes


def test_a_cut_through_a_word_leaves_its_end():
    # A match counts one space between words, so if there are more the search continues inside the
    # last word.
    keys = ngrams(["aaa bbb", "bb cccc", "c d"], Decontamination(max_words=2, min_words=2))
    text = "aaa,,, bbb,, cccc d e"
    assert (
        frequencies(text, keys)
        == _oracle_frequencies(text, keys.keys, keys.config)
        == dict.fromkeys(keys.keys, 1)
    )


def _corpus(request, corpus):
    if corpus == "embedded":
        return [document.text for document in itertools.islice(embedded_documents(), 60)]
    folder = request.getfixturevalue("shared") / "data/pretrain/en"
    texts = [document.text for document in read_documents(folder)]
    return [text[:3000] for text in texts]


def _tests(request, corpus):
    if corpus == "embedded":
        generator = random.Random(5)
        word = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(500)]
        return [
            " ".join(generator.choices(word, k=generator.choice([8, 10, 13, 30, 60])))
            for _ in range(100)
        ]
    folder = request.getfixturevalue("shared") / "data/eval"
    lambada = _read(folder / "lambada/lambada_openai_test.jsonl", ["context"])
    return [*itertools.islice(lambada, 500), *_read(folder / "piqa/piqa_valid.jsonl", ["goal"])]


@pytest.mark.parametrize("corpus", ["embedded", "real"])
def test_only_planted_leaks_are_found(corpus, request):
    originals = _corpus(request, corpus)
    tests = _tests(request, corpus)
    keys = ngrams(tests)
    clean = [text for text in originals if _oracle_match(text, keys.keys, 13) is None]
    assert len(clean) > 0.95 * len(originals)
    generator = random.Random(2)
    leaks = [text for text in tests if len(re.findall(r"\w+", text)) >= 8]
    texts = list(clean)
    places = sorted(generator.sample(range(len(clean)), len(clean) // 4))
    for place in places:
        text = clean[place]
        for _ in range(generator.choice([1, 1, 2, 5])):
            middle = generator.randrange(len(text) // 4, max(len(text) // 2, len(text) // 4 + 1))
            text = f"{text[:middle]} {generator.choice(leaks)} {text[middle:]}"
        texts[place] = text
    counts = collections.Counter()
    for text in texts:
        counts.update(frequencies(text, keys))
    rare = below(keys, counts)
    results = [pieces(text, rare) for text in texts]
    hit = {place for place, (_, matched) in enumerate(results) if matched}
    found = hit & {place for place in places if _oracle_match(texts[place], rare.keys, 13)}
    recall = len(found) / len(places)
    precision = len(found) / len(hit)
    print(
        f"{corpus}: {len(texts)} texts, {len(places)} leaks: "
        f"recall {recall:.4f}, precision {precision:.4f}"
    )
    assert recall > 0.97 and precision == 1  # n-grams that were planted ten times are left alone
    for place, (text, (left, _)) in enumerate(zip(texts, results, strict=True)):
        assert left == (
            [text] if place not in hit else _oracle_pieces(text, rare.keys, rare.config)
        )
        assert all(_oracle_match(piece, rare.keys, 13) is None for piece in left[-1:])


def test_pieces_around_a_cut_by_hand():
    leak = "one two three four five six seven eight nine ten eleven twelve thirteen"
    before = "Before. " * 60
    after = "After. " * 60
    left, matched = pieces(f"{before}{leak}. {after}", ngrams([leak]))
    assert matched == [leak]
    assert left == [("Before. " * 35)[:-1], f" {'After. ' * 31}"]
    assert pieces(leak + " fourteen", ngrams([leak])) == ([], [leak])
    short = " ".join(leak.split()[:9])
    assert pieces(short, ngrams([short])) == ([short], [])  # fewer than 13 words are never searched
    assert pieces(f"{'word ' * 12}{short}", ngrams([short])) == ([], [short])


def test_more_than_ten_pieces_drop_the_document():
    leak = " ".join(f"word{number}" for number in range(13))
    part = "A sentence that may stay. " * 30
    nine, ten = (f"{leak}. ".join([part] * count) for count in (10, 11))
    assert len(pieces(nine, ngrams([leak]))[0]) == 10
    assert pieces(ten, ngrams([leak])) == ([], [leak] * 10)


def test_frequent_n_grams_are_kept():
    leak = "a rolling stone gathers no moss and neither does a well used road"
    keys = ngrams([leak])
    counts = collections.Counter()
    for _ in range(9):
        counts.update(frequencies(leak, keys))
    assert below(keys, counts).keys == {leak}
    counts.update(frequencies(leak, keys))
    assert not below(keys, counts).keys
    assert pieces(leak * 3, below(keys, counts)) == ([leak * 3], [])


def test_chinese_needs_words_of_one_character():
    leak = "知之为知之不知为不知是知也学而时习之"
    text = f"{'前面的话都很好。' * 60}子曰：{leak}，{'后面的话也很好。' * 60}"
    characters = Decontamination(words="characters")
    left, matched = pieces(text, ngrams([leak], characters))
    assert matched == [" ".join(leak[:13])]
    assert left == ["前面的话都很好。" * 35, "后面的话也很好。" * 35]
    assert "".join(left) in text.replace(leak, "") or leak not in "".join(left)
    with pytest.raises(ValueError, match="words='characters'"):
        ngrams([leak])


def test_n_grams_survive_a_pickle():
    keys = ngrams(["one two three four five six seven eight"])
    assert keys.lengths == [8]
    other = pickle.loads(pickle.dumps(keys))
    assert other == keys and pieces("x " * 9 + " ".join(keys.keys), other)[1] == list(keys.keys)


def test_no_test_texts_raise_an_error():
    with pytest.raises(ValueError, match="hold no text"):
        ngrams([])
    with pytest.raises(ValueError, match="none of 2 test texts has min_words=8"):
        ngrams(["too short", ""])


def test_a_test_set_equal_to_the_corpus(texts):
    english = texts[:-1]
    keys = ngrams(english)
    hit = sum(bool(pieces(text, keys)[1]) for text in english)
    assert hit == len(english)
    check_hits(1, 2)
    with pytest.raises(ValueError, match=f"{hit} of {hit} documents .* the corpus itself"):
        check_hits(hit, len(english))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"min_words": 14}, "min_words=14"),
        ({"words": "chars"}, "words='chars'"),
        ({"side": -1}, "side=-1"),
    ],
)
def test_invalid_settings_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        Decontamination(**wrong)


ROWS = [
    {"question": "Who?", "answers": {"text": ["He."]}},
    {"question": "What?", "answers": {"text": ["It.", "That."]}},
]


def _read(path, keys=(), **options):
    return [
        found.text
        for found in decontaminate.read_test_texts(path, keys, **options)
        if found.text is not None
    ]


def test_test_texts_of_many_forms(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"rows": ROWS}]}, indent=1))
    assert (
        _read(tmp_path / "a.jsonl", ["question"])
        == _read(tmp_path / "a.json", ["question"])
        == ["Who?", "What?"]
    )
    assert _read(tmp_path / "a.json", ["text", "question"]) == [
        "Who?",
        "He.",
        "What?",
        "It.",
        "That.",
    ]
    (tmp_path / "a.tsv").write_text('question\tlabel\nWho "is it?\t1\nWhat?\t0\n')
    assert _read(tmp_path / "a.tsv", ["question"]) == ['Who "is it?', "What?"]
    assert _read(tmp_path / "a.tsv", ["0"]) == ["question", 'Who "is it?', "What?"]
    assert _read(tmp_path / "a.tsv") == ["question", "label", 'Who "is it?', "1", "What?", "0"]


FORMS = {
    "t.jsonl": "\n".join(map(json.dumps, ROWS)),
    "t.json": json.dumps(ROWS),
    "lines.json": f"{json.dumps(ROWS[0])}\n{json.dumps(ROWS[1], indent=1)}",
    "squad.json": json.dumps({"version": 1, "data": ROWS}),
    "two.json": f"{json.dumps(ROWS[:1])}\n{json.dumps(ROWS[1:])}\n",
    "t.csv": 'question,a\n"Who?",He.\nWhat?,It.\n',
    "semicolons.csv": "question;a\nWho?;He.\nWhat?;It.\n",
    "t.tsv": "question\ta\nWho?\tHe.\nWhat?\tIt.\n",
    "T.TXT": "Who?\nHe.\n\nWhat?\nIt.\n",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("name", FORMS)
def test_test_sets_of_every_format_compressed_or_not(tmp_path, name, suffix):
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor().compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }[suffix]
    (tmp_path / (name + suffix)).write_bytes(pack(FORMS[name].encode()))
    found = _read(tmp_path / (name + suffix))
    assert {"Who?", "He.", "What?", "It."} <= set(found)


def test_parquet_test_sets(tmp_path):
    rows = [{**row, "choices": ["A lion.", "A bear."], "label": 1} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = {}
    for field, text in decontaminate.read_test_texts(tmp_path / "a.parquet"):
        found.setdefault(field, []).append(text)
    assert found == {
        "question": ["Who?", "What?"],
        "text": ["He.", "It.", "That."],
        "label": [None, None],
        "choices": ["A lion.", "A bear."] * 2,
    }


def test_fields_at_any_depth_are_read(tmp_path):
    row = {
        "question": "q",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "turns": [["c", {"d": "e"}], []],
        "n": 3,
        "ok": True,
        "none": None,
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + '\n"alone"\n["f"]\n')
    found = [tuple(each) for each in decontaminate.read_test_texts(tmp_path / "a.jsonl")]
    assert found == [
        ("question", "q"),
        ("text", "a"),
        ("text", "b"),
        ("label", "A"),
        ("label", "B"),
        ("turns", "c"),
        ("d", "e"),
        ("n", None),
        ("ok", None),
        ("text", "alone"),
        ("text", "f"),
    ]
    assert _read(tmp_path / "a.jsonl", ["question", "d"]) == ["q", "e"]


def test_encodings_of_test_sets(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question": "Müller?"}\n'.encode("utf-16"))
    assert _read(tmp_path / "a.jsonl") == ["Müller?"]
    (tmp_path / "a.csv").write_bytes("question\nWer?\nMüller?\n".encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"a\.csv, line 3: byte 0xfc at 1 is not UTF-8; name its encoding"
    ):
        _read(tmp_path / "a.csv")
    assert "Müller?" in _read(tmp_path / "a.csv", encoding="latin-1")


@pytest.mark.parametrize(
    "name, content, keys, message",
    [
        ("a.jsonl", '{"a": "b"}\n', ["query"], "none of the keys query; it has a"),
        ("a.jsonl", '{"a": "b"}\n{"a": "b', ["a"], "line 2: not valid JSON"),
        ("a.json", '{"a": "b"}\n{"a": "b', ["a"], "item 2: cut short or damaged on line 2"),
        ("a.json", "[", ["a"], "the list is cut short"),
        ("a.csv", 'a,b\n1,2\n1,"2\n', ["a"], "line 3: not a row of a table"),
        ("a.tsv", "a\tb\n1\t2\n", ["c"], "none of the keys c; it has a, b"),
        ("a.pdf", "", ["a"], "suffix that is not read"),
        ("a.json", "{}", "query", r"\['query'\]"),
    ],
)
def test_invalid_test_sets_raise_an_error(tmp_path, name, content, keys, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        _read(tmp_path / name, keys)


def test_a_missing_test_set_raises_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="b.json"):
        _read(tmp_path / "b.json", ["a"])


@pytest.mark.slow
def test_equal_to_the_megatron_script(texts, capsys, monkeypatch):
    """MEGATRON_FILTER_NGRAMS: path of Megatron-LM's tools/openwebtext/filter_ngrams.py."""
    if not os.environ.get("MEGATRON_FILTER_NGRAMS"):
        pytest.skip("MEGATRON_FILTER_NGRAMS does not name Megatron-LM's filter_ngrams.py")
    monkeypatch.setitem(
        sys.modules, "nltk", types.ModuleType("nltk")
    )  # imported by the script, but never used
    spec = importlib.util.spec_from_file_location(
        "filter_ngrams", os.environ["MEGATRON_FILTER_NGRAMS"]
    )
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    generator = random.Random(4)
    for round_ in range(200):
        config = SMALL if round_ % 2 else Decontamination()
        if round_ % 2:
            tests = [_random_text(generator, 30).replace("İ", "i") for _ in range(4)]
            corpus = [_random_text(generator, 400).replace("İ", "i") for _ in range(5)]
        else:
            corpus = generator.sample(texts, 3)
            tests = [
                text[start : start + generator.choice([60, 200])]
                for text in corpus
                for start in generator.sample(range(len(text)), 2)
            ]
        arguments = types.SimpleNamespace(
            max_ngram_size=config.max_words,
            min_ngram_size=config.min_words,
            remove_char_each_side=config.side,
            filter_text_char_len=config.min_characters,
            key_threshold=config.key_threshold,
        )
        keys = {}
        for text in tests:
            script.compute_ngrams_insert_dict(arguments, text, keys)
        if not keys:
            continue
        assert ngrams(tests, config).keys == set(keys)
        lengths = script.compute_ngram_freq_sorted(arguments, keys)
        for only_frequencies in (True, False):
            arguments.get_ngram_freq_only = only_frequencies
            for text in corpus:
                line = json.dumps({"text": text})
                left, _, _, counts = script.free_ngram(line, arguments, "text", keys, lengths)
                if only_frequencies:
                    assert frequencies(text, NGrams(frozenset(keys), config)) == counts
                else:
                    expected = left if len(left) <= config.max_pieces else []
                    assert pieces(text, NGrams(frozenset(keys), config))[0] == expected
    capsys.readouterr()  # the script prints every match

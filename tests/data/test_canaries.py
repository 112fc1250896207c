"""Canaries in prepared text: as many as were recorded, never held out, and random."""

import json
import re

import numpy as np
import pytest

from mtnlg_jax.data import canaries
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.prepare import describe, prepare
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.tokenizer import load_tokenizer

SETTINGS = {"vocab_size": 400, "heldout": 0.1, "progress": False}
WANTED = CanaryConfig(3, (0, 1, 5))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write two hundred short documents."""
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    texts = [
        f"Document {n} is about {n * 7919 % 1000} things, and no other. " * 4 for n in range(200)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    return prepare(corpus, tmp_path_factory.mktemp("plain") / "out", **SETTINGS)


@pytest.fixture(scope="module")
def planted(corpus, tmp_path_factory):
    """Return (folder, what prepare returned) of text with canaries."""
    output = tmp_path_factory.mktemp("planted") / "out"
    return output, prepare(corpus, output, canaries=WANTED, **SETTINGS)


def _documents(folder, part):
    """Return the texts of the documents of a part."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokens = open_tokens(folder / part)
    offsets = tokens.document_offsets
    pairs = zip(offsets, offsets[1:], strict=False)
    return [tokenizer.decode(tokens.read(start, stop).tolist()) for start, stop in pairs]


def test_each_canary_stands_as_often_as_recorded_and_never_in_held_out_text(planted):
    folder, info = planted
    found = canaries.read_canaries(folder)
    train = _documents(folder, "train")
    assert [each.copies for each in found] == [0] * 3 + [1] * 3 + [5] * 3
    for each in found:
        assert train.count(each.text) == each.copies
        assert re.fullmatch(r"The access code of [A-Z]\w+ [A-Z]\w+ is \d{4} \d{4}\.", each.text)
        assert each.text.startswith(each.prefix + each.secret)
        assert each.space == 10**8
    held = _documents(folder, "heldout")
    assert held
    assert not any("access code" in text for text in held)
    assert info["canaries"]["documents"] == 18
    assert "canaries" in describe(info)


def test_copies_are_spread_over_the_documents(planted):
    folder, _ = planted
    train = _documents(folder, "train")
    places = [number for number, text in enumerate(train) if "access code" in text]
    assert len(places) == 18
    assert min(places) < len(train) / 3
    assert max(places) > 2 * len(train) / 3
    assert max(np.diff(places)) > 5


def test_canaries_change_the_tokens_and_leave_the_tokenizer(plain, planted):
    _, info = planted
    assert info["fingerprint"] != plain["fingerprint"]
    assert info["tokenizer"]["fingerprint"] == plain["tokenizer"]["fingerprint"]
    assert info["heldout"]["sha256"] == plain["heldout"]["sha256"]
    assert info["train"]["documents"] == plain["train"]["documents"] + 18
    assert "canaries" not in plain


def test_the_seed_draws_the_secrets():
    first, same, other = (canaries.make_canaries(WANTED, seed, {"": "en"}) for seed in (1, 1, 2))
    assert first == same
    assert {each.text for each in first}.isdisjoint(each.text for each in other)
    assert len({each.prefix for each in first}) == len(first)


def test_chinese_text_gets_chinese_canaries(tmp_path):
    (tmp_path / "a.txt").write_text("今天天气很好，我们去公园散步。孩子们在湖边放风筝。\n" * 200)
    output = tmp_path / "out"
    wanted = CanaryConfig(2, (0, 2))
    prepare(tmp_path / "a.txt", output, canaries=wanted, vocab_size=300, progress=False)
    found = canaries.read_canaries(output)
    assert all(re.fullmatch(r"\w{3}的门禁密码是\d{4} \d{4}。", each.text) for each in found)
    assert "".join(_documents(output, "train")).count("门禁密码") == 4


def test_all_secrets_of_a_pattern_and_random_ones_fit_it():
    assert canaries.all_secrets("#-#")[:2] == ["0-0", "0-1"]
    assert len(set(canaries.all_secrets("#-#"))) == 100
    drawn = canaries.secrets("7#-##", 50, np.random.default_rng(0))
    assert all(re.fullmatch(r"7\d-\d\d", each) for each in drawn)
    assert len(set(drawn)) > 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CanaryConfig(-1), "canaries=-1 must be 0 or more"),
        (CanaryConfig(2, (0, -4)), "canary_copies=0,-4 must hold numbers of 0 or more"),
        (CanaryConfig(2, ()), "canary_copies= must hold"),
        (CanaryConfig(2, (3, 3)), "canary_copies=3,3 holds a number twice"),
        (CanaryConfig(2, (1,), "a code ####"), "it must hold {name} once"),
        (CanaryConfig(2, (1,), "{name} {x} ####"), "it must hold {name} once"),
        (CanaryConfig(2, (1,), "{name is ####"), "expected '}'"),
        (CanaryConfig(2, (1,), "{name} is"), "it holds no #"),
        (CanaryConfig(2, (1,), "#### is of {name}"), "its digits must follow {name}"),
        (CanaryConfig(5000, (1,)), "5,000 canaries for 1 numbers of copies, and there are 3,600"),
        (CanaryConfig(400, (0, 5)), "at most 10% may be planted"),
    ],
)
def test_bad_settings_are_one_error(corpus, tmp_path, config, message):
    with pytest.raises(ValueError) as error:
        prepare(corpus, tmp_path / "out", canaries=config, **SETTINGS)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_pairs_take_no_canaries(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "label": "b"}\n' * 200)
    with pytest.raises(ValueError, match="canaries=2 are plain text"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", answer="{label}", canaries=CanaryConfig(2))


def test_a_damaged_file_is_named(tmp_path):
    assert canaries.read_canaries(tmp_path) is None
    for content in ("{", '{"canaries": [{"prefix": "a"}]}', '{"canaries": 3}'):
        (tmp_path / "canaries.json").write_text(content)
        with pytest.raises(ValueError, match=r"canaries.json is damaged"):
            canaries.read_canaries(tmp_path)


def test_more_items_go_before_their_places():
    found = canaries.interleaved("abc", [1, 2, 3, 4], [0, 2, 2, 3])
    assert [*found] == [1, "a", "b", 2, 3, "c", 4]
    assert [*canaries.interleaved("", [1, 2], [0, 0])] == [1, 2]


def test_the_order_of_copies_and_their_places_are_drawn_apart(monkeypatch):
    seeds = []
    plain = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or plain(seed))
    canaries.shuffled_copies([], 5)
    canaries.places(3, 10, 5)
    # numpy fills up short seeds with zeros.
    assert len({tuple(seed + [0] * (4 - len(seed))) for seed in seeds}) == 2

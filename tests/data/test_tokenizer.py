import json
import random

import numpy as np
import pytest
import sentencepiece

from mtnlg_jax.data.tokenizer import (
    ByteLevelBPETokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from mtnlg_jax.data.tokenizer.base import replace_surrogates, starts_word
from mtnlg_jax.data.tokenizer.byte_level import byte_alphabet
from mtnlg_jax.data.tokenizer.sentence_piece import UNIT_CHARACTERS, split_line
from mtnlg_jax.data.tokenizer.training import sample

TEXTS = [
    "",
    " ",
    "a",
    " a ",
    "  two   spaces  ",
    "\n",
    "\n\n line \n",
    "\ttab\t\t",
    "cr\r\nlf",
    "nul\0",
    "\0\0",
    "\u2581",
    "a\u2581b \u2581\u2581\n\u2581",
    "\u2585 \u2047 \ufffd \ufeff",
    "\u00e9 e\u0301",
    "\u2028\x85\x0b\x0c",
    "\U0001f600\U0001f468\u200d\U0001f469",
    "\U0010ffff",
    "天下大势，分久必合。龘",
    "mixed 天下 text\u3000ok",
    "<eos> <pad><bos><mask> <sep><unk>",
    "<0x41><0x00>",
    "<|endoftext|>",
    "".join(map(chr, range(0x180))),
    "x" * 5000,
    " " * 3000,
    "the end " * 700,
    "天下" * 3000,
]


def _random_texts(count):
    rng = random.Random(0)
    alphabet = [*"etaoin \n\t'.,\u2581\0天\U0001f600\u0301\ufffd", "  ", "the ", "<eos>"]
    for _ in range(count):
        yield "".join(
            rng.choice(alphabet) if rng.random() < 0.8 else chr(rng.randrange(0xD800))
            for _ in range(rng.randrange(80))
        )


def test_every_text_survives_a_round_trip(tokenizer):
    texts = [*TEXTS, *_random_texts(300)]
    encoded = tokenizer.encode_batch(texts, threads=2)
    for text, ids in zip(texts, encoded, strict=True):
        assert tokenizer.decode(ids) == text
        assert not tokenizer.is_special[ids].any(), text
        # as in generation: byte by byte
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.encode(text) == ids


def test_special_tokens(tokenizer):
    ids = [
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.mask_id,
        tokenizer.sep_id,
    ]
    assert len(set(ids)) == (4 if tokenizer.kind == "byte-level BPE" else 5)
    assert tokenizer.is_special[ids].all() and not tokenizer.starts_word[ids].any()
    assert tokenizer.is_special.shape == tokenizer.starts_word.shape == (tokenizer.vocab_size,)
    text = tokenizer.encode("the end")
    assert tokenizer.decode([ids[1], *text, *ids]) == "the end"
    assert tokenizer.decode([*text, tokenizer.mask_id], skip_special=False) == "the end<mask>"
    assert tokenizer.token_bytes(tokenizer.mask_id) == b""
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(
            ValueError, match=f"token {wrong} .* ends at {tokenizer.vocab_size - 1}"
        ):
            tokenizer.decode([wrong])


def test_a_lone_surrogate_is_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_half_a_character_becomes_u_fffd(tokenizer):
    ids = tokenizer.encode("\U0001f600")
    assert (
        len(ids) == 4
        and tokenizer.decode(ids[:3]) == "\ufffd"
        and tokenizer.decode(ids) == "\U0001f600"
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_layout_of_trained_models(trained, kind):
    ours = trained[kind]
    assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.mask_id, ours.sep_id) == (0, 2, 3, 4, 5)
    assert (
        ours.vocab_size == 800 and ours.is_special.sum() == 6
    )  # five roles and <unk>, which no text yields
    assert ours.token_bytes(ours.encode("\n")[0]) == b"\n" and len(ours.encode("\n\t\n")) == 3


def test_pieces_that_start_words(trained):
    ours = trained["bpe"]
    text = "the value, of\nthe 天下大势 \U0001f600"
    words = []
    ids = ours.encode(text)
    for index in ids:
        if ours.starts_word[index] or not words:
            words.append(b"")
        words[-1] += ours.token_bytes(index)
    pieces = [word.decode() for word in words]
    assert pieces[:4] == ["the", " value", ",", " of"] and pieces[4] == "\nthe"
    # Each piece of Chinese is a word, and an unknown character stays with what is before it.
    assert (
        "".join(pieces[5:]) == " 天下大势 \U0001f600"
        and len(pieces) >= 8
        and pieces[-1] == " \U0001f600"
    )
    assert all(not ours.starts_word[index] for index in ours.encode("\U0001f600"))


def test_pieces_of_gpt2_that_start_words(gpt2_files):
    gpt2 = load_tokenizer(gpt2_files)
    ids = gpt2.encode("the, the7天")
    assert [(gpt2.token_bytes(index), bool(gpt2.starts_word[index])) for index in ids] == [
        (b"the", False),
        (b",", True),
        (b" the", True),
        (b"7", False),
        (b"\xe5", True),
        (b"\xa4", False),
        (b"\xa9", False),
    ]
    # A piece may begin inside one character and end with the next.
    assert not starts_word("天天".encode()[2:]) and starts_word("天天".encode()[:4])
    assert gpt2.vocab_size == 263 and gpt2.bos_id == gpt2.eos_id == 259 and gpt2.pad_id == 260
    assert gpt2.decode([gpt2.eos_id], skip_special=False) == "<|endoftext|>"


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "there")
    loaded = load_tokenizer(tmp_path / "there")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("the end 天") == tokenizer.encode("the end 天")
    assert np.array_equal(loaded.starts_word, tokenizer.starts_word)
    tokenizer.save("memory://tokenizers/" + tokenizer.fingerprint)
    assert (
        load_tokenizer("memory://tokenizers/" + tokenizer.fingerprint).fingerprint
        == tokenizer.fingerprint
    )


def test_gpt2_files_under_either_name(gpt2_files, tmp_path):
    (tmp_path / "vocab.json").write_bytes((gpt2_files / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2_files / "vocab.bpe").read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(gpt2_files).fingerprint


def test_errors_name_damaged_or_missing_files(trained, gpt2_files, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match="text.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")
    trained["bpe"].save(tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.model").write_bytes(
        trained["unigram"].files()["tokenizer.model"]
    )
    with pytest.raises(ValueError, match="fingerprint"):
        load_tokenizer(tmp_path / "ours")
    with pytest.raises(ValueError, match="not the vocabulary and merges"):
        ByteLevelBPETokenizer(b"{}", b"a b\n")
    with pytest.raises(ValueError, match="all 256 bytes"):
        ByteLevelBPETokenizer(b'{"a": 0, "b": 1}', b"")
    assert trained["bpe"].fingerprint != trained["unigram"].fingerprint


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_vocab_size_must_fit_the_text(kind):
    text = ["hello world this is a small text, small as it is\n"]
    with pytest.raises(ValueError, match="vocab_size=5000 .* largest possible is") as error:
        train_tokenizer(text, 5000, kind)
    largest = int(str(error.value).split("possible is ")[1].split(":")[0])
    assert train_tokenizer(text, largest, kind).vocab_size == largest
    with pytest.raises(ValueError, match="vocab_size=200 .* smallest possible is 279"):
        train_tokenizer(text, 200, kind)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", "\n\n"], 300, kind)
    with pytest.raises(ValueError, match="model_type='word'"):
        train_tokenizer(text, 300, "word")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_repeatable(texts, trained, kind):
    assert train_tokenizer(iter(texts), 800, kind).fingerprint == trained[kind].fingerprint


def test_training_samples_a_large_corpus(texts):
    lines = [f"{number} {line}" for number, line in enumerate("\n".join(texts).split("\n"))]
    assert sample(lines, 10**9, seed=0) == lines
    some = sample(lines, 20_000, seed=0)
    assert 15_000 < sum(len(line.encode()) for line in some) <= 20_000
    assert some == [line for line in lines if line in some]  # in order, from the whole corpus
    third = len(lines) // 3
    assert set(some) & set(lines[:third]) and set(some) & set(lines[-third:])
    once, again, other = (train_tokenizer(texts, 500, "bpe", seed, 30_000) for seed in (7, 7, 8))
    assert once.fingerprint == again.fingerprint != other.fingerprint


def test_a_giant_line_survives_a_round_trip(texts):
    line = " ".join(texts[:10]).replace("\n", " ") * 40
    assert len(line) > 1_000_000
    giant = train_tokenizer([line], 400)
    assert giant.decode(giant.encode(line)) == line
    blank = "x" * 1_000_000
    assert giant.decode(giant.encode(blank)) == blank


def test_splitting_a_text_keeps_its_ids(texts, trained):
    """Long texts go to SentencePiece in parts; cuts at spaces do not change the ids."""
    text = (" ".join(texts[:3]).replace("\n", "  ") + "\nnew line \u3002 " + texts[3])[:30_000]
    assert text.index("\n") > 5 * UNIT_CHARACTERS
    for line in (text, "x  " * 3000, "x" * 3000, " " * 3000 + "x", "x" * 1023 + "   " + "x" * 2000):
        parts = list(split_line(line))
        assert "".join(parts) == line and all(0 < len(part) <= UNIT_CHARACTERS for part in parts)
        if line.strip(" ").count(" "):
            assert not any(part.endswith(" ") for part in parts[:-1])
    for ours in trained.values():
        whole = sentencepiece.SentencePieceProcessor(model_proto=ours.files()["tokenizer.model"])
        assert ours.encode(text) == whole.encode(text)


@pytest.fixture(scope="module")
def foreign(texts, tmp_path_factory):
    """Return a model as trained elsewhere: a space before each text, normalized, no bytes, <mask>
    found in texts, no <sep>."""
    prefix = tmp_path_factory.mktemp("foreign") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_prefix=str(prefix),
        vocab_size=500,
        user_defined_symbols=["<mask>"],
        control_symbols=["<pad>"],
        minloglevel=2,
    )
    return load_tokenizer(f"{prefix}.model")


def test_a_model_from_elsewhere(foreign):
    assert isinstance(foreign, SentencePieceTokenizer)
    sp = sentencepiece.SentencePieceProcessor(model_proto=foreign.files()["tokenizer.model"])
    assert (foreign.bos_id, foreign.eos_id) == (sp.bos_id(), sp.eos_id())
    assert (foreign.mask_id, foreign.pad_id) == (sp.piece_to_id("<mask>"), sp.piece_to_id("<pad>"))
    assert foreign.sep_id == 500 and foreign.vocab_size == 501
    assert foreign.encode("the end of it") == sp.encode("the end of it")
    assert foreign.decode(foreign.encode("the end of it")) == "the end of it"
    assert foreign.mask_id in sp.encode("a <mask> b") and foreign.mask_id not in foreign.encode(
        "a <mask> b"
    )
    assert "\ufffd" in foreign.decode(foreign.encode("龘"))


def test_published_vocabularies(shared):
    gpt2 = load_tokenizer(shared / "data/tokenizers/gpt2")
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.vocab_size == 50260
    assert (gpt2.eos_id, gpt2.bos_id) == (50256, 50256)
    assert (gpt2.pad_id, gpt2.mask_id, gpt2.sep_id) == (50257, 50258, 50259)
    xlnet = load_tokenizer(shared / "data/tokenizers/xlnet_zh/spiece.model")
    assert (xlnet.pad_id, xlnet.bos_id, xlnet.eos_id, xlnet.mask_id, xlnet.sep_id) == (
        5,
        1,
        2,
        6,
        4,
    )
    assert xlnet.vocab_size == 32000 and xlnet.decode(xlnet.encode("天下大势")) == "天下大势"


def _both(gpt2, texts):
    """Return the ids of tiktoken and of `tokenizers`."""
    assert gpt2._tiktoken is not None
    gpt2._characters = 1 << 40
    slow = [
        encoding.ids
        for encoding in gpt2._tokenizer.encode_batch_fast(
            [replace_surrogates(text) for text in texts]
        )
    ]
    return gpt2.encode_batch(texts), slow


@pytest.mark.parametrize("files", ["small", "published"])
def test_tiktoken_gives_the_same_ids(files, gpt2_files, request):
    folder = (
        gpt2_files
        if files == "small"
        else request.getfixturevalue("shared") / "data/tokenizers/gpt2"
    )
    gpt2 = load_tokenizer(folder)
    rng = random.Random(1)
    code = (
        "def f(x):\n\tif x != 'y''s':\r\n"
        "        return {\"a\": [1_000, 0x7f]}  # I'll, WE'LL, he'd've\n\n\n"
    )
    runs = [
        mark * count
        for mark in ("x", " ", "\n", "0", "!", "天", "the ", " \n", "'s", "\u0301")
        for count in (1, 2, 499, 500, 501, 20_000)
    ]
    texts = [
        *TEXTS,
        code,
        "\ud800",
        *runs,
        *(" " + run + "x" for run in runs),
        *_random_texts(300),
        *(
            "".join(
                chr(rng.choice((rng.randrange(0x110000), rng.randrange(0x3000))))
                for _ in range(200)
            )
            for _ in range(200)
        ),
    ]
    fast, slow = _both(gpt2, texts)
    assert fast == slow == gpt2.encode_batch(texts, threads=2)


def test_tiktoken_gives_the_same_ids_of_real_text(shared):
    gpt2 = load_tokenizer(shared / "data/tokenizers/gpt2")
    files = [*sorted((shared / "data/pretrain").rglob("*.txt")), shared / "data/README.md"]
    fast, slow = _both(gpt2, [path.read_text(encoding="utf-8")[:40_000] for path in files])
    assert fast == slow and len(files) > 10


@pytest.mark.slow
def test_tiktoken_splits_the_same_at_every_character(gpt2_files):
    characters = [chr(index) for index in range(0x110000) if not 0xD800 <= index < 0xE000]
    fast, slow = _both(
        load_tokenizer(gpt2_files), [f"a{c}b 1{c} {c}\n{c}{c}  {c}" for c in characters]
    )
    assert fast == slow


@pytest.mark.parametrize(
    "pieces, merges",
    [
        # "the" is t and he: not a pair of the list, yet it spells a token.
        (["he", "th", "the"], ["h e", "t h", "th e"]),
        (["the", "th"], ["t h", "th e"]),  # ids in another order
        (["th", "the"], ["t h", "th e", "t h"]),  # a pair twice
    ],
)
def test_tiktoken_is_not_used_if_ids_could_differ(pieces, merges):
    alphabet = [*byte_alphabet()]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *pieces])}
    gpt2 = ByteLevelBPETokenizer(json.dumps(vocabulary).encode(), "\n".join(merges).encode())
    texts = ["the" * 100_000]
    assert (
        gpt2.encode_batch(texts) == [gpt2._tokenizer.encode(texts[0]).ids]
        and gpt2._tiktoken is None
    )
    assert len(gpt2.encode("the")) == (2 if pieces[0] == "he" else 1)

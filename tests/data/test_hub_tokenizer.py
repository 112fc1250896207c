"""Tokenizers of Hugging Face folders: ids equal those of transformers, roles never take ids in use,
documents cannot end themselves, and losses are reported."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hub_folders import FOLDERS, HUB_TEXTS, TEXT, byte_level, older_files, write
from tokenizers import Tokenizer, decoders

from mtnlg_jax.data.prepare import describe, prepare
from mtnlg_jax.data.recipe import report
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.tokenizer import ByteLevelBPETokenizer, HubTokenizer, load_tokenizer
from mtnlg_jax.interop.vocabulary import read_tokenizer

IDS = json.loads(Path(__file__).with_name("hub_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=FOLDERS)
def hub(request, tmp_path_factory):
    """(name, folder, tokenizer) of each folder."""
    folder = FOLDERS[request.param](tmp_path_factory.mktemp("hub") / "folder")
    return request.param, folder, load_tokenizer(folder)


def parsing(tokenizer):
    """Return the tokenizer as a prompt uses it: special tokens in a text are parsed."""
    other = copy.copy(tokenizer)
    other.parse_special = True
    return other


def test_ids_equal_those_of_transformers(hub):
    name, _, tokenizer = hub
    assert isinstance(tokenizer, HubTokenizer)
    special = tokenizer._parsed
    for text, (ids, plain, back) in zip(HUB_TEXTS, IDS[name], strict=True):
        # Some models read their own special tokens even in plain text; here these are cut.
        if not special & set(plain):
            assert tokenizer.encode(text) == plain, text
        # "<mask>" is a role added here if the folder has no such token.
        if "<mask>" not in text or tokenizer.mask_id in special:
            assert parsing(tokenizer).encode(text) == ids, text
        # transformers omits unknown text; here it shows as U+FFFD or the folder's "?".
        shown = tokenizer.decode(ids).replace("\ufffd", "")
        assert shown == back or "\ufffd" in tokenizer.decode(ids) or "?" in shown, text


def test_a_text_never_becomes_a_special_token(hub):
    _, _, tokenizer = hub
    names = [name for name in tokenizer.special_names.values() if not name.startswith("<unused")]
    text = " ".join(["a", *names, "b", *names]) + "".join(names)
    unknown = {
        index
        for index in range(tokenizer.vocab_size)
        if tokenizer.token_bytes(index) == b"\xef\xbf\xbd"
    }
    found = set(tokenizer.encode(text))
    assert not {index for index in found if tokenizer.is_special[index]} - unknown
    roles = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    assert roles <= set(parsing(tokenizer).encode(text))


def test_roles_never_take_ids_in_use(hub):
    _, folder, tokenizer = hub
    numbers = tokenizer._fast.get_vocab(with_added_tokens=True)
    taken = {index: piece for piece, index in numbers.items()}
    for role in ("bos", "eos", "pad", "mask", "sep"):
        index = getattr(tokenizer, f"{role}_id")
        assert index not in taken or tokenizer.is_special[index], (role, taken.get(index))
        assert index < tokenizer.vocab_size
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text())
    for role in ("bos", "eos", "pad", "mask"):
        if isinstance(named.get(f"{role}_token"), str):
            assert getattr(tokenizer, f"{role}_id") == numbers.get(
                named[f"{role}_token"], getattr(tokenizer, f"{role}_id")
            )


def test_a_saved_tokenizer_loads_the_same(hub, tmp_path):
    _, _, tokenizer = hub
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size and loaded.eos_id == tokenizer.eos_id
    assert loaded.encode_batch(HUB_TEXTS, threads=2) == tokenizer.encode_batch(HUB_TEXTS)
    assert np.array_equal(loaded.starts_word, tokenizer.starts_word)
    whole = json.loads((tmp_path / "special_ids.json").read_text())
    (tmp_path / "special_ids.json").write_text(json.dumps(whole | {"eos": 5}))
    with pytest.raises(ValueError, match="fingerprint"):
        load_tokenizer(tmp_path)


FILES_BESIDE = {
    "tokenizer_config.json": '{"chat_template":  "{{ bos_token }}", "eos_token": "<|im_end|>"}',
    "chat_template.jinja": "{{ messages }}\n",
}


def test_files_beside_a_tokenizer_are_kept_byte_for_byte(tmp_path):
    """The template and all ends come along, and a changed file is noticed."""
    folder = FOLDERS["qwen"](tmp_path / "folder")
    plain = load_tokenizer(folder)
    assert plain.eos_ids == (plain.eos_id,)
    added = {name: index for index, name in plain.special_names.items()}
    first = added["<|im_end|>"]
    second = added["<|endoftext|>"]
    files = FILES_BESIDE | {
        "generation_config.json": json.dumps({"eos_token_id": [second, 3, 900]})
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (first, second), "text yields 3, and there is no 900"
    assert load_tokenizer(folder / "tokenizer.json").eos_ids == (first, second)
    for where in (tmp_path / "saved", tmp_path / "again"):
        tokenizer.save(where)
        for name, text in files.items():
            assert (where / name).read_text(encoding="utf-8") == text
        given = (folder / "tokenizer.json").read_bytes()
        assert (where / "tokenizer.json").read_bytes() == given
        tokenizer = load_tokenizer(where)
        assert tokenizer.eos_ids == (first, second)
    (where / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(ValueError, match="chat_template.jinja is missing or was changed"):
        load_tokenizer(where)


def test_pieces_are_the_bytes_of_the_text(hub):
    """The bytes of the tokens, one after another, are the bytes of the decoded text."""
    _, _, tokenizer = hub
    for text in HUB_TEXTS:
        ids = tokenizer.encode(text)
        stream = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
        assert tokenizer.decode(ids) in (stream, stream.removeprefix(" "))
    ids = tokenizer.encode("the man")
    if not tokenizer.is_special[ids].any():
        assert "the man" in tokenizer.decode(ids)


LOSSES = {
    "qwen": ["combining marks"],
    "words and masks": ["spaces around <new>"],
    "byte fallback": [],
    "prefix space": ["a start without a space"],
    "characters, bpe": ["carriage returns", "tabs", "unknown characters such as 龘"],
    "vocab.txt": [
        "line ends",
        "runs of spaces",
        "case",
        "accents",
        "characters without spaces between them",
        "unknown characters such as 龘",
    ],
    "unigram": ["runs of spaces", "full-width forms", "compatibility forms such as ligatures"],
}


def test_losses_are_listed(hub):
    name, _, tokenizer = hub
    found = tokenizer.losses()
    assert tokenizer.lossless == (not found)
    assert set(LOSSES.get(name, found)) <= set(found)
    if not found:
        for text in (*HUB_TEXTS, "\x00\x7f \n\r\t", "ﬁ１²"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    else:
        assert "case" not in found or name == "vocab.txt"


def test_losses_of_other_kinds(trained, gpt2_files, shared_spiece):
    assert trained["bpe"].losses() == trained["unigram"].losses() == []
    assert load_tokenizer(gpt2_files).losses() == []
    found = load_tokenizer(shared_spiece).losses()
    assert {"line ends", "runs of spaces", "full-width forms"} <= set(found)


@pytest.fixture(scope="module")
def shared_spiece(tmp_path_factory):
    """A SentencePiece model as trained elsewhere: normalized, a space before each text."""
    prefix = tmp_path_factory.mktemp("spiece") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_prefix=str(prefix), vocab_size=60, minloglevel=2
    )
    return Path(f"{prefix}.model")


def test_files_next_to_a_sentencepiece_model_are_read(shared_spiece, tmp_path):
    files = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "60": {"content": "<extra_id_0>", "special": True},
                "61": {"content": "<extra_id_1>", "special": True},
            }
        }
    }
    folder = write(tmp_path / "special", files=files)
    (folder / "spiece.model").write_bytes(shared_spiece.read_bytes())
    tokenizer = load_tokenizer(folder)
    assert load_tokenizer(shared_spiece).pad_id == 60 and tokenizer.pad_id == 62
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").pad_id == 62
    for name, settings, message in (
        (
            "words",
            {"added_tokens_decoder": {"60": {"content": "YORICK", "special": False}}},
            "'YORICK' were added .* save_pretrained",
        ),
        ("offset", {"tokenizer_class": "XLMRobertaTokenizer"}, "ids of a XLMRobertaTokenizer"),
    ):
        folder = write(tmp_path / name, files={"tokenizer_config.json": settings})
        (folder / "spiece.model").write_bytes(shared_spiece.read_bytes())
        with pytest.raises(ValueError, match=message):
            load_tokenizer(folder)


def test_word_pieces_that_start_words(tmp_path):
    tokenizer = load_tokenizer(FOLDERS["vocab.txt"](tmp_path / "folder"))
    ids = tokenizer.encode("the man, town 天地")
    words = [(tokenizer.token_bytes(index), bool(tokenizer.starts_word[index])) for index in ids]
    assert words == [
        (b" the", True),
        (b" man", True),
        (b",", True),
        (b" t", True),
        (b"o", False),
        (b"wn", False),
        (" 天".encode(), True),
        (" 地".encode(), True),
    ]


def test_every_form_of_gpt2_gives_the_same_tokenizer(gpt2_files, tmp_path):
    """Its hub folder gives the same tokenizer as its two files: ids, fingerprint and tiktoken."""
    plain = load_tokenizer(gpt2_files)
    files = {
        "vocab.json": (gpt2_files / "encoder.json").read_text(encoding="utf-8"),
        "merges.txt": (gpt2_files / "vocab.bpe").read_text(encoding="utf-8"),
    }
    older = write(
        tmp_path / "older",
        files=files
        | {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}},
    )
    made = tmp_path / "older"
    fast = load_tokenizer(older)
    assert isinstance(fast, ByteLevelBPETokenizer) and fast.fingerprint == plain.fingerprint
    from mtnlg_jax.interop.vocabulary import write_tokenizer

    (made / "tokenizer.json").write_bytes(write_tokenizer(plain, 8)[0]["tokenizer.json"])
    with_masks = load_tokenizer(made)  # <pad>, <mask> and <sep> were added
    assert isinstance(with_masks, HubTokenizer) and with_masks.mask_id == plain.mask_id
    assert with_masks.encode("the end 天") == plain.encode("the end 天")
    whole = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    whole["added_tokens"] = [
        token for token in whole["added_tokens"] if token["content"] == "<|endoftext|>"
    ]
    (made / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    assert load_tokenizer(made).fingerprint == plain.fingerprint
    assert load_tokenizer(made / "tokenizer.json").fingerprint == plain.fingerprint
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"model": whole["model"] | {"ignore_merges": True}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
    ):
        (made / "tokenizer.json").write_text(json.dumps(whole | change), encoding="utf-8")
        assert isinstance(load_tokenizer(made), HubTokenizer)


@pytest.mark.parametrize("name", ["limited", "words and masks", "qwen"])
def test_gpt2_with_more_special_tokens_still_uses_tiktoken(tmp_path, name):
    """Only the first of these differs from GPT-2's tokenizer in special tokens alone."""
    tokenizer = load_tokenizer(FOLDERS[name](tmp_path / "folder"))
    slow = tokenizer.encode_batch(HUB_TEXTS)
    tokenizer._characters = 1 << 40
    assert tokenizer.encode_batch(HUB_TEXTS, threads=2) == slow
    assert (tokenizer._gpt2 is not None) == (name == "limited")


def test_a_single_file(tmp_path):
    folder = FOLDERS["words and masks"](tmp_path / "folder")
    whole = load_tokenizer(folder)
    assert load_tokenizer(folder / "tokenizer.json").fingerprint == whole.fingerprint
    other = tmp_path / "other.json"
    other.write_bytes((folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(other).encode("YORICK is") == whole.encode("YORICK is")
    other.write_text("{}")
    with pytest.raises(ValueError, match="other.json: not a tokenizer.json, .* give the folder"):
        load_tokenizer(other)


def _without_decoder(fast, decoder):
    fast.decoder = decoder
    return fast


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write(f, _without_decoder(byte_level(), decoders.CTC())), "decoder CTC makes"),
        (
            lambda f: write(f, _without_decoder(byte_level(), decoders.BPEDecoder())),
            "decoder BPEDecoder",
        ),
        (
            lambda f: write(f, files=older_files(byte_level()), tokenizer_class="CLIPTokenizer"),
            "vocab.json and merges.txt of a CLIPTokenizer cannot .* save_pretrained",
        ),
        (
            lambda f: write(
                f, files={"vocab.txt": "a\nb\n"}, tokenizer_class="BertJapaneseTokenizer"
            ),
            "vocab.txt of a BertJapaneseTokenizer",
        ),
        (lambda f: write(f, files={"vocab.txt": "a\nb\n"}), r"vocab.txt has no \[UNK\]"),
        (lambda f: write(f, files={"tokenizer.json": "{}"}), "tokenizer.json is not a tokenizer"),
        (lambda f: write(f, files={"tokenizer.json": "{"}), "tokenizer.json is not a tokenizer"),
        (
            lambda f: write(f, byte_level(), files={"added_tokens.json": {"<new>": 900}}),
            "added token '<new>' has id 900, and transformers reads it as 3",
        ),
        (
            lambda f: write(f, byte_level(), files={"special_tokens_map.json": "[1]"}),
            "special_tokens_map.json holds a list",
        ),
        (
            lambda f: write(f, files={"vocab.json": "[]", "merges.txt": "#version: 0.2\n"}),
            "vocab.json is not an object",
        ),
    ],
)
def test_tokenizers_that_cannot_be_reproduced_raise_an_error(tmp_path, make, message):
    folder = make(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match=message):
        prepare(None, tmp_path / "out", tokenizer=str(folder), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_documents_of_a_hub_tokenizer(tmp_path):
    """prepare() writes its ids, ends documents itself, and reports what is lost."""
    folder = FOLDERS["vocab.txt"](tmp_path / "folder")
    lines = ["the man [SEP] born", "天地玄黄"]
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8"
    )
    info = prepare(
        tmp_path / "text.jsonl",
        tmp_path / "out",
        tokenizer=str(folder),
        heldout=0.0,
        progress=False,
    )
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer")
    tokens = open_tokens(tmp_path / "out/train")
    offsets = tokens.document_offsets
    assert tokenizer.fingerprint == load_tokenizer(folder).fingerprint
    found = sorted(
        tokens.read(start, stop).tolist() for start, stop in zip(offsets, offsets[1:], strict=False)
    )
    assert found == sorted([2, *tokenizer.encode(line), 3] for line in lines)
    assert "it is not lossless; a text loses line ends" in describe(info)


def test_a_recipe_reports_what_its_tokenizer_loses():
    stage = {"name": "read", "documents": [1, 1], "bytes": [0, 9], "dropped": {}}
    about = {"kind": "sentencepiece", "vocab_size": 9, "losses": ["line ends", "case"]}
    info = {"stages": [stage], "tokens": {"train": 7, "heldout": 0}, "tokenizer": about}
    told = "it is not lossless; a text loses line ends, case"
    assert told in describe(info)
    assert told in report._summary(info).replace("It is", "it is")
    assert "lossless" not in describe(info | {"tokenizer": about | {"losses": []}})


# By name in shared/data/weights: tokens, (bos, eos, pad) and losses of the tokenizer.json.
PUBLISHED = {
    "stories260K_llama": (512, (1, 2, 2), []),
    "rxnfp_bert_mlm": (591, (12, 13, 0), ["spaces"]),
    "bert_tiny_splade": (30_522, (101, 102, 0), ["case", "accents"]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokenizers_of_published_weights(shared, tmp_path, name):
    """The ids are those of the `tokenizers` package, and the files come back byte for byte."""
    folder = shared / "data/weights" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    size, roles, losses = PUBLISHED[name]
    config = json.loads((folder / "config.json").read_text())
    tokenizer, outside = read_tokenizer(folder, config, {}, size)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == roles and outside == []
    assert isinstance(tokenizer, HubTokenizer) and tokenizer.prompt_bos
    assert set(losses) <= set(tokenizer.losses()) if losses else tokenizer.losses() == []
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.no_truncation()
    fast.no_padding()
    fast.encode_special_tokens = True
    for text in (*HUB_TEXTS, "the quick brown fox " * 400, "CC(=O)Oc1ccccc1>>[NH4+]", "👩‍👩‍👧 é"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(roles)
        # The pattern of one of them reads its own special tokens in a text; here they are cut.
        there = fast.encode(text, add_special_tokens=False).ids
        assert ids == there or set(there) & set(roles), text
        if not losses:
            assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_a_published_folder(shared, tmp_path):
    """NFC, its own pattern and added tokens: 26 ids, not GPT-2's 33."""
    folder = shared / "faults/data"
    tokenizer = load_tokenizer(folder / "hf_tokenizer")
    text = json.loads((folder / "hf_tokenizer_text/a.jsonl").read_text(encoding="utf-8"))["text"]
    assert len(tokenizer.encode(text)) == 26
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (600, 600, 603)

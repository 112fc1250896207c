"""Tokenizers inside GGUF files, written with the package gguf as llama.cpp's converter does."""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.data.tokenizer.chat import Chat
from mtnlg_jax.data.tokenizer.gguf_header import read_header
from mtnlg_jax.data.tokenizer.gguf_tokenizer import gguf_tokenizer_files, tokenizer_files
from mtnlg_jax.interop import registry
from mtnlg_jax.interop.huggingface import convert
from mtnlg_jax.interop.source import Source
from mtnlg_jax.interop.vocabulary import read_tokenizer
from mtnlg_jax.train.checkpoint import load_run

gguf = pytest.importorskip("gguf", reason="needs the extra gguf: pip install '.[gguf]'")
HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "data")]
from hub_folders import FOLDERS, HUB_TEXTS, byte_fallback, byte_level, word_pieces  # noqa: E402
from test_gguf import Model  # noqa: E402

registry.register()
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
TEXTS = [text for text in HUB_TEXTS if "▁" not in text]


def write_vocabulary(path: Path, kind: str, tokens, types, architecture="llama", **more) -> Path:
    """Write a GGUF file with a tokenizer and without tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    add_vocabulary(writer, kind, tokens, types, **more)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def add_vocabulary(writer, kind, tokens, types, pre=None, scores=None, merges=None, **more) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    for key, value in more.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.{key}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)


def of_llama() -> tuple[dict, dict]:
    """Return byte_fallback of hub_folders as llama.cpp stores it, and its tokenizer.json."""
    whole = json.loads(byte_fallback().to_str())
    ids = whole["model"]["vocab"]
    tokens = sorted(ids, key=ids.get)
    merged = ["".join(merge) for merge in whole["model"]["merges"]]
    scores = [-float(merged.index(token)) if token in merged else -99.0 for token in tokens]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    given = {"tokens": tokens, "types": types, "scores": scores, "bos_token_id": 1}
    return given | {"eos_token_id": 2, "unknown_token_id": 0}, whole


def of_bytes(fast: tokenizers.Tokenizer) -> dict:
    """Return a byte-level BPE as llama.cpp stores it, with rows that fill the vocabulary."""
    whole = json.loads(fast.to_str())
    ids = whole["model"]["vocab"] | {each["content"]: each["id"] for each in whole["added_tokens"]}
    special = {each["content"]: each["special"] for each in whole["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    types = [(CONTROL if special[t] else USER) if t in special else NORMAL for t in tokens]
    merges = [" ".join(merge) for merge in whole["model"]["merges"]]
    filled = [f"[PAD{index}]" for index in range(len(tokens), len(tokens) + 3)]
    types += [UNUSED] * len(filled)
    return {"tokens": tokens + filled, "types": types, "merges": merges}


def ids_of(fast: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    fast.encode_special_tokens = True
    return [found.ids for found in fast.encode_batch(texts, add_special_tokens=False)]


def test_pieces_of_sentencepiece_are_encoded_as_by_their_tokenizer_json(tmp_path):
    given, whole = of_llama()
    path = write_vocabulary(tmp_path / "model.gguf", "llama", **given, eot_token_id=5)
    ours = load_tokenizer(path)
    real = tokenizers.Tokenizer.from_str(json.dumps(whole))
    assert ours.encode_batch(TEXTS) == ids_of(real, TEXTS)
    merges = json.loads(gguf_tokenizer_files(path)("tokenizer.json"))["model"]["merges"]
    assert merges == whole["model"]["merges"]
    closed, _ = read_tokenizer(path, {"eos_token_id": [2, 5]}, {}, len(given["tokens"]))
    assert closed.prompt_bos and (closed.bos_id, closed.eos_id) == (1, 2)
    assert closed.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    # Without the space before a text.
    write_vocabulary(path, "llama", **given, add_space_prefix=False)
    bare = load_tokenizer(path)
    assert bare.encode(" the man") == ours.encode("the man") != bare.encode("the man")


def test_runs_of_spaces_and_words_of_the_user_are_tokens(tmp_path):
    given, _ = of_llama()
    size = len(given["tokens"])
    given |= {"tokens": [*given["tokens"], "   ", "<tool>"], "types": [*given["types"], USER, USER]}
    given |= {"scores": [*given["scores"], -1000.0, -1000.0]}
    more = {"add_space_prefix": False, "architecture": "gemma2"}
    path = write_vocabulary(tmp_path / "model.gguf", "llama", **given, **more)
    ours = load_tokenizer(path)
    assert ours.encode("a<tool>b") == [*ours.encode("a"), size + 1, *ours.encode("b")]
    assert ours.encode("a   b") == [*ours.encode("a"), size, *ours.encode("b")]
    assert ours.decode(ours.encode("a   <tool>b")) == "a   <tool>b"


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "smollm", "tekken", "gpt-4o"])
def test_byte_level_bpe_splits_as_its_name_says(tmp_path, pre):
    fast = byte_level()
    given = of_bytes(fast)
    path = write_vocabulary(tmp_path / "m.gguf", "gpt2", pre=pre, **given, eos_token_id=0)
    ours = load_tokenizer(path)
    if pre == "gpt-2":
        assert ours.encode_batch(TEXTS) == ids_of(fast, TEXTS)
        assert ours.kind == "byte-level BPE"  # by tiktoken
    if pre == "qwen2":
        qwen = load_tokenizer(FOLDERS["qwen"](tmp_path / "qwen"))
        write_vocabulary(path, "gpt2", pre=pre, **of_bytes(qwen._fast), eos_token_id=330)
        ours = load_tokenizer(path)
        assert ours.encode_batch(TEXTS) == qwen.encode_batch(TEXTS)
        assert ours.encode("e\u0301") == ours.encode("\u00e9")
    expected = {"qwen2": [5, 2], "llama-bpe": [2, 2], "smollm": [5, 3], "tekken": [5, 3]}
    if pre != "gpt-2":
        split = ours._fast.pre_tokenizer.pre_tokenize_str
        words = [len(split(text)) for text in ("12345", "aB'LL")]
        assert words == expected.get(pre, [2, 2])
        assert not any("PAD" in piece for piece in ours._fast.get_vocab())
    assert ours.decode(ours.encode("the man 12345\n天地")) == "the man 12345\n天地"


def test_word_pieces_get_their_marks_back(tmp_path):
    def stored(word: str) -> str:
        if word.startswith("["):
            return word
        return word.removeprefix("##") if word.startswith("##") else "\u2581" + word

    words = word_pieces()
    types = [CONTROL if word.startswith("[") else NORMAL for word in words]
    roles = {"cls_token_id": 2, "seperator_token_id": 3, "unknown_token_id": 1}
    roles |= {"padding_token_id": 0, "mask_token_id": 4}
    path = write_vocabulary(
        tmp_path / "m.gguf", "bert", [stored(w) for w in words], types, "bert", **roles
    )
    ours = load_tokenizer(path)
    real = load_tokenizer(FOLDERS["vocab.txt"](tmp_path / "bert"))
    assert ours.encode_batch(TEXTS) == real.encode_batch(TEXTS)
    for role in ("bos", "eos", "pad", "mask", "sep"):
        assert getattr(ours, f"{role}_id") == getattr(real, f"{role}_id"), role


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def test_a_file_needs_nothing_beside_it(tmp_path):
    """It is decoded and converted with its own tokenizer, chat template and ends."""
    given, _ = of_llama()
    made = Model("qwen3")
    made.config |= {"vocab_size": len(given["tokens"])}
    made = resized(made, len(given["tokens"]))
    path = tmp_path / "model.gguf"
    write_with_vocabulary(made, path, given | {"eot_token_id": 5, "chat_template": TEMPLATE})
    run = load_run(path)
    assert run.tokenizer.decode(run.tokenizer.encode("the man 天")) == "the man 天"
    assert run.tokenizer.eos_ids == (2, 5) and run.tokenizer.prompt_bos
    assert Chat(run.tokenizer).text([{"role": "user", "content": "a"}]) == "<s>user a</s>"
    assert "tokens" in convert(path, tmp_path / "run")
    other = load_run(tmp_path / "run")
    assert other.tokenizer.fingerprint == run.tokenizer.fingerprint
    convert(tmp_path / "run", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["eos_token_id"] == [2, 5]
    settings = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    assert Source(tmp_path / "back").settings().tokenizer.encode("the") == run.tokenizer.encode(
        "the"
    )
    # A tokenizer beside the file is used instead.
    letters = byte_level(vocab_size=300)
    letters.save(os.fspath(tmp_path / "tokenizer.json"))
    assert load_run(path).tokenizer.encode("the") == ids_of(letters, ["the"])[0]


def resized(made: Model, rows: int) -> Model:
    table = np.zeros((rows, made.config["hidden_size"]), np.float32)
    table[:64] = made.tensors["model.embed_tokens.weight"]
    made.tensors["model.embed_tokens.weight"] = table
    return made


def write_with_vocabulary(made: Model, path: Path, given: dict) -> None:
    """Write ``made`` with a tokenizer, by adding to the writer that `Model.write` uses."""
    before = gguf.GGUFWriter.write_header_to_file

    def header(writer, *arguments):
        for key in list(writer.kv_data[0]):
            if key.endswith(("bos_token_id", "eos_token_id")):
                del writer.kv_data[0][key]
        add_vocabulary(writer, "llama", **given)
        before(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", header)
        made.write(path)


# --- what is refused


def test_an_unknown_tokenizer_is_refused_by_name(tmp_path):
    given = of_bytes(byte_level())
    path = write_vocabulary(tmp_path / "m.gguf", "gpt2", pre="viking-9", **given)
    with pytest.raises(ValueError, match="pre of .* is 'viking-9', .* known are gpt-2, .* beside"):
        load_tokenizer(path)
    write_vocabulary(path, "gpt2", **given)
    with pytest.raises(ValueError, match="tokenizer.ggml.pre of .* is None"):
        load_tokenizer(path)
    write_vocabulary(path, "t5", **given)
    with pytest.raises(ValueError, match="tokenizer.ggml.model is 't5', known are llama, gpt2"):
        load_tokenizer(path)
    given["merges"][5] = "x y z"
    write_vocabulary(path, "gpt2", pre="gpt-2", **given)
    with pytest.raises(ValueError, match="the merge 'x y z' is not of its tokens; copy it again"):
        load_tokenizer(path)
    given["tokens"][7] = given["tokens"][8]
    write_vocabulary(path, "gpt2", pre="gpt-2", **given)
    with pytest.raises(ValueError, match="has .* twice"):
        load_tokenizer(path)


def test_lists_of_another_length_are_refused():
    given, _ = of_llama()
    metadata = {f"tokenizer.ggml.{key}": value for key, value in given.items()}
    metadata |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": given["types"]}
    assert tokenizer_files(metadata, "x")
    with pytest.raises(ValueError, match="tokens of SentencePiece and 3 scores"):
        tokenizer_files(metadata | {"tokenizer.ggml.scores": [0.0] * 3}, "x")
    with pytest.raises(ValueError, match="and 2 entries of tokenizer.ggml.token_type"):
        tokenizer_files(metadata | {"tokenizer.ggml.token_type": [1, 1]}, "x")


def test_the_header_equals_that_of_the_package(tmp_path):
    given, _ = of_llama()
    path = write_vocabulary(tmp_path / "m.gguf", "llama", **given, add_bos_token=True)
    theirs = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    ours = read_header(path).metadata
    assert ours == {name: v for name, v in theirs.items() if not name.startswith("GGUF.")}
    data = path.read_bytes()
    for cut in (3, 20, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="m.gguf is damaged or not a GGUF file"):
            read_header(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + data[8:])
    with pytest.raises(ValueError, match="version 1, not 2 or 3"):
        read_header(path)

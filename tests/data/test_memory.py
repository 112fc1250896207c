"""Measure the memory of preparing data: some bytes per document, some megabytes for a long one."""

import os
import tracemalloc

import numpy as np
import pytest

from mtnlg_jax.data import encode, heldout, spool
from mtnlg_jax.data.encode import encode_long, encode_texts
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.read import long_texts
from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.data.store import tokens, zarr
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.data.tokenizer import load_tokenizer

WORDS = "the mill stood at the end of a village where its road turned towards hills".split()


def _peak(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_document_takes_50_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SHARD", 1 << 16)
    monkeypatch.setattr(zarr, "SHARD", 1 << 16)
    monkeypatch.setattr(heldout, "_DOCUMENTS_AT_ONCE", 1 << 8)

    def run(count):
        with spool.Spool(str(tmp_path / "texts"), seed=0) as texts:
            texts.fill(Document(str(number), "") for number in range(count))
            train, held = heldout.split(texts, 0.5)
            assert len(train) + len(held) == count and len(held) > count / 3
            writer = TokenWriter(tmp_path / "out", 300, "")
            for start, stop, _ in train.shuffled(np.uint64(3)):
                writer.add(np.zeros(2, np.uint16), int(stop - start))
            writer.finish()

    run(300)  # allocated once
    few, many = (_peak(lambda count=count: run(count)) for count in (2_000, 14_000))
    assert (many - few) / 12_000 < 50


def _long_text(megabytes):
    draw = np.random.default_rng(1)
    lines = [" ".join(draw.choice(WORDS, 12)) for _ in range(400)]
    return "".join(
        f"{lines[number % 400]}.{'' if number % 7 else os.linesep}\n"
        for number in range(int(megabytes * 16_000))
    )


def test_a_long_text_is_never_held_in_memory(tmp_path, monkeypatch, gpt2_files):
    """6 MB in pieces of 200 KB. Held at once, they would take eleven times their size."""
    for place, name, value in (
        (long_texts, "PIECE", 200_000),
        (spool, "_PIECE", 200_000),
        (encode, "_PIECE", 200_000),
        (tokens, "SHARD", 1 << 18),
        (zarr, "SHARD", 1 << 18),
    ):
        monkeypatch.setattr(place, name, value)
    text = _long_text(6)
    (tmp_path / "a.txt").write_text(text)
    size = len(text)
    del text
    load_tokenizer(gpt2_files).encode("warm " * 40_000)

    def run():
        prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer=str(gpt2_files), progress=False)

    assert _peak(run) < 2 * size
    train, held = (open_tokens(tmp_path / "out" / part) for part in ("train", "heldout"))
    assert (
        train.documents == held.documents == 1 and train.meta["bytes"] + held.meta["bytes"] == size
    )


def _odd_text(generator, length):
    parts = [
        "a",
        "b",
        "Word",
        " ",
        " ",
        "  ",
        "\n",
        "\n\n",
        ".\n",
        "。\n",
        "天",
        "地",
        "'s",
        "\t",
        "é",
        "😀",
        "12",
        "\r",
        " \n ",
    ]
    return "".join(generator.choice(parts, length))


def test_pieces_have_the_ids_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "_PIECE", 100)
    generator = np.random.default_rng(0)
    cut = 0
    for length in [0, 1, 30, 300, 3000] * 20:
        text = _odd_text(generator, length) or " "
        data = text.encode()
        parts = list(
            encode_long(tokenizer, lambda start, stop, data=data: data[start:stop], 0, len(data))
        )
        assert sum(size for _, size in parts) == len(data)
        assert [index for ids, _ in parts for index in ids] == tokenizer.encode(text)
        cut += len(parts) - 1
        (whole,) = encode_texts(tokenizer, [text])
        assert whole.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert cut > 500


def test_a_tokenizer_that_marks_the_beginning_of_a_text_is_not_cut(trained, monkeypatch):
    tokenizer = trained["bpe"]
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer,
        "encode_batch",
        lambda texts, threads=1: [[7, *ids] for ids in encode_batch(texts, threads)],
    )
    monkeypatch.setattr(encode, "_PIECE", 100)
    data = _long_text(0.01).encode()
    parts = list(encode_long(tokenizer, lambda start, stop: data[start:stop], 0, len(data)))
    assert len(parts) == 1 and parts[0][0] == tokenizer.encode(data.decode())


@pytest.mark.parametrize("kind", ["bpe", "unigram", "gpt2"])
def test_prepared_data_does_not_depend_on_the_pieces(tmp_path, monkeypatch, gpt2_files, kind):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.txt").write_text(
            _long_text(0.05) + str(number) + "天地。\n" * 500
        )
    prints = []
    for number, piece in enumerate((1 << 23, 3000)):
        monkeypatch.setattr(long_texts, "PIECE", piece)
        monkeypatch.setattr(spool, "_PIECE", piece)
        monkeypatch.setattr(encode, "_PIECE", piece)
        chosen = str(gpt2_files) if kind == "gpt2" else kind
        info = prepare(
            tmp_path / "in",
            tmp_path / str(number),
            tokenizer=chosen,
            vocab_size=300,
            progress=False,
        )
        prints.append((info["fingerprint"], info["input"], info["examples"]))
    assert prints[0] == prints[1]

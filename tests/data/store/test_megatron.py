"""Read and write Megatron's .bin and .idx. To test with megatron-core, in a Python that has it:

MEGATRON_PYTHON=PYTHON pytest --slow tests/data/store/test_megatron.py
"""

import json
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
from megatron_peer import FIXTURES, documents

from mtnlg_jax.data.batches import Batches
from mtnlg_jax.data.store import megatron as module
from mtnlg_jax.data.store import offsets
from mtnlg_jax.data.store.megatron import open_megatron, prefix_of, write_megatron
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.data.tokenizer import load_tokenizer

STREAM = np.concatenate(documents())
BEGINS = np.concatenate([[0], np.cumsum([len(document) for document in documents()])])


def _arrays(location, texts, vocab_size=300):
    writer = TokenWriter(location, vocab_size, "f00d")
    for text in texts:
        writer.add(np.array(text), len(text))
    writer.finish()
    return open_tokens(location)


def test_golden_bytes(tmp_path):
    """The bytes were written by hand from the layout in the module's docstring."""
    write_megatron(_arrays(tmp_path / "x", [[1, 2, 258], [5]]), tmp_path / "y")
    assert (tmp_path / "y.bin").read_bytes() == b"\x01\0\x02\0\x02\x01\x05\0"
    assert (tmp_path / "y.idx").read_bytes() == (
        b"MMIDIDX\0\0"
        b"\x01\0\0\0\0\0\0\0"
        b"\x08"
        b"\x02\0\0\0\0\0\0\0"
        b"\x03\0\0\0\0\0\0\0"
        b"\x03\0\0\0"
        b"\x01\0\0\0"
        b"\0\0\0\0\0\0\0\0"
        b"\x06\0\0\0\0\0\0\0"
        b"\0\0\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\0"
        b"\x02\0\0\0\0\0\0\0"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y.bin", "y.idx"]


@pytest.mark.parametrize(
    "vocab_size, dtype", [(65_499, "uint16"), (65_500, "int32"), (200_000, "int32")]
)
def test_the_size_of_the_vocabulary_decides_the_type(tmp_path, vocab_size, dtype):
    texts = [[vocab_size - 1, 0], [7] * 9]
    write_megatron(_arrays(tmp_path / "x", texts, vocab_size), tmp_path / "y")
    tokens = open_megatron(tmp_path / "y")
    assert tokens.meta["dtype"] == dtype and tokens.read(0, 11).tolist() == sum(texts, [])


@pytest.mark.parametrize("name", ["short", "sentences", "short.bin", "sentences.idx"])
def test_files_of_megatron_are_read(name, monkeypatch):
    monkeypatch.setattr(offsets, "BLOCK", 8)
    tokens = open_tokens(FIXTURES / name)
    assert len(tokens) == len(STREAM) and tokens.documents == 40 and tokens.prompt_lengths is None
    assert np.array_equal(tokens.read(0, len(tokens)), STREAM)
    assert np.array_equal(tokens.document_offsets, BEGINS)
    document, begins = tokens.document_of(np.arange(len(STREAM)))
    assert np.array_equal(document, np.repeat(np.arange(40), np.diff(BEGINS))) and set(
        begins
    ) == set(BEGINS[:-1])
    windows = tokens.read_windows(np.array([0, len(STREAM) - 5]), 30)
    assert np.array_equal(windows, [STREAM[:30], np.roll(STREAM, 5)[:30]])
    assert tokens.begins_with(64) and not tokens.begins_with(65)
    with pytest.raises(IndexError, match="0 to 10000"):
        tokens.read(0, 10_000)


def test_rows_equal_those_from_arrays(tmp_path):
    ours = Batches([(_arrays(tmp_path / "x", documents()), 1.0)], 64, seed=3).rows(np.arange(50))
    for name in ("short", "sentences"):
        theirs = Batches([(open_tokens(FIXTURES / name), 1.0)], 64, seed=3).rows(np.arange(50))
        assert all(
            np.array_equal(theirs[key], ours[key]) and theirs[key].dtype == np.int32 for key in ours
        )


@pytest.mark.parametrize("first, last", [(0, 39), (39, 40), (3, 17), (0, 0), (40, 40), (0, 40)])
def test_a_range_of_documents(first, last):
    part = open_megatron(FIXTURES / "sentences", first, last)
    stream = STREAM[BEGINS[first] : BEGINS[last]]
    assert part.documents == last - first and np.array_equal(part.read(0, len(part)), stream)
    assert np.array_equal(part.document_offsets, BEGINS[first : last + 1] - BEGINS[first])
    assert part.meta["sha256"] != open_megatron(FIXTURES / "sentences", 1, 2).meta["sha256"]


def test_our_files_equal_those_of_megatron(tmp_path):
    """The bytes are the same from arrays, from its own files, and in pieces."""
    for source in (_arrays(tmp_path / "x", documents()), open_megatron(FIXTURES / "short")):
        source.meta["vocab_size"] = 260
        write_megatron(source, tmp_path / "again", overwrite=True)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"again{suffix}").read_bytes() == (
                FIXTURES / f"short{suffix}"
            ).read_bytes()


@pytest.mark.parametrize("size", [0, 1, 8, 9, 100])
def test_round_trip_in_blocks_and_pieces(tmp_path, size, monkeypatch):
    monkeypatch.setattr(offsets, "BLOCK", 8)
    monkeypatch.setattr(module, "_PIECE", 7)
    rng = np.random.default_rng(size)
    texts = [rng.integers(0, 300, rng.integers(1, 40)) for _ in range(size)]
    before = _arrays(tmp_path / "x", texts)
    write_megatron(before, tmp_path / "a" / "y.idx")
    after = open_tokens(tmp_path / "a" / "y")
    assert np.array_equal(after.read(0, len(after)), before.read(0, len(before)))
    assert np.array_equal(after.document_offsets, before.document_offsets)
    with pytest.raises(FileExistsError, match=r"y.bin exists; .*--overwrite"):
        write_megatron(before, tmp_path / "a" / "y")


def test_empty_documents(tmp_path):
    """preprocess_data.py writes a document without sequences for a text without sentences."""
    index = (
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 2, 6)
        + np.array([2, 3], "<i4").tobytes()
        + np.array([0, 8, 0, 0, 1, 1, 2, 2], "<i8").tobytes()
    )
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(np.arange(5, dtype="<i4").tobytes())
    tokens = open_tokens(tmp_path / "x")
    assert tokens.documents == 5 and tokens.document_offsets.tolist() == [0, 0, 2, 2, 5, 5]
    assert tokens.document_of(np.arange(5))[0].tolist() == [1, 1, 3, 3, 3]


def _edit(suffix, change):
    def damage(prefix):
        path = prefix.with_suffix(suffix)
        path.write_bytes(change(path.read_bytes()))

    return damage


def _put(place, form, *values):
    """Overwrite a part of the index."""
    size = struct.calcsize(form)
    return _edit(
        ".idx", lambda data: data[:place] + struct.pack(form, *values) + data[place + size :]
    )


LENGTHS = 34
POINTERS = 34 + 4 * 40
DOCUMENTS = POINTERS + 8 * 40


def _shift(prefix):
    """Shift everything after the middle by a byte; only the ends are read at opening, and they are
    valid."""
    index = bytearray(prefix.with_suffix(".idx").read_bytes())
    pointers = np.frombuffer(index, "<i8", 40, POINTERS)
    pointers[17:] += 1
    prefix.with_suffix(".idx").write_bytes(index)
    _edit(".bin", lambda data: data + b"\0")(prefix)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda prefix: prefix.with_suffix(".bin").unlink(),
            FileNotFoundError,
            r"x.bin does not exist; .* and .*x.idx",
        ),
        (
            lambda prefix: prefix.with_suffix(".idx").unlink(),
            FileNotFoundError,
            r"x.idx does not exist; .* and .*x.bin",
        ),
        (_put(0, "<9s", b"MMIDIDY\0\0"), ValueError, "does not begin with MMIDIDX"),
        (_put(9, "<Q", 2), ValueError, "has version 2"),
        (_put(17, "<B", 6), ValueError, "holds float64, not tokens"),
        (_put(17, "<B", 7), ValueError, "float32"),
        (_put(17, "<B", 9), ValueError, "names dtype 9"),
        (_put(17, "<B", 4), ValueError, "x.bin has 4840 bytes, and the index requires"),
        (
            _put(18, "<Q", 39),
            ValueError,
            r"x.idx has 842 bytes, and 39 sequences in 40 documents take 830",
        ),
        (_put(18, "<Q", 1 << 60), ValueError, "x.idx has 842 bytes"),
        (_put(26, "<Q", 0), ValueError, "x.idx has 842 bytes"),
        (_edit(".idx", lambda data: data[:20]), ValueError, "inside its header"),
        (_edit(".idx", lambda data: data[:-1]), ValueError, "x.idx has 841 bytes"),
        (_edit(".idx", lambda data: data + bytes(40)), ValueError, "is multimodal"),
        (
            _edit(".bin", lambda data: data[:-2]),
            ValueError,
            "x.bin has 4838 bytes, and the index requires 4840",
        ),
        (_edit(".bin", lambda data: data + b"\0"), ValueError, "x.bin has 4841 bytes"),
        (
            _put(LENGTHS + 4 * 5, "<i", 18),
            ValueError,
            "sequences of documents 0 to 8 do not lie one after another",
        ),
        (_put(POINTERS + 8 * 4, "<q", 2), ValueError, "do not lie one after another"),
        (_put(POINTERS, "<q", 2), ValueError, "from byte 0 on"),
        (_put(DOCUMENTS + 8 * 40, "<q", 39), ValueError, "are not those of 40 sequences"),
        (_put(DOCUMENTS + 8 * 3, "<q", 9), ValueError, "do not follow each other"),
        (_put(DOCUMENTS + 8 * 3, "<q", -1), ValueError, "do not follow each other"),
        (_shift, ValueError, "sequences of documents 40 to 40 do not lie one after another"),
    ],
    ids=range(23),
)
def test_damage_is_found_at_opening(tmp_path, damage, error, message, monkeypatch):
    monkeypatch.setattr(offsets, "BLOCK", 8)
    for suffix in (".bin", ".idx"):
        shutil.copy(FIXTURES / f"short{suffix}", tmp_path / f"x{suffix}")
    damage(tmp_path / "x")
    with pytest.raises(error, match=message) as caught:
        open_tokens(tmp_path / "x")
    assert "; " in str(caught.value)


def test_damage_inside_is_found_at_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(offsets, "BLOCK", 8)
    for suffix in (".bin", ".idx"):
        shutil.copy(FIXTURES / f"short{suffix}", tmp_path / f"x{suffix}")
    _put(LENGTHS + 4 * 20, "<i", 7)(tmp_path / "x")
    tokens = open_tokens(tmp_path / "x")
    assert tokens.document_of(np.arange(50))[0][-1] == 5  # the first block is whole
    with pytest.raises(
        ValueError, match="x is damaged: the sequences of documents 16 to 24 do not lie .*; copy"
    ):
        tokens.document_of(np.arange(len(tokens)))


def test_paths_that_name_a_data_set(tmp_path):
    assert (
        prefix_of(FIXTURES / "short") == prefix_of(f"{FIXTURES}/short.bin") == f"{FIXTURES}/short"
    )
    assert prefix_of(FIXTURES) is None and prefix_of(tmp_path / "x") is None
    (tmp_path / "folder.bin").mkdir()
    assert prefix_of(tmp_path / "folder.bin") is None
    with pytest.raises(ValueError, match="gs://bucket/x: Megatron's files are mapped into memory"):
        open_tokens("gs://bucket/x.idx")


def test_another_tokenizer_raises_an_error(tmp_path, gpt2_files):
    gpt2 = load_tokenizer(gpt2_files)
    tokens = open_megatron(FIXTURES / "short")
    with pytest.raises(ValueError, match="short: the bytes of its tokens are not known without"):
        tokens.predicted  # noqa: B018
    tokens.attach(gpt2)
    lengths = [len(document) - 1 for document in documents()]
    # The first token of a document is not predicted, and its end has no bytes.
    assert tokens.predicted == (sum(lengths), sum(lengths) - 40)
    write_megatron(_arrays(tmp_path / "x", [[1, 2], [263, 4]]), tmp_path / "y")
    with pytest.raises(
        ValueError, match=r"y holds token 263, and the tokenizer's vocabulary ends at 262; give"
    ):
        open_megatron(tmp_path / "y").attach(gpt2)
    negative = np.frombuffer((tmp_path / "y.bin").read_bytes(), "<u2").astype("<i4")
    negative[0] = -5
    (tmp_path / "y.bin").write_bytes(negative.tobytes())
    index = bytearray((tmp_path / "y.idx").read_bytes())
    index[17:18] = b"\4"
    index[42:58] = struct.pack("<QQ", 0, 8)
    (tmp_path / "y.idx").write_bytes(index)
    with pytest.raises(ValueError, match="holds token -5"):
        open_megatron(tmp_path / "y").attach(gpt2)


def test_documents_that_megatron_cannot_hold_raise_an_error(tmp_path):
    writer = TokenWriter(tmp_path / "x", 300, "")
    writer.add(np.arange(5), 5, (2, 2))
    writer.finish()
    with pytest.raises(ValueError, match="holds pairs"):
        write_megatron(open_tokens(tmp_path / "x"), tmp_path / "y")
    with pytest.raises(ValueError, match="the vocabulary of the tokens is unknown"):
        write_megatron(open_megatron(FIXTURES / "short"), tmp_path / "y")
    assert not (tmp_path / "y.bin").exists()


@pytest.mark.slow
def test_megatron_core_itself(tmp_path):
    python = os.environ.get("MEGATRON_PYTHON")
    if not python:
        pytest.skip("needs MEGATRON_PYTHON, a Python that has megatron-core")

    def peer(*arguments):
        script = FIXTURES.parent / "megatron_peer.py"
        done = subprocess.run(
            [python, script, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    rng = np.random.default_rng(0)
    for name, vocab_size in (("uint16", 50_257), ("int32", 120_000)):
        texts = [rng.integers(0, vocab_size, rng.integers(1, 300)).tolist() for _ in range(500)]
        write_megatron(_arrays(tmp_path / name, texts, vocab_size), tmp_path / f"{name}-ours")
        assert json.loads(peer("read", tmp_path / f"{name}-ours").splitlines()[-1]) == texts
        peer("copy", tmp_path / f"{name}-ours", tmp_path / f"{name}-theirs")
        for suffix in (".bin", ".idx"):
            ours, theirs = (
                (tmp_path / f"{name}-{side}{suffix}").read_bytes() for side in ("ours", "theirs")
            )
            assert ours == theirs

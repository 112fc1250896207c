import json
import shutil

import numpy as np
import pytest

from mtnlg_jax import storage
from mtnlg_jax.data.store import tokens as module
from mtnlg_jax.data.store import zarr
from mtnlg_jax.data.store.prepared import read_prepared
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 300, size) for size in (1, 2, 700, 3, 64, 1, 260, 9)]
STREAM = np.concatenate(DOCUMENTS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make chunks small, so that a thousand tokens fill many chunks and several files."""
    for each in (module, zarr):
        monkeypatch.setattr(each, "CHUNK", 16)
        monkeypatch.setattr(each, "SHARD", 128)


def _write(location, documents=DOCUMENTS, vocab_size=300):
    writer = TokenWriter(location, vocab_size, "f00d", seed=3)
    for tokens in documents:
        writer.add(tokens, 4 * len(tokens))
    return writer.finish()


@pytest.mark.parametrize(
    "vocab_size, dtype", [(300, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_tokens_are_read_as_written(tmp_path, vocab_size, dtype):
    meta = _write(tmp_path / "x", [*DOCUMENTS, [vocab_size - 1]], vocab_size)
    assert (tmp_path / "x/tokens/c/7").exists() and not (tmp_path / "x/tokens/c/9").exists()
    tokens = open_tokens(tmp_path / "x")
    stream = np.append(STREAM, vocab_size - 1)
    assert len(tokens) == len(stream) and tokens.documents == 9 and tokens.meta == meta
    assert {
        name: meta[name] for name in ("dtype", "tokens", "documents", "bytes", "seed", "tokenizer")
    } == {
        "dtype": dtype,
        "tokens": 1041,
        "documents": 9,
        "bytes": 4164,
        "seed": 3,
        "tokenizer": "f00d",
    }
    everything = tokens.read(0, len(tokens))
    assert everything.dtype == dtype and np.array_equal(everything, stream)
    assert tokens.document_offsets.dtype == np.int64
    for index, document in enumerate(DOCUMENTS):
        assert np.array_equal(tokens.read(*tokens.document_offsets[index : index + 2]), document)
    assert tokens.read(5, 5).shape == (0,)
    for start, stop in ((-1, 3), (4, 2), (1000, 1042)):
        with pytest.raises(IndexError, match=f"{start} to {stop}"):
            tokens.read(start, stop)


def test_windows_wrap_around(tmp_path):
    _write(tmp_path)
    windows = open_tokens(tmp_path).read_windows(np.array([0, 130, 1035, 1039]), 50)
    assert np.array_equal(windows, [np.roll(STREAM, -start)[:50] for start in (0, 130, 1035, 1039)])


def test_the_hash_depends_on_the_content(tmp_path):
    same = _write(tmp_path / "a")
    other = _write(tmp_path / "b")
    assert same == other
    cut = [STREAM[:5], STREAM[5:]]  # the same tokens, other documents
    assert _write(tmp_path / "c", cut)["sha256"] != same["sha256"]
    assert _write(tmp_path / "d", DOCUMENTS[::-1])["sha256"] != same["sha256"]


def test_an_empty_data_set(tmp_path):
    meta = _write(tmp_path, [])
    tokens = open_tokens(tmp_path)
    assert len(tokens) == tokens.documents == meta["bytes"] == 0 and tokens.read(0, 0).size == 0


@pytest.mark.parametrize("wrong", [[], [300], [-1]])
def test_tokens_outside_the_vocabulary_raise_an_error(tmp_path, wrong):
    writer = TokenWriter(tmp_path, 300, "")
    writer.add([299], 1)
    with pytest.raises(ValueError, match="document 1 .* vocabulary of 300"):
        writer.add(wrong, 1)


def test_urls(tmp_path):
    _write("memory://corpus/train")
    assert np.array_equal(open_tokens("memory://corpus/train").read(0, len(STREAM)), STREAM)
    assert storage.key_value_spec("gs://bucket/a/b") == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "a/b/",
    }
    assert storage.key_value_spec("s3://bucket/a/") == {
        "driver": "s3",
        "bucket": "bucket",
        "path": "a/",
    }
    assert storage.key_value_spec(tmp_path) == {"driver": "file", "path": f"{tmp_path}/"}
    with pytest.raises(ValueError, match="nonsense://a is not a URL that TensorStore supports"):
        storage.key_value_spec("nonsense://a")
    with pytest.raises(FileNotFoundError, match="memory://nowhere holds no tokens"):
        open_tokens("memory://nowhere")


def test_unfinished_and_missing_data_raise_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_tokens(tmp_path / "nowhere")
    writer = TokenWriter(tmp_path / "x", 300, "")
    writer.add(STREAM, 1)
    with pytest.raises(FileNotFoundError, match="holds no tokens"):
        open_tokens(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="holds no prepared data"):
        read_prepared(tmp_path)
    for content in ("{", "[]", '{"fingerprint": 1}'):
        (tmp_path / "prepared.json").write_text(content)
        with pytest.raises(ValueError, match="is damaged: prepared.json"):
            read_prepared(tmp_path)


def _meta(name, value):
    def change(folder):
        path = folder / "meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def _offsets(folder):
    offsets = open_tokens(folder).document_offsets.copy()
    offsets[3] = offsets[2]
    zarr.create_array(str(folder / "document_offsets"), offsets.dtype, offsets.size).write(
        offsets
    ).result()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_offsets, "do not divide"),
        (lambda folder: (folder / "meta.json").write_text('{"tokens"'), "Expecting"),
        (lambda folder: (folder / "meta.json").write_text("{}"), "tokens"),
        (_meta("tokens", 1041), "1040 tokens of uint16, meta.json says 1041"),
        (_meta("dtype", "uint32"), "meta.json says 1040 of uint32"),
        (_meta("documents", 7), "do not divide"),
        (lambda folder: shutil.rmtree(folder / "tokens"), "tokens/zarr.json"),
        (
            lambda folder: (folder / "document_offsets/zarr.json").unlink(),
            "document_offsets/zarr.json",
        ),
        (lambda folder: (folder / "document_offsets/c/0").unlink(), "is missing"),
    ],
    ids=range(9),
)
def test_damage_is_found_at_opening(tmp_path, damage, message):
    _write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_tokens(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} is damaged: ") and "--overwrite" in str(
        error.value
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(path.read_bytes()[:20] + b"\x55" + path.read_bytes()[21:]),
    ],
)
def test_damage_inside_is_found_at_reading(tmp_path, damage):
    _write(tmp_path)
    damage(tmp_path / "tokens/c/3")
    tokens = open_tokens(tmp_path)
    assert np.array_equal(tokens.read(0, 384), STREAM[:384])
    with pytest.raises(ValueError, match="is damaged: .*tokens/c/3"):
        tokens.read(380, 512)

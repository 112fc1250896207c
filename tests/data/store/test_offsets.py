import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax import storage
from mtnlg_jax.data.store import offsets as module
from mtnlg_jax.data.store import zarr
from mtnlg_jax.data.store.offsets import Offsets

RNG = np.random.default_rng(0)
SIZES = {
    "alike": RNG.integers(1, 9, 1000),
    "one": np.array([7]),
    "a block": np.full(8, 3),
    "and one": np.full(9, 3),
    "skewed": np.concatenate(
        [np.ones(700, int), [100_000], np.full(300, 50), [10**9], np.ones(200, int)]
    ),
    "growing": 1 + np.arange(500) ** 2,
    "with empty ones": RNG.integers(0, 3, 600),
    "empty ends": np.array([0] * 20 + [5, 0, 5] + [0] * 20),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(module, "_KEPT", 3)


def _lazy(values, least=0):
    """Return offsets over ``values``, and the list of the numbers that were read."""
    reads = []

    def read(first, stop):
        reads.append((first, stop))
        return values[first:stop]

    return Offsets(read, len(values) - 1, int(values[-1]), ValueError, least), reads


@pytest.mark.parametrize("kind", SIZES)
def test_lookups_equal_a_search_in_all_offsets(kind):
    values = np.concatenate([[0], np.cumsum(SIZES[kind])])
    lazy, reads = _lazy(values)
    lazy.check_ends()
    places = np.minimum(RNG.integers(0, values[-1], (40, 1)) + np.arange(50), values[-1] - 1)
    wanted = np.searchsorted(values, places, side="right") - 1
    for chosen in (slice(3), slice(None), slice(-1, None, -1)):
        documents, begins = lazy.find(places[chosen])
        assert np.array_equal(documents, wanted[chosen]) and np.array_equal(
            begins, values[wanted[chosen]]
        )
        assert documents.dtype == begins.dtype == np.int64
    assert all(stop - first <= 9 for first, stop in reads)
    assert np.array_equal(lazy.all(), values)


@pytest.mark.parametrize("kind", ["alike", "skewed", "growing"])
def test_a_lookup_reads_few_blocks(kind):
    values = np.concatenate([[0], np.cumsum(np.tile(SIZES[kind], 30))])
    counts = []
    for index in RNG.integers(0, values[-1], 200):
        lazy, reads = _lazy(values)
        lazy.find(np.array([index]))
        counts.append(len(reads))
    assert max(counts) <= 2 * np.log2(len(values) / 8) + 2
    assert kind != "alike" or np.mean(counts) < 4


@pytest.mark.parametrize(
    "index, value", [(0, 1), (1000, -1), (500, -1), (500, 10**9), (504, 0), (505, 0)]
)
def test_invalid_offsets_are_found_when_read(index, value):
    values = np.concatenate([[0], np.cumsum(SIZES["alike"])])
    broken = values.copy()
    broken[index] = values[index - 1] if value == 0 else value
    lazy = Offsets(lambda first, stop: broken[first:stop], 1000, int(values[-1]), ValueError)
    with pytest.raises(
        ValueError,
        match=r"do not divide \d+ tokens into 1000 documents \(seen at documents \d+ to ",
    ):
        lazy.find(np.arange(values[-1]))
    with pytest.raises(ValueError, match="do not divide"):
        lazy.all()


def test_blocks_that_overlap_raise_an_error():
    """Each block is valid, but the second begins before the first one ends."""
    blocks = {0: np.arange(9) * 2, 8: np.arange(9) + 12, 16: np.arange(9) * 10 + 20}
    lazy = Offsets(lambda first, stop: blocks[first][: stop - first], 24, 100, ValueError)
    with pytest.raises(ValueError, match="do not divide"):
        lazy.find(np.arange(100))


FIRST_BATCH = """
import sys, time
import numpy as np
from mtnlg_jax.data.batches import Batches
from mtnlg_jax.data.store.sources import open_tokens
begin = time.perf_counter()
rows = Batches([(open_tokens(sys.argv[1]), 1.0)], 2048, seed=0).rows(np.arange(8))
print(time.perf_counter() - begin, rows["tokens"].shape)
"""


@pytest.mark.slow
def test_the_first_batch_of_many_documents_is_fast(tmp_path, monkeypatch):
    """30 million documents, as if `TokenWriter` had written them, and a process that has not read
    them yet."""
    monkeypatch.undo()
    values = np.concatenate([[0], np.cumsum(RNG.integers(1, 6, 30_000_000, dtype=np.int64))])
    stored = zarr.create_array(
        storage.join(tmp_path, "document_offsets"), values.dtype, values.size, zarr.CHUNK >> 4
    )
    stored.write(values).result()
    ids = RNG.integers(0, 50_000, values[-1], dtype=np.uint16)
    zarr.create_array(storage.join(tmp_path, "tokens"), ids.dtype, ids.size).write(ids).result()
    meta = {
        "dtype": "uint16",
        "tokens": ids.size,
        "documents": 30_000_000,
        "bytes": 0,
        "tokenizer": "",
        "sha256": "",
    }
    storage.write_file(tmp_path, "meta.json", json.dumps(meta).encode())
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    seconds, shape = done.stdout.split(" ", 1)
    print(f"first batch after {float(seconds):.3f} s")
    assert float(seconds) < 1 and shape.strip() == "(8, 2049)"

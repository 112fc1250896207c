"""The documents of the tokens of a batch: their text is in the row, in plain and packed sources."""

from types import SimpleNamespace

import numpy as np

from mtnlg_jax.data.batches import Batches
from mtnlg_jax.data.origins import PADDING, origins
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter


def _source(folder, lengths, first, prompts=False):
    """Write documents of ``lengths``, in which every token is the document's number + first."""
    writer = TokenWriter(folder, 1000, "t")
    for number, length in enumerate(lengths):
        writer.add(np.full(length, first + number), 1, (1, 1) if prompts else None)
    writer.finish()
    return open_tokens(folder)


def test_documents_of_windows_and_of_packed_rows(tmp_path):
    rng = np.random.default_rng(0)
    plain = _source(tmp_path / "plain", rng.integers(2, 30, 40), 100)
    pairs = _source(tmp_path / "pairs", rng.integers(2, 9, 40), 500, prompts=True)
    batches = Batches([(plain, 2.0), (pairs, 1.0)], 16, seed=3)
    samples = np.arange(200)  # several epochs, so that windows cross the seam
    rows = batches.rows(samples)
    source, documents = origins(batches, 16, samples)
    assert set(source) == {0, 1} and documents.shape == rows["tokens"].shape
    padding = rows["segment_ids"] == 0
    np.testing.assert_array_equal(documents == PADDING, padding)
    assert padding.any()
    first = np.where(source == 0, 100, 500)[:, None]
    np.testing.assert_array_equal((rows["tokens"] - first)[~padding], documents[~padding])


def test_room_for_an_image_belongs_to_its_document(tmp_path):
    pairs = _source(tmp_path, [4, 5, 6], 500, prompts=True)
    pairs.prefixes = SimpleNamespace(
        positions=2,
        shape=(2, 3),
        dtype=np.float32,
        of_documents=lambda at: np.zeros((len(at), 2, 3)),
    )
    batches = Batches([(pairs, 1.0)], 12, seed=0)
    rows = batches.rows(np.arange(3))
    _, documents = origins(batches, 12, np.arange(3))
    for row, tokens, segments in zip(documents, rows["tokens"], rows["segment_ids"], strict=True):
        assert (row[:2] == row[2]).all() and tokens[2] - 500 == row[2]
        np.testing.assert_array_equal(row == PADDING, segments == 0)

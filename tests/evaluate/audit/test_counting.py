"""Counts of sequences in a store, by hand and against a plain search."""

import numpy as np
import pytest

from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.evaluate.audit import counting


def _store(folder, documents, vocab_size):
    writer = TokenWriter(folder, vocab_size, "of no tokenizer")
    for document in documents:
        writer.add(np.array(document), 0)
    writer.finish()
    return open_tokens(folder)


@pytest.mark.parametrize("piece", [1 << 20, 3])
def test_counts_by_hand(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(counting, "_PIECE", piece)
    parts = [
        _store(tmp_path / "a", [[1, 5, 6, 7, 2], [1, 5, 6, 7, 5, 6, 7, 2]], 10),
        _store(tmp_path / "b", [[1, 9, 9, 9, 9, 2]], 10),
    ]
    wanted = [
        [5, 6, 7],
        [6, 7, 5],
        [9, 9],
        [7],
        [5, 6, 7],
        [2, 1, 5],
        [8],
        [1, 5, 6, 7, 5, 6, 7, 2],
    ]
    seen = []
    counts = counting.count_sequences(parts, wanted, seen.append)
    # Overlapping occurrences count; so do those across the end of a document.
    assert counts.tolist() == [3, 1, 3, 3, 3, 1, 0, 1]
    assert sum(seen) == 19


def test_counts_equal_a_plain_search(tmp_path, monkeypatch):
    monkeypatch.setattr(counting, "_PIECE", 128)
    monkeypatch.setattr(counting, "_COMPARED", 5)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 1000)
    part = _store(tmp_path, [tokens], 3)
    wanted = [rng.integers(0, 3, length).tolist() for length in (1, 2, 4, 4, 7, 200)]
    wanted += [tokens[120:140].tolist(), tokens[-30:].tolist(), tokens.tolist()]
    plain = [
        sum(tokens[at : at + len(each)].tolist() == each for at in range(len(tokens)))
        for each in wanted
    ]
    assert max(plain) > 100
    assert counting.count_sequences([part], wanted).tolist() == plain


def test_equal_hashes_are_told_apart(tmp_path, monkeypatch):
    # With this base every window of the same tokens has the same hash.
    monkeypatch.setattr(counting, "_BASE", np.uint64(1))
    part = _store(tmp_path, [[3, 4, 5, 5, 4, 3, 3, 4, 5]], 10)
    assert counting.count_sequences([part], [[3, 4, 5]]).tolist() == [2]


def test_strings_are_found_however_they_are_tokenized(tmp_path, monkeypatch):
    class Letters:
        vocab_size = 300
        is_special = np.arange(300) >= 256

        @staticmethod
        def token_bytes(index):
            return bytes([index]) if index < 256 else b""

    monkeypatch.setattr(counting, "_PIECE", 4)
    part = _store(tmp_path, [[256, *"write to é.b@c.de".encode(), 257], [256, *b"x y", 257]], 300)
    wanted = ["é.b@c.de", "b@c.d", "b@c.com", "e\nx", "dex"]
    # A document ends with a line, so nothing is found across two.
    found = counting.find_strings([part], Letters(), wanted)
    assert found.tolist() == [True, True, False, False, False]
    assert counting.find_strings([part], Letters(), []).tolist() == []

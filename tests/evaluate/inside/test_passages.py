"""Passages: every token of the data once, prompts of pairs without weight, draws by a seed."""

from types import SimpleNamespace

import numpy as np

from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter
from mtnlg_jax.evaluate.inside.passages import passages_of_sources, passages_of_texts, sample


def _written(folder, documents, prompts=None):
    writer = TokenWriter(folder, 1000, "t")
    for number, ids in enumerate(documents):
        writer.add(np.array(ids), 1, prompts and (prompts[number], 1))
    writer.finish()
    return open_tokens(folder)


def test_passages_cover_the_data(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 900, size) for size in (1, 2, 7, 8, 9, 30)]
    plain = _written(tmp_path / "train", documents)
    pairs = _written(tmp_path / "pairs", [[1, 2, 3, 4], [5, 6, 7, 8, 9]], prompts=[3, 1])
    found, total = passages_of_sources([plain, pairs], 7, 99, seed=0)
    assert total == len(found) == 0 + 1 + 1 + 1 + 2 + 5 + 2
    assert {each.source for each in found} == {str(tmp_path), str(tmp_path / "pairs")}
    whole = [each for each in found if each.source == str(tmp_path)]
    for number, ids in enumerate(documents):
        own = [each for each in whole if each.document == number]
        predicted = [token for each in own for token in each.tokens[1:].tolist()]
        assert predicted == ids[1:].tolist()
        assert all((each.tokens[0] == ids[each.begin]).all() for each in own)
    assert [each.weights.tolist() for each in found[-2:]] == [[0, 0, 1], [1, 1, 1, 1]]
    some, total = passages_of_sources([plain, pairs], 7, 4, seed=1)
    again, _ = passages_of_sources([plain, pairs], 7, 4, seed=1)
    assert len(some) == 4 and total == 12
    assert [each[:3] for each in some] == [each[:3] for each in again]


def test_passages_of_texts_and_samples():
    tokenizer = SimpleNamespace(bos_id=1, encode=lambda text: [ord(each) for each in text])
    found = passages_of_texts(tokenizer, ["abcde", "", "f"], "file", 3)
    assert [(each.document, each.begin, each.tokens.tolist()) for each in found] == [
        (0, 0, [1, 97, 98, 99]),
        (0, 3, [99, 100, 101]),
        (2, 0, [1, 102]),
    ]
    assert sample(range(9), 9, 0) == list(range(9)) and len(set(sample(range(99), 9, 0))) == 9

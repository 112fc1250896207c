"""Check which source each token of the held-out text is of."""

import json

import numpy as np
import pytest

from mtnlg_jax.data.batches import HeldOut
from mtnlg_jax.data.held_out_sources import HeldOutSources, short_names
from mtnlg_jax.data.store.tokens import TokenWriter, open_stored

LENGTH = 8


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/books"], ("books",)),
        (["/data/books", "/data/web"], ("books", "web")),
        (["/a/en/books", "/a/fr/books", "web"], ("en/books", "fr/books", "web")),
        (["gs://x/one", "/y/one", "one"], ("x/one", "y/one", "one")),
        (["one", "one"], ("one", "one")),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths, names):
    assert short_names(paths) == names


@pytest.fixture
def mixed(tmp_path):
    """Return the held-out part of a recipe of three sources, in spans of shards; the documents of
    each source have tokens of its own."""
    spans = [("web", 3), ("books", 1), ("web", 2), ("rare", 1), ("books", 2)]
    kinds = {"web": 10, "books": 20, "rare": 30}
    writer = TokenWriter(tmp_path / "out" / "heldout", 100, "none")
    tokens = []
    for name, count in spans:
        size = 3 if name == "rare" else 40
        tokens.append([name, count * size])
        for _ in range(count):
            writer.add(np.full(size, kinds[name]), size)
    writer.finish()
    path = tmp_path / "out" / "heldout" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sources": tokens}))
    return open_stored(str(tmp_path / "out" / "heldout")), kinds


def test_each_token_of_a_recipe_has_its_source(mixed):
    tokens, kinds = mixed
    held_out = HeldOut([(tokens, 1.0)], LENGTH, 1000)
    sources = HeldOutSources(held_out, LENGTH)
    assert sources.names == ("web", "books", "rare") and not len(sources.part)
    rows = held_out.read(held_out.source, held_out.window)
    found = sources.of_rows(held_out.source, held_out.window)
    real = rows["segment_ids"] > 0
    assert real.sum() > len(tokens)
    wanted = np.array([kinds[name] for name in sources.names])
    assert (wanted[found[real]] == rows["tokens"][real]).all()


def test_a_source_that_no_row_reads_gets_a_row_of_its_own(mixed):
    tokens, kinds = mixed
    held_out = HeldOut([(tokens, 1.0)], LENGTH, 1)
    sources = HeldOutSources(held_out, LENGTH)
    read = np.unique(sources.of_rows(held_out.source, held_out.window))
    added = sources.of_rows(sources.part, sources.window)
    assert set(read) | set(added.ravel()) == {0, 1, 2} and len(read) < 3
    rows = held_out.read(sources.part, sources.window)
    assert (rows["tokens"] == kinds["rare"]).any()


def test_sources_in_one_row_share_the_row_that_is_added(mixed):
    tokens, _ = mixed
    total = len(tokens)
    tokens.meta["sources"] = [["rare", 3], ["odd", 3], ["web", total - 9], ["rare", 3]]
    for rows in (1, 2, 5, 1000):
        held_out = HeldOut([(tokens, 1.0)], LENGTH, rows)
        sources = HeldOutSources(held_out, LENGTH)
        read = [*held_out.window, *sources.window]
        assert len(set(read)) == len(read)
        assert 0 in read  # it has both


def test_a_record_that_does_not_fit_counts_as_one_source(mixed):
    tokens, _ = mixed
    tokens.meta["sources"][0][1] += 1
    sources = HeldOutSources(HeldOut([(tokens, 1.0)], LENGTH, 4), LENGTH)
    assert sources.names == ("out",)

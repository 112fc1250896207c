import hashlib
from collections import Counter

import numpy as np
import pytest

from mtnlg_jax.data.batches import Batches, heldout_count, heldout_rows, permute
from mtnlg_jax.data.store.sources import open_tokens
from mtnlg_jax.data.store.tokens import TokenWriter

SIZES = [7, 1, 40, 3, 90, 2, 58]  # 201 tokens


def _tokens(location, sizes=SIZES, first=0):
    """Write tokens where token n is n (from ``first`` on), so that a row shows where it was cut."""
    ends = first + np.cumsum(sizes)
    writer = TokenWriter(location, 1 << 20, "")
    for size, end in zip(sizes, ends, strict=True):
        writer.add(np.arange(end - size, end), size)
    writer.finish()
    return open_tokens(location)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return _tokens(tmp_path_factory.mktemp("tokens"))


def test_rows_are_windows_that_wrap_around(tokens):
    rows = Batches([(tokens, 1.0)], 24, seed=5).rows(np.arange(300))
    assert {name: (values.shape, values.dtype) for name, values in rows.items()} == {
        name: ((300, 25), np.dtype(np.int32)) for name in ("tokens", "segment_ids", "positions")
    }
    starts = set(np.concatenate([[0], np.cumsum(SIZES)[:-1]]))
    for ids, segments, positions in zip(
        rows["tokens"], rows["segment_ids"], rows["positions"], strict=True
    ):
        assert np.array_equal(ids, (ids[0] + np.arange(25)) % 201)
        segment = 1
        position = -1
        for place, token in enumerate(ids):
            new = place > 0 and token in starts
            segment = segment + new
            position = 0 if new else position + 1
            assert (segments[place], positions[place]) == (segment, position)


@pytest.mark.parametrize("length, missing", [(1, 0), (3, 0), (3, 2), (7, 5)])
def test_an_epoch_predicts_every_token_once(tmp_path, length, missing):
    size = 1024 * length - missing  # 1024 windows: epochs are then whole blocks of samples
    batches = Batches([(_tokens(tmp_path, [size // 2, size - size // 2]), 3.0)], length, seed=1)
    orders = []
    for epoch in range(3):
        rows = batches.rows(np.arange(1024 * epoch, 1024 * (epoch + 1)))["tokens"]
        seen = Counter(rows[:, 1:].ravel().tolist())
        assert set(seen) == set(range(size))
        assert sum(seen.values()) - size == missing and max(seen.values()) <= 2
        orders.append(rows[:, 0].tolist())
    assert orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0])
    if length > 1:
        assert (
            len({tuple(sorted(order)) for order in orders}) > 1
        )  # not always cut at the same positions


def test_a_row_depends_on_seed_and_sample_only(tokens, tmp_path):
    other = _tokens(tmp_path, [50, 60], first=1000)
    blend = [(tokens, 0.7), (other, 0.3)]
    whole = Batches(blend, 10, seed=2).rows(np.arange(64))
    again = Batches(blend, 10, seed=2)
    for samples in ([63, 5, 5, 17], [0], range(31, 40)):
        rows = again.rows(np.array(samples))
        for name, values in rows.items():
            assert np.array_equal(values, whole[name][list(samples)])
    assert not np.array_equal(
        Batches(blend, 10, seed=3).rows(np.arange(64))["tokens"], whole["tokens"]
    )
    assert again.rows(np.array([], int))["tokens"].shape == (0, 11)


def test_the_order_of_samples_never_changes(tokens):
    """Golden values: a run resumed with a newer version must read the same rows."""
    first = Batches([(tokens, 1.0)], 24, seed=5).rows(np.array([0, 1, 2, 9, 5000, 10**9]))[
        "tokens"
    ][:, 0]
    assert first.tolist() == [176, 56, 32, 63, 36, 56]
    assert permute(np.arange(10), 10, np.uint64(7)).tolist() == [2, 7, 6, 8, 5, 4, 3, 0, 9, 1]


@pytest.mark.parametrize("size", [*range(1, 70), 1000, 1024, 1025, 4097])
def test_permutations_contain_every_index_once(size):
    orders = [permute(np.arange(size), size, np.uint64(key)) for key in range(4)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(size))
    if size > 30:
        for order in orders:
            assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
            assert not any(np.array_equal(order, other) for other in orders if other is not order)
    sizes = np.array([size, 5, size])  # one size for each number
    mixed = permute(np.array([size - 1, 4, 0]), sizes, np.array([2, 7, 0], np.uint64))
    assert mixed.tolist() == [
        orders[2][-1],
        permute(np.arange(5), 5, np.uint64(7))[4],
        orders[0][0],
    ]
    keys = np.array([3, 1], np.uint64)  # one key for each number
    assert permute(np.array([0, 0]), size, keys).tolist() == [orders[3][0], orders[1][0]]


WEIGHTS = [
    [1],
    [0.5, 0.5],
    [3, 1, 2],
    [0.7, 0.2999, 0.0001],
    [0.0003, 0.0002, 0.9995],
    [1e-3] * 7 + [1],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_blend_shares_are_exact(tmp_path, weights):
    sources = [
        (_tokens(tmp_path / str(index), [400], first=1000 * index), weight)
        for index, weight in enumerate(weights)
    ]
    batches = Batches(sources, 100, seed=4)
    blocks = 6
    drawn = batches.rows(np.arange(1024 * blocks))["tokens"][:, 0] // 1000
    shares = np.array(weights) / np.sum(weights)
    counts = np.array(
        [np.bincount(drawn[: 1024 * block], minlength=len(weights)) for block in range(blocks + 1)]
    )
    rounding = 0.5 * len(weights)  # the remainder is rounded source by source
    assert (np.abs(counts - 1024 * np.arange(blocks + 1)[:, None] * shares) <= rounding).all()
    # mixed, not one source after the other
    assert len(weights) == 1 or (np.diff(drawn) != 0).sum() > 0.5 * (len(drawn) - counts[-1].max())


@pytest.mark.parametrize(
    "windows, weights",
    [
        ([2], [1]),
        ([5], [2]),
        ([200], [1]),
        ([1023], [1]),
        ([1025], [1]),
        ([2500], [1]),
        ([200, 7], [1, 1]),
        ([37, 1100, 3], [0.2, 0.7999, 0.0001]),
        ([90, 3000, 1024], [0.9, 0.05, 0.05]),
    ],
)
def test_each_window_occurs_once_an_epoch(tmp_path, windows, weights):
    """Sources smaller and larger than a block of samples, any blend, and batches read by runs that
    each start again."""
    length = 4
    sources = [
        (_tokens(tmp_path / str(index), [count * length], first=100_000 * index), weight)
        for index, (count, weight) in enumerate(zip(windows, weights, strict=True))
    ]
    last = 2600
    drawn = []
    for first in range(0, last, 650):
        batches = Batches(sources, length, seed=3)
        drawn += [
            batches.rows(np.arange(first + part, first + part + 130))["tokens"]
            for part in range(0, 650, 130)
        ]
    drawn = np.concatenate(drawn)[:, 0]
    for index, count in enumerate(windows):
        mine = drawn[drawn // 100_000 == index] % 100_000
        for epoch in range(0, len(mine) - count + 1, count):
            assert len(set(mine[epoch : epoch + count].tolist())) == count
        rest = mine[len(mine) // count * count :]
        assert len(set(rest.tolist())) == len(rest)


def test_a_source_continues_across_batches(tokens, tmp_path):
    """In a blend a source is also read window by window, none twice before all were read."""
    other = _tokens(tmp_path, [10] * 3000, first=1000)
    batches = Batches([(tokens, 0.2), (other, 0.8)], 10, seed=0)
    starts = batches.rows(np.arange(3072))["tokens"][:, 0]
    starts = starts[starts >= 1000]
    assert len(starts) == round(0.8 * 3072) and len(set(starts)) == len(starts)


@pytest.mark.parametrize(
    "length, weight, message",
    [
        (201, 1.0, "has 201 tokens, sequence_length=201 needs 202: shorten it or add text"),
        (0, 1.0, "sequence_length=0 must be at least 1"),
        (8, 0.0, "weight 0.0 .* must be above 0"),
        (8, -1.0, "weight -1.0"),
        (8, float("nan"), "weight nan"),
    ],
)
def test_invalid_arguments_raise_an_error(tokens, length, weight, message):
    with pytest.raises(ValueError, match=message):
        Batches([(tokens, weight)], length, seed=0)
    with pytest.raises(ValueError, match="at least one source"):
        Batches([], 8, seed=0)


def test_the_shortest_corpus(tokens):
    rows = Batches([(tokens, 1.0)], 200, seed=0).rows(np.arange(4))
    assert (np.sort(rows["tokens"], axis=1) == np.arange(201)).all()
    # The document that contains both ends of the window is two segments.
    assert (rows["segment_ids"].max(axis=1) >= len(SIZES)).all()


@pytest.mark.parametrize("length, batch", [(1, 3), (10, 4), (50, 4), (200, 2), (500, 2)])
def test_heldout_tokens_are_predicted_once_each(tokens, length, batch):
    seen = []
    for first in range(0, heldout_count(tokens, length), batch):
        rows = heldout_rows(tokens, length, np.arange(first, first + batch))
        assert {values.shape for values in rows.values()} == {(batch, length + 1)}
        assert {values.dtype.name for values in rows.values()} == {"int32"}
        real = rows["segment_ids"] > 0
        assert not rows["tokens"][~real].any() and not rows["positions"][~real].any()
        seen += rows["tokens"][:, 1:][real[:, 1:]].tolist()
        for ids, segments in zip(rows["tokens"], rows["segment_ids"], strict=True):
            changes = [
                int(token)
                for token, step in zip(ids[1:], np.diff(segments), strict=True)
                if step > 0
            ]
            assert set(changes) <= set(np.cumsum(SIZES))
    assert seen == list(range(1, 201))


def test_empty_held_out_data(tmp_path):
    assert (
        heldout_count(_tokens(tmp_path / "none", []), 8)
        == heldout_count(_tokens(tmp_path / "one", [1]), 8)
        == 0
    )
    with pytest.raises(ValueError, match="sequence_length=0"):
        heldout_count(_tokens(tmp_path / "two", [2]), 0)


def test_rows_of_many_documents_never_change(tmp_path):
    """Golden values: 40,000 documents in many blocks of offsets, rows of training and held-out
    text."""
    rng = np.random.default_rng(3)
    tokens = [
        _tokens(tmp_path / str(index), (1 + rng.geometric(share, 40_000)).tolist(), first=7 * index)
        for index, share in enumerate((0.5, 0.05))
    ]
    samples = np.concatenate([np.arange(40), [10**6, 10**9]])
    rows = [
        Batches([(tokens[0], 0.8), (tokens[1], 0.2)], 2048, seed=9).rows(samples),
        *(
            heldout_rows(source, 300, np.array([0, 5, 100, heldout_count(source, 300) - 1, 10**5]))
            for source in tokens
        ),
    ]
    digest = hashlib.sha256(
        b"".join(values.tobytes() for part in rows for values in part.values())
    ).hexdigest()
    assert digest == "f5c191d599a488e0dfb73a5aac02029e3ef5b4d59ab4d3b1351eaf40d2deb943"

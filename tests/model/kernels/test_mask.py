"""Check that blocks are skipped only if they have no visible pair, and always if that is known."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.model.kernels import mask as masks
from mtnlg_jax.model.kernels.mask import Mask, block_ranges, visible, visible_blocks

SORTED = [1] * 9 + [2] * 4 + [5] * 10
MIXED = [3, 1, 3] * 7 + [1, 1]
CASES = {
    "causal": ({}, True),
    "both ways": ({"causal": False}, True),
    "offset": ({"q_offset": 5}, True),
    "window": ({"window": 4}, True),
    "window both ways": ({"causal": False, "window": 3}, True),
    "lengths": ({"causal": False, "kv_lengths": [23, 0, 7]}, True),
    "offsets of rows": ({"q_offset": [0, -4, 30]}, True),
    "documents": ({"causal": False, "segment_ids": ([SORTED] * 3, [SORTED] * 3)}, True),
    "mixed documents": ({"causal": False, "segment_ids": ([MIXED] * 3, [SORTED] * 3)}, False),
    # Each of the three shows a pair in a block, but all together show none: this is not detected.
    "all": (
        {
            "segment_ids": ([SORTED] * 3, [SORTED] * 3),
            "window": 6,
            "kv_lengths": [20, 23, 9],
            "q_offset": [0, 2, 4],
        },
        False,
    ),
}


def _mask(causal=True, window=None, q_offset=0, segment_ids=(None, None), kv_lengths=None):
    ids = [None if x is None else jnp.int32(x) for x in segment_ids]
    offset = q_offset if isinstance(q_offset, int) else jnp.int32(q_offset)
    return Mask(causal, window, offset, *ids, None if kv_lengths is None else jnp.int32(kv_lengths))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", [(4, 3), (8, 16), (23, 5)])
def test_no_visible_pair_is_skipped(longhand, case, blocks):
    options, exact = CASES[case]
    pairs = longhand.visible(3, 23, 23, **options)
    grid = tuple(-(-23 // block) for block in blocks)
    want = np.zeros((3, *grid), bool)
    for row, i, j in np.argwhere(pairs):
        want[row, i // blocks[0], j // blocks[1]] = True
    got = np.asarray(visible_blocks(_mask(**options), 3, 23, 23, *blocks))
    assert got.shape == want.shape and not (want & ~got).any()
    assert not exact or np.array_equal(got, want)
    for axis, of_keys in ((2, False), (1, True)):
        first, end = (
            np.asarray(x)
            for x in block_ranges(_mask(**options), 3, 23, 23, *blocks, of_keys=of_keys)
        )
        seen = np.moveaxis(got, axis, -1)
        for at in np.ndindex(first.shape):
            places = np.flatnonzero(seen[at])
            assert (first[at], end[at]) == ((places[0], places[-1] + 1) if len(places) else (0, 0))


def test_a_mask_without_arrays_is_known_exactly():
    assert Mask(True, 5, 3).known
    assert not _mask(kv_lengths=[1]).known and not _mask(q_offset=[0]).known


def test_the_drawing_of_the_module_is_what_the_code_computes():
    rows = re.findall(r"\d   ([#.](?: [#.]){5})    (\d)", masks.__doc__)
    drawn = np.array([[cell == "#" for cell in cells.split()] for cells, _ in rows])
    assert drawn.shape == (6, 6)
    ids = jnp.int32([[int(segment) for _, segment in rows]])
    positions = jnp.arange(6)
    seen = visible(
        positions[:, None],
        positions[None, :],
        causal=True,
        window=3,
        q_ids=ids[0, :, None],
        kv_ids=ids[0, None, :],
    )
    np.testing.assert_array_equal(seen, drawn)
    # The text below the drawing lists the blocks of two by two that the kernels visit.
    listed = [(int(i), int(j)) for i, j in re.findall(r"\((\d), (\d)\)", masks.__doc__)]
    visited = visible_blocks(Mask(True, 3, 0, ids, ids), 1, 6, 6, 2, 2)[0]
    assert listed == [tuple(block) for block in np.argwhere(visited).tolist()]

"""Compare single-token decoding against a cache, interpreted with the race detector, with
attention()."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax import compat
from mtnlg_jax.model.attention import decode_attention
from mtnlg_jax.model.kernels.call import DecodeCall
from mtnlg_jax.model.kernels.select import unsupported_reason
from mtnlg_jax.model.kernels.tpu.decode import WINDOW_BLOCK, _DecodePlan

FLOAT32 = 2e-5
FLOAT16 = 3e-3
# Both sides have values that int8 holds exactly; the weights are rounded to bfloat16 before their
# product.
INT8 = 2e-2


def _close(pair, tolerance):
    got, want = pair
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
    assert (
        np.isneginf(want[1]).any() and not got[0][np.isneginf(want[1])].any()
    )  # a row has an empty cache


@pytest.mark.parametrize(
    "case",
    [
        {"num_splits": 3, "keys": 700, "lengths": (700, 0, 650)},
        {"width": 160, "softcap": 2.0},
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ({}, {"num_splits": 1}, {"heads": 8, "kv_heads": 1, "width": 96})
        ),
    ],
    ids=str,
)
def test_the_tpu_kernel_equals_attention(kernels, case):
    _close(kernels.decoded("pallas_tpu", "float32", **case), FLOAT32)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"num_splits": 3, "keys": 400, "lengths": (400, 0, 330), "width": 160},
    ],
    ids=str,
)
def test_the_gpu_kernel_equals_attention(kernels, case):
    _close(kernels.decoded("pallas_gpu", "float16", **case), FLOAT16)


# (kernel, its dtype and tolerance, keys of a block)
KERNELS = [("pallas_tpu", "float32", FLOAT32, WINDOW_BLOCK), ("pallas_gpu", "float16", FLOAT16, 64)]


@pytest.mark.parametrize(("impl", "dtype", "tolerance", "_"), KERNELS)
@pytest.mark.parametrize(
    "case",
    [
        # The last row's query is 20 positions behind its last key, and sees 50 keys.
        {"window": 70, "positions": (299, 4, 149), "alibi": True, "softcap": 2.0, "num_splits": 2},
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                {"window": 1},
                {"window": 70, "heads": 8, "kv_heads": 1},
                {"window": 40, "positions": (299, 4, 400)},  # the last row sees no key
                {"alibi": True, "positions": (300, 4, 149)},
            )
        ),
    ],
    ids=str,
)
def test_a_window_and_slopes_equal_attention(kernels, impl, dtype, tolerance, _, case):
    _close(kernels.decoded(impl, dtype, **case), tolerance)


@pytest.mark.parametrize(("impl", "dtype", "tolerance", "block"), KERNELS)
def test_blocks_before_the_window_are_not_read(kernels, impl, dtype, tolerance, block):
    """NaN in a block that is read reaches the output, since the weight 0 times NaN is NaN."""
    keys = 3 * block
    case = {"rows": 2, "heads": 1, "kv_heads": 1, "keys": keys, "lengths": (keys, 0), "window": 50}
    _close(kernels.decoded(impl, dtype, hidden=2 * block, **case), tolerance)
    got, _ = kernels.decoded(impl, dtype, hidden=2 * block + 1, **case)
    assert np.isnan(got[0][0]).any()  # so the test sees a block that is read


def test_a_window_shortens_the_grid_and_names_only_its_blocks():
    plan = _DecodePlan(1.0, None, 4096, 512, 2, False, True, False)
    numbers = (jnp.int32([4096, 700, 700, 0]), jnp.int32([3900, 500, 900, 0]))
    visited = [
        [tuple(map(int, plan.block_of(numbers, row, 0, step))) for step in range(plan.steps)]
        for row in range(4)
    ]
    # The second row's window begins in the first block; the third row's lies past its length.
    assert visited == [[(7, 1), (7, 0)], [(0, 1), (1, 1)], [(1, 0), (1, 0)], [(0, 0), (0, 0)]]


@pytest.mark.parametrize("impl", ["pallas_tpu", "pallas_gpu"])
def test_positions_of_heads_stay_with_xla(impl):
    q = np.zeros((2, 4, 64), jnp.bfloat16)
    cache = np.zeros((2, 2, 128, 64), jnp.bfloat16)
    lengths = np.array([128, 3], np.int32)
    positions = np.broadcast_to(lengths[:, None] - 1, (2, 4))
    with compat.interpreted():
        call = DecodeCall(q, cache, cache, lengths, positions=positions, window=5)
        assert (
            unsupported_reason(impl, call) == "takes one position a row, positions (B,), not (B, N)"
        )
        assert unsupported_reason("xla", call) is None
        by_row = DecodeCall(q, cache, cache, lengths, positions=lengths, window=5)
        assert unsupported_reason(impl, by_row) is None
        unused = DecodeCall(q, cache, cache, lengths, positions=positions)
        assert unsupported_reason(impl, unused) is None


@pytest.mark.parametrize("impl", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize(
    "case", [{}, pytest.param({"window": 70}, marks=pytest.mark.slow)], ids=str
)
def test_an_int8_cache_equals_its_dequantized_values(kernels, impl, case):
    _close(kernels.decoded(impl, "bfloat16", int8=True, **case), INT8)


def test_an_int8_cache_without_kernels_equals_its_dequantized_values():
    draws = np.random.default_rng(0)
    q, k, v = (
        draws.standard_normal(shape).astype(np.float32)
        for shape in ((2, 4, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    )
    steps = [np.abs(x).max(-1) / 127 for x in (k, v)]
    whole = [np.round(x / step[..., None]) for x, step in zip((k, v), steps, strict=True)]
    lengths = np.array([9, 4], np.int32)
    got = decode_attention(
        q, *(x.astype(np.int8) for x in whole), lengths, k_scale=steps[0], v_scale=steps[1]
    )
    want = decode_attention(
        q, *(x * step[..., None] for x, step in zip(whole, steps, strict=True)), lengths
    )
    np.testing.assert_allclose(got, want, atol=FLOAT32)
    exact = decode_attention(q, k, v, lengths)
    assert 1e-4 < np.abs(got - exact).max() < 0.05  # eight bits lose a little precision

"""Compare single-token decoding against a cache, interpreted with the race detector, with
attention()."""

import numpy as np
import pytest

from mtnlg_jax.model.attention import decode_attention

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


@pytest.mark.parametrize("impl", ["pallas_tpu", "pallas_gpu"])
def test_an_int8_cache_equals_its_dequantized_values(kernels, impl):
    _close(kernels.decoded(impl, "bfloat16", int8=True), INT8)


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

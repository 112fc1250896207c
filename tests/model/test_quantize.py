"""NF4 against bitsandbytes 0.50: nf4.npz holds `quantize_4bit(quant_type="nf4", blocksize=64)` of a
matrix with a block of zeros and an outlier, and `dequantize_4bit` of that."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mtnlg_jax.model.quantize import NF4, dequantize_nf4, quantize_nf4


def test_nf4_equals_bitsandbytes_bit_for_bit():
    expected = np.load(Path(__file__).with_name("nf4.npz"))
    # Theirs has outputs first; the inputs of an output follow each other in both.
    codes, scales = quantize_nf4(np.ascontiguousarray(expected["weights"].T))
    assert np.array_equal(NF4, expected["code"])
    assert np.array_equal(codes.T, expected["packed"])
    assert np.array_equal(scales.T, expected["absmax"])
    back = np.asarray(dequantize_nf4(jnp.asarray(codes), jnp.asarray(scales), 0)).T
    assert np.array_equal(back, expected["dequantized"])
    assert len(set(codes.ravel().tolist())) > 100


def test_dequantizing_along_a_later_axis_gives_the_same_numbers():
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(2, 128, 3)).astype(np.float32)
    pairs = [quantize_nf4(layer) for layer in layers]
    codes, scales = (jnp.stack(parts) for parts in zip(*pairs, strict=True))
    stacked = dequantize_nf4(codes, scales, 1)
    for layer, pair in enumerate(pairs):
        alone = dequantize_nf4(*map(jnp.asarray, pair), 0)
        assert np.array_equal(stacked[layer], alone)
    # Half a step of the widest gap between codes.
    largest = np.abs(layers).reshape(2, 2, 64, 3).max(2, keepdims=True)
    error = np.abs(stacked - layers).reshape(2, 2, 64, 3) / largest
    assert error.max() <= 0.1520

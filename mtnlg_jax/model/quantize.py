"""Weights in fewer bits: int8 with one scale for each output, and NF4 with one for each block.

NF4 (Dettmers 2023, arXiv 2305.14314) has 16 codes, the quantiles of a normal distribution (appendix
E), and a scale, the largest magnitude, for each 64 inputs of an output: the blocks and the order of
the two codes in a byte are those of bitsandbytes. The scales are float32, without the second
quantization of that paper: 4.5 bits a weight.
"""

# Shapes: I inputs, O outputs

import jax
import jax.numpy as jnp
import numpy as np

NF4_BLOCK = 64  # inputs that share a scale
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_BETWEEN = (NF4[1:] + NF4[:-1]) / 2


def quantize(x, axes):
    """Return int8 numbers, and float32 scales without ``axes``.

    Symmetric: the largest number along ``axes`` becomes 127.
    """
    x = x.astype(jnp.float32)
    # -128 is not used, so that the range is symmetric.
    scale = jnp.abs(x).max(axes, keepdims=True) / 127
    # All zeros have scale 0, by which nothing can be divided.
    number = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    return number.astype(jnp.int8), scale.squeeze(axes)


def quantize_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``quantize(x, 1)`` of a float32 matrix, computed on the host."""
    # In place, since int8 is there to save another copy of a table.
    scale = np.maximum(x.max(1, keepdims=True), -x.min(1, keepdims=True)) / np.float32(127)
    number = x / np.where(scale > 0, scale, np.float32(1))
    # Rounds half to even, as jnp.round does.
    return np.rint(number, out=number).astype(np.int8), scale[:, 0]


def quantize_nf4(x_IO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (two codes a byte (I / 2, O) uint8, scales (I / 64, O) float32), on the host.

    I must be a multiple of 64.
    """
    inputs, outputs = x_IO.shape
    blocks = x_IO.reshape(inputs // NF4_BLOCK, NF4_BLOCK, outputs)
    scales = np.abs(blocks).max(1)
    # A block of zeros has scale 0 and the code of 0.
    blocks = blocks / np.where(scales > 0, scales, np.float32(1))[:, None]
    codes = np.searchsorted(_BETWEEN, blocks).astype(np.uint8).reshape(inputs // 2, 2, outputs)
    return codes[:, 0] << 4 | codes[:, 1], scales


def dequantize_nf4(codes: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """Return float32 weights, I long along ``axis``, from two codes a byte, I / 2 long there, and
    scales, I / 64 long there."""
    both = jnp.stack([codes >> 4, codes & 15], axis + 1)
    shape = list(codes.shape)
    values = jnp.asarray(NF4)[both].reshape(
        *shape[:axis], scales.shape[axis], NF4_BLOCK, *shape[axis + 1 :]
    )
    shape[axis] *= 2
    return (values * jnp.expand_dims(scales, axis + 1)).reshape(shape)

"""Weights as decoding multiplies by them: a row for each output, in int8 with one scale a row, or
as floats.

Symmetric: the largest weight of an output becomes 127, zero stays zero. The scale is common to a
row and so multiplies
the sum: no dequantised weight is ever held. Norms, biases and positions stay as they are, for they
are few. The table that tokens are looked up in has a scale for each token, so that a head which is
the same table is held once.

XLA:CPU multiplies neither int8 nor bfloat16 by a single vector with the processor's instructions
for them, but in plain loops (ten times slower than float32, measured on jax 0.12 with AVX512 and
AMX), and converts nothing while it reads. It does have kernels for int8 by int8 and for bfloat16,
for matrices of a few rows: so there every activation becomes two int8 numbers, hi + lo / 254, 16
bits together, as two rows of one integer product.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax import compat

# For fewer rows XLA:CPU leaves its kernels, or they are no faster.
LEAST_ROWS = 4
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


def quantise(x, axes):
    """(int8, float32 scales without ``axes``): symmetric, the largest along ``axes`` becomes
    127."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axes, keepdims=True) / 127
    # Nothing but zeros has no scale of its own.
    number = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    return number.astype(jnp.int8), scale.squeeze(axes)


def quantise_numpy(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``quantise(x, 1)`` of a float32 matrix, on the host."""
    # In place, since another copy of a table is what int8 is to save.
    scale = np.maximum(x.max(1, keepdims=True), -x.min(1, keepdims=True)) / np.float32(127)
    number = x / np.where(scale > 0, scale, np.float32(1))
    return np.rint(number, out=number).astype(np.int8), scale[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowWeight:
    """A weight with outputs first, (O, I), and what its product is: in place of an array in a
    Param."""

    number_OI: jax.Array
    scale_O: jax.Array | None  # of int8
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(
        metadata={"static": True}
    )  # dims of x that the product sums over

    def __getitem__(self, key):
        """``param[...]`` is the weight itself, as of an array."""
        assert key is ..., "a weight in rows is read as a whole"
        return self

    def __call__(self, x):
        return self.float32(x).astype(x.dtype)

    def float32(self, x):
        """The product before it is rounded to x's type."""
        rows_RI = x.reshape(-1, self.number_OI.shape[1])
        if self.scale_O is None:
            y_RO = _multiply(rows_RI.astype(self.number_OI.dtype), self.number_OI)
        elif on_cpu():
            y_RO = self.scale_O * _multiply_int8(rows_RI, self.number_OI)
        else:
            y_RO = self.scale_O * jax.lax.dot_general(
                rows_RI,
                self.number_OI.astype(x.dtype),
                _ROWS_BY_ROWS,
                preferred_element_type=jnp.float32,
            )
        return y_RO.reshape(*x.shape[: x.ndim - self.inputs], *self.outputs)

    def rows(self, ids, dtype):
        """The rows of ``ids`` (...), dequantised, (..., I)."""
        rows = self.number_OI[ids]
        return (rows if self.scale_O is None else rows * self.scale_O[ids][..., None]).astype(dtype)

    def array(self, dtype):
        """(O, I), dequantised."""
        if self.scale_O is None:
            return self.number_OI.astype(dtype)
        return (self.number_OI * self.scale_O[:, None]).astype(dtype)


def on_cpu() -> bool:
    return compat.device_kind() == "cpu"


def rows_of(weight, inputs: int, int8: bool, dtype, outputs_first: bool = False) -> RowWeight:
    """A float weight, its first ``inputs`` dims those that the product sums over (or,
    ``outputs_first``, (O, I))."""
    if outputs_first:
        matrix_OI = weight
        outputs = weight.shape[:1]
    else:
        outputs = weight.shape[inputs:]
        matrix_OI = weight.reshape(-1, math.prod(outputs)).T
    number_OI, scale_O = quantise(matrix_OI, 1) if int8 else (matrix_OI.astype(dtype), None)
    return RowWeight(number_OI, scale_O, tuple(outputs), inputs)


def _multiply(x_RI, number_OI):
    """float32 (R, O)."""
    rows = x_RI.shape[0]
    if on_cpu() and x_RI.dtype != jnp.float32:
        x_RI = jnp.pad(x_RI, ((0, max(0, LEAST_ROWS - rows)), (0, 0)))
    return jax.lax.dot_general(x_RI, number_OI, _ROWS_BY_ROWS, preferred_element_type=jnp.float32)[
        :rows
    ]


def _multiply_int8(x_RI, number_OI):
    """float32 (R, O), x to 16 bits. Sums fit int32 up to 2^31 / 127^2 = 133,000 inputs."""
    rows = x_RI.shape[0]
    x_RI = x_RI.astype(jnp.float32)
    scale_R1 = jnp.abs(x_RI).max(1, keepdims=True) / 127
    scaled_RI = x_RI / jnp.where(scale_R1 > 0, scale_R1, 1.0)
    hi_RI = jnp.round(scaled_RI)
    lo_RI = jnp.round((scaled_RI - hi_RI) * 254)
    both_RI = jnp.concatenate([hi_RI, lo_RI]).astype(jnp.int8)
    both_RI = jnp.pad(both_RI, ((0, max(0, LEAST_ROWS - 2 * rows)), (0, 0)))
    sums_RO = jax.lax.dot_general(
        both_RI, number_OI, _ROWS_BY_ROWS, preferred_element_type=jnp.int32
    )
    sums_RO = sums_RO.astype(jnp.float32)
    return scale_R1 * (sums_RO[:rows] + sums_RO[rows : 2 * rows] / 254)

"""Weights for decoding: one row for each output, in int8 with one scale a row, or in floats.

Quantization is symmetric: the largest weight of an output becomes 127, zero stays zero. The scale
is common to a row and multiplies the sum, so no dequantized weight is ever held. Norms, biases and
positions stay in floats, since they are small. The token table has a scale for each token, so that
a head tied to it is held once.

XLA:CPU multiplies int8 or bfloat16 by a single vector in plain loops, not with the processor's
instructions (ten times slower than float32, measured on jax 0.12 with AVX512 and AMX), and converts
nothing while it reads. It does have kernels for int8 by int8 and for bfloat16, for matrices of a
few rows. There every activation therefore becomes two int8 numbers, hi + lo / 254, 16 bits
together, as two rows of one integer product.
"""

# Shapes: B rows of a product, I inputs, O outputs, E experts

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mtnlg_jax import compat
from mtnlg_jax.model.grouped import grouped_product
from mtnlg_jax.model.parts import WholeWeight
from mtnlg_jax.model.quantize import quantize
from mtnlg_jax.parallel.auto import axes_of

# With fewer rows XLA:CPU does not use its kernels, or they are not faster.
LEAST_ROWS = 4
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowWeight(WholeWeight):
    """A weight with outputs first, (O, I), and its product; takes an array's place in a Param."""

    number_OI: jax.Array
    scale_O: jax.Array | None  # of int8
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})  # dims of x summed over

    def __call__(self, x):
        return self.float32(x).astype(x.dtype)

    def float32(self, x):
        """Return the product before it is rounded to x's type."""
        # Both operands have inputs last, so memory is read in order and nothing is transposed.
        rows_BI = x.reshape(-1, self.number_OI.shape[1])
        if self.scale_O is None:
            y_BO = _multiply(rows_BI.astype(self.number_OI.dtype), self.number_OI)
        elif on_cpu():
            y_BO = self.scale_O[None, :] * _multiply_int8(rows_BI, self.number_OI)
        else:
            # The integers are exact in bfloat16 (8 bits of significand), and the scale multiplies
            # the float32 sum.
            y_BO = self.scale_O[None, :] * jax.lax.dot_general(
                rows_BI,
                self.number_OI.astype(x.dtype),
                _ROWS_BY_ROWS,
                preferred_element_type=jnp.float32,
            )
        return y_BO.reshape(*x.shape[: x.ndim - self.inputs], *self.outputs)

    def rows(self, ids, dtype):
        """Return the rows of ``ids`` (...), dequantized: (..., I)."""
        rows = self.number_OI[ids]
        return (rows if self.scale_O is None else rows * self.scale_O[ids][..., None]).astype(dtype)

    def array(self, dtype):
        """Return the weight, dequantized: (O, I)."""
        if self.scale_O is None:
            return self.number_OI.astype(dtype)
        return (self.number_OI * self.scale_O[:, None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeight(WholeWeight):
    """The weights of experts in int8, with a scale for each output of each expert."""

    number_EIO: Any  # arrays, or what describes them
    scale_EO: Any

    @staticmethod
    def specs(spec: P) -> "ExpertWeight":
        """Return the specs of the arrays of a weight (E, I, O) that ``spec`` splits."""
        expert, _, output = spec
        return ExpertWeight(spec, P(expert, output))

    def grouped(self, x_BI, sizes_E, experts_B):
        """Return the products of rows that are sorted by expert, (B, O)."""
        if on_cpu():
            # float32, since XLA:CPU multiplies it the fastest; it holds the integers exactly.
            numbers_EIO = self.number_EIO.astype(jnp.float32)
            y_BO = grouped_product(x_BI.astype(jnp.float32), numbers_EIO, sizes_E)
        else:
            numbers_EIO = self.number_EIO.astype(x_BI.dtype)
            y_BO = jax.lax.ragged_dot(
                x_BI, numbers_EIO, sizes_E, preferred_element_type=jnp.float32
            )
        return (y_BO * self.scale_EO[experts_B]).astype(x_BI.dtype)


def experts_of(weight_EIO) -> ExpertWeight:
    """Return the float weights of experts in int8."""
    return ExpertWeight(*quantize(weight_EIO, 1))


def on_cpu() -> bool:
    return compat.device_kind() == "cpu"


def by_rows() -> bool:
    """Return whether float weights are faster as RowWeights too, as int8 weights are held."""
    return on_cpu()


def rows_of(weight, inputs: int, int8: bool, dtype, outputs_first: bool = False) -> RowWeight:
    """Return a float weight as a RowWeight.

    The product sums over its first ``inputs`` dims; with ``outputs_first`` it is (O, I) already.
    """
    if outputs_first:
        matrix_OI = weight
        outputs = weight.shape[:1]
    else:
        outputs = weight.shape[inputs:]
        matrix_OI = weight.reshape(-1, math.prod(outputs)).T
    number_OI, scale_O = quantize(matrix_OI, 1) if int8 else (matrix_OI.astype(dtype), None)
    return RowWeight(number_OI, scale_O, tuple(outputs), inputs)


def _multiply(x_BI, number_OI):
    """Return the product in float32, (B, O)."""
    rows = x_BI.shape[0]

    def product(x_BI):
        return jax.lax.dot_general(
            x_BI, number_OI, _ROWS_BY_ROWS, preferred_element_type=jnp.float32
        )

    if not on_cpu():
        return product(x_BI)
    if x_BI.dtype == jnp.float32:
        if not 1 < rows < LEAST_ROWS or axes_of("B", rows):
            return product(x_BI)
        # XLA:CPU reads a float32 weight as it is for one row, and copies it into another layout for
        # several, which takes as long as two more rows.
        return jnp.concatenate([product(x_BI[at : at + 1]) for at in range(rows)])
    # Rows of zeros reach XLA:CPU's kernels; a row more costs less than its plain loop.
    return product(jnp.pad(x_BI, ((0, max(0, LEAST_ROWS - rows)), (0, 0))))[:rows]


def _multiply_int8(x_BI, number_OI):
    """Return the product in float32, (B, O), with x rounded to 16 bits.

    Sums fit int32 up to 2^31 / 127^2 = 133,000 inputs.
    """
    rows = x_BI.shape[0]
    x_BI = x_BI.astype(jnp.float32)
    scale_B1 = jnp.abs(x_BI).max(1, keepdims=True) / 127
    scaled_BI = x_BI / jnp.where(scale_B1 > 0, scale_B1, 1.0)
    hi_BI = jnp.round(scaled_BI)
    # The rest is within 0.5, so lo is within 127.
    lo_BI = jnp.round((scaled_BI - hi_BI) * 254)
    # One product of twice the rows reads the weights once.
    both_BI = jnp.concatenate([hi_BI, lo_BI]).astype(jnp.int8)
    both_BI = jnp.pad(both_BI, ((0, max(0, LEAST_ROWS - 2 * rows)), (0, 0)))
    sums_BO = jax.lax.dot_general(
        both_BI, number_OI, _ROWS_BY_ROWS, preferred_element_type=jnp.int32
    )
    sums_BO = sums_BO.astype(jnp.float32)
    return scale_B1 * (sums_BO[:rows] + sums_BO[rows : 2 * rows] / 254)

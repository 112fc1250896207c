"""MXFP4, the 4-bit floats of gpt-oss (Open Compute Project, Microscaling Formats, 2023).

A tensor X (E, inputs, outputs) is stored as ``X_blocks`` (E, outputs, groups, 16), bytes of two
numbers each with the low half first, and ``X_scales`` (E, outputs, groups), exponents of two to
which 127 is added. A group is 32 inputs.
"""

# Shapes: E experts, O outputs, G groups of 32 inputs, I inputs, B 16 (bytes of a group)

import jax.numpy as jnp
import numpy as np

BLOCKS = "_blocks"
SCALES = "_scales"
BYTES = 16  # of a group
# By their four bits: a sign, two of the exponent, one of the fraction.
_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_VALUES, -_VALUES])


def pairs_of(names: set[str]) -> dict[str, tuple[str, str]]:
    """Return {tensor: (its blocks, its scales)}. Raises ValueError that names a tensor of which
    only one of the two is there."""
    found = {}
    for end, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        for name in sorted(names):
            if not name.endswith(end):
                continue
            base = name.removesuffix(end)
            if base + other not in names:
                raise ValueError(
                    f"{name} is half of an MXFP4 tensor, and {base + other} is missing; copy all "
                    "shards"
                )
            found[base] = base + BLOCKS, base + SCALES
    return found


def shape_of(name: str, blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of tensor ``name``. Raises ValueError if those of its halves differ."""
    if len(blocks) != 4 or blocks[-1] != BYTES or blocks[:-1] != scales:
        raise ValueError(
            f"{name} has MXFP4 blocks of {list(blocks)} and scales of {list(scales)}; they must be "
            f"[experts, outputs, groups, {BYTES}] and [experts, outputs, groups]; copy the model "
            "again"
        )
    experts, outputs, groups, _ = blocks
    return experts, groups * 2 * BYTES, outputs


def unpack(blocks_EOGB: np.ndarray, scales_EOG: np.ndarray) -> np.ndarray:
    """Return the numbers, bfloat16 (E, I, O), as transformers does: all are exact, and a scale of
    255 is not a number."""
    experts, outputs, groups, half = blocks_EOGB.shape
    made = np.empty((experts, groups * 2 * half, outputs), jnp.bfloat16)
    # An expert at a time: those of a layer would fill gigabytes in float32.
    for expert, (blocks, scales) in enumerate(zip(blocks_EOGB, scales_EOG, strict=True)):
        numbers = np.empty((outputs, groups, 2 * half), np.float32)
        numbers[..., 0::2] = _VALUES[blocks & 15]
        numbers[..., 1::2] = _VALUES[blocks >> 4]
        with np.errstate(over="ignore"):
            numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
        numbers[scales == 255] = np.nan
        made[expert] = numbers.reshape(outputs, -1).T
    return made

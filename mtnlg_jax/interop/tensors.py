"""One row of a conversion table: how a tensor of another project holds parameters of ours.

Theirs are matrices (outputs, inputs) and vectors, a layer apart. Ours have an axis for each letter
of their names, and layers are stacked. The functions here translate one layer, or one expert of a
layer, of either into the other.
"""

# Letters in names: D width, F MLP width, N query heads, K key/value heads, H head width, V
# vocabulary, P positions, C width of the masked head's transform, E experts

import math
from dataclasses import dataclass

import numpy as np

from mtnlg_jax.config import ModelConfig


@dataclass(frozen=True)
class Tensor:
    """What a tensor of theirs holds, and how."""

    ours: tuple[str, ...]  # names of parameters, side by side along the outputs
    by_group: bool = False  # queries, keys and values of one key/value head after another
    interleaved: bool = False  # outputs of the parts take turns
    pairs: bool = False  # rotary pairs are neighbors; ours are half a width apart
    plus_one: bool = False  # norm scales are stored less 1
    columns: bool = False  # (inputs, outputs)
    skip: int = 0  # leading rows that are never used
    add: str | None = None  # another tensor, whose first row is added to each row


def dims_of(name: str) -> str:
    """Return the dims in the name of a parameter: DNH for blocks.attention.w_q_DNH."""
    return name.rpartition("_")[2]


def is_vector(name: str) -> bool:
    """Return whether a parameter is a vector for each layer and expert: a bias or a scale."""
    return name.rpartition(".")[2].startswith(("b_", "bias", "scale"))


def _is_table(dims: str) -> bool:
    return dims in ("VD", "PD")


def their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a part of theirs holds a parameter of one layer and one expert."""
    dims = dims_of(name).removeprefix("E")
    if is_vector(name):
        return (math.prod(shape),)
    if _is_table(dims):
        return shape
    if dims.startswith("D"):
        return (math.prod(shape[1:]), shape[0])
    return (shape[-1], math.prod(shape[:-1]))


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
    """Return one layer's parameter as a matrix (outputs, inputs) or a vector."""
    dims = dims_of(name).removeprefix("E")
    if is_vector(name):
        return array.reshape(-1)
    if _is_table(dims):
        return array
    if dims.startswith("D"):
        return array.reshape(array.shape[0], -1).T
    return array.reshape(-1, array.shape[-1]).T


def to_ours(name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo `to_theirs`."""
    if rows.ndim == 1 or _is_table(dims_of(name)):
        return rows.reshape(shape)
    return rows.T.reshape(shape)


def join(tensor: Tensor, parts: list[np.ndarray], model: ModelConfig) -> np.ndarray:
    """Return the rows of a tensor, given those of its parts."""
    if tensor.by_group:
        groups = model.kv_heads
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return np.concatenate(grouped, 1).reshape(-1, *parts[0].shape[1:])
    if tensor.interleaved:
        return np.stack(parts, 1).reshape(-1, *parts[0].shape[1:])
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def part_of(
    tensor: Tensor, rows: np.ndarray, sizes: list[int], number: int, model: ModelConfig
) -> np.ndarray:
    """Return the rows of part ``number`` of a tensor whose parts have ``sizes`` rows."""
    if tensor.interleaved:
        return rows[number :: len(sizes)]
    groups = model.kv_heads if tensor.by_group else 1
    grouped = rows.reshape(groups, -1, *rows.shape[1:])
    start = sum(sizes[:number]) // groups
    part = grouped[:, start : start + sizes[number] // groups]
    return part.reshape(-1, *rows.shape[1:])


def turn_pairs(rows: np.ndarray, model: ModelConfig, *, back: bool) -> np.ndarray:
    """Return queries' or keys' rows with the dims of each head in another order: neighbors (0, 1),
    (2, 3) ... that rotate together to halves, or ``back``."""
    width = model.head_width
    turning = model.rotary_width
    order = np.concatenate(
        [np.arange(0, turning, 2), np.arange(1, turning, 2), np.arange(turning, width)]
    )
    if back:
        order = np.argsort(order)
    return rows.reshape(-1, width, *rows.shape[1:])[:, order].reshape(rows.shape)

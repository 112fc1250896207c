"""A training batch on the mesh: int32/float32 arrays (M, B, S), M micro-batches of B rows.

B is split over ``data`` and ``expert``, S over ``context`` in zigzag order. A model with a prefix
has that of each row as well, (M, B, *model.prefix.shape), on every device that has tokens of the
row.
"""

# Shapes: M micro-batches, B rows of one over the whole mesh, S query positions

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.data.poisson import capacity
from mtnlg_jax.parallel.collectives import zigzag
from mtnlg_jax.parallel.mesh import BATCH, ROWS, row_shards

BATCH_KEYS = ("tokens", "labels", "segment_ids", "positions", "weights", "rows")


def batch_keys(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of the arrays of a batch for ``model``."""
    return (*BATCH_KEYS, "prefix") if model.prefix.positions else BATCH_KEYS


def micro_batch_shape(config: Config, mesh: Mesh, most: int | None = None) -> tuple[int, int]:
    """Return (M, B) of the largest batch, or of ``most`` of its rows.

    A circular pipeline takes micro-batches by the flush, so some may have to stay empty.
    """
    size = row_shards(mesh.shape)
    train = config.train
    rows = (train.micro_batch_size or train.global_batch_size // size) * size
    if most is not None:  # no rows of weight 0 beside few
        rows = min(rows, -(-most // size) * size)
    # `validate_batch` has checked that this divides the whole batch.
    micro_batches = -(-(most or train.global_batch_size) // rows)
    unit = 1
    if mesh.shape["pipe"] > 1 and config.mesh.schedule == "circular":
        unit = config.mesh.flush or mesh.shape["pipe"]
    # Rounded up to whole flushes; the rows added have weight 0.
    return -(-micro_batches // unit) * unit, rows


def private_batch_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Return (M, B) of a batch of Poisson sampling: of each micro-batch a shard has one unit."""
    per_unit = config.optimizer.rows_of_unit
    shards = row_shards(mesh.shape)
    room = capacity(config.train.global_batch_size / per_unit)
    return -(-room // shards), shards * per_unit


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the largest batch as ShapeDtypeStructs: every step is compiled for this input."""
    shape_of = private_batch_shape if config.optimizer.private else micro_batch_shape
    micro, rows = shape_of(config, mesh)

    def one(name):
        shape, spec = layout_of(name, (micro, rows, config.sequence_length), config.model)
        dtype = {"weights": "float32", "prefix": config.model.prefix.dtype}.get(name, "int32")
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    return {name: one(name) for name in batch_keys(config.model)}


def layout_of(
    name: str, shape: tuple[int, int, int], model: ModelConfig
) -> tuple[tuple[int, ...], P]:
    """Return the shape and the PartitionSpec of one array of a batch (M, B, S)."""
    # Row numbers and prefixes have no position in the sequence, so they are without S.
    tail = {"rows": (), "prefix": model.prefix.shape}.get(name)
    return (shape, BATCH) if tail is None else ((*shape[:2], *tail), P(None, ROWS))


def put_batch(
    rows_of: Callable[[np.ndarray], dict[str, np.ndarray]],
    shape: tuple[int, int, int],
    mesh: Mesh,
    model: ModelConfig | None = None,
    more: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """Return the global batch (M, B, S) as sharded arrays, S in the zigzag order of ``context``.

    ``rows_of(numbers)`` returns a dict of (n, S) arrays for global row numbers m * B + b, and for
    a ``model`` with a prefix "prefix" (n, *model.prefix.shape). It is called only for rows that
    this process holds. It may return other numbers of the rows for dropout, "rows" (n,). ``more``:
    names of further int32 arrays (n, S).
    """
    model = ModelConfig() if model is None else model
    micro, rows, length = shape
    # The order is applied on the host, so that devices never exchange tokens.
    order = zigzag(length, mesh.shape["context"])
    parts: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(index) -> dict[str, np.ndarray]:
        # Devices along pipe, context and tensor share rows: they are read once.
        key = (index[1].start or 0, rows if index[1].stop is None else index[1].stop)
        if key not in parts:
            # Row b of micro-batch m is global row m B + b on every mesh, which makes a batch
            # independent of the number of devices.
            numbers = (np.arange(micro)[:, None] * rows + np.arange(*key)).reshape(-1)
            found = rows_of(numbers)
            prefix = {"prefix": found.pop("prefix")} if model.prefix.positions else {}
            named = found.pop("rows", numbers)
            flat = {name: x[:, order] for name, x in found.items()} | prefix
            flat["rows"] = named.astype(np.int32)
            parts[key] = {
                name: x.reshape(micro, key[1] - key[0], *x.shape[1:]) for name, x in flat.items()
            }
        return parts[key]

    def array(name: str) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            # Rows are selected already; what is left of the index is the part of S.
            return part(index)[name][:, :, *index[2:]]

        size, spec = layout_of(name, shape, model)
        return jax.make_array_from_callback(size, NamedSharding(mesh, spec), shard)

    return {name: array(name) for name in (*batch_keys(model), *more)}

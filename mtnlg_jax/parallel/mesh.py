"""THE PLAN: how every tensor lies on the mesh.

The letters at the end of a parameter's name are its dims (``w_q_DNH``); this table turns a dim into
a mesh axis. Parameters, gradients, optimizer moments and checkpoints carry the same names, so they
share the plan.

| dim | split over | what it costs |
| --- | --- | --- |
| V vocabulary | tensor | one reduce-scatter after the look-up; three scalars a token in the loss |
| N query heads, K key/value heads | tensor | gather of the sequence before, reduce-scatter after
the half block |
| F MLP width | tensor | the same |
| D width, of weights only | data (ZeRO) | all-gather of the weight, reduce-scatter of its gradient
|
| L layers | pipe | one activation to the neighbour a tick, each way |
| M micro-batches, in embedding and head | pipe | none: the pipeline hands each to its home |
| B batch | data | one sum of the gradients a step |
| S sequence | context | keys and values, or heads, change places in attention |
| S sequence, between half blocks | tensor too | none: norms and residuals work on their own tokens
|
| H head width, P positions, C, R rank of an adapter | none | |
"""

import math
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig, near_divisors

AXES = ("pipe", "data", "context", "tensor")  # slowest network first

AXIS_OF = {"L": "pipe", "V": "tensor", "N": "tensor", "K": "tensor", "F": "tensor", "D": "data"}
UNSPLIT = "HPCR"

BATCH = P(
    None, "data", "context"
)  # tokens, labels, weights (M, B, S): rows over data, places over context


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Sizes of AXES on ``devices`` devices; ``config.data=-1`` takes what the others leave.
    Raises ValueError when the sizes do not multiply to ``devices``."""
    fixed = config.pipe * config.context * config.tensor
    data = devices // fixed if config.data == -1 else config.data
    if fixed * data != devices or data == 0:
        raise ValueError(
            f"mesh pipe={config.pipe} x data={config.data} x context={config.context} x tensor={config.tensor} "
            f"does not fit {devices} devices; their product must be {devices} (data=-1 takes the rest)"
        )
    return dict(zip(AXES, (config.pipe, data, config.context, config.tensor), strict=True))


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh of AXES over ``devices`` (default: all of them), of the sizes of ``mesh_shape``."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(
        tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices
    )


def parameter_name(path) -> str:
    """The attribute name of a parameter from its pytree key path: the last string key in it."""
    names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
    return names[-1]


def dims_of(path) -> str:
    """The dims of the parameter at ``path``, with L in front below ``blocks``: ``blocks.w_q_DNH``
    -> LDNH."""
    stacked = any(getattr(key, "key", None) == "blocks" for key in path)
    return ("L" if stacked else "") + parameter_name(path).rsplit("_", 1)[1]


def spec_of(dims: str, zero: int = 1) -> P:
    """The PartitionSpec of a tensor whose dims are ``dims``. Raises ValueError on an unknown dim,
    or when two dims would be split over the same axis."""
    axes = []
    for dim in dims:
        if dim not in AXIS_OF and dim not in UNSPLIT:
            raise ValueError(
                f"dim {dim!r} of {dims!r} is not in the plan; add a row to AXIS_OF or UNSPLIT"
            )
        axis = AXIS_OF.get(dim)
        if axis == "data" and zero == 0:
            axis = None
        if axis is not None and axis in axes:
            raise ValueError(f"{dims!r} would use mesh axis {axis!r} twice; name its dims apart")
        axes.append(axis)
    return P(*axes)


def specs_of(tree, zero: int = 1):
    """A tree of PartitionSpecs for a tree of named parameters (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec_of(dims_of(path), zero) if getattr(leaf, "ndim", 0) else P(), tree
    )


def local_shape(
    name: str, dims: str, shape: tuple[int, ...], sizes, zero: int = 1
) -> tuple[int, ...]:
    """What one device has of a tensor ``shape`` on a mesh of ``sizes`` (axis -> size). Raises
    ValueError naming the tensor when a dim does not divide."""
    local = []
    for dim, size, axis in zip(dims, shape, spec_of(dims, zero), strict=True):
        parts = sizes[axis] if axis else 1
        if size % parts:
            way_out = f"try mesh.{axis}={near_divisors(size, parts)}" + (
                ", or mesh.zero=0" if axis == "data" else ""
            )
            raise ValueError(f"{name}: {dim}={size} does not divide by {axis}={parts}; {way_out}")
        local.append(size // parts)
    return tuple(local)


def shardings_of(tree, mesh: Mesh, zero: int = 1):
    """Like ``specs_of``, as NamedShardings. Raises ValueError naming the first tensor that does not
    divide."""

    def sharding(path, leaf):
        if not getattr(leaf, "ndim", 0):
            return NamedSharding(mesh, P())
        dims = dims_of(path)
        local_shape(parameter_name(path), dims, leaf.shape, mesh.shape, zero)
        return NamedSharding(mesh, spec_of(dims, zero))

    return jax.tree_util.tree_map_with_path(sharding, tree)


class Row(NamedTuple):
    """A parameter in the plan; ``bytes`` is what one device has of one float32 copy."""

    path: str
    dims: str
    shape: tuple[int, ...]
    spec: P
    local: tuple[int, ...]
    bytes: int


def plan_table(tree, sizes: dict[str, int], zero: int = 1) -> list[Row]:
    """A Row for every parameter of ``tree``. Raises ValueError naming the first that does not
    divide."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dims = dims_of(path)
        name = ".".join(key.key for key in path if isinstance(getattr(key, "key", None), str))
        local = local_shape(parameter_name(path), dims, leaf.shape, sizes, zero)
        rows.append(Row(name, dims, leaf.shape, spec_of(dims, zero), local, 4 * math.prod(local)))
    return rows

"""THE PLAN: how every tensor is split over the mesh.

The letters at the end of a parameter's name are its dims (``w_q_DNH``). This table maps a dim to a
mesh axis. Parameters, gradients, optimizer moments and checkpoints have the same names, so they
share the plan.

| dim | split over | cost |
| --- | --- | --- |
| V vocabulary | tensor | one reduce-scatter after the look-up; three scalars a token in the loss |
| N query heads, K key/value heads | tensor | gather of S before, reduce-scatter after attention |
| K key/value heads, fewer than the parts | none | products of all K on every device |
| F MLP width | tensor | the same around the MLP |
| D width, weights only | data x expert (ZeRO) | all-gather, reduce-scatter of its gradient |
| D width, weights of experts | data (ZeRO) | the same |
| L layers | pipe | one activation to the next stage a tick, each way |
| M micro-batches, embedding and head only | pipe | none: the pipeline sends each to its device |
| B rows | data x expert | one sum of the gradients a step |
| S sequence | context | exchange of keys and values, or of heads, in attention |
| S sequence, between half blocks | tensor too | none: norms and residuals are per token |
| E experts | expert | gather of tokens before, reduce-scatter after the experts |
| E experts, outputs of a router | none | |
| H head width, P positions, R rank of an adapter, C width of a masked head | none | |
| C width of a prefix, I numbers of a patch of an image | none | |
| U columns of SOAP's statistics whose rows tensor splits | data x expert (ZeRO) | as D |
| J columns of its others | none | |
| W steps of a history | none | |
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig, near_divisors

# The last axis numbers neighboring devices: tensor, which communicates most, spans the fastest
# links.
AXES = ("pipe", "data", "expert", "context", "tensor")  # slowest network first

# Devices along these have rows of their own. All parameters but those of experts are alike on
# them, so ZeRO splits D over both.
ROWS = ("data", "expert")

# No two dims of one tensor may share an axis, so the dims of a new parameter must differ in it.
AXIS_OF: dict[str, str | tuple[str, ...]] = {
    "L": "pipe",
    "V": "tensor",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "D": ROWS,
    "U": ROWS,
    "E": "expert",
}
UNSPLIT = "CHIJPRW"

# The bias by which routers choose experts: float32 in every step, and its gradient counts tokens.
EXPERT_BIAS = "b_balance_E"

# Tokens, labels and weights, (M, B, S): rows are split over ROWS, positions over context.
# Every stage looks up what it needs of a micro-batch by its number, so M stays whole.
BATCH = P(None, ROWS, "context")


def row_shards(sizes: Mapping[str, int]) -> int:
    """Return the number of parts into which a mesh of ``sizes`` (axis -> size) splits rows."""
    return math.prod(sizes[axis] for axis in ROWS)


def described(sizes: Mapping[str, int]) -> str:
    """Return text such as "pipe 1 x data 8 x context 1 x tensor 4"; expert only where above 1."""
    shown = {axis: size for axis, size in sizes.items() if axis != "expert" or size > 1}
    return " x ".join(f"{axis} {size}" for axis, size in shown.items())


def axes_in(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the axes that an entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, int]:
    """Return the sizes of AXES on ``devices`` devices; ``config.data=-1`` takes the rest.

    Raises ValueError when the product of the sizes is not ``devices``.
    """
    # data is the axis that grows with the number of devices, since it changes nothing else in the
    # plan.
    fixed = config.pipe * config.expert * config.context * config.tensor
    data = devices // fixed if config.data == -1 else config.data
    # data is 0 where the other axes need more devices than there are.
    if fixed * data != devices or data == 0:
        raise ValueError(
            f"mesh pipe={config.pipe} x data={config.data} x expert={config.expert} x "
            f"context={config.context} x tensor={config.tensor} does not fit {devices} devices; "
            f"their product must be {devices} (data=-1 takes the rest)"
        )
    sizes = (config.pipe, data, config.expert, config.context, config.tensor)
    return dict(zip(AXES, sizes, strict=True))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of AXES over ``devices`` (default: all), with the sizes of `mesh_shape`."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    sizes = tuple(shape.values())
    # Auto: outside the manual region, as in the optimizer's update, XLA derives how to split.
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # Only on v5e does JAX by itself divide a dim of the torus between axes.
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def parameter_name(path) -> str:
    """Return a parameter's name from its pytree key path: the last string key."""
    # Attributes of NNX variables and indices of tuples are not string keys.
    names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
    return names[-1]


def dims_of(path) -> str:
    """Return the dims of the parameter at ``path``: LDNH for ``blocks.w_q_DNH``."""
    # "blocks" is a key of a model's State, or a field of Params: all below it is stacked.
    stacked = any("blocks" in (getattr(k, "key", None), getattr(k, "name", None)) for k in path)
    return ("L" if stacked else "") + parameter_name(path).rsplit("_", 1)[1]


def spec_of(dims: str, zero: int = 1, whole: str = "") -> P:
    """Return the PartitionSpec of a tensor whose dims are ``dims``; those in ``whole`` stay whole.

    Raises ValueError on an unknown dim, or when two dims would be split over the same axis.
    """
    # The experts of a weight are split, and those of a router, whose last dim they are, are not.
    of_experts = "E" in dims[:-1]
    axes: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for dim in dims:
        if dim not in AXIS_OF and dim not in UNSPLIT:
            raise ValueError(
                f"dim {dim!r} of {dims!r} is not in the plan; add a row to AXIS_OF or UNSPLIT"
            )
        axis = AXIS_OF.get(dim)
        if axis == ROWS and of_experts:
            axis = "data"
        # Without ZeRO every device along data holds whole parameters and moments.
        unsharded = dim in "DU" and zero == 0
        if unsharded or dim in whole or (dim == "E" and not of_experts):
            axis = None
        # JAX would refuse such a spec as well, but without the name of the tensor.
        for name in axes_in(axis):
            if name in used:
                raise ValueError(
                    f"{dims!r} would use mesh axis {name!r} twice; name its dims differently"
                )
            used.add(name)
        axes.append(axis)
    return P(*axes)


def whole_dims(dims: str, shape: Sequence[int], tensor: int) -> str:
    """Return the dims that tensor does not split: key/value heads, if it has a multiple of them in
    parts."""
    if "K" not in dims:
        return ""
    heads = shape[dims.index("K")]
    return "K" if heads < tensor and tensor % heads == 0 else ""


def specs_of(tree: Any, zero: int = 1, tensor: int = 1) -> Any:
    """Return the PartitionSpecs of a tree of named parameters (arrays or ShapeDtypeStructs of the
    whole shapes) on a mesh whose axis tensor has ``tensor`` parts."""

    def spec(path, leaf):
        if not getattr(leaf, "ndim", 0):
            return P()
        dims = dims_of(path)
        return spec_of(dims, zero, whole_dims(dims, leaf.shape, tensor))

    return jax.tree_util.tree_map_with_path(spec, tree)


def local_shape(
    name: str, dims: str, shape: tuple[int, ...], sizes, zero: int = 1
) -> tuple[int, ...]:
    """Return the shape of one device's part of a tensor on a mesh of ``sizes`` (axis -> size).

    Raises ValueError naming the tensor when a dim is not divisible.
    """
    local = []
    spec = spec_of(dims, zero, whole_dims(dims, shape, sizes["tensor"]))
    for dim, size, axis in zip(dims, shape, spec, strict=True):
        parts = math.prod(sizes[each] for each in axes_in(axis))
        if size % parts:
            over = [each for each in axes_in(axis) if sizes[each] > 1]
            # The message gives sizes that do divide.
            way_out = f"try mesh.{' x mesh.'.join(over)}={near_divisors(size, parts)}"
            if "data" in axes_in(axis):
                way_out += ", or mesh.zero=0"
            raise ValueError(
                f"{name}: {dim}={size} is not divisible by {' x '.join(over)}={parts}; {way_out}"
            )
        local.append(size // parts)
    return tuple(local)


def shardings_of(tree: Any, mesh: Mesh, zero: int = 1) -> Any:
    """Return `specs_of` as NamedShardings.

    Raises ValueError naming the first tensor with a dim that is not divisible.
    """

    def sharding(path, leaf):
        # Counters of the state have no name with dims and are equal everywhere.
        if not getattr(leaf, "ndim", 0):
            return NamedSharding(mesh, P())
        dims = dims_of(path)
        local_shape(parameter_name(path), dims, leaf.shape, mesh.shape, zero)
        whole = whole_dims(dims, leaf.shape, mesh.shape["tensor"])
        return NamedSharding(mesh, spec_of(dims, zero, whole))

    return jax.tree_util.tree_map_with_path(sharding, tree)


class Row(NamedTuple):
    """A parameter in the plan."""

    path: str
    dims: str
    shape: tuple[int, ...]
    spec: P
    local: tuple[int, ...]  # the shape of one device's part
    bytes: int  # of one device's part


def plan_table(tree, sizes: dict[str, int], zero: int = 1) -> list[Row]:
    """Return a Row for every parameter of ``tree``.

    Raises ValueError naming the first tensor with a dim that is not divisible.
    """
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dims = dims_of(path)
        # The same names as in a checkpoint.
        name = ".".join(key.key for key in path if isinstance(getattr(key, "key", None), str))
        local = local_shape(parameter_name(path), dims, leaf.shape, sizes, zero)
        spec = spec_of(dims, zero, whole_dims(dims, leaf.shape, sizes["tensor"]))
        size = leaf.dtype.itemsize * math.prod(local)
        rows.append(Row(name, dims, leaf.shape, spec, local, size))
    return rows

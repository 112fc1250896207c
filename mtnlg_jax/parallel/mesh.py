"""THE PLAN: how every tensor lies on the mesh.

The letters at the end of a parameter's name are its dims (``w_q_DNH``); this table turns a dim into a mesh
axis. Parameters, gradients, optimizer moments and checkpoints carry the same names, so they share the plan.

| dim | split over | what it costs |
| --- | --- | --- |
| V vocabulary | tensor | one reduce-scatter after the look-up; three scalars a token in the loss |
| N query heads, K key/value heads | tensor | gather of the sequence before, reduce-scatter after the half block |
| F MLP width | tensor | the same |
| D width, of weights only | data (ZeRO) | all-gather of the weight, reduce-scatter of its gradient |
| L layers | pipe | one activation to the neighbour a tick, each way |
| M micro-batches, in embedding and head | pipe | none: the pipeline hands each to its home |
| B batch | data | one sum of the gradients a step |
| S sequence | context | keys and values, or heads, change places in attention |
| S sequence, between half blocks | tensor too | none: norms and residuals work on their own tokens |
| H head width, P positions, C | none | |
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.config import MeshConfig

AXES = ("pipe", "data", "context", "tensor")  # slowest network first

AXIS_OF = {"L": "pipe", "V": "tensor", "N": "tensor", "K": "tensor", "F": "tensor", "D": "data"}
UNSPLIT = "HPC"

BATCH = P(None, "data", "context")  # tokens, labels, weights (M, B, S): rows over data, places over context


def shape_of(config: MeshConfig, count: int) -> tuple[int, int, int, int]:
    """Sizes of AXES over ``count`` devices. ``config.data=-1`` takes what the others leave.
    Raises ValueError when the sizes do not multiply to ``count``."""
    fixed = config.pipe * config.context * config.tensor
    data = count // fixed if config.data == -1 else config.data
    if fixed * data != count or data == 0:
        raise ValueError(
            f"mesh pipe={config.pipe} x data={config.data} x context={config.context} x tensor={config.tensor} "
            f"does not fit {count} devices; their product must be {count} (data=-1 takes the rest)"
        )
    return config.pipe, data, config.context, config.tensor


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh of AXES over ``devices`` (default: all of them), sized as ``shape_of`` says."""
    devices = jax.devices() if devices is None else devices
    shape = shape_of(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def parameter_name(path) -> str:
    """The attribute name of a parameter from its pytree key path: the last string key in it."""
    names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
    return names[-1]


def dims_of(path) -> str:
    """The dims of the parameter at ``path``, with L in front below ``blocks``: ``blocks.w_q_DNH`` -> LDNH."""
    stacked = any(getattr(key, "key", None) == "blocks" for key in path)
    return ("L" if stacked else "") + parameter_name(path).rsplit("_", 1)[1]


def spec_of(dims: str, zero: int = 1) -> P:
    """The PartitionSpec of a tensor whose dims are ``dims``. Raises ValueError on an unknown dim, or when
    two dims would be split over the same axis."""
    axes = []
    for dim in dims:
        if dim not in AXIS_OF and dim not in UNSPLIT:
            raise ValueError(f"dim {dim!r} of {dims!r} is not in the plan; add a row to AXIS_OF or UNSPLIT")
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


def shardings_of(tree, mesh: Mesh, zero: int = 1):
    """Like ``specs_of``, as NamedShardings. Raises ValueError naming the first tensor that does not divide."""

    def sharding(path, leaf):
        if not getattr(leaf, "ndim", 0):
            return NamedSharding(mesh, P())
        dims = dims_of(path)
        spec = spec_of(dims, zero)
        for dim, size, axis in zip(dims, leaf.shape, spec, strict=True):
            if axis and size % mesh.shape[axis]:
                way_out = f"choose mesh.{axis} among the divisors of {size}"
                if axis == "data":
                    way_out += ", or mesh.zero=0"
                raise ValueError(f"{parameter_name(path)}: {dim}={size} does not divide by "
                                 f"{axis}={mesh.shape[axis]}; {way_out}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def plan_table(tree, mesh_shape: dict[str, int], zero: int = 1) -> list[tuple[str, str, tuple, str, int]]:
    """Rows (path, dims, shape, spec, bytes a device of one float32 copy) for every parameter of ``tree``."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dims = dims_of(path)
        spec = spec_of(dims, zero)
        split = math.prod(mesh_shape[axis] for axis in spec if axis)
        name = ".".join(key.key for key in path if isinstance(getattr(key, "key", None), str))
        rows.append((name, dims, leaf.shape, str(spec), 4 * math.prod(leaf.shape) // split))
    return rows

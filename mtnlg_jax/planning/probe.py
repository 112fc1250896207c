"""Check whether the compiler of a described TPU accepts flags, by compiling a small program with
the collectives of a run. mtnlg_jax/xla_flags.py starts ``python -m mtnlg_jax.planning.probe``
before it sets any flag.

Parsing proves nothing: a compiler may parse a flag and refuse the first program that it affects."""

import json
import os
import sys
from collections.abc import Collection

from mtnlg_jax.parallel.mesh import AXES, ROWS, row_shards
from mtnlg_jax.planning import topology as described
from mtnlg_jax.planning.topology import Topology

# By the dims of a torus: a slice of 64 chips, so that groups span more than one dim.
DIMS = {2: (8, 8), 3: (4, 4, 4)}
# Shapes: L layers, B rows, S positions, D width, F MLP width.
LAYERS = 2
WIDTH = 1024  # below it the flags do not affect some collectives
LENGTH = 512


def sizes_of(collectives: Collection[tuple[str, str]], devices: int) -> dict[str, int]:
    """Return the sizes of the mesh axes over ``devices`` (a power of two). Only axes with traffic
    are larger than 1; ``data`` is the largest."""
    used = {axis for _, axis in collectives}
    order = [axis for axis in ("data", "tensor", "pipe", "context", "expert") if axis in used] or [
        "data"
    ]
    sizes = dict.fromkeys(AXES, 1)
    left = devices
    for index, axis in enumerate(order[1:]):
        sizes[axis] = 4 if left > 4 ** (2 if index == 0 else 1) else 2
        left //= sizes[axis]
    sizes[order[0]] = left
    return sizes


def lower(topology: Topology, collectives: Collection[tuple[str, str]]):
    """Lower a training step of ``LAYERS`` layers, each one product in a scan, with the given
    ``collectives``: (kind as in planning.hlo_cost.KINDS, mesh axis)."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from mtnlg_jax.config import MeshConfig

    devices = described.devices(topology)
    sizes = sizes_of(collectives, len(devices))
    layout = MeshConfig(
        pipe=sizes["pipe"],
        data=sizes["data"],
        expert=sizes["expert"],
        context=sizes["context"],
        tensor=sizes["tensor"],
    )
    mesh = described.mesh_over(layout, topology, devices)
    neighbors = {axis: [(i, (i + 1) % size) for i in range(size)] for axis, size in sizes.items()}

    def has(kind, axis):
        return (kind, axis) in collectives

    def layer(x_BSD, w_DF):
        if has("all-gather", "data"):
            w_DF = lax.all_gather(w_DF, "data", axis=0, tiled=True)
        if has("all-gather", "expert"):
            x_BSD = lax.all_gather(x_BSD, "expert", axis=0, tiled=True)
        if has("all-gather", "tensor"):
            x_BSD = lax.all_gather(x_BSD, "tensor", axis=1, tiled=True)
        if has("all-to-all", "context"):
            x_BSD = lax.all_to_all(x_BSD, "context", 2, 1, tiled=True)
            x_BSD = lax.all_to_all(x_BSD, "context", 1, 2, tiled=True)
        if has("all-gather", "context"):
            x_BSD += lax.all_gather(x_BSD, "context", axis=1, tiled=True)[:, : x_BSD.shape[1]]
        y_BSF = jax.nn.gelu(jnp.einsum("bsd,df->bsf", x_BSD, w_DF.astype(x_BSD.dtype)))
        if has("reduce-scatter", "tensor"):
            y_BSF = lax.all_gather(y_BSF, "tensor", axis=2, tiled=True)
            y_BSF = lax.psum_scatter(y_BSF, "tensor", scatter_dimension=1, tiled=True)
        if has("reduce-scatter", "expert"):
            y_BSF = lax.psum_scatter(y_BSF, "expert", scatter_dimension=0, tiled=True)
        for axis in AXES:
            if has("collective-permute", axis):
                y_BSF = lax.ppermute(y_BSF, axis, neighbors[axis])
        return y_BSF, None

    def loss(w_LDF, x_BSD):
        out_BSD, _ = lax.scan(jax.checkpoint(layer), x_BSD, w_LDF)
        return jnp.sum(jnp.square(out_BSD.astype(jnp.float32)))

    def step(w_LDF, x_BSD):
        value, gradient_LDF = jax.value_and_grad(loss)(w_LDF, x_BSD)
        if has("all-reduce", "data") and not has("all-gather", "data"):
            gradient_LDF = lax.psum(gradient_LDF, "data")
        return lax.psum(value, AXES), w_LDF - gradient_LDF

    weights = P(None, "data" if has("all-gather", "data") else None, "tensor")
    rows = P(ROWS, ("context", "tensor"), None)
    region = jax.shard_map(
        step, mesh=mesh, in_specs=(weights, rows), out_specs=(P(), weights), check_vma=False
    )

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    return jax.jit(region, donate_argnums=0).lower(
        array((LAYERS, WIDTH, WIDTH), jnp.float32, weights),
        array((row_shards(sizes), LENGTH, WIDTH), jnp.bfloat16, rows),
    )


def _answer() -> None:
    """Read {"kind", "slices", "collectives"} and write {"refused": why, or "" if it compiles}. The
    compiler's flags are in the environment already."""
    request = json.load(sys.stdin)
    dims = DIMS[2 if request["kind"] in described.FLAT else 3]
    topology = Topology(request["kind"], dims, request["slices"])
    described.enter(topology)

    import jax

    refused = ""
    try:
        lower(topology, [tuple(pair) for pair in request["collectives"]]).compile()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        refused = " ".join(str(error).split())
    print(json.dumps({"refused": refused}))


if __name__ == "__main__":
    # Only the answer goes to standard output; the compiler's messages go to standard error.
    output = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(output, "w")
    _answer()

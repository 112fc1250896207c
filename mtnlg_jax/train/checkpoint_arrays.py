"""The arrays of a checkpoint on disk: their names, their layout, and Orbax to write and read them.

Names go to disk rather than structures, so that files outlive the classes of Flax and Optax.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from mtnlg_jax.config import Config
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.train import lora

# Orbax logs each phase of its work, and each failure with a stack trace. Failures are raised here
# instead.
logging.getLogger("absl").addFilter(lambda line: f"orbax{os.sep}checkpoint" not in line.pathname)


def _without_late_writes(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Silence the writes that Orbax abandons when one of them fails: each would print a stack
    trace as it ends."""
    return lambda late: None if str(late.exc_value) == "Event loop is closed" else hook(late)


sys.unraisablehook = _without_late_writes(sys.unraisablehook)

# Counters of TrainState are stored under the names with which the first runs were saved.
SAVED_NAMES = {"nonfinite_streak": "bad", "nonfinite_total": "skipped"}
CHUNK_BYTES = 2**24  # at most, of the piece of a parameter that is stored together


# --- names


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of ``tree`` by dotted name.

    For example ``params.blocks.mlp.w_in_DF``, ``opt_state.1.mu.tokens_VD``, ``step``.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        # A variable of Flax NNX adds ".value" to the path of its array; names on disk have none.
        leaves[SAVED_NAMES.get(name, name)] = leaf
    return leaves


def is_parameter(name: str) -> bool:
    """Return whether ``name`` belongs to params/ rather than rest/."""
    return name.startswith("params.")


def split(flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (parameters by their name without "params.", all other leaves)."""
    params = {
        name.removeprefix("params."): leaf for name, leaf in flat.items() if is_parameter(name)
    }
    return params, {name: leaf for name, leaf in flat.items() if not is_parameter(name)}


def shapes(flat: dict[str, Any]) -> dict[str, str]:
    """Return the type and shape of each leaf as text, "float32[2, 64]"."""
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in flat.items()}


# --- Orbax. It is imported inside functions: loading a model can do without it for half a second.


def make_writer() -> Any:
    """Return the asynchronous Orbax checkpointer of the parts params/ and rest/."""
    import orbax.checkpoint as ocp

    # Two parts, so that a reader of the parameters never opens the optimizer state.
    handler = ocp.CompositeCheckpointHandler(params=_handler(), rest=_handler())
    return ocp.AsyncCheckpointer(handler)


def _handler() -> Any:
    import orbax.checkpoint as ocp

    # Compression (zstd) makes float32 weights 8 % smaller and costs a save 2.5 times the processor
    # time. Orbax would split replicated arrays between their replicas, which compiles a program per
    # shape at the first save (5 s) and gains nothing here: ZeRO has split all large arrays.
    array = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, array))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def save_args(params: dict[str, jax.Array], rest: dict[str, jax.Array]) -> Any:
    """Return Orbax's arguments to save both parts; empty ones are left out.

    Large parameters are stored by layer, and embedding tables in pieces, so that decoding can read
    one without holding it as a whole.
    """
    import orbax.checkpoint as ocp

    def layout(part: str, name: str, array: jax.Array) -> Any:
        if part != "params" or array.nbytes <= CHUNK_BYTES:
            return ocp.SaveArgs()
        # Dim 0 of a block's parameter is L.
        axes = (0,) if name.startswith("blocks.") else ()
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)

    parts = {}
    for part, flat in {"params": params, "rest": rest}.items():
        # A converted model has no optimizer state, and then no folder rest/.
        if flat:
            layouts = {name: layout(part, name, array) for name, array in flat.items()}
            parts[part] = ocp.args.PyTreeSave(flat, save_args=layouts)
    return ocp.args.Composite(**parts)


def read(path: epath.Path, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the arrays of ``path`` with the names, shapes and shardings of ``abstract``."""
    import orbax.checkpoint as ocp

    one_device = SingleDeviceSharding(jax.local_devices()[0])
    arguments = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding or one_device, global_shape=leaf.shape)
        for name, leaf in abstract.items()
    }
    # A reader of its own: the writer is asynchronous and belongs to the run.
    with ocp.Checkpointer(_handler()) as reader:
        return reader.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args=arguments))


def zeros(abstract: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the optimizer state and counters of a fresh start."""
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    # Made on the devices, in their shards, and not copied from the host.
    return jax.jit(
        lambda: {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract.items()},
        out_shardings={name: leaf.sharding or one_device for name, leaf in abstract.items()},
    )()


def read_params(path: epath.Path, config: Config, mesh: Mesh | None, zero_stage: int) -> nnx.State:
    """Return the parameters at ``path`` on one device, or sharded over ``mesh``."""
    abstract = lora.abstract_parameters(config)
    if mesh is not None:
        shardings = shardings_of(abstract, mesh, zero_stage)
        abstract = jax.tree.map(
            lambda leaf, sharding: leaf.update(sharding=sharding), abstract, shardings
        )
    flat = flatten(abstract)
    arrays = read(path, flat)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in flat])

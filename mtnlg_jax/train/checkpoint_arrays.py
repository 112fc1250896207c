"""The arrays of a checkpoint on disk: their names, their layout, and Orbax to write and read them.

Names go to disk rather than structures, so that files outlive the classes of Flax and Optax.
"""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import names_of
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train import lora, moments_dtype

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
AVERAGE = "extras.ema."  # beginning of the names of averages
UPLOAD = 6 * 3600  # seconds that the arrays of a checkpoint may take; Orbax gives up after 600
CHUNK_BYTES = 2**24  # at most, of the piece of a parameter that is stored together


# --- names


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of ``tree`` by dotted name.

    For example ``params.blocks.mlp.w_in_DF``, ``opt_state.1.mu.tokens_VD``, ``step``.
    """
    return {SAVED_NAMES.get(name, name): leaf for name, leaf in names_of(tree).items()}


def is_parameter(name: str) -> bool:
    """Return whether ``name`` belongs to params/."""
    return name.startswith("params.")


def is_average(name: str) -> bool:
    """Return whether ``name`` is the average of a parameter, which ema/ holds."""
    return name.startswith(AVERAGE)


def split(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the leaves by the folder that holds them: params/, rest/ and ema/.

    Averages have the names of the parameters that they are of. Beside them ema/ has the parameters
    that are not averaged, such as those below adapters, so that it is read as params/ is.
    """
    params = {
        name.removeprefix("params."): leaf for name, leaf in flat.items() if is_parameter(name)
    }
    averages = {name.removeprefix(AVERAGE): leaf for name, leaf in flat.items() if is_average(name)}
    rest = {
        name: leaf for name, leaf in flat.items() if not is_parameter(name) and not is_average(name)
    }
    return {"params": params, "rest": rest, "ema": params | averages if averages else {}}


def bytes_of(flat: dict[str, Any]) -> int:
    """Return the bytes of all leaves, in every folder that holds them."""
    parts = split(flat).values()
    return sum(leaf.size * leaf.dtype.itemsize for part in parts for leaf in part.values())


def shapes(flat: dict[str, Any]) -> dict[str, str]:
    """Return the type and shape of each leaf as text, "float32[2, 64]"."""
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in flat.items()}


def vocabulary_dim(name: str) -> int | None:
    """Return which dim of the array ``name`` is the vocabulary, None if none is."""
    dims = name.rpartition("_")[2]
    return dims.index("V") if dims.isupper() and "V" in dims else None


def with_padding_of(arrays: dict[str, str], saved: dict[str, str]) -> dict[str, str]:
    """Return `shapes` of ``arrays`` with as many rows of the vocabulary as ``saved`` has."""

    def adapted(name: str, shape: str) -> str:
        dim = vocabulary_dim(name)
        if dim is None or name not in saved:
            return shape
        found = re.findall(r"\[.*\]", saved[name])[0]
        kind, _, _ = shape.partition("[")
        sizes = json.loads(shape.removeprefix(kind))
        rows = json.loads(found)
        if len(rows) == len(sizes):
            sizes[dim] = rows[dim]
        return f"{kind}{sizes}"

    return {name: adapted(name, shape) for name, shape in arrays.items()}


# --- Orbax. It is imported inside functions: loading a model can do without it for half a second.


def make_writer() -> Any:
    """Return the asynchronous Orbax checkpointer of the parts of `split`."""
    import orbax.checkpoint as ocp

    # Parts, so that a reader of the parameters never opens the optimizer state.
    handler = ocp.CompositeCheckpointHandler(params=_handler(), rest=_handler(), ema=_handler())
    return ocp.AsyncCheckpointer(handler, async_options=ocp.AsyncOptions(timeout_secs=UPLOAD))


def _handler() -> Any:
    import orbax.checkpoint as ocp

    # Compression (zstd) makes float32 weights 8 % smaller and costs a save 2.5 times the processor
    # time. Orbax would split replicated arrays between their replicas, which compiles a program per
    # shape at the first save (5 s) and gains nothing here: ZeRO has split all large arrays.
    array = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, array))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def save_args(flat: dict[str, jax.Array]) -> Any:
    """Return Orbax's arguments to save the parts of `split`; empty ones are left out.

    Large parameters are stored by layer, and embedding tables in pieces, so that decoding can read
    one without holding it as a whole.
    """
    import orbax.checkpoint as ocp

    def layout(part: str, name: str, array: jax.Array) -> Any:
        if part == "rest" or array.nbytes <= CHUNK_BYTES:
            return ocp.SaveArgs()
        # Dim 0 of a block's parameter is L.
        axes = (0,) if name.startswith("blocks.") else ()
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)

    parts = {}
    for part, arrays in split(flat).items():
        # A converted model has no optimizer state, and then no folder rest/.
        if arrays:
            layouts = {name: layout(part, name, array) for name, array in arrays.items()}
            parts[part] = ocp.args.PyTreeSave(arrays, save_args=layouts)
    return ocp.args.Composite(**parts)


class LayerWriter:
    """Write parameters in Orbax's layout, one layer at a time, so that no parameter need be in
    memory as a whole. `read` and `StoredArrays` read them as those that Orbax wrote."""

    def __init__(self, path: epath.Path, shapes: dict[str, tuple[int, ...]]) -> None:
        import tensorstore as ts

        self._path = path
        self._shapes = shapes
        path.mkdir(parents=True, exist_ok=True)
        base = f"{path}/" if is_remote(path) else {"driver": "file", "path": f"{path}/"}
        store = {"driver": "ocdbt", "base": base}
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._arrays = {
            name: ts.open(
                {
                    "driver": "zarr",
                    "kvstore": store | {"path": f"{name}/"},
                    "metadata": {
                        "shape": shape,
                        "chunks": _chunks(name, shape),
                        "dtype": "<f4",
                        "compressor": None,
                    },
                    "store_data_equal_to_fill_value": True,
                },
                create=True,
                context=context,
            ).result()
            for name, shape in shapes.items()
        }
        # Layers of arrays that are stored in one piece.
        self._waiting: dict[str, dict[int, np.ndarray]] = {}

    def write(self, name: str, layer: int | None, array: np.ndarray) -> None:
        """Write parameter ``name``, or one layer of it."""
        target = self._arrays[name]
        if layer is None:
            target.write(array).result()
        elif _chunks(name, self._shapes[name])[0] == 1:
            target[layer].write(array).result()
        else:
            waiting = self._waiting.setdefault(name, {})
            waiting[layer] = array
            if len(waiting) == self._shapes[name][0]:
                target.write(np.stack([waiting[index] for index in sorted(waiting)])).result()
                del self._waiting[name]

    def finish(self) -> None:
        """Write what names the arrays."""
        if self._waiting:
            raise ValueError(f"layers of {', '.join(sorted(self._waiting))} were not written")
        tree = {
            str((name,)): {
                "key_metadata": [{"key": name, "key_type": 2}],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
            }
            for name in self._shapes
        }
        content = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._path / "_METADATA").write_text(json.dumps(content))


def _chunks(name: str, shape: tuple[int, ...]) -> list[int]:
    """Return the shape of a stored piece: whole small arrays, layers of blocks, rows of tables."""
    chunks = list(shape)
    if 4 * math.prod(shape) <= CHUNK_BYTES // 16:
        return chunks
    axes = range(len(shape))
    if name.startswith("blocks."):
        chunks[0] = 1
        axes = range(1, len(shape))
    for axis in axes:
        size = 4 * math.prod(chunks)
        if size > CHUNK_BYTES:
            chunks[axis] = max(1, chunks[axis] * CHUNK_BYTES // size)
    return chunks


def read(path: epath.Path, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the arrays of ``path`` with the names, shapes and shardings of ``abstract``; others
    are left unread."""
    import orbax.checkpoint as ocp

    one_device = SingleDeviceSharding(jax.local_devices()[0])
    arguments = {
        name: ocp.ArrayRestoreArgs(
            sharding=leaf.sharding or one_device,
            global_shape=leaf.shape,
            # Rows of padding are added as zeros, or left out, where the mesh needs another number.
            strict=vocabulary_dim(name) is None,
        )
        for name, leaf in abstract.items()
    }
    # A reader of its own: the writer is asynchronous and belongs to the run.
    with ocp.Checkpointer(_handler()) as reader:
        wanted = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
        return reader.restore(path, args=wanted)


def read_state(path: epath.Path, abstract_state: Any, saved: Mapping[str, str]) -> Any:
    """Return the state below ``path``, in the structure, types and shardings of
    ``abstract_state``. Arrays that are not among those ``saved`` (`shapes`) are 0; moments may have
    been saved in another type."""
    wanted = shapes(flatten(abstract_state))
    as_saved, convert = moments_dtype.conversion(abstract_state.opt_state, saved, wanted)
    abstract_state = abstract_state._replace(opt_state=as_saved)
    flat = flatten(abstract_state)
    parts = split(flat)
    averages = {name.removeprefix(AVERAGE) for name in flat if is_average(name) and name in saved}
    stored = {
        "params": parts["params"],
        "rest": {name: leaf for name, leaf in parts["rest"].items() if name in saved},
        "ema": {name: leaf for name, leaf in parts["ema"].items() if name in averages},
    }
    prefixes = {"params": "params.", "rest": "", "ema": AVERAGE}
    arrays = {
        prefixes[part] + name: array
        for part, wanted in stored.items()
        for name, array in (read(path / part, wanted) if wanted else {}).items()
    }
    arrays |= zeros({name: leaf for name, leaf in flat.items() if name not in arrays})
    # By name and not by position: the order of leaves on disk does not matter.
    leaves = [arrays[name] for name in flat]
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
    return state._replace(opt_state=convert(state.opt_state))


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

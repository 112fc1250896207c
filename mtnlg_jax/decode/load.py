"""Load a trained run as a decoder, reading its checkpoint parameter by parameter.

When weights are converted to int8 or bfloat16, their float32 form is never held all at once;
float32 weights are held once.
"""

# Shapes: O outputs, I inputs

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.decode.cache import ROUTER, TABLES, Decoder, check_held, split_abstract
from mtnlg_jax.decode.quantized import ExpertWeight, RowWeight, by_rows
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.model.params import name_of, names_of
from mtnlg_jax.model.quantize import quantize_numpy
from mtnlg_jax.parallel.host import Filling, as_type, on_device, one_ahead
from mtnlg_jax.parallel.mesh import EXPERT_BIAS
from mtnlg_jax.train.adapted_arrays import stored_arrays
from mtnlg_jax.train.checkpoint import Before, Run, find_run
from mtnlg_jax.train.checkpoint_folder import reader_of


def load_decoder(
    workdir,
    which: str = "best",
    dtype: str = "float32",
    *,
    weights: str | None = None,
    cache: str | None = None,
    mesh: Mesh | None = None,
    before: Before = lambda config, tokenizer: None,
) -> tuple[Run, Decoder]:
    """Return the run, without parameters, and its decoder.

    Does the same as ``unstack`` of ``load_run`` in less memory, and takes their arguments. A host
    holds one parameter of one layer at a time, and its devices their parts. ``before`` is called
    with the config and the tokenizer before any parameter is read; it may raise. Raises what they
    raise, and ValueError with the parameter's name if one is not finite.
    """
    # Before anything is read, since reading takes long.
    dtype = check_held(dtype, weights, cache)
    reader = reader_of(workdir, which)

    def check(config: Config, tokenizer) -> None:
        if mesh is not None:
            Placement(config.model, split_abstract(config.model), mesh)
        before(config, tokenizer)

    if reader is not None:
        run, source = reader.open(workdir)
        check(run.config, run.tokenizer)
        params = _assemble(run.config.model, dtype, weights, source, mesh)
        _trim()
        return run, Decoder(run.config.model, params, cache == "int8", mesh)

    def read(path, config: Config) -> tuple:
        return _assemble(config.model, dtype, weights, stored_arrays(path, config), mesh)

    run = find_run(workdir, which, read, check)
    _trim()
    return Run(run.config, None, run.tokenizer, run.step, run.meta), Decoder(
        run.config.model, run.params, cache == "int8", mesh
    )


def _trim() -> None:
    """Return freed memory of the C library's heap to the system, after reading parameters."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _assemble(
    config: ModelConfig, dtype: str, weights: str | None, stored, mesh: Mesh | None = None
) -> tuple:
    """Return the decoder's parameters. Each is read, converted and freed before the next one."""
    outer, block = split_abstract(config)
    placement = None if mesh is None else Placement(config, (outer, block), mesh)
    # On a mesh they are converted on the host, of which each device then gets its part.
    to = on_device if placement is None else as_type
    int8 = weights == "int8"
    shapes = names_of(outer)
    # The largest first, while little else is held. Then name by name, each through all layers: an
    # array that is stored in one piece is read once.
    wanted: list[tuple[str, int | None]] = [
        (name, None) for name, _ in sorted(shapes.items(), key=lambda pair: -pair[1].size)
    ]
    inner = {f"blocks.{name}": name for name in names_of(block)}
    numbers = [n for n in range(config.num_layers) if placement is None or placement.holds(n)]
    wanted += [(name, number) for name in inner for number in numbers]
    in_order = hasattr(stored, "in_file_order")
    if in_order:
        wanted = stored.in_file_order(wanted)

    def read() -> Iterator[tuple[str, int | None, Any]]:
        for name, layer in wanted:
            if name in TABLES and (int8 or placement is not None):
                kind = "int8" if int8 else dtype
                yield name, None, _table(stored, name, shapes[name].shape, kind, placement)
            else:
                yield name, layer, stored.read(name, layer)

    made: dict[str, Any] = {}
    layers: dict[int, dict[str, Any]] = {number: {} for number in numbers}
    for name, layer, values in one_ahead(read()) if in_order else read():
        if not isinstance(values, np.ndarray):  # a table
            made[name] = values
            continue
        if layer is None:
            into = made
            key = name
            held = to(values, dtype)
        else:
            into = layers[layer]
            key = inner[name]
            held = _converted(name.rpartition(".")[2], dtype, int8, values, to)
        into[key] = held if placement is None else placement.put(key, held, layer)
    stacks = list(layers.values())
    if placement is not None and placement.stages > 1:
        # Name by name, so that the layers of one are freed before the next.
        joined = {
            key: placement.join(key, {n: layer.pop(key) for n, layer in layers.items()})
            for key in inner.values()
        }
        stacks = [
            dict(zip(joined, each, strict=True)) for each in zip(*joined.values(), strict=True)
        ]
    return _filled(outer, made), tuple(_filled(block, stack) for stack in stacks)


def _filled(abstract: nnx.State, made: dict) -> nnx.State:
    return jax.tree_util.tree_map_with_path(lambda path, _: made[name_of(path)], abstract)


def _table(
    stored, name: str, shape: tuple[int, ...], kind: str, placement: Placement | None
) -> Any:
    """Return a table in "int8" or another dtype, read a piece at a time."""
    if kind != "int8":
        assert placement is not None, "on one device it is read at once"
        whole = jax.ShapeDtypeStruct(shape, kind)
        numbers = Filling(shape, kind, placement.shardings(name, whole))
        for start, rows in stored.blocks(name):
            numbers.write(start, rows)
        return numbers.array()
    here: Any = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places: Any = RowWeight(here, here, shape[:1], 1)
    if placement is not None:
        places = placement.shardings(name, places)
    numbers = Filling(shape, np.int8, places.number_OI)
    scales = Filling(shape[:1], np.float32, places.scale_O)
    for start, rows in stored.blocks(name):
        # A scale for each row, so pieces of the table are quantized independently.
        number_OI, scale_O = quantize_numpy(rows.astype(np.float32, copy=False))
        numbers.write(start, number_OI)
        scales.write(start, scale_O)
    return RowWeight(numbers.array(), scales.array(), shape[:1], 1)


def _converted_experts(array: np.ndarray, dtype: str, int8: bool, to: Callable):
    """Return the weights of a layer's experts; grouped products take arrays."""
    if not int8:
        return to(array, dtype)
    experts = [quantize_numpy(np.ascontiguousarray(matrix.T)) for matrix in array]
    numbers = np.stack([number.T for number, _ in experts])
    scales = np.stack([scale for _, scale in experts])
    return ExpertWeight(to(numbers, np.int8), to(scales, np.float32))


def _converted(name: str, dtype: str, int8: bool, array: np.ndarray, to: Callable):
    """Return one parameter of a block in the form that decoding holds.

    ``to(values, dtype)`` makes its arrays.
    """
    int8 = int8 and name != ROUTER
    if name == EXPERT_BIAS:
        return to(array, np.float32)
    # Only the matrices of products are held in rows.
    if not name.startswith("w_") or not (int8 or by_rows()):
        return to(array, dtype)
    if int8:
        array = array.astype(np.float32, copy=False)
    if name.rpartition("_")[2].startswith("E"):
        return _converted_experts(array, dtype, int8, to)
    # Dims that the product sums over: N and H of the output projection, the first one elsewhere.
    inputs = 2 if name == "w_o_NHD" else 1
    outputs = array.shape[inputs:]
    # Outputs first, as RowWeight holds them.
    matrix_OI = array.reshape(-1, int(np.prod(outputs))).T
    if not int8:
        return RowWeight(to(matrix_OI, dtype), None, outputs, inputs)
    number_OI, scale_O = quantize_numpy(np.ascontiguousarray(matrix_OI))
    return RowWeight(to(number_OI, np.int8), to(scale_O, np.float32), outputs, inputs)

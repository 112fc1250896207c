"""Load a trained run as a decoder, reading its checkpoint parameter by parameter.

When weights are converted to int8 or bfloat16, their float32 form is never held all at once;
float32 weights are held once.
"""

# Shapes: O outputs, I inputs

import ctypes
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtnlg_jax import foreign
from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.decode.cache import ROUTER, TABLES, Decoder, by_rows, check_held, split_abstract
from mtnlg_jax.decode.quantized import ExpertWeight, RowWeight
from mtnlg_jax.model.params import name_of, names_of
from mtnlg_jax.model.quantize import quantize_numpy
from mtnlg_jax.parallel.host import on_device, one_ahead
from mtnlg_jax.parallel.mesh import EXPERT_BIAS
from mtnlg_jax.train.adapted_arrays import stored_arrays
from mtnlg_jax.train.checkpoint import Run, find_run


def load_decoder(
    workdir,
    which: str = "best",
    dtype: str = "float32",
    *,
    weights: str | None = None,
    cache: str | None = None,
) -> tuple[Run, Decoder]:
    """Return the run, without parameters, and its decoder.

    Does the same as ``unstack`` of ``load_run`` in less memory, and takes their arguments. Raises
    what they raise, and ValueError with the parameter's name if one is not finite.
    """
    # Before anything is read, since reading takes long.
    dtype = check_held(dtype, weights, cache)
    reader = foreign.reader_of(workdir)
    if reader is not None:
        run, source = reader.open(workdir)
        params = _assemble(run.config.model, dtype, weights, source)
        _trim()
        return run, Decoder(run.config.model, params, cache == "int8")

    def read(path, config: Config) -> tuple:
        return _assemble(config.model, dtype, weights, stored_arrays(path, config))

    run = find_run(workdir, which, read)
    _trim()
    return Run(run.config, None, run.tokenizer, run.step, run.meta), Decoder(
        run.config.model, run.params, cache == "int8"
    )


def _trim() -> None:
    """Return freed memory of the C library's heap to the system, after reading parameters."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _assemble(config: ModelConfig, dtype: str, weights: str | None, stored) -> tuple:
    """Return the decoder's parameters. Each is read, converted and freed before the next one."""
    outer, block = split_abstract(config)
    int8 = weights == "int8"
    shapes = names_of(outer)
    # The largest first, while little else is held. Then name by name, each through all layers: an
    # array that is stored in one piece is read once.
    wanted: list[tuple[str, int | None]] = [
        (name, None) for name, _ in sorted(shapes.items(), key=lambda pair: -pair[1].size)
    ]
    inner = {f"blocks.{name}": name for name in names_of(block)}
    wanted += [(name, number) for name in inner for number in range(config.num_layers)]
    in_order = hasattr(stored, "in_file_order")
    if in_order:
        wanted = stored.in_file_order(wanted)

    def read() -> Iterator[tuple[str, int | None, np.ndarray | RowWeight]]:
        for name, layer in wanted:
            if int8 and name in TABLES:
                yield name, None, _int8_table(stored, name, shapes[name].shape)
            else:
                yield name, layer, stored.read(name, layer)

    made: dict[str, jax.Array | RowWeight] = {}
    layers: list[dict[str, jax.Array | RowWeight]] = [{} for _ in range(config.num_layers)]
    for name, layer, values in one_ahead(read()) if in_order else read():
        if isinstance(values, RowWeight):
            made[name] = values
        elif layer is None:
            made[name] = on_device(values, dtype)
        else:
            last = name.rpartition(".")[2]
            layers[layer][inner[name]] = _converted(last, dtype, int8, values)
    return _filled(outer, made), tuple(_filled(block, layer) for layer in layers)


def _filled(abstract: nnx.State, made: dict) -> nnx.State:
    return jax.tree_util.tree_map_with_path(lambda path, _: made[name_of(path)], abstract)


def _int8_table(stored, name: str, shape: tuple[int, ...]) -> RowWeight:
    number_OI = np.empty(shape, np.int8)
    scale_O = np.empty(shape[0], np.float32)
    for start, rows in stored.blocks(name):
        # A scale for each row, so pieces of the table are quantized independently.
        part = slice(start, start + len(rows))
        number_OI[part], scale_O[part] = quantize_numpy(rows.astype(np.float32, copy=False))
    return RowWeight(jnp.asarray(number_OI), jnp.asarray(scale_O), shape[:1], 1)


def _converted_experts(array: np.ndarray, dtype: str, int8: bool):
    """Return the weights of a layer's experts; grouped products take arrays."""
    if not int8:
        return on_device(array, dtype)
    experts = [quantize_numpy(np.ascontiguousarray(matrix.T)) for matrix in array]
    numbers = np.stack([number.T for number, _ in experts])
    return ExpertWeight(jnp.asarray(numbers), jnp.asarray(np.stack([s for _, s in experts])))


def _converted(name: str, dtype: str, int8: bool, array: np.ndarray):
    """Return one parameter of a block in the form that decoding holds."""
    int8 = int8 and name != ROUTER
    if name == EXPERT_BIAS:
        return on_device(array, np.float32)
    # Only the matrices of products are held in rows.
    if not name.startswith("w_") or not (int8 or by_rows()):
        return on_device(array, dtype)
    if int8:
        array = array.astype(np.float32, copy=False)
    if name.rpartition("_")[2].startswith("E"):
        return _converted_experts(array, dtype, int8)
    # Dims that the product sums over: N and H of the output projection, the first one elsewhere.
    inputs = 2 if name == "w_o_NHD" else 1
    outputs = array.shape[inputs:]
    # Outputs first, as RowWeight holds them.
    matrix_OI = array.reshape(-1, int(np.prod(outputs))).T
    if not int8:
        return RowWeight(on_device(matrix_OI, dtype), None, outputs, inputs)
    number_OI, scale_O = quantize_numpy(np.ascontiguousarray(matrix_OI))
    return RowWeight(jnp.asarray(number_OI), jnp.asarray(scale_O), outputs, inputs)

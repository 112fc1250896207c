"""A trained run as a decoder, read from its checkpoint parameter by parameter.

The float32 weights that int8 or bfloat16 stand for are never held together, and float32 weights are
held once."""

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtnlg_jax.config import Config, ModelConfig
from mtnlg_jax.decode.cache import TABLES, Decoder, by_rows, check_held, split_abstract
from mtnlg_jax.decode.quantized import RowWeight, quantise_numpy
from mtnlg_jax.train import lora
from mtnlg_jax.train.arrays import StoredArrays
from mtnlg_jax.train.checkpoint import Run, find_run, load_run

_SEPARATOR = "."


def load_decoder(
    workdir,
    which: str = "best",
    dtype: str = "float32",
    *,
    weights: str | None = None,
    cache: str | None = None,
) -> tuple[Run, Decoder]:
    """(the run, with no parameters, its decoder): what ``unstack`` makes of ``load_run``, in less
    memory.

    Args as of these two. Raises what they raise, and ValueError naming the parameter where one is
    not finite.
    """
    dtype = check_held(dtype, weights, cache)

    def read(path, config: Config) -> tuple:
        if not lora.used(config):
            return _assemble(config.model, dtype, weights, StoredArrays(path))
        return _assemble(config.model, dtype, weights, _Held(load_run(workdir, which).params))

    run = find_run(workdir, which, read)
    _trim()
    return Run(run.config, None, run.tokenizer, run.step, run.meta), Decoder(
        run.config.model, run.params, cache == "int8"
    )


def _trim() -> None:
    """Gives back to the system what the parameters read so far left behind in the C library's
    heap."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


class _Held:
    """Parameters in memory, to be read as from a checkpoint."""

    def __init__(self, params):
        self._arrays = names_of(params)

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        array = np.asarray(self._arrays[name])
        return array if index is None else array[index]

    def blocks(self, name: str):
        yield 0, self.read(name)


def names_of(tree) -> dict:
    """Leaves by dotted name: blocks.mlp.w_in_DF, tokens_VD."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=_SEPARATOR).removesuffix(".value")


def _assemble(config: ModelConfig, dtype: str, weights: str | None, stored) -> tuple:
    """The decoder's parameters: each is read, converted and let go before the next one."""
    outer, block = split_abstract(config)
    int8 = weights == "int8"
    # The largest first: what is held besides one while it is converted is little then.
    made = {}
    for name, leaf in sorted(names_of(outer).items(), key=lambda pair: -pair[1].size):
        if int8 and name in TABLES:
            made[name] = _int8_table(stored, name, leaf.shape)
        else:
            made[name] = jnp.asarray(stored.read(name).astype(dtype, copy=False))
    layers = [{} for _ in range(config.num_layers)]
    for name in names_of(block):
        convert = functools.partial(_converted, name.rpartition(_SEPARATOR)[2], dtype, int8)
        for number, layer in enumerate(layers):
            layer[name] = convert(stored.read(f"blocks.{name}", number))
    return _filled(outer, made), tuple(_filled(block, layer) for layer in layers)


def _filled(abstract: nnx.State, made: dict) -> nnx.State:
    return jax.tree_util.tree_map_with_path(lambda path, _: made[_name(path)], abstract)


def _int8_table(stored, name: str, shape: tuple[int, ...]) -> RowWeight:
    number_OI = np.empty(shape, np.int8)
    scale_O = np.empty(shape[0], np.float32)
    for start, rows in stored.blocks(name):
        part = slice(start, start + len(rows))
        number_OI[part], scale_O[part] = quantise_numpy(rows)
    return RowWeight(jnp.asarray(number_OI), jnp.asarray(scale_O), shape[:1], 1)


def _converted(name: str, dtype: str, int8: bool, array: np.ndarray):
    """One parameter of a block as decoding holds it."""
    if not name.startswith("w_") or not (int8 or by_rows()):
        return jnp.asarray(array.astype(dtype, copy=False))
    inputs = 2 if name == "w_o_NHD" else 1
    outputs = array.shape[inputs:]
    matrix_OI = array.reshape(-1, int(np.prod(outputs))).T
    if not int8:
        return RowWeight(
            jnp.asarray(np.ascontiguousarray(matrix_OI, dtype=dtype)), None, outputs, inputs
        )
    number_OI, scale_O = quantise_numpy(np.ascontiguousarray(matrix_OI))
    return RowWeight(jnp.asarray(number_OI), jnp.asarray(scale_O), outputs, inputs)

"""The frozen base of low-rank adaptation in int8 or NF4 (QLoRA, Dettmers 2023, arXiv 2305.14314).

The matrices of the blocks are quantized when the run starts, parameter by parameter on the host, so
that no device ever holds them in float32. In ``state.params`` they lie under ``quantized``, stacked
over layers: ``nf4_q_DNH`` and ``absmax_q_DNH`` for ``w_q_DNH``, or ``int8_q_DNH`` and
``int8scale_q_NH``. Norms, biases, routers and tables stay float32.

A step dequantizes a layer when it applies it: the matrices are never held for more than one layer.
Gradients flow to A and B alone. Codes are what travels where a mesh splits D.
"""

# Shapes: I inputs, O outputs, and in names of parameters D width, F MLP width, N query heads,
# K key/value heads, H head width, E experts

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.model.params import name_of
from mtnlg_jax.model.quantize import NF4_BLOCK, dequantize_nf4, quantize_nf4, quantize_numpy
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import parameter_name, shardings_of

KEY = "quantized"  # in state.params; below it "blocks", as in a model


def used(config: Config) -> bool:
    """Return whether ``config`` trains adapters of a quantized base."""
    return config.optimizer.lora_rank > 0 and config.optimizer.lora_base != "float"


def matrices(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the matrices of the blocks by name, stacked over layers, as ShapeDtypeStructs."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(config.model)[1]["blocks"])
    named = {parameter_name(path): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if is_quantized(name)}


def is_quantized(name: str) -> bool:
    """Return whether the parameter ``name`` is a matrix of a block; a router's is not."""
    return name.startswith("w_") and not name.startswith(("w_router", "w_mlm"))


def _parts(name: str) -> tuple[str, str, str, str]:
    """Return (target, dims of experts, of the inputs, of the outputs) of a matrix."""
    _, target, dims = name.split("_")
    experts = "E" if dims.startswith("E") else ""
    dims = dims.removeprefix("E")
    split = 1 if dims[0] == "D" else len(dims) - 1
    return target, experts, dims[:split], dims[split:]


def names_of(name: str, base: str) -> tuple[str, str]:
    """Return the names of a matrix's codes and scales. Several inputs, such as N and H, are one dim
    with the letter of the first."""
    target, experts, inputs, outputs = _parts(name)
    dims = f"{experts}{inputs[0]}{outputs}"
    if base == "nf4":
        return f"nf4_{target}_{dims}", f"absmax_{target}_{dims}"
    return f"int8_{target}_{dims}", f"int8scale_{target}_{experts}{outputs}"


def _abstract_pair(name: str, shape: tuple[int, ...], base: str) -> Iterator[tuple[str, Any]]:
    _, experts, inputs, _ = _parts(name)
    lead = shape[: 1 + len(experts)]
    width = math.prod(shape[len(lead) : len(lead) + len(inputs)])
    outputs = shape[len(lead) + len(inputs) :]
    codes, scales = names_of(name, base)
    if base == "nf4":
        yield codes, jax.ShapeDtypeStruct((*lead, width // 2, *outputs), jnp.uint8)
        yield scales, jax.ShapeDtypeStruct((*lead, width // NF4_BLOCK, *outputs), jnp.float32)
    else:
        yield codes, jax.ShapeDtypeStruct((*lead, width, *outputs), jnp.int8)
        yield scales, jax.ShapeDtypeStruct((*lead, *outputs), jnp.float32)


def abstract_base(config: Config) -> nnx.State:
    """Return the base of a run as ShapeDtypeStructs: a plain model's parameters, of which matrices
    are below KEY."""
    base = config.optimizer.lora_base
    pairs = [
        pair
        for name, leaf in matrices(config).items()
        for pair in _abstract_pair(name, leaf.shape, base)
    ]
    return _with_quantized(abstract_model(config.model)[1], dict(pairs))


def _with_quantized(params: nnx.State, quantized: dict[str, Any]) -> nnx.State:
    """Return ``params`` with the codes and scales in place of the matrices."""

    def rest(mapping):
        return {
            key: rest(value) if isinstance(value, dict) else value
            for key, value in mapping.items()
            if not is_quantized(key)
        }

    mapping = rest(params.raw_mapping)
    return type(params)({**mapping, KEY: {"blocks": quantized}})


# --- quantizing


def quantize_layer(name: str, array: np.ndarray, base: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes and scales of one layer of matrix ``name``, float32 on the host."""
    _, experts, inputs, _ = _parts(name)
    if experts:
        pairs = [quantize_layer(name.replace("_E", "_"), each, base) for each in array]
        codes, scales = zip(*pairs, strict=True)
        return np.stack(codes), np.stack(scales)
    outputs = array.shape[len(inputs) :]
    matrix_IO = np.ascontiguousarray(array).reshape(-1, math.prod(outputs))
    if base == "nf4":
        codes, scales = quantize_nf4(matrix_IO)
        return codes.reshape(-1, *outputs), scales.reshape(-1, *outputs)
    number_OI, scale_O = quantize_numpy(np.ascontiguousarray(matrix_IO.T))
    return np.ascontiguousarray(number_OI.T).reshape(-1, *outputs), scale_O.reshape(outputs)


def read_base(config: Config, stored: Any, mesh: Mesh) -> nnx.State:
    """Return the base on ``mesh``, quantized. ``stored`` reads float32 parameters like
    `train.arrays.StoredArrays`; the host holds one stacked matrix at a time, in fewer bits."""
    base = config.optimizer.lora_base
    abstract = abstract_base(config)
    shardings = shardings_of(abstract, mesh, config.mesh.zero)
    plain = {
        parameter_name(path): name_of(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract_model(config.model)[1])
    }
    made: dict[str, jax.Array] = {}
    placed = {
        name_of(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }
    for name, leaf in matrices(config).items():
        names = names_of(name, base)
        layers = [
            quantize_layer(name, stored.read(plain[name], layer), base)
            for layer in range(leaf.shape[0])
        ]
        for part, arrays in zip(names, zip(*layers, strict=True), strict=True):
            full = f"{KEY}.blocks.{part}"
            made[full] = _place(np.stack(arrays), placed[full])

    def one(path, leaf):
        name = name_of(path)
        if name in made:
            return made[name]
        array = stored.read(name)
        # The rows of model.vocab_padding are not stored.
        more = [(0, size - had) for size, had in zip(leaf.shape, array.shape, strict=True)]
        return _place(np.pad(array, more) if any(map(any, more)) else array, placed[name])

    return jax.tree_util.tree_map_with_path(one, abstract)


def _place(array: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


# --- computing


def dequantize(name: str, codes: jax.Array, scales: jax.Array, base: str, stacked: bool, head: int):
    """Return matrix ``name`` in float32, of one layer or ``stacked`` over layers; ``head`` is the
    width of a head. In the manual region these are this device's parts."""
    _, experts, inputs, _ = _parts(name)
    axis = stacked + len(experts)
    if base == "nf4":
        matrix = dequantize_nf4(codes, scales, axis)
    else:
        matrix = codes.astype(jnp.float32) * jnp.expand_dims(scales, axis)
    if inputs == "NH":
        shape = matrix.shape
        matrix = matrix.reshape(*shape[:axis], -1, head, *shape[axis + 1 :])
    return matrix


def among_blocks(params: nnx.State) -> nnx.State:
    """Return the base with its codes and scales among the blocks, from which a step takes one layer
    after the other (`assemble`)."""
    mapping = dict(params.raw_mapping)
    codes = mapping.pop(KEY)["blocks"]
    return type(params)({**mapping, "blocks": {**mapping["blocks"], KEY: codes}})


def assemble(
    config: Config, blocks: Any, adapt: Callable[[str, jax.Array], Any], stacked: bool
) -> Any:
    """Return a plain model's blocks, or one layer of them: matrices dequantized, and changed by
    ``adapt`` (name, matrix)."""
    # Inside a scan over layers the mapping is a State.
    mapping = dict(getattr(blocks, "raw_mapping", blocks))
    quantized = mapping.pop(KEY)
    base = config.optimizer.lora_base
    head = config.model.head_width
    plain = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mapping)}

    def one(path, _):
        name = parameter_name(path)
        if not is_quantized(name):
            return plain[name_of(path)]
        codes, scales = (quantized[part] for part in names_of(name, base))
        return adapt(name, dequantize(name, codes, scales, base, stacked, head))

    return jax.tree_util.tree_map_with_path(one, abstract_model(config.model)[1]["blocks"])

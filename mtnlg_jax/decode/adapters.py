"""Several low-rank adapters in one batch: each row is decoded with its own, or with none.

The factors of all adapters are stacked, ranks padded with zeros, and a row has the index of its
adapter: its product with a matrix W is x W + (x A_i) B_i, where B_i has the scale multiplied in
(S-LoRA, Sheng 2023, arXiv 2311.03285, without its kernels). Index 0 is no adapter: factors of
zeros. A decoder without adapters is unchanged, and so are its compiled programs.

The indices are part of the parameters, so that nothing between a caller and a product needs to
know of them. One index serves all rows; n indices serve k n rows, k consecutive rows each, such as
the beams of a prompt.
"""

# Shapes: B rows, S positions, N adapters (the first is none), I inputs, O outputs, R low rank

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.quantized import ExpertWeight, RowWeight
from mtnlg_jax.model.params import name_of
from mtnlg_jax.model.parts import WholeWeight
from mtnlg_jax.parallel.auto import fetch
from mtnlg_jax.train import lora
from mtnlg_jax.train.adapter_file import Adapter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight(WholeWeight):
    """A weight with the factors of several adapters, and the adapter of each row of a product."""

    weight: Any  # an array, or a RowWeight
    first_NIR: jax.Array
    second_NRO: jax.Array
    adapters_B: jax.Array  # int32
    inputs: int = dataclasses.field(metadata={"static": True})  # dims of x summed over

    def __call__(self, x: jax.Array) -> jax.Array:
        if callable(self.weight):
            y = self.weight(x)
        else:
            y = jnp.tensordot(x, self.weight, self.inputs)
        rows = x.shape[0]
        x_BSI = x.reshape(rows, -1, self.first_NIR.shape[1])
        if self.adapters_B.shape[0] == 1:
            # Without a copy of the factors for each row.
            first = self.first_NIR[self.adapters_B[0]]
            second = self.second_NRO[self.adapters_B[0]]
            more_BSO = _product("BSR,RO->BSO", _product("BSI,IR->BSR", x_BSI, first), second)
        else:
            given = self.adapters_B.shape[0]
            assert rows % given == 0, f"{rows} rows with the adapters of {given}"
            at_B = jnp.repeat(self.adapters_B, rows // given)
            h_BSR = _product("BSI,BIR->BSR", x_BSI, self.first_NIR[at_B])
            more_BSO = _product("BSR,BRO->BSO", h_BSR, self.second_NRO[at_B])
        return (y + more_BSO.reshape(y.shape)).astype(x.dtype)


def _product(dims: str, x: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.einsum(dims, x, factor, preferred_element_type=jnp.float32)


def check_stackable(adapters: Iterable[Adapter], stages: int) -> None:
    """Raise ValueError if rows cannot have each their own of ``adapters``: those of a model's
    experts, and over ``stages`` of a pipeline."""
    if stages > 1:
        raise ValueError(
            f"adapters of single rows do not decode over stages (mesh.pipe={stages}); set "
            "mesh.pipe=1, or merge one adapter into the model with --adapter"
        )
    for name in itertools.chain.from_iterable(each.factors for each in adapters):
        _, _, target, dims = name.split("_")
        if dims.startswith("E"):
            raise ValueError(
                f"an adapter changes the matrices {target!r} of the experts, which rows cannot "
                "have each their own of; merge one adapter into the model with --adapter, or train "
                "adapters of attention alone (--targets=q,k,v,o)"
            )


def stack(decoder: Decoder, adapters: Mapping[str, Adapter]) -> Decoder:
    """Return ``decoder`` with ``adapters`` by name, all rows with none until `for_rows`.

    The adapters are of the decoder's model (`adapter_file.load_adapter` has checked it). Raises
    ValueError as `check_stackable` does.
    """
    mesh = decoder.mesh
    check_stackable(adapters.values(), 1 if mesh is None else mesh.shape["pipe"])
    outer, layers = decoder.params
    dtype = _dtype_of(layers[0])
    params = (
        outer,
        tuple(
            _with_factors(decoder, layer, number, list(adapters.values()), dtype)
            for number, layer in enumerate(layers)
        ),
    )
    return decoder._replace(params=params, adapters=tuple(adapters))


def _with_factors(
    decoder: Decoder, layer: Any, number: int, adapters: Sequence[Adapter], dtype: Any
) -> Any:
    """Return a layer's parameters with the stacked factors of every matrix that one adapts."""
    none_1 = _placed(decoder, np.zeros(1, np.int32))

    def one(path, held):
        name = name_of(path).rpartition(".")[2]
        if lora.target_of(name) is None:
            return held
        first, second = lora.factor_names(name)
        if not any(first in each.factors for each in adapters):
            return held
        pairs = [_matrices(each, first, second, number) for each in adapters]
        rank = max(len(second_RO) for _, second_RO in pairs)
        first_NIR = np.zeros((1 + len(pairs), pairs[0][0].shape[0], rank), np.float32)
        second_NRO = np.zeros((1 + len(pairs), rank, pairs[0][1].shape[1]), np.float32)
        for at, (first_IR, second_RO) in enumerate(pairs, 1):
            first_NIR[at, :, : first_IR.shape[1]] = first_IR
            second_NRO[at, : len(second_RO)] = second_RO
        return AdaptedWeight(
            held,
            _placed(decoder, first_NIR.astype(dtype)),
            _placed(decoder, second_NRO.astype(dtype)),
            none_1,
            inputs=len(first.rpartition("_")[2]) - 1,
        )

    return jax.tree_util.tree_map_with_path(one, layer, is_leaf=_is_held)


def _matrices(
    adapter: Adapter, first: str, second: str, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return one layer's factors as (I, R) and (R, O), the scale in the second."""
    if first not in adapter.factors:
        shapes = lora.abstract_adapters(_all_targets(adapter))["blocks"]
        inputs = math.prod(shapes[first].shape[1:-1])
        outputs = math.prod(shapes[second].shape[2:])
        return np.zeros((inputs, 0), np.float32), np.zeros((0, outputs), np.float32)
    first_IR = adapter.factors[first][number]
    second_RO = adapter.factors[second][number]
    first_IR = first_IR.reshape(-1, first_IR.shape[-1])
    return first_IR, np.float32(adapter.scale) * second_RO.reshape(len(second_RO), -1)


def _all_targets(adapter: Adapter):
    optimizer = dataclasses.replace(
        adapter.config.optimizer, lora_targets=("q", "k", "v", "o", "in", "gate", "out")
    )
    return dataclasses.replace(adapter.config, optimizer=optimizer)


def for_rows(decoder: Decoder, names: Sequence[str | None]) -> Decoder:
    """Return ``decoder`` for a batch whose rows have the adapters ``names``, None for none.

    One name serves all rows. Raises ValueError on a name that `stack` was not given.
    """
    for name in names:
        if name is not None and name not in decoder.adapters:
            known = ", ".join(decoder.adapters) or "none"
            raise ValueError(f"the adapter {name!r} is not among those of the decoder: {known}")
    return _with_indices(
        decoder,
        np.array([0 if n is None else 1 + decoder.adapters.index(n) for n in names], np.int32),
    )


def of_rows(decoder: Decoder, rows: Sequence[int] | np.ndarray, count: int = 0) -> Decoder:
    """Return a decoder of several rows for the rows at these indices, with ``count`` rows in all.

    Further rows have no adapter. A decoder whose rows all have the same adapter is returned as it
    is.
    """
    if not decoder.adapters:
        return decoder
    leaves = jax.tree.leaves(decoder.params[1][0], is_leaf=_is_adapted)
    found = next(fetch(leaf.adapters_B) for leaf in leaves if _is_adapted(leaf))
    if len(found) == 1:
        return decoder
    chosen = np.zeros(max(count, len(rows)), np.int32)
    chosen[: len(rows)] = found[np.asarray(rows, np.int64)]
    return _with_indices(decoder, chosen)


def _with_indices(decoder: Decoder, indices_B: np.ndarray) -> Decoder:
    placed_B = _placed(decoder, indices_B)

    def one(leaf):
        return dataclasses.replace(leaf, adapters_B=placed_B) if _is_adapted(leaf) else leaf

    return decoder._replace(params=jax.tree.map(one, decoder.params, is_leaf=_is_adapted))


def _placed(decoder: Decoder, array: np.ndarray) -> jax.Array:
    """Return an array that every device of the decoder holds whole."""
    if decoder.mesh is None:
        return jnp.asarray(array)
    return jax.device_put(array, NamedSharding(decoder.mesh, P()))


def _dtype_of(layer: Any) -> Any:
    return layer["norm_1"]["scale_D"].dtype


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, AdaptedWeight)


def _is_held(leaf: Any) -> bool:
    return isinstance(leaf, RowWeight | ExpertWeight)

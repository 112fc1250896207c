"""Low-rank adaptation (Hu 2021, arXiv 2106.09685).

A matrix W of the blocks becomes W + alpha / r x A B, and only A and B are trained. B starts at 0,
so the first step computes with the unchanged model.

A run of rank r keeps its adapters under ``lora`` in ``state.params``, beside the frozen parameters.
Those of ``w_q_DNH`` are ``lora_a_q_DR`` and ``lora_b_q_RNH``, stacked over layers like the matrix.
Their names end in their dims, so the plan of the mesh, ZeRO and checkpoints treat them like any
parameter.

A step computes x W + (x A) B and never the sum: W has no gradient, so a backward pass costs one
product with W instead of two. Moments exist for A and B alone. Decoding loads the merged model.
"""

# Shapes: L layers, R low rank, and in names of parameters D width, F MLP width, N query heads,
# K key/value heads, H head width

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtnlg_jax.config import Config, OptimizerConfig
from mtnlg_jax.model.parts import WholeWeight
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import parameter_name
from mtnlg_jax.train import quantized_base

_KEYS = ("lora_rank", "lora_alpha", "lora_targets", "lora_base")
_OFF = {key: getattr(OptimizerConfig(), key) for key in _KEYS}


def used(config: Config) -> bool:
    """Return whether ``config`` trains adapters."""
    return config.optimizer.lora_rank > 0


def without(config: Config) -> Config:
    """Return ``config`` with low-rank adaptation off: that of the merged model."""
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **_OFF))


# --- what a step does with parameters; without a rank, nothing


def trainable(params: nnx.State, config: Config) -> tuple[Any, Callable]:
    """Return (the trained part of ``state.params``, a function from a new one to params)."""
    # Full training takes the same path with identities, so the step has no branch for adapters.
    if not used(config):
        return params, lambda new: new
    base, adapters = split(params)
    # The frozen base goes back into the new state as it is.
    return adapters, functools.partial(joined, base)


def make_targets(config: Config) -> tuple[Callable, Callable]:
    """Return (targets, with_targets): which leaves of `computed` the loss is differentiated by.

    targets: params -> these leaves; with adapters, only their factors.
    with_targets: (params, these leaves) -> params.
    """
    if not used(config):
        return lambda params: params, lambda params, targets: targets
    return _factors_of, _with_factors


def _factors_of(params: Any) -> dict[str, dict[str, Any]]:
    """Return the factors among the blocks of `computed`."""
    return {"blocks": params.raw_mapping["blocks"]["lora"]}


def _with_factors(params: Any, factors: dict[str, dict[str, Any]]) -> Any:
    mapping = params.raw_mapping
    blocks = {**mapping["blocks"], "lora": factors["blocks"]}
    return type(params)({**mapping, "blocks": blocks})


def computed(params: nnx.State, config: Config) -> nnx.State:
    """Return, for ``state.params``, the parameters with which a loss is computed: a plain model's,
    with adapters (and the codes of a quantized base) among the blocks. There
    `weights.make_weights` takes them, layer by layer."""
    if not used(config):
        return params
    base, adapters = split(params)
    assert adapters is not None, "a run with a rank holds adapters"
    if quantized_base.used(config):
        base = quantized_base.among_blocks(base)
    mapping = base.raw_mapping
    return type(base)({**mapping, "blocks": {**mapping["blocks"], "lora": adapters["blocks"]}})


def abstract_computed(config: Config) -> nnx.State:
    """Return `computed` as ShapeDtypeStructs."""
    return computed(abstract_parameters(config), config)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankSum(WholeWeight):
    """W + scale x A B, multiplied without adding it up; takes an array's place in a Param."""

    matrix: jax.Array
    first: jax.Array  # A: the inputs, then R
    second: jax.Array  # B: R, then the outputs
    scale: float = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = self.first.ndim - 1
        # Frozen, also where a pipeline differentiates a stage by all that it holds.
        y = jnp.tensordot(x, lax.stop_gradient(self.matrix), inputs)
        return y + jnp.tensordot(self.scale * jnp.tensordot(x, self.first, inputs), self.second, 1)


def low_rank_sum(
    config: Config, name: str, matrix: jax.Array, factors: dict
) -> jax.Array | LowRankSum:
    """Return one layer's ``matrix`` with its adapter, or alone if there are no factors of
    ``name``."""
    first, second = factor_names(name)
    if first not in factors:
        return matrix
    if name.rsplit("_", 1)[1].startswith("E"):  # grouped products take arrays
        return adapt(config, name, matrix, factors)
    return LowRankSum(matrix, factors[first], factors[second], _scale(config))


def with_adapters(config: Config, layer: nnx.State) -> nnx.State:
    """Return one layer of `computed` as that of a plain model: its adapters join their matrices."""
    mapping = dict(layer.raw_mapping)
    factors = mapping.pop("lora")

    def one(path, leaf):
        name = parameter_name(path)
        return leaf if target_of(name) is None else low_rank_sum(config, name, leaf, factors)

    return jax.tree_util.tree_map_with_path(one, type(layer)(mapping))


def target_of(name: str) -> str | None:
    """Return "q" for w_q_DNH, None for a parameter that is not a matrix of a block."""
    # Biases (b_q_NH) and norms (scale_D) have no low-rank form.
    return name.split("_")[1] if name.startswith("w_") else None


def adapt(
    config: Config, name: str, matrix: jax.Array, factors: dict, stacked: str = ""
) -> jax.Array:
    """Return ``matrix`` + alpha / r x A B if there are factors of ``name``, for all layers if
    ``stacked`` is L."""
    first, second = factor_names(name)
    if first not in factors:
        return matrix
    # R is the only letter that both factors share besides L, so the einsum sums over it alone.
    dims = [stacked + each.rsplit("_", 1)[1] for each in (first, second, name)]
    # By default TPUs would round the factors to bfloat16 before the product.
    product = jnp.einsum(
        f"{dims[0]},{dims[1]}->{dims[2]}",
        factors[first],
        factors[second],
        precision=jax.lax.Precision.HIGHEST,
    )
    return matrix + _scale(config) * product


def _scale(config: Config) -> float:
    return config.optimizer.lora_alpha / config.optimizer.lora_rank


# --- the adapters of a state


def joined(params: nnx.State, adapters: dict) -> nnx.State:
    """Return a plain model's parameters and adapters as one tree."""
    # The tree keeps its type, so paths, specs and checkpoints treat it like a plain model's.
    return type(params)({**params.raw_mapping, "lora": adapters})


def split(params: nnx.State) -> tuple[nnx.State, dict | None]:
    """Return (a plain model's parameters, adapters or None): the inverse of `joined`."""
    mapping = dict(params.raw_mapping)
    adapters = mapping.pop("lora", None)
    return type(params)(mapping), adapters


def with_new_adapters(params: nnx.State, config: Config, shardings: dict | None) -> nnx.State:
    """Return a plain model's ``params`` with the adapters of a run's start, if it has any.

    A is drawn from train.seed with variance 1 / (3 inputs), as in Hu's code, and B is 0. They are
    equal on every mesh.
    """
    if not used(config):
        return params

    def one(number, name, shape):
        if name.startswith("lora_b"):
            return jnp.zeros(shape, jnp.float32)
        # Shape (L, inputs ..., R).
        inputs = math.prod(shape[1:-1])
        # "lora" in ASCII, a number that no step reaches: these draws stay apart from those of
        # dropout.
        key = jax.random.fold_in(jax.random.key(config.train.seed), 0x6C6F7261 + number)
        # Drawn as a matrix: XLA needs seconds to compile a draw of more dims.
        drawn = jax.random.normal(key, (shape[0], inputs * shape[-1]), jnp.float32)
        return drawn.reshape(shape) / math.sqrt(3 * inputs)

    def make():
        # The number decides the draw: with other targets a matrix gets other adapters.
        leaves = enumerate(abstract_adapters(config)["blocks"].items())
        return {"blocks": {name: one(number, name, leaf.shape) for number, (name, leaf) in leaves}}

    return joined(params, jax.jit(make, out_shardings=shardings)())


def factor_names(name: str) -> tuple[str, str]:
    """Return the names of the factors: lora_a_q_DR and lora_b_q_RNH for w_q_DNH."""
    _, target, dims = name.split("_")
    # The inputs of a matrix are D alone (DNH, DF), or all dims before D (NHD, FD).
    inputs, outputs = (dims[0], dims[1:]) if dims[0] == "D" else (dims[:-1], dims[-1])
    return f"lora_a_{target}_{inputs}R", f"lora_b_{target}_R{outputs}"


def outputs_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the outputs' part of the ``shape`` of one layer of a matrix: (N, H) for w_q_DNH."""
    dims = name.rsplit("_", 1)[1]
    return shape[1:] if dims[0] == "D" else shape[-1:]


def abstract_adapters(config: Config) -> dict:
    """Return the adapters as ShapeDtypeStructs."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(config.model)[1])
    names = {parameter_name(path): leaf for path, leaf in leaves}
    targets = config.optimizer.lora_targets
    matrices = {name: leaf for name, leaf in names.items() if target_of(name) in targets}
    sizes = {"R": config.optimizer.lora_rank}
    for name, leaf in matrices.items():
        # Names hold the dims, so sizes by letter follow from the matrices themselves.
        sizes |= dict(zip("L" + name.split("_")[2], leaf.shape, strict=True))
    factors = [factor for name in matrices for factor in factor_names(name)]

    def one(name):
        shape = tuple(sizes[dim] for dim in "L" + name.rsplit("_", 1)[1])
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {"blocks": {name: one(name) for name in factors}}


def abstract_parameters(config: Config) -> nnx.State:
    """Return ``state.params`` as ShapeDtypeStructs: the model, and its adapters under ``lora``."""
    if not used(config):
        return abstract_model(config.model)[1]
    quantized = quantized_base.used(config)
    base = quantized_base.abstract_base(config) if quantized else abstract_model(config.model)[1]
    return joined(base, abstract_adapters(config))


@functools.partial(jax.jit, static_argnums=1)
def _merged(params: nnx.State, config: Config) -> nnx.State:
    base, adapters = split(params)
    assert adapters is not None, "a run with a rank holds adapters"
    factors = adapters["blocks"]
    if quantized_base.used(config):
        mapping = quantized_base.among_blocks(base).raw_mapping

        def adapted(name, matrix):
            return adapt(config, name, matrix, factors, "L")

        blocks = quantized_base.assemble(config, mapping["blocks"], adapted, stacked=True)
        return type(params)({**mapping, "blocks": blocks.raw_mapping})

    def one(path, leaf):
        name = parameter_name(path)
        return leaf if target_of(name) is None else adapt(config, name, leaf, factors, "L")

    return jax.tree_util.tree_map_with_path(one, base)


def merge(params: nnx.State, config: Config) -> nnx.State:
    """Return ``state.params`` of any run as those of a plain model."""
    return _merged(params, config) if used(config) else params

"""Low-rank adaptation (Hu 2021, arXiv 2106.09685): a matrix W of the blocks becomes W + alpha / r x
A B, of which A and B alone are learnt. B begins at 0, so that the model begins as it was.

A run of rank r keeps, beside the frozen parameters, ``lora`` in ``state.params``: of ``w_q_DNH``
the two ``lora_a_q_DR`` and ``lora_b_q_RNH``, stacked over layers as that is. Their names end in
their dims, so the plan of the mesh, ZeRO and checkpoints hold for them as they do for all else. The
step adds the product to each device's part of
the float32 masters: what is computed with is always a plain model, the same as is loaded
afterwards. The price is that gradients of the matrices named exist while a step runs; moments do of
A and B alone.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from mtnlg_jax.config import Config, OptimizerConfig
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import dims_of, parameter_name

_OFF = {key: getattr(OptimizerConfig(), key) for key in ("lora_rank", "lora_alpha", "lora_targets")}


def used(config: Config) -> bool:
    return config.optimizer.lora_rank > 0


def without(config: Config) -> Config:
    """``config`` of the plain model that a merged run is."""
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **_OFF))


def matrices(params, config: Config) -> dict:
    """{"blocks": {"w_q_DNH": ...}}: of a tree of named parameters those that the config names,
    whatever they are."""
    names = {
        parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return {
        "blocks": {
            name: leaf
            for name, leaf in names.items()
            if _target(name) in config.optimizer.lora_targets
        }
    }


def with_matrices(params, chosen: dict):
    """``params`` with the matrices ``chosen`` in their places."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: chosen["blocks"].get(parameter_name(path), leaf), params
    )


def _target(name: str) -> str | None:
    """q of w_q_DNH; None for what is no matrix of a block."""
    return name.split("_")[1] if name.startswith("w_") else None


def _names(name: str) -> tuple[str, str]:
    """Of w_q_DNH: lora_a_q_DR and lora_b_q_RNH."""
    _, target, dims = name.split("_")
    # Matrices lead from D (DNH, DF) or to D (NHD, FD).
    inputs, outputs = (dims[0], dims[1:]) if dims[0] == "D" else (dims[:-1], dims[-1])
    return f"lora_a_{target}_{inputs}R", f"lora_b_{target}_R{outputs}"


def _abstract(config: Config) -> dict:
    """The adapters as ShapeDtypeStructs."""
    chosen = matrices(abstract_model(config.model)[1], config)["blocks"]
    sizes = {"R": config.optimizer.lora_rank}
    for name, leaf in chosen.items():
        sizes |= dict(zip("L" + name.split("_")[2], leaf.shape, strict=True))
    names = [one for name in chosen for one in _names(name)]
    return {
        "blocks": {
            name: jax.ShapeDtypeStruct(
                tuple(sizes[dim] for dim in "L" + name.rsplit("_", 1)[1]), jnp.float32
            )
            for name in names
        }
    }


def abstract_parameters(config: Config):
    """What ``state.params`` is, as ShapeDtypeStructs: the model, and with a rank its adapters
    under ``lora``."""
    params = abstract_model(config.model)[1]
    return joined(params, _abstract(config)) if used(config) else params


def init_adapters(config: Config, shardings: dict) -> dict:
    """A from train.seed with variance 1 / (3 inputs), as in Hu's code, B 0; equal on every mesh."""

    def one(number, name, shape):
        if name.startswith("lora_b"):
            return jnp.zeros(shape, jnp.float32)
        inputs = math.prod(shape[1:-1])
        key = jax.random.fold_in(jax.random.key(config.train.seed), 0x6C6F7261 + number)
        drawn = jax.random.normal(key, (shape[0], inputs * shape[-1]), jnp.float32)
        return drawn.reshape(shape) / math.sqrt(3 * inputs)

    def make():
        leaves = _abstract(config)["blocks"].items()
        return {
            "blocks": {
                name: one(number, name, leaf.shape) for number, (name, leaf) in enumerate(leaves)
            }
        }

    return jax.jit(make, out_shardings=shardings)()


def joined(params, adapters: dict):
    """A plain model's parameters and adapters as one tree."""
    return type(params)({**params.raw_mapping, "lora": adapters})


def split(params) -> tuple:
    """(a plain model's parameters, adapters): what ``joined`` had put together."""
    mapping = dict(params.raw_mapping)
    adapters = mapping.pop("lora")
    return type(params)(mapping), adapters


def adapted(chosen: dict, adapters: dict, config: Config) -> dict:
    """The matrices W as W + alpha / r x A B, in float32."""
    scale = config.optimizer.lora_alpha / config.optimizer.lora_rank
    found = adapters["blocks"]

    def one(path, leaf):
        first, second = _names(parameter_name(path))
        dims = ["L" + name.rsplit("_", 1)[1] for name in (first, second)]
        product = jnp.einsum(
            f"{dims[0]},{dims[1]}->{dims_of(path)}",
            found[first],
            found[second],
            precision=jax.lax.Precision.HIGHEST,
        )
        return leaf + scale * product

    return jax.tree_util.tree_map_with_path(one, chosen)


def opened(params, config: Config) -> tuple:
    """``params`` of a state as (those of a plain model, what is learnt, a function from gradients
    of the first to those of the second, a function from what is learnt to ``params``)."""
    if not used(config):
        return params, params, lambda grads: grads, lambda learnt: learnt
    base, adapters = split(params)
    chosen, back = jax.vjp(lambda new: adapted(matrices(base, config), new, config), adapters)
    return (
        with_matrices(base, chosen),
        adapters,
        lambda grads: back(grads)[0],
        functools.partial(joined, base),
    )


@functools.partial(jax.jit, static_argnums=1)
def _merged(params, config: Config):
    base, adapters = split(params)
    return with_matrices(base, adapted(matrices(base, config), adapters, config))


def merge(params, config: Config):
    """``state.params`` of any run as those of a plain model."""
    return _merged(params, config) if used(config) else params

"""AdamW or Muon, from Optax.

The train step applies the learning rate, because it knows how many samples were consumed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mtnlg_jax.config import Config, OptimizerConfig
from mtnlg_jax.config.memory_rules import offloads_moments
from mtnlg_jax.parallel.mesh import dims_of, parameter_name
from mtnlg_jax.train import offload

Path = tuple[Any, ...]  # of a leaf, as jax.tree_util gives it

# RMS of a Muon update. It is about that of an Adam update in practice, so both use the same
# learning rates and weight decays.
_MUON_RMS = 0.2  # Liu 2025, Muon is Scalable for LLM Training, section 2.2
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Jordan 2024


def decay_mask(params: Any) -> Any:
    """Return True for matrices and embeddings, False for norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not parameter_name(path).startswith(("scale_", "bias_", "b_")), params
    )


def make_optimizer(
    config: OptimizerConfig, seed: int = 0, on_host: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Chain clipping by global norm, moments and decoupled weight decay.

    The caller scales the updates by minus the learning rate. ``seed`` and ``on_host`` are those of
    `offload.hold`.
    """
    # Clipping comes first: moments then never see a gradient above the limit.
    clip = optax.identity()
    if config.clip_grad_norm:
        clip = optax.clip_by_global_norm(config.clip_grad_norm)
    moments = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "muon":
        # Clipping is outside the partition, so that the norm is that of all gradients together.
        moments = optax.partition({"adam": moments, "muon": _muon(config)}, _labels)
    moments = offload.hold(moments, config.moments_dtype, seed, on_host)
    # Decay follows the moments and so is decoupled from them (AdamW, Loshchilov 2019).
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    return optax.with_extra_args_support(optax.chain(clip, moments, decay))


def optimizer_of(config: Config) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run."""
    return make_optimizer(config.optimizer, config.train.seed, offloads_moments(config))


def _is_matrix(path: Path) -> bool:
    # The leading L marks a parameter of the stacked blocks.
    return dims_of(path).startswith("L") and parameter_name(path).startswith("w_")


def _labels(params: Any) -> Any:
    """Give the matrices of the blocks to Muon; embeddings, head, norms and biases to Adam."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _is_matrix(path) else "adam", params
    )


def _matrix_dims(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (the input dims, the output dims) of a stacked matrix.

    Its input is D (LDNH, LDF, LEDF), or its output is D (LNHD, LFD, LEFD).
    """
    dims = dims_of(path)
    # L and E belong to neither side: each layer and each expert has a matrix of its own.
    first = 2 if dims[1] == "E" else 1
    split = first + 1 if dims[first] == "D" else len(dims) - 1
    return tuple(range(first, split)), tuple(range(split, len(dims)))


def _matrix_axes(updates: Any) -> Any:
    """Tell Muon which dims of each stacked matrix are inputs and which are outputs."""

    return jax.tree_util.tree_map_with_path(
        lambda path, _: contrib.MuonDimensionNumbers(*_matrix_dims(path)), updates
    )


def _scale(path: Path, update: jax.Array) -> jax.Array:
    """Scale an orthogonal m x n matrix, whose RMS is 1 / sqrt(max(m, n)), to _MUON_RMS."""
    size = max(math.prod(update.shape[dim] for dim in dims) for dims in _matrix_dims(path))
    return _MUON_RMS * math.sqrt(size) * update


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    inner = contrib.scale_by_muon(
        _NEWTON_SCHULZ, beta=config.muon_momentum, weight_dimension_numbers=_matrix_axes
    )

    # Optax keeps the coefficients in the state. They are constants, so they are taken out: they
    # have no dims to shard, and a checkpoint need not hold them.
    def init(params: Any) -> Any:
        return inner.init(params)._replace(ns_coeffs=())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = state._replace(ns_coeffs=jnp.asarray(_NEWTON_SCHULZ))
        updates, state = inner.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(_scale, updates), state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)

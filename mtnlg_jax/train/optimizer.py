"""AdamW, Muon or Lion, from Optax, or SOAP.

The train step applies the learning rate, because it knows how many samples were consumed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from optax import contrib

from mtnlg_jax.config import Config, ModelConfig, OptimizerConfig
from mtnlg_jax.config.memory_rules import offloads_moments
from mtnlg_jax.model import mup
from mtnlg_jax.parallel.mesh import dims_of, parameter_name
from mtnlg_jax.train import offload
from mtnlg_jax.train.soap import scale_by_soap

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
    config: OptimizerConfig,
    mesh: Mesh | None = None,
    model: ModelConfig | None = None,
    seed: int = 0,
    on_host: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Chain clipping by global norm, moments, clipping of the update, the factors of muP if
    ``model`` has it, and decoupled weight decay.

    The caller scales the updates by minus the learning rate. The devices of ``mesh`` share what
    XLA would compute on each; without one the updates are the same. ``seed`` and ``on_host`` are
    those of `offload.hold`.
    """
    # Clipping comes first: moments then never see a gradient above the limit.
    clip = _clip(config.clip_grad_norm)
    # Decay follows the moments and so is decoupled from them (AdamW, Loshchilov 2019). The limit of
    # the update is before it, so that decay goes on where an update is scaled down.
    clip_update = _clip(config.clip_update_norm)
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    ratio = 1.0 if model is None else model.mup_ratio
    moments = _moments(config, mesh, ratio)
    moments = offload.hold(moments, config.moments_dtype, seed, on_host)
    if model is None or model.mup_ratio == 1:
        return optax.with_extra_args_support(optax.chain(clip, moments, clip_update, decay))
    # Its factors are behind what looks at the update as a whole.
    factors = _mup(config, model)
    return optax.with_extra_args_support(optax.chain(clip, moments, clip_update, factors, decay))


def optimizer_of(config: Config, mesh: Mesh | None = None) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run; ``mesh`` as in `make_optimizer`."""
    on_host = offloads_moments(config)
    return make_optimizer(config.optimizer, mesh, config.model, config.train.seed, on_host)


def _clip(norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def _moments(
    config: OptimizerConfig, mesh: Mesh | None, ratio: float
) -> optax.GradientTransformation:
    """Return what turns clipped gradients into updates; ``ratio`` is `ModelConfig.mup_ratio`."""
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "adamw":
        return adam
    # Clipping is outside the partition, so that the norm is that of all gradients together.
    labels = functools.partial(_labels, config.name)
    if config.name == "muon":
        return optax.partition({"adam": adam, "muon": _muon(config)}, labels)
    soap = scale_by_soap(
        config.b1,
        config.b2,
        config.eps,
        config.precondition_frequency,
        config.max_precond_dim,
        _matrix_dims,
        mesh,
        lambda path: mup.factor_before_turns(parameter_name(path), ratio),
    )
    return optax.partition({"adam": adam, "soap": soap}, labels)


def _mup(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    def scaled(updates: Any, _: Any = None) -> Any:
        whole = config.name in ("adamw", "lion")
        each = (
            jax.tree.map(lambda _: config.name, updates) if whole else _labels(config.name, updates)
        )
        if config.name == "soap":
            each = jax.tree_util.tree_map_with_path(of_soap, each, updates)
        return mup.scale_updates(updates, model, each)

    def of_soap(path: Path, label: str, update: jax.Array) -> str:
        # A matrix of which no side is turned has Adam's updates.
        if label == "adam":
            return label
        sizes = (math.prod(update.shape[dim] for dim in dims) for dims in _matrix_dims(path))
        return label if min(sizes) <= config.max_precond_dim else "adam"

    return optax.stateless(scaled)


def _is_matrix(path: Path) -> bool:
    # The leading L marks a parameter of the stacked blocks.
    return dims_of(path).startswith("L") and parameter_name(path).startswith("w_")


def _labels(name: str, params: Any) -> Any:
    """Give the matrices of the blocks to ``name``; embeddings, head, norms and biases to Adam."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: name if _is_matrix(path) else "adam", params
    )


def _matrix_dims(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (the input dims, the output dims) of a stacked matrix, by number."""
    inputs, outputs = mup.sides(parameter_name(path))
    # L and E belong to neither side: each layer and each expert has a matrix of its own.
    first = len(dims_of(path)) - len(inputs) - len(outputs)
    split = first + len(inputs)
    return tuple(range(first, split)), tuple(range(split, split + len(outputs)))


def sizes_of_sides(params: Any) -> dict[tuple[str, int], int]:
    """Return the sizes of the sides of the matrices of the blocks in ``params`` (arrays or their
    shapes): inputs, at (name, 0), and outputs, at (name, 1)."""
    return {
        (parameter_name(path), number): math.prod(leaf.shape[dim] for dim in dims)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if _is_matrix(path)
        for number, dims in enumerate(_matrix_dims(path))
    }


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

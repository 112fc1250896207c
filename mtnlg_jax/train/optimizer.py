"""AdamW or Muon by Optax; the learning rate is applied by the step, which knows how many samples
went by."""

import math

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mtnlg_jax.config import OptimizerConfig
from mtnlg_jax.parallel.mesh import dims_of, parameter_name

# RMS of a Muon update, that of Adam's in practice: so both take the same learning rates and weight
# decays.
_MUON_RMS = 0.2  # Liu 2025, Muon is Scalable for LLM Training, section 2.2
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Jordan 2024


def decay_mask(params):
    """True for matrices and embeddings; norms and biases (scale_*, bias_*, b_*) are not decayed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not parameter_name(path).startswith(("scale_", "bias_", "b_")), params
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, moments, decoupled weight decay. Updates are to be scaled by -learning
    rate."""
    clip = (
        optax.clip_by_global_norm(config.clip_grad_norm)
        if config.clip_grad_norm
        else optax.identity()
    )
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    moments = (
        adam
        if config.name == "adamw"
        else optax.partition({"adam": adam, "muon": _muon(config)}, _labels)
    )
    return optax.chain(clip, moments, optax.add_decayed_weights(config.weight_decay, decay_mask))


def _is_matrix(path) -> bool:
    return dims_of(path).startswith("L") and parameter_name(path).startswith("w_")


def _labels(params):
    """Muon takes the matrices of the blocks; embeddings, head, norms and biases stay with Adam."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _is_matrix(path) else "adam", params
    )


def _first_output(path, ndim: int) -> int:
    """Matrices lead from D (LDNH, LDF) or to D (LNHD, LFD): the axis at which their outputs
    begin."""
    return 2 if dims_of(path)[1] == "D" else ndim - 1


def _matrix_axes(updates):
    def axes(path, leaf):
        split = _first_output(path, leaf.ndim)
        return contrib.MuonDimensionNumbers(tuple(range(1, split)), tuple(range(split, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, updates)


def _scale(path, update):
    """An orthogonal m x n matrix has RMS 1 / sqrt(max(m, n))."""
    split = _first_output(path, update.ndim)
    size = max(math.prod(update.shape[1:split]), math.prod(update.shape[split:]))
    return _MUON_RMS * math.sqrt(size) * update


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    inner = contrib.scale_by_muon(
        _NEWTON_SCHULZ, beta=config.muon_momentum, weight_dimension_numbers=_matrix_axes
    )

    def init(params):
        # The coefficients are constants, not state: they have no dims, and a checkpoint need not
        # hold them.
        return inner.init(params)._replace(ns_coeffs=())

    def update(updates, state, params=None):
        updates, state = inner.update(
            updates, state._replace(ns_coeffs=jnp.asarray(_NEWTON_SCHULZ)), params
        )
        return jax.tree_util.tree_map_with_path(_scale, updates), state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)

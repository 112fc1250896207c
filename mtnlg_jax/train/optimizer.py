"""AdamW by Optax; the learning rate is applied by the step, which knows how many samples went by."""

import jax
import optax

from mtnlg_jax.config import OptimizerConfig
from mtnlg_jax.parallel.mesh import parameter_name


def decay_mask(params):
    """True for matrices and embeddings; norms and biases (scale_*, bias_*, b_*) are not decayed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not parameter_name(path).startswith(("scale_", "bias_", "b_")), params
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam moments, decoupled weight decay. Updates are to be scaled by -learning rate."""
    clip = optax.clip_by_global_norm(config.clip_grad_norm) if config.clip_grad_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
    )

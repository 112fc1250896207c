"""How many tokens each expert gets, and the bias that evens this out (Wang 2024, arXiv 2408.15664).

The loads travel as the gradients of a bias that routers add to the scores when they choose experts.
So accumulation, pipelines and meshes sum them as they sum gradients. A model without such a bias
gets one of zeros for the step, which chooses the same experts.
"""

# Shapes: L layers, E experts

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtnlg_jax.config import Config, ModelConfig, MoEConfig
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.collectives import axis_size
from mtnlg_jax.parallel.mesh import EXPERT_BIAS, parameter_name


def counted(model: ModelConfig) -> ModelConfig:
    """Return ``model``, whose experts are chosen with a bias."""
    moe = dataclasses.replace(model.moe, moe_router_enable_expert_bias=True)
    return dataclasses.replace(model, moe=moe)


def new_counters(model: ModelConfig) -> jax.Array:
    """Return zeros, (L, E) of the layers of this stage."""
    layers = model.num_layers // axis_size("pipe")
    counters_LE = jnp.zeros((layers, model.moe.num_moe_experts), jnp.float32)
    # Split over pipe, as the bias is whose gradient they receive.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return lax.pcast(counters_LE, "pipe", to="varying") if manual else counters_LE


def with_counters(params: nnx.State, counters_LE: jax.Array, model: ModelConfig) -> nnx.State:
    """Return the parameters of the `counted` model; the loads are the gradient of ``counters_LE``,
    which are zeros."""
    leaves = _by_path(params)

    def one(path, _):
        found = leaves.get(jax.tree_util.keystr(path))
        if parameter_name(path) != EXPERT_BIAS:
            return found
        # The bias itself is not trained by gradients.
        return counters_LE if found is None else lax.stop_gradient(found) + counters_LE

    return jax.tree_util.tree_map_with_path(one, abstract_model(counted(model))[1])


def split_loads(gradients: nnx.State, like: Any) -> tuple[Any, jax.Array]:
    """Return (gradients in the structure of ``like``, the loads); a bias in ``like`` gets zeros."""
    leaves = _by_path(gradients)
    loads_LE = next(leaf for path, leaf in leaves.items() if EXPERT_BIAS in path)

    def one(path, _):
        found = leaves[jax.tree_util.keystr(path)]
        return jnp.zeros_like(found) if parameter_name(path) == EXPERT_BIAS else found

    return jax.tree_util.tree_map_with_path(one, like), loads_LE


def _by_path(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


# --- their use in a step


def balanced(params: Any, loads_LE: jax.Array, config: Config) -> Any:
    """Return ``params`` with the biases moved by moe_router_bias_update_rate, up for experts with
    less than the mean load and down for those with more."""
    rate = config.model.moe.moe_router_bias_update_rate
    move_LE = rate * jnp.sign(loads_LE.mean(-1, keepdims=True) - loads_LE)

    def one(path, leaf):
        return leaf + move_LE if parameter_name(path) == EXPERT_BIAS else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def metrics_of(loads_LE: jax.Array, moe: MoEConfig) -> dict[str, jax.Array]:
    """Return what metrics.jsonl records of a step.

    ``expert_load_max`` is the load of the busiest expert over the mean, 1 if all are even, and
    ``expert_idle`` the share of experts without a token; both in the worst layer, and by layer
    under the names that end in ``_by_layer``.
    """
    total_L = jnp.maximum(loads_LE.sum(-1), 1.0)
    most_L = loads_LE.max(-1) * moe.num_moe_experts / total_L
    idle_L = (loads_LE == 0).mean(-1)
    return {
        "expert_load_max": most_L.max(),
        "expert_idle": idle_L.max(),
        "expert_load_max_by_layer": most_L,
        "expert_idle_by_layer": idle_L,
    }

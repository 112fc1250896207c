"""What training changes: parameters, optimizer state and counters, born sharded."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.train import lora
from mtnlg_jax.train.optimizer import make_optimizer


def init_state(config: Config, mesh: Mesh, params=None):
    """{"params", "opt_state", "step", "samples", "bad", "skipped"}: float32 masters and moments,
    born sharded. ``bad`` counts non-finite steps in a row, ``skipped`` all of them. ``params``: a
    plain model's to start from, laid out as the plan says; without, fresh ones. With
    optimizer.lora_rank they get fresh adapters."""
    shardings = state_shardings(config, mesh)
    base, adapters = (
        lora.split(shardings["params"]) if lora.used(config) else (shardings["params"], None)
    )
    if params is None:
        params = init_parameters(config.model, config.train.seed, base)
    if adapters is not None:
        params = lora.joined(params, lora.init_adapters(config, adapters))
    rest = {key: value for key, value in shardings.items() if key != "params"}
    return {
        "params": params,
        **jax.jit(functools.partial(_rest, config), out_shardings=rest)(params),
    }


def _rest(config: Config, params):
    zero = jnp.int32(0)
    learnt = lora.split(params)[1] if lora.used(config) else params
    return {
        "opt_state": make_optimizer(config.optimizer).init(learnt),
        "step": zero,
        "samples": zero,
        "bad": zero,
        "skipped": zero,
    }


def abstract_state(config: Config, mesh: Mesh):
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    params = lora.abstract_parameters(config)
    shapes = {"params": params, **jax.eval_shape(functools.partial(_rest, config), params)}
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings_of(shapes, mesh, config.mesh.zero),
    )


def state_shardings(config: Config, mesh: Mesh):
    return jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))

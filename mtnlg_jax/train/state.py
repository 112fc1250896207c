"""The training state: parameters, optimizer state and counters, created in their final shards."""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.config import Config
from mtnlg_jax.model.transformer import init_parameters
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.train import extras, lora, offload, quantized_base
from mtnlg_jax.train.arrays import Held
from mtnlg_jax.train.optimizer import optimizer_of


class TrainState(NamedTuple):
    """Everything that a step reads and replaces."""

    # float32 masters; with optimizer.lora_rank also the adapters, under "lora", and with lora_base
    # the matrices under "quantized"
    params: nnx.State
    opt_state: Any  # moments of the trained parameters, in optimizer.moments_dtype
    step: jax.Array  # int32; steps done, the non-finite ones included
    samples: jax.Array  # int32; sequences read, the clock of the ramp and of the learning rate
    nonfinite_streak: jax.Array  # int32; non-finite steps in a row, up to the last step
    nonfinite_total: jax.Array  # int32; non-finite steps since the start of the run
    extras: dict[str, Any]  # optional parts by name: `extras.PARTS`


def init_state(config: Config, mesh: Mesh, params: nnx.State | None = None) -> TrainState:
    """Return the state of a run before its first step.

    ``params`` are those of a plain model, sharded by the plan; without them, new ones are
    drawn from train.seed. With optimizer.lora_rank new adapters are added to either.
    """
    shardings = state_shardings(config, mesh)
    base, adapters = lora.split(shardings.params)
    if params is None:
        # Drawn into their shards: the model need not fit one device.
        params = _initial(config, mesh, base)
    params = lora.with_new_adapters(params, config, adapters)
    # The parameters may fill the devices: they are left out of this program, not copied by it.
    make_rest = functools.partial(_rest, config)
    rest = jax.jit(make_rest, out_shardings=shardings._replace(params=nnx.State({})))(params)
    return rest._replace(params=params)


def _initial(config: Config, mesh: Mesh, shardings: Any) -> nnx.State:
    """Return new parameters, of which a quantized base has the matrices in fewer bits."""
    if quantized_base.used(config):
        params = init_parameters(config.model, config.train.seed)
        return quantized_base.read_base(config, Held(params), mesh)
    return init_parameters(config.model, config.train.seed, shardings)


def _rest(config: Config, params: nnx.State) -> TrainState:
    """Return the state without its parameters."""
    # Moments exist for the trained parameters alone, which saves most of the state of a run with
    # adapters.
    trained, _ = lora.trainable(params, config)
    # int32 counts 2.1 billion sequences; MT-NLG read 0.13 billion.
    zero = jnp.int32(0)
    opt_state = optimizer_of(config).init(trained)
    parts = extras.new(config, trained)
    return TrainState(nnx.State({}), opt_state, zero, zero, zero, zero, parts)


def renew(config: Config, state: TrainState, parts: Collection[str]) -> TrainState:
    """Return ``state`` with those ``parts`` of its extras that are named as before the first step,
    from the parameters as they are."""
    if not parts:
        return state
    trained, _ = lora.trainable(state.params, config)
    shardings = {name: jax.tree.map(lambda x: x.sharding, state.extras[name]) for name in parts}

    def make(trained):
        made = extras.new(config, trained)
        return {name: made[name] for name in parts}

    made = jax.jit(make, out_shardings=shardings)(trained)
    return state._replace(extras={**state.extras, **made})


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Return the state as ShapeDtypeStructs with shardings, into which a checkpoint is restored."""
    # Only shapes are computed, so this works for models that fit no device here.
    params = lora.abstract_parameters(config)
    rest = jax.eval_shape(functools.partial(_rest, config), params)
    shapes = rest._replace(params=params)
    shardings = shardings_of(shapes, mesh, config.mesh.zero)
    placed = offload.shardings_of_state(config, shardings.opt_state)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings._replace(opt_state=placed),
    )


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Return the state with a NamedSharding in place of every array."""
    return jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))

"""Exponential moving averages of the weights (train.ema_decay), a part of the state's extras."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtnlg_jax.config import Config
from mtnlg_jax.train import lora

KEY = "ema"  # of `state.TrainState.extras`, and of the folder of a checkpoint


def wanted(config: Config) -> bool:
    """Return whether a run of ``config`` averages its weights."""
    return config.train.ema_decay > 0


def new(config: Config, trained: nnx.State) -> Any:
    """Return the averages before the first step: the weights themselves, float32.

    They have the names of `state.params`, so that a checkpoint's ema/ is read as its params/.
    """
    return _named(config, jax.tree.map(lambda x: x.astype(jnp.float32), trained))


def _named(config: Config, averages: Any) -> Any:
    return {"lora": averages} if lora.used(config) else averages


def _trained(config: Config, averages: Any) -> Any:
    """Return ``averages`` as a tree of the trained parameters."""
    return averages["lora"] if lora.used(config) else averages


def held(state: Any) -> dict[str, Any]:
    """Return the averages among the extras of ``state``, by their name; {} without any."""
    return {name: part for name, part in state.extras.items() if name == KEY}


def updated(config: Config, state: Any, trained: nnx.State) -> dict[str, Any]:
    """Return `held`, moved toward the weights ``trained`` after the next step of ``state``.

    The decay is at most (1 + t) / (10 + t) at step t, as in TensorFlow's
    ExponentialMovingAverage: otherwise random weights would stay in the average for long.
    """
    t = (state.step + 1).astype(jnp.float32)
    decay = jnp.minimum(config.train.ema_decay, (1 + t) / (10 + t))

    def moved(averages: Any) -> Any:
        averages = _trained(config, averages)
        new = jax.tree.map(lambda old, x: old + (1 - decay) * (x - old), averages, trained)
        return _named(config, new)

    return {name: moved(averages) for name, averages in held(state).items()}


def parameters(config: Config, params: nnx.State, averages: Any) -> nnx.State:
    """Return the model's parameters with ``averages`` in place of those that are trained."""
    return lora.trainable(params, config)[1](_trained(config, averages))

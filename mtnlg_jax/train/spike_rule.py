"""Spikes: steps whose loss or gradient norm lies far above those of the steps before them.

A figure of a step deviates by (figure - median) / scale, where the median is that of the last
train.spike_window accepted steps, and the scale is 1.4826 times their median absolute deviation
from it: the standard deviation of a normal distribution, which few outliers do not move. A step is
a spike where its loss or its gradient norm (before clipping) deviates by more than
train.spike_deviations. Low figures are no spikes.

Others take mean and standard deviation, with the same window and factor as the defaults here
(OLMo's skip_step_optimizer.py, Levanter's skipstep.py, MaxText's skip_step_on_spikes); one spike
among them hides the next.
"""

# Shapes: W the last steps of one kind

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtnlg_jax.config import LONGEST_SPIKE_WINDOW, Config
from mtnlg_jax.train import changes
from mtnlg_jax.train.schedule import stage_bounds

KEY = "spikes"  # in the extras of a state
_NORMAL = 1.4826
# A flat history would make any change a spike: at least this share of the median is one deviation.
FLOOR = 0.01
# After this number in a row they are no outliers: their level is taken for the new one.
IN_A_ROW = 5
_OBJECTIVES = ("causal", "masked")
_FIGURES = ("loss_W", "grad_norm_W")


def wanted(config: Config) -> bool:
    """Return whether the steps of ``config`` are judged."""
    return config.train.spike_policy != "none"


def new(config: Config, trained: nnx.State) -> dict[str, Any]:
    """Return empty histories, one for each objective, whose losses have different levels.

    Their size is fixed, so that a resume may change train.spike_window.
    """
    zero = jnp.int32(0)

    def history() -> dict[str, jax.Array]:
        arrays = {name: jnp.zeros(LONGEST_SPIKE_WINDOW, jnp.float32) for name in _FIGURES}
        return arrays | {"count": zero, "kind": zero, "streak": zero}

    return {name: history() for name in _OBJECTIVES} | {"total": zero}


def total(extras: dict[str, Any]) -> int:
    """Return the spikes of a run, given the extras of its state; 0 where none is judged."""
    return int(extras[KEY]["total"]) if KEY in extras else 0


def judge(
    config: Config,
    causal: bool,
    state: Any,
    loss: jax.Array,
    grad_norm: jax.Array,
    finite: jax.Array,
) -> tuple[jax.Array, dict[str, Any], dict[str, jax.Array]]:
    """Return (whether the update of a step is taken, the new extras, metrics).

    ``state`` is the `TrainState` before the step. A spike and a step that is not ``finite`` leave
    the history as it is; the last of IN_A_ROW spikes begins a new one. The metrics are the
    deviations of both figures, nan while the history is too short; whether the step ``is_spike``;
    the spikes in a row of this objective up to it; and ``spikes_total`` of the run. Without
    train.spike_policy there are none.
    """
    if KEY not in state.extras:
        return finite, state.extras, {}
    spikes = state.extras[KEY]
    name = _OBJECTIVES[0 if causal else 1]
    history = spikes[name]
    kind = _kind_at(config, state.step)
    # With another kind of stage a new history begins.
    known = kind == history["kind"]
    count = jnp.where(known, history["count"], 0)
    streak = jnp.where(known, history["streak"], 0)
    figures = dict(zip(_FIGURES, (loss, grad_norm), strict=True))
    window = config.train.spike_window
    enough = count >= config.train.spike_history
    deviations = {
        name: jnp.where(enough, _deviation(history[name], count, window, value), jnp.nan)
        for name, value in figures.items()
    }
    limit = config.train.spike_deviations
    # A comparison with nan is False.
    above = [deviation > limit for deviation in deviations.values()]
    is_spike = finite & (above[0] | above[1])
    taken = finite & ~is_spike
    at = count % LONGEST_SPIKE_WINDOW
    moved = {
        name: jnp.where(taken, history[name].at[at].set(value), history[name])
        for name, value in figures.items()
    }
    streak = jnp.where(taken, 0, streak + is_spike)
    number = spikes["total"] + is_spike
    shifted = streak >= IN_A_ROW
    moved |= {
        "count": jnp.where(shifted, 0, count + taken),
        "kind": kind,
        "streak": jnp.where(shifted, 0, streak),
    }
    metrics = {
        "deviation_loss": deviations["loss_W"],
        "deviation_grad_norm": deviations["grad_norm_W"],
        "is_spike": is_spike,
        "spikes_in_a_row": streak,
        "spikes_total": number,
    }
    return taken, {**state.extras, KEY: {**spikes, name: moved, "total": number}}, metrics


def _deviation(figures_W: jax.Array, count: jax.Array, window: int, value: jax.Array) -> jax.Array:
    """Return by how many robust deviations ``value`` is above the last ``window`` of the
    ``count`` figures of a history."""
    places = jnp.arange(window)
    last_W = figures_W[(count - 1 - places) % LONGEST_SPIKE_WINDOW]
    used = jnp.minimum(count, window)
    median = _median(last_W, used)
    spread = _NORMAL * _median(jnp.abs(last_W - median), used)
    # The last term is for a median of 0.
    scale = jnp.maximum(jnp.maximum(spread, FLOOR * jnp.abs(median)), 1e-12)
    return (value - median) / scale


def _median(values_W: jax.Array, used: jax.Array) -> jax.Array:
    """Return the median of the first ``used`` values; any number of none."""
    places = jnp.arange(len(values_W))
    sorted_W = jnp.sort(jnp.where(places < used, values_W, jnp.inf))
    return (sorted_W[jnp.maximum(used - 1, 0) // 2] + sorted_W[used // 2]) / 2


def _kind_at(config: Config, step: jax.Array) -> jax.Array:
    """Return a number for what decides the level of the loss in the stage of ``step``."""
    kinds = jnp.array(_kinds(config), jnp.int32)
    number = jnp.searchsorted(jnp.array(stage_bounds(config.train)), step, side="right")
    return kinds[jnp.minimum(number, len(kinds) - 1)]


def histories(config: Config) -> dict[str, list[int]] | None:
    """Return what of stages and sources is compiled into a step; None where none is judged."""
    if not wanted(config):
        return None
    return {"kinds": _kinds(config), "ends": stage_bounds(config.train)}


def _kinds(config: Config) -> list[int]:
    """Return `_kind_at` of each stage.

    Stages of equal sources, targets and teachers share a history, and so do the starts of a run
    that change nothing of these.
    """
    settings = changes.deciding(config)  # sources by position: their paths may move
    common = {
        key: value
        for key, value in settings.items()
        if key in ("data.blend", "train.label_smoothing", "model.dropout_rate")
        or key.startswith("data.masking.")
    }
    # Teachers by position as well; 0 is none.
    teachers = list(dict.fromkeys(["", *(stage["distill"] for stage in settings["train.stages"])]))
    found = []
    for stage in settings["train.stages"]:
        teacher = teachers.index(stage["distill"])
        own = [stage["blend"], teacher, stage["distill_temperature"], stage["distill_weight"]]
        text = json.dumps([common, own], sort_keys=True)
        # Positive, and never the 0 of a new history.
        found.append((zlib.crc32(text.encode()) & 0x7FFFFFFF) | 1)
    return found

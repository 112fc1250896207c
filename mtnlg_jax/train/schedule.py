"""Batch size, stage, objective and learning rate of each step, as pure functions.

They depend on the config, the step and the samples consumed so far, so a resume needs no other
state.
"""

import math

import jax
import jax.numpy as jnp

from mtnlg_jax.config import Config, StageConfig, TrainConfig
from mtnlg_jax.config.samples import batch_size_at as batch_size_at
from mtnlg_jax.config.samples import phases_of
from mtnlg_jax.config.samples import samples_before as samples_before


def samples_at_end(train: TrainConfig, step: int, samples: int) -> int:
    """Return the sequences that a run will have consumed at its end: the length of its schedule.

    It has consumed ``samples`` in ``step`` steps, with whatever batch sizes.
    """
    # Step by step only as long as the ramp lasts; the rest has one size.
    if train.rampup_batch_size:
        size = batch_size_at(train, samples)
        while step < train.steps and size < train.global_batch_size:
            step += 1
            samples += size
            size = batch_size_at(train, samples)
    return samples + (train.steps - step) * train.global_batch_size


def stage_bounds(train: TrainConfig) -> list[int]:
    """Return the steps at which the stages end; the last is train.steps."""
    fractions = [stage.fraction for stage in train.stages]
    total = sum(fractions)
    # Cumulative shares are rounded, not single ones, so that rounding does not add up and the last
    # bound is exactly train.steps.
    shares = [sum(fractions[: i + 1]) / total for i in range(len(fractions))]
    return [round(share * train.steps) for share in shares]


def stage_at(train: TrainConfig, step: int) -> tuple[int, int, StageConfig]:
    """Return (index of the stage, steps since it began, the stage)."""
    begin = 0
    for number, end in enumerate(stage_bounds(train)):
        if step < end:
            return number, step - begin, train.stages[number]
        begin = end
    # After the last step, as in a run that is finished.
    last = len(train.stages) - 1
    return last, step - begin, train.stages[last]


def is_due(train: TrainConfig, every: int, done: int) -> bool:
    """Return whether something that happens ``every`` steps (0: never) is due after ``done``."""
    # The last step is always due, so that every finished run has a checkpoint and an evaluation.
    return done == train.steps or (every > 0 and done % every == 0)


def is_masked(train: TrainConfig, step: int) -> bool:
    """Return whether ``step`` uses the masked objective; a mix spreads its masked steps evenly."""
    # 1e-9 absorbs rounding: 100 x 0.29 is 28.999999999999996.
    _, since, stage = stage_at(train, step)
    # A masked step is one in which the running count, share x steps, passes an integer.
    return math.floor((since + 1) * stage.masked + 1e-9) > math.floor(since * stage.masked + 1e-9)


def learning_rate(config: Config, samples: int | jax.Array, total: int | None = None) -> jax.Array:
    """Return the learning rate of the step that ends after ``samples`` sequences (may be traced).

    It rises linearly to the peak during warm-up, then follows the curve of optimizer.lr_decay_style
    to the floor and stays there. The formulas are those of Megatron-LM's OptimizerParamScheduler.
    The caller applies the scale of the stage. ``total``: sequences of the whole run
    (`samples_at_end`); the default is that of a run that began with this config.
    """
    total = samples_before(config.train, config.train.steps) if total is None else total
    optimizer = config.optimizer
    phases = phases_of(optimizer, total)
    # float32 is exact up to 16.8 million sequences; beyond that the error is below 1e-7 of the
    # whole.
    samples = jnp.asarray(samples, jnp.float32)
    # Sequences since the cycle began, its warm-up, and what follows that.
    since = samples
    warmup: float | jax.Array = phases.warmup
    # The lower limits here and below avoid 0 / 0 where a phase has no length.
    rest: float | jax.Array = max(phases.cycle - phases.warmup, 1e-9)
    if optimizer.lr_cycles > 1:
        begins = jnp.asarray([n * phases.cycle for n in range(optimizer.lr_cycles)], jnp.float32)
        # A step that ends where a cycle ends belongs to it.
        cycle = jnp.searchsorted(begins[1:], samples)
        since = samples - begins[cycle]
        warmup = jnp.where(cycle == 0, phases.warmup, 0.0)
        rest = jnp.where(cycle == 0, rest, phases.cycle)
    progress = jnp.clip((since - warmup) / rest, 0.0, 1.0)
    floor = optimizer.min_learning_rate_ratio
    match optimizer.lr_decay_style:
        case "constant":
            share = jnp.ones_like(samples)
        case "inverse_square_root":
            # A restart goes on as though its warm-up had just ended.
            past = since + (phases.warmup - warmup)
            root = jnp.sqrt(max(phases.warmup, 1.0) / jnp.maximum(past, 1.0))
            share = jnp.where(samples > phases.end, floor, jnp.maximum(root, floor))
        case "wsd":
            begin = phases.cycle - phases.decay
            decayed = jnp.clip((since - begin) / max(phases.decay, 1e-9), 0.0, 1.0)
            share = _falling(optimizer.wsd_decay_style, decayed, floor)
        case style:
            share = _falling(style, progress, floor)
    return optimizer.learning_rate * jnp.where(
        samples < phases.warmup, samples / max(phases.warmup, 1e-9), share
    )


def _falling(style: str, progress: jax.Array, floor: float) -> jax.Array:
    """Return a curve that falls from 1 to ``floor`` while ``progress`` goes from 0 to 1."""
    match style:
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "exponential":
            return floor + (1 - floor) * (2 * 0.5**progress - 1)
        case "minus_sqrt":
            return floor + (1 - floor) * (1 - jnp.sqrt(progress))
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    raise ValueError(f"unknown curve {style!r}")


def loss_name(train: TrainConfig, stage: StageConfig) -> str:
    """Return the name of the training loss of ``stage``, a key of `metrics.TRAINING_LOSSES`.

    Only without a teacher and without label smoothing is it the cross entropy of the text, like the
    held-out loss.
    """
    if stage.distill and stage.distill_weight > 0:
        return "distillation_loss"
    return "smoothed_loss" if train.label_smoothing else "loss"

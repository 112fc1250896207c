"""Batch size, stage, objective and learning rate of each step, as pure functions.

They depend on the config, the step and the samples consumed so far, so a resume needs no other
state.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mtnlg_jax.config import Config, StageConfig, TrainConfig


def batch_size_at(train: TrainConfig, samples: int) -> int:
    """Return the sequences in the step that starts after ``samples`` sequences.

    This is Megatron-LM's --rampup-batch-size.
    """
    if train.rampup_batch_size is None:
        return train.global_batch_size
    start, increment, ramp_samples = train.rampup_batch_size
    # Integers alone: the size must be the same in every process and after every resume.
    increments = (train.global_batch_size - start) // increment
    if increments == 0 or samples >= ramp_samples:
        return train.global_batch_size
    return start + increment * (samples * increments // ramp_samples)


# Called for every look at the schedule; the config is frozen and hashable.
@functools.lru_cache(maxsize=16)
def _ramp(train: TrainConfig) -> tuple[int, ...]:
    """Return the samples before each step of the ramp, and before the first full batch."""
    before = [0]
    ramp_samples = train.rampup_batch_size[2] if train.rampup_batch_size else 0
    # Each size depends on the samples before it, so there is no closed form.
    while before[-1] < ramp_samples and len(before) <= train.steps:
        before.append(before[-1] + batch_size_at(train, before[-1]))
    return tuple(before)


def samples_before(train: TrainConfig, step: int) -> int:
    """Return the sequences consumed before ``step``, which is at most train.steps."""
    ramp = _ramp(train)
    if step < len(ramp):
        return ramp[step]
    return ramp[-1] + (step - len(ramp) + 1) * train.global_batch_size


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

    It rises linearly to the peak during warm-up, then falls along a cosine to the floor and stays
    there. The caller applies the scale of the stage. ``total``: sequences of the whole run
    (`samples_at_end`); the default is that of a run that began with this config.
    """
    total = samples_before(config.train, config.train.steps) if total is None else total
    optimizer = config.optimizer
    warmup = optimizer.warmup_fraction * total
    decay = optimizer.decay_fraction * total
    # float32 is exact up to 16.8 million sequences; beyond that the error is below 1e-7 of the
    # whole.
    samples = jnp.asarray(samples, jnp.float32)
    floor = optimizer.min_learning_rate_ratio
    # Both lower limits avoid 0 / 0 where warm-up or decay have no length.
    progress = jnp.clip((samples - warmup) / max(decay - warmup, 1e-9), 0.0, 1.0)
    cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return optimizer.learning_rate * jnp.where(
        samples < warmup, samples / max(warmup, 1e-9), cosine
    )


def loss_name(train: TrainConfig, stage: StageConfig) -> str:
    """Return the name of the training loss of ``stage``, a key of `metrics.TRAINING_LOSSES`.

    Only without a teacher and without label smoothing is it the cross entropy of the text, like the
    held-out loss.
    """
    if stage.distill and stage.distill_weight > 0:
        return "distillation_loss"
    return "smoothed_loss" if train.label_smoothing else "loss"

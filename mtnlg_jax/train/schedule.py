"""What every step of a run does, as pure functions of the step: its batch, its stage, its
objective, its learning rate. A resume needs one integer."""

import functools
import math

import jax.numpy as jnp

from mtnlg_jax.config import Config, StageConfig, TrainConfig


def batch_size_at(train: TrainConfig, samples: int) -> int:
    """Sequences in the step that starts after ``samples`` sequences: Megatron-LM's
    --rampup-batch-size."""
    if train.rampup_batch_size is None:
        return train.global_batch_size
    start, increment, ramp_samples = train.rampup_batch_size
    increments = (train.global_batch_size - start) // increment
    if increments == 0 or samples >= ramp_samples:
        return train.global_batch_size
    return start + increment * (samples * increments // ramp_samples)


@functools.lru_cache(maxsize=16)
def _ramp(train: TrainConfig) -> tuple[int, ...]:
    """Samples before each step of the ramp, and before the first step at full batch."""
    before = [0]
    while (
        train.rampup_batch_size
        and before[-1] < train.rampup_batch_size[2]
        and len(before) <= train.steps
    ):
        before.append(before[-1] + batch_size_at(train, before[-1]))
    return tuple(before)


def samples_before(train: TrainConfig, step: int) -> int:
    """Sequences consumed by the steps before ``step``, at most train.steps."""
    ramp = _ramp(train)
    if step < len(ramp):
        return ramp[step]
    return ramp[-1] + (step - len(ramp) + 1) * train.global_batch_size


def samples_at_end(train: TrainConfig, step: int, samples: int) -> int:
    """Sequences consumed by the end of a run that has consumed ``samples`` in ``step`` steps,
    whatever its batches were
    until then: the length of its schedule."""
    if train.rampup_batch_size:
        while (
            step < train.steps and (size := batch_size_at(train, samples)) < train.global_batch_size
        ):
            step = step + 1
            samples = samples + size
    return samples + (train.steps - step) * train.global_batch_size


def stage_bounds(train: TrainConfig) -> list[int]:
    """Steps where stages end; the last is train.steps."""
    total = sum(stage.fraction for stage in train.stages)
    shares = [
        sum(s.fraction for s in train.stages[: i + 1]) / total for i in range(len(train.stages))
    ]
    return [round(share * train.steps) for share in shares]


def stage_at(train: TrainConfig, step: int) -> tuple[int, int, StageConfig]:
    """(number of the stage, steps since it began, the stage)."""
    begin = 0
    for number, end in enumerate(stage_bounds(train)):
        if step < end:
            return number, step - begin, train.stages[number]
        begin = end
    last = len(train.stages) - 1
    return last, step - begin, train.stages[last]


def is_masked(train: TrainConfig, step: int) -> bool:
    """Whether ``step`` takes the masked objective; a mix spreads its masked steps evenly."""
    _, since, stage = stage_at(train, step)
    return math.floor((since + 1) * stage.masked + 1e-9) > math.floor(since * stage.masked + 1e-9)


def learning_rate(config: Config, samples, total: int | None = None):
    """The rate for the step that ends after ``samples`` sequences (may be traced): linear to the
    peak over the warm-up, then a cosine to the floor, then the floor. The stage's scale is applied
    by the caller.

    ``total``: sequences of the whole run (`samples_at_end`); without, those of a run that began
        with this config.
    """
    total = samples_before(config.train, config.train.steps) if total is None else total
    optimizer = config.optimizer
    warmup = optimizer.warmup_fraction * total
    decay = optimizer.decay_fraction * total
    samples = jnp.asarray(samples, jnp.float32)
    floor = optimizer.min_learning_rate_ratio
    progress = jnp.clip((samples - warmup) / max(decay - warmup, 1e-9), 0.0, 1.0)
    cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return optimizer.learning_rate * jnp.where(
        samples < warmup, samples / max(warmup, 1e-9), cosine
    )


def loss_name(train: TrainConfig, stage: StageConfig) -> str:
    """What the training loss of ``stage`` is, a name of `metrics.TRAINING_LOSSES`: only without a
    teacher and without label smoothing is it the cross entropy of the text, as the held-out
    loss."""
    if stage.distill and stage.distill_weight > 0:
        return "distillation_loss"
    return "smoothed_loss" if train.label_smoothing else "loss"

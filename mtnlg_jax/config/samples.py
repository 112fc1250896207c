"""Sequences of a run's steps and of the phases of its learning rate, as pure functions."""

import functools
from typing import NamedTuple

from mtnlg_jax.config.optimizer import OptimizerConfig
from mtnlg_jax.config.schema import TrainConfig


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


class Phases(NamedTuple):
    """The learning rate's course, in sequences. The first cycle begins with the warm-up."""

    warmup: float
    end: float  # where the last cycle reaches the floor
    cycle: float  # length of a cycle
    decay: float  # length of the decay at a cycle's end, of wsd alone


def phases_of(optimizer: OptimizerConfig, total: int) -> Phases:
    """Return the phases of a run of ``total`` sequences."""
    warmup: float = optimizer.warmup_fraction * total
    # Whole sequences, so that a longer run can keep them (`changes.kept_warmup`). The cosine that
    # ends with the run, and so cannot become longer, keeps the fractions of earlier versions.
    if optimizer.lr_decay_style != "cosine" or optimizer.decay_samples is not None:
        warmup = round(warmup)
    if optimizer.warmup_samples is not None:
        warmup = optimizer.warmup_samples
    end = optimizer.decay_samples or optimizer.decay_fraction * total
    cycle = end / optimizer.lr_cycles
    return Phases(warmup, end, cycle, optimizer.wsd_decay_fraction * cycle)

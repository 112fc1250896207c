"""Resume with another train.steps: the steps so far keep their learning rates, or it is refused.

A curve that ends with the run, such as a cosine, has another value at each step if the run has
another length. wsd has not, until its decay begins, and constant and inverse_square_root never do.
The warm-up keeps its length in samples.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import Config
from mtnlg_jax.config.samples import phases_of
from mtnlg_jax.config.schedule_rules import check_schedule
from mtnlg_jax.train.schedule import learning_rate, samples_at_end

# Settings of the curve. Who changes one wants another curve, which is reported.
_CURVE = (
    "lr_decay_style",
    "warmup_fraction",
    "decay_fraction",
    "decay_samples",
    "wsd_decay_style",
    "wsd_decay_fraction",
    "lr_cycles",
)
_POINTS = 256  # of the samples read, spread evenly, are compared
_TOLERANCE = 3e-7  # relative; float32 rounds a rate that did not change


def kept_warmup(before: Config, step: int, samples: int, config: Config) -> Config:
    """Return ``config`` with the warm-up of ``before``, that of the checkpoint of ``step``, in
    samples, if another train.steps makes the run longer or shorter, or if an earlier start kept it.

    ``samples``: sequences read so far.
    """
    old = before.optimizer
    new = config.optimizer
    # Given again, or in another way: the user wants another warm-up.
    if new.warmup_samples is not None or new.warmup_fraction != old.warmup_fraction:
        return config
    warmup = old.warmup_samples
    if warmup is None and before.train.steps != config.train.steps:
        total = _total(before, step, samples)
        # The same share of the same samples is the same warm-up.
        if total != _total(config, step, samples):
            warmup = round(phases_of(old, total).warmup)
    return dataclasses.replace(config, optimizer=dataclasses.replace(new, warmup_samples=warmup))


def refuse_kept_warmup(before: Config, step: int, samples: int, config: Config) -> None:
    """Raise ValueError if the warm-up that `kept_warmup` keeps does not fit the train.steps or the
    curve of ``config``."""
    kept = kept_warmup(before, step, samples, config)
    reasons = []
    if before.train.steps != config.train.steps:
        reasons.append(
            f"train.steps was {before.train.steps} up to checkpoint {step} and is "
            f"{config.train.steps}"
        )
    if kept != config:
        reasons.append(f"the warm-up keeps the length that it has in checkpoint {step}")
    if not reasons:
        return
    try:
        check_schedule(kept, _total(kept, step, samples))
    except ValueError as error:
        raise ValueError(f"{', and '.join(reasons)}: {error}") from error


def refuse_other_rates(before: Config, step: int, samples: int, config: Config) -> None:
    """Raise ValueError if the train.steps of ``config`` would have given other learning rates to
    the steps up to the checkpoint of ``step``, whose config is ``before``."""
    old = before.optimizer
    new = config.optimizer
    same_warmup = new.warmup_samples in (None, old.warmup_samples)
    same_curve = all(getattr(old, key) == getattr(new, key) for key in _CURVE)
    if before.train.steps == config.train.steps or not (same_warmup and same_curve):
        return
    # Only the length differs, in samples: other changes are reported.
    train = dataclasses.replace(
        before.train,
        steps=config.train.steps,
        global_batch_size=config.train.global_batch_size,
        rampup_batch_size=config.train.rampup_batch_size,
    )
    longer = kept_warmup(before, step, samples, dataclasses.replace(before, train=train))
    # By samples: earlier starts may have had other batches, and so other steps.
    points = max(1, min(step, _POINTS))
    read = np.linspace(samples / points, samples, points).round()
    given = jnp.asarray(read, jnp.float32)
    rates = [
        np.asarray(learning_rate(one, given, _total(one, step, samples)), np.float64)
        for one in (before, longer)
    ]
    apart = np.abs(rates[1] - rates[0])
    if not (apart > _TOLERANCE * rates[0]).any():
        return
    worst = apart.argmax()
    end = phases_of(old, _total(before, step, samples)).end
    style = old.lr_decay_style
    why = f"optimizer.lr_decay_style={style} follows the length of the run"
    if style == "wsd":
        why = "the decay of optimizer.lr_decay_style=wsd has begun"
    raise ValueError(
        f"train.steps was {before.train.steps} up to checkpoint {step} and is "
        f"{config.train.steps}: {why}, so the learning rate after {read[worst]:.0f} sequences "
        f"would have been {rates[1][worst]:.3g} instead of {rates[0][worst]:.3g}; set "
        f"optimizer.decay_samples={round(end)} to keep the curve, or to more for another one from "
        "here on, or start from this run by --init in another --workdir"
    )


def _total(config: Config, step: int, samples: int) -> int:
    """Return the sequences of the run after ``step`` steps with ``samples`` in all."""
    return samples_at_end(config.train, min(step, config.train.steps), samples)

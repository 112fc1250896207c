"""Rules of the learning rate: phases that do not fit the run are refused."""

from mtnlg_jax.config.checks import Rules, check_rules, refuse_changed
from mtnlg_jax.config.samples import phases_of, samples_before
from mtnlg_jax.config.schema import Config, OptimizerConfig

_RULES: Rules = (
    (
        lambda c: (
            c.warmup_samples is None
            and c.decay_samples is None
            and c.lr_decay_style != "constant"
            and c.decay_fraction <= c.warmup_fraction
        ),
        "optimizer.decay_fraction={c.decay_fraction} is outside ({c.warmup_fraction}, inf): the "
        "decay ends after optimizer.warmup_fraction",
    ),
    (
        lambda c: c.lr_decay_style == "constant" and c.lr_cycles > 1,
        "optimizer.lr_cycles={c.lr_cycles} with optimizer.lr_decay_style=constant: without a decay "
        "there is nothing to restart; set lr_cycles=1, or another style",
    ),
    (
        lambda c: c.lr_decay_style == "wsd" and c.decay_samples is None and c.decay_fraction > 1,
        "optimizer.decay_fraction={c.decay_fraction} with optimizer.lr_decay_style=wsd: the run "
        "would end before its decay does; set it to 1, or lr_decay_style=constant",
    ),
)


def check_schedule(config: Config, total: int | None = None) -> None:
    """Raise ValueError if a setting of the learning rate cannot act, or if its phases exceed the
    run or their cycle.

    ``total``: sequences of the whole run; the default is that of a run that began with ``config``.
    """
    optimizer = config.optimizer
    check_rules(_RULES, optimizer)
    if optimizer.lr_decay_style != "wsd":
        why = f"is for wsd, and optimizer.lr_decay_style={optimizer.lr_decay_style}; set that"
        refuse_changed(optimizer, ("wsd_decay_style", "wsd_decay_fraction"), why, "optimizer.")
    total = samples_before(config.train, config.train.steps) if total is None else total
    warmup, end, cycle, decay = phases_of(optimizer, total)
    warmup_text = f"{_warmup(optimizer)}, a warm-up of {warmup:.12g} sequences,"
    if warmup >= total:
        raise ValueError(
            f"{warmup_text} does not end within the {total} of the run; lower it, or raise "
            "train.steps"
        )
    if optimizer.lr_decay_style == "constant":
        return
    if optimizer.lr_decay_style == "inverse_square_root" and not warmup:
        raise ValueError(
            "optimizer.lr_decay_style=inverse_square_root falls with the square root of "
            f"warm-up / samples, and {warmup_text} has no length; raise it"
        )
    # A step that ends a cycle is at the floor: of two or more, another one is above it.
    batch = config.train.global_batch_size
    if optimizer.lr_cycles > 1 and cycle < 2 * batch:
        length = "train.steps" if optimizer.decay_samples is None else "optimizer.decay_samples"
        raise ValueError(
            f"optimizer.lr_cycles={optimizer.lr_cycles} gives each cycle {cycle:.12g} sequences, "
            f"and one takes two batches ({2 * batch}, by train.global_batch_size={batch}) or more; "
            f"set it to {max(1, int(end / (2 * batch)))} or less, or raise {length}"
        )
    what = f"the {cycle:.12g} of {_cycle(optimizer)}"
    if optimizer.lr_decay_style != "wsd":
        if warmup >= cycle:
            raise ValueError(f"{warmup_text} leaves nothing of {what}; lower one of them")
    # Rounded to whole sequences, so that shares of 0.5 and 0.5 fit.
    elif warmup + decay > cycle + 0.5:
        raise ValueError(
            f"{warmup_text} and optimizer.wsd_decay_fraction={optimizer.wsd_decay_fraction}, a "
            f"decay of {decay:.12g}, exceed {what}; lower one of them"
        )


def _warmup(optimizer: OptimizerConfig) -> str:
    key = "warmup_fraction" if optimizer.warmup_samples is None else "warmup_samples"
    return f"optimizer.{key}={getattr(optimizer, key)}"


def _cycle(optimizer: OptimizerConfig) -> str:
    """Return what sets the length of a cycle."""
    key = "decay_fraction" if optimizer.decay_samples is None else "decay_samples"
    end = f"optimizer.{key}={getattr(optimizer, key)}"
    if optimizer.lr_cycles == 1:
        return f"the curve ({end})"
    return f"each of optimizer.lr_cycles={optimizer.lr_cycles} ({end})"

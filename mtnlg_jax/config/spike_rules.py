"""Rules of train.spike_policy: a policy that could never act is refused."""

from mtnlg_jax.config.checks import Rules, check_rules, refuse_changed
from mtnlg_jax.config.schema import Config

_RULES: Rules = (
    (
        lambda c: c.train.steps <= c.train.spike_history,
        "train.spike_policy={c.train.spike_policy} compares a step with {c.train.spike_history} "
        "steps before it or more (half of train.spike_window={c.train.spike_window}), and the run "
        "has train.steps={c.train.steps}; raise that, lower train.spike_window (16 or more), or "
        "set train.spike_policy=none",
    ),
    (
        lambda c: c.train.spike_policy == "rewind" and not c.train.save_every,
        "train.spike_policy=rewind goes back to the last checkpoint, and train.save_every=0 writes "
        "none before the end; set it to 100, or train.spike_policy=skip",
    ),
    (
        lambda c: c.train.spike_policy == "rewind" and c.train.spike_leave_out > c.train.save_every,
        "train.spike_leave_out={c.train.spike_leave_out} is more than train.save_every="
        "{c.train.save_every}: the last checkpoint has trained on the first of these batches; "
        "lower it, or raise train.save_every",
    ),
)


def check_spikes(config: Config) -> None:
    """Raise ValueError if the policy cannot act, or if a setting acts only with another one."""
    train = config.train
    if train.spike_policy == "none":
        why = "is for spikes, and train.spike_policy=none leaves them; set that to skip or rewind"
        keys = ("spike_deviations", "spike_window", "spike_leave_out")
        refuse_changed(train, keys, why, "train.")
        return
    check_rules(_RULES, config)
    if train.spike_policy == "skip":
        why = "is for train.spike_policy=rewind, and skip leaves one batch out; set that"
        refuse_changed(train, ("spike_leave_out",), why, "train.")

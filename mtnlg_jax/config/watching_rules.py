"""Rules of what shows a run: trackers, profiler, samples."""

from mtnlg_jax.config.checks import Rules, check_rules, refuse_changed
from mtnlg_jax.config.schema import Config

TRACKERS = ("tensorboard", "wandb", "trackio")

_RULES: Rules = (
    (
        lambda c: len(set(c.train.trackers)) < len(c.train.trackers),
        "train.trackers={c.train.trackers} names a tracker twice; name each once",
    ),
    (
        lambda c: not c.train.tracker_project,
        "train.tracker_project is empty; give a name, such as mtnlg_jax",
    ),
    (
        lambda c: c.train.profile_steps and not 1 <= c.train.profile_steps[0] <= _last(c),
        "train.profile_steps={c.train.profile_steps} is not a first and a last step; give two "
        "numbers from 1, the first one not above the second, such as (100, 105)",
    ),
    (
        lambda c: c.train.profile_steps and c.train.profile_steps[0] > c.train.steps,
        "train.profile_steps={c.train.profile_steps} begins after the last step, "
        "train.steps={c.train.steps}; give earlier steps",
    ),
    (
        lambda c: c.train.sample_prompts and all(stage.masked == 1 for stage in c.train.stages),
        "train.sample_prompts are continued, and no stage of this run learns to continue a text "
        "(masked=1 in all); add a causal stage, or leave them out",
    ),
    (
        lambda c: c.train.sample_prompts and not all(c.train.sample_prompts),
        "train.sample_prompts={c.train.sample_prompts} has an empty text; give words to go on from",
    ),
    (
        lambda c: c.train.sample_prompts and c.train.sample_tokens >= c.sequence_length,
        "train.sample_tokens={c.train.sample_tokens} leaves no room for a prompt in the "
        "{c.sequence_length} tokens that the model reads; lower it",
    ),
)


def check_watching(config: Config) -> None:
    """Raise ValueError if a setting of what shows the run is wrong, or acts on nothing."""
    check_rules(_RULES, config)
    for name in config.train.trackers:
        module, _, attribute = name.partition(":")
        if name not in TRACKERS and not (module and attribute):
            raise ValueError(
                f"unknown train.trackers={name!r}; choose some of {', '.join(TRACKERS)}, or give "
                "module:Class of an own tracker"
            )
    if not config.train.sample_prompts:
        why = "is for samples, and train.sample_prompts has no text; give some"
        refuse_changed(config.train, ("sample_every", "sample_tokens"), why, "train.")
    if config.train.profile_signal == "none":
        why = "is for train.profile_signal=none, which records nothing; set that to SIGUSR1"
        refuse_changed(config.train, ("profile_signal_steps",), why, "train.")


def _last(config: Config) -> int:
    assert config.train.profile_steps is not None, "asked only where there are some"
    return config.train.profile_steps[1]

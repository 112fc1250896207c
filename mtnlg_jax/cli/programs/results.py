"""Flags of what compile_ahead.py writes."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("The result"):
    PROVE = flags.DEFINE_integer(
        "prove", 2, "number of suggested changes to compile where the step does not fit", 0
    )
    JSON = command.define_path("json", None, "file for the measurement, as JSON")
    TEXT = command.define_path("hlo", None, "file for the compiled program's text")
    SAVE = command.define_path(
        "save", None, "file for the compiled train step, for pretrain.py --executable=FILE"
    )
    TIME = flags.DEFINE_boolean(
        "time", False, "predict the seconds of a train step from the compiler's schedule"
    )
    TRACE = command.define_path(
        "trace", None, "file for the timeline of --time, which Perfetto opens"
    )


def check(step: str) -> None:
    """Raise ValueError where a flag does not go with the compiled ``step`` or with another."""
    if TRACE.value and not TIME.value:
        raise ValueError(f"--trace={TRACE.value} is the timeline of --time; add --time")
    if SAVE.value and step != "train":
        raise ValueError(
            f"--save={SAVE.value} is for the train step, which pretrain.py loads, not "
            f"--step={step}; leave it out"
        )
    for flag in (JSON, TEXT, TRACE, SAVE):
        command.check_output(flag)

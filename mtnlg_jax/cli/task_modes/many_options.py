"""Flags of launch/task.py for many inputs."""

from absl import flags

from mtnlg_jax import command

with command.flag_group("Many inputs"):
    INPUTS = command.define_path(
        "inputs", None, "file of rows, or folder of texts, to answer into --outputs"
    )
    OUTPUTS = command.define_path(
        "outputs",
        None,
        "file for a JSON line a row, appended as soon as it is known; the same command goes on "
        "with a file that was interrupted",
    )
    RETRY_ERRORS = flags.DEFINE_bool(
        "retry_errors", False, "answer the rows again whose lines in --outputs are errors"
    )
    KEEP_PROMPTS = flags.DEFINE_bool("keep_prompts", False, "write the prompt of each answer too")
    REPORT = command.define_path(
        "report",
        None,
        "file for the report of rows with labels, a page that needs no network; none: no report; "
        "default: --outputs with .html behind it",
    )
    TIME_COLUMN = flags.DEFINE_string(
        "time_column", None, "column of the dates in the report; default: detect it; none: no dates"
    )
    GROUP_COLUMN = flags.DEFINE_string(
        "group_column",
        None,
        "column of the sources in the report; default: detect it; none: no sources",
    )

# The flags of this module.
OWN = (INPUTS, OUTPUTS, RETRY_ERRORS, KEEP_PROMPTS, REPORT, TIME_COLUMN, GROUP_COLUMN)

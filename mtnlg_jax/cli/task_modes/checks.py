"""Check that the flags of launch/task.py fit together."""

import os

from mtnlg_jax.cli.decoding import shared_flags
from mtnlg_jax.cli.decoding.preset_flag import PRESET, preset_scorers
from mtnlg_jax.cli.task_modes import long_options, many_options, options, profiles


def check_flags() -> None:
    """Raise ValueError on a flag that has no effect beside the others, and on a missing one."""
    if options.EVAL.value and (options.INPUT.value or options.MAKE_PAIRS.value):
        raise ValueError(
            "--eval reads its inputs from its rows; leave --input and --make_pairs out"
        )
    _check_many()
    rows = options.EVAL.value or many_options.INPUTS.value
    for flag, of_rows in ((options.OUTPUT, options.EVAL.value), (options.BLANK, rows)):
        if flag.value and not of_rows:
            raise ValueError(
                f"--{flag.name}={flag.value} is for rows that are scored; name their file with "
                "--eval"
            )
    if preset_scorers():
        raise ValueError(
            f"--preset={PRESET.value} ranks texts that continue a prompt, which launch/generate.py "
            "does; choose another one for a task"
        )
    if options.LAST_WORD.value and not (options.EVAL.value or options.SCORE.value):
        raise ValueError("--last_word scores rows; name their file with --eval")
    profiles.check(model_used=not (options.SCORE.value or options.MAKE_PAIRS.value))
    if options.SCORE.value or options.MAKE_PAIRS.value:
        long_options.check_unused("--score" if options.SCORE.value else "--make_pairs")
    if options.SCORE.value:
        _check_score()
    elif options.MAKE_PAIRS.value:
        if options.INPUT.value in (None, "-"):
            raise ValueError("--make_pairs takes its rows from a file; name it with --input")
    elif not options.WORKDIR.value:
        raise ValueError(
            "--workdir is missing; name a run of launch/pretrain.py or a Hugging Face folder"
        )


def check_output() -> None:
    """Raise ValueError if --output exists, before the model is loaded."""
    path = options.OUTPUT.value
    if path and os.path.exists(path):
        raise ValueError(
            f"--output={path} exists; name another file, or score it with --score={path}"
        )


def _check_many() -> None:
    """Check the flags of --inputs."""
    inputs = many_options.INPUTS.value
    if inputs and not many_options.OUTPUTS.value:
        raise ValueError(
            f"--inputs={inputs} is answered into a file; name it with --outputs=FILE.jsonl"
        )
    others = (
        *(many_options.OUTPUTS, many_options.RETRY_ERRORS, many_options.KEEP_PROMPTS),
        *(many_options.REPORT, many_options.TIME_COLUMN, many_options.GROUP_COLUMN),
    )
    for flag in () if inputs else others:
        if flag.present:
            raise ValueError(
                f"--{flag.name} is for the rows of --inputs; name their file or folder with it"
            )
    modes = (
        *(options.INPUT, options.EVAL, options.SCORE, options.MAKE_PAIRS, options.LAST_WORD),
        options.OUTPUT,
    )
    for flag in modes if inputs else ():
        if flag.value:
            raise ValueError(
                f"--inputs answers the rows of {inputs} into --outputs; leave --{flag.name} out"
            )


def _check_score() -> None:
    """Refuse flags of a model beside --score."""
    for flag in (
        options.WORKDIR,
        options.INPUT,
        options.OUTPUT,
        options.MAKE_PAIRS,
        options.EXAMPLES,
        options.SHOTS,
        options.PASSAGES,
        options.SCORER,
        options.NORMALISE,
        PRESET,
        shared_flags.SET,
    ):
        if flag.present:
            raise ValueError(
                f"--score reads existing answers, without a model; leave --{flag.name} out"
            )

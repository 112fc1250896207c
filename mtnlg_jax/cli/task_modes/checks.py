"""Check that the flags of launch/task.py fit together."""

import os

from mtnlg_jax.cli.decoding import shared_flags
from mtnlg_jax.cli.task_modes import options


def check_flags() -> None:
    """Raise ValueError on a flag that has no effect beside the others, and on a missing one."""
    if options.EVAL.value and (options.INPUT.value or options.MAKE_PAIRS.value):
        raise ValueError(
            "--eval reads its inputs from its rows; leave --input and --make_pairs out"
        )
    for flag in (options.OUTPUT, options.BLANK):
        if flag.value and not options.EVAL.value:
            raise ValueError(
                f"--{flag.name}={flag.value} is for rows that are scored; name their file with "
                "--eval"
            )
    if options.LAST_WORD.value and not (options.EVAL.value or options.SCORE.value):
        raise ValueError("--last_word scores rows; name their file with --eval")
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
        shared_flags.SET,
    ):
        if flag.present:
            raise ValueError(
                f"--score reads existing answers, without a model; leave --{flag.name} out"
            )

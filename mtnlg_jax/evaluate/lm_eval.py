"""The command of lm-evaluation-harness with the model ``mtnlg``, also where `plugin` is not there.

    python -m mtnlg_jax.evaluate.lm_eval --model mtnlg --model_args workdir=RUN --tasks piqa

Bad input is one line and exit code 2. Several processes run it together, each with the same
arguments: under SLURM, on a TPU pod or on GKE as it is, elsewhere with --coordinator=HOST:PORT,
--processes=N and --process_id=I. Process 0 prints and writes; the others only compute.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from mtnlg_jax import command, compat
from mtnlg_jax.errors import explain

# What only process 0 writes: (argument, number of values of it).
_WRITES = {"--output_path": 1, "-o": 1, "--log_samples": 0, "-s": 0, "--wandb_args": 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments ``argv``, and return its exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process_id", type=int)
    ours, theirs = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    compat.quiet()
    with command.lasting_output(), contextlib.ExitStack() as stack:
        try:
            if any(each is not None for each in vars(ours).values()) or (
                compat.cluster_processes() > 1
            ):
                theirs = _join(ours, theirs, stack)
            _evaluate(theirs)
        except Exception as error:
            line, code = explain(error)
            if line is None:
                raise
            print(line, file=sys.stderr)
            return code
    return 0


def _join(ours: argparse.Namespace, theirs: list[str], stack: contextlib.ExitStack) -> list[str]:
    """Join the other processes, and return the arguments of this one."""
    from mtnlg_jax.train import processes

    processes.start(ours.coordinator, ours.processes, ours.process_id, heartbeat_seconds=100)
    stack.enter_context(processes.exit_on_failure("start all of them again"))
    if processes.is_first():
        return theirs
    nowhere = stack.enter_context(open(os.devnull, "w"))
    stack.enter_context(contextlib.redirect_stdout(nowhere))
    return without_output(theirs)


def without_output(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` of the harness without those that make it write files."""
    kept = []
    skip = 0
    for each in arguments:
        name, equals, _ = each.partition("=")
        if skip:
            skip -= 1
        elif name in _WRITES:
            skip = 0 if equals else _WRITES[name]
        else:
            kept.append(each)
    return kept


def _evaluate(arguments: Sequence[str]) -> None:
    # Registers the class.
    from mtnlg_jax.evaluate import harness  # noqa: F401

    from lm_eval.__main__ import cli_evaluate  # isort: skip

    # The harness reads its arguments from there.
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())

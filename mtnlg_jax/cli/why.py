"""Replay the batch of a training step, and find the documents that made it unusual.

    python launch/why.py --workdir=RUN --step=1234
    python launch/why.py --workdir=RUN --step=spike

The step's texts are shown by source and document, with the loss of every token, the norm of the
gradient by layer, the recorded figures of its neighbors, and the same step with each suspicious
document left out. "spike" takes the step of metrics.jsonl whose loss or gradient norm is furthest
above its neighbors; "loss" and "grad_norm" look at one of the two.

The parameters are those of the newest checkpoint before the step, or of the start of the run. With
--replay the true steps from there are run again, so that all figures are exactly those of the run:

    python launch/why.py --workdir=RUN --step=1234 --replay

The data must be those of the run; the run may go on meanwhile. If the data were moved, or for other
devices:

    python launch/why.py --workdir=RUN --step=1234 --set=data.path=OUT --set=mesh.data=8

Results go to RUN/why/step_1234/why.json and why.html. Exit codes: 0 done, 2 bad input.
"""

import os

from absl import flags

from mtnlg_jax import command

with command.flag_group("The step"):
    _WORKDIR = command.define_path("workdir", None, "folder of the run", required=True)
    _STEP = flags.DEFINE_string(
        "step",
        None,
        "number of the step as in metrics.jsonl; or spike, loss, grad_norm: the most unusual one",
        required=True,
    )
    _CHECKPOINT = flags.DEFINE_integer(
        "checkpoint",
        None,
        "step of the checkpoint to take parameters from, 0 for the start of the run; default: the "
        "newest before the step",
        lower_bound=0,
    )
    _REPLAY = flags.DEFINE_bool(
        "replay", False, "run the steps from the checkpoint to the step again"
    )
    _SET = flags.DEFINE_multi_string(
        "set", [], "where the data are (data.path=OUT), or the devices (mesh.KEY=VALUE)"
    )
with command.flag_group("The report"):
    _DOCUMENTS = flags.DEFINE_integer(
        "documents", 32, "documents whose gradients are computed, at most", lower_bound=1
    )
    _TOP = flags.DEFINE_integer(
        "top", 3, "documents without which the whole step is computed again", lower_bound=0
    )
    _OUTPUT = command.define_path(
        "output", None, "folder of the results; default: RUN/why/step_NUMBER"
    )


def main() -> None:
    from mtnlg_jax import compat, xla_flags
    from mtnlg_jax.evaluate.why.settings import Settings
    from mtnlg_jax.interop import registry

    registry.register()
    compat.quiet()
    number = _number(_STEP.value)
    # Of the run as it was: the same flags of the compiler give the same bits.
    config = Settings(_WORKDIR.value, _SET.value).at(0 if number is None else number - 1)
    xla_flags.set_flags(config.mesh, config.train.recompute)
    compat.configure_cache()

    # Imported here: bad input is reported before JAX is imported, which takes longer.
    from mtnlg_jax.evaluate.inside.files import write_results
    from mtnlg_jax.evaluate.why import page, report, run_why

    question = run_why.Question(
        _WORKDIR.value,
        number,
        _STEP.value if number is None and _STEP.value != "spike" else None,
        _CHECKPOINT.value,
        _REPLAY.value,
        tuple(_SET.value),
        _DOCUMENTS.value,
        _TOP.value,
    )
    result, shown = run_why.answer(question)
    print(page.lines(result), flush=True)
    folder = _OUTPUT.value or report.folder_of(_WORKDIR.value, result["step"])
    names = write_results(folder, "why", result, shown)
    print("wrote", ", ".join(os.path.join(folder, name) for name in names))


def _number(given: str) -> int | None:
    """Return the number of --step, None for a spike. Raises ValueError on anything else."""
    if given in ("spike", "loss", "grad_norm"):
        return None
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise ValueError(
            f"--step={given} is not a step of a run; give a number from 1, or spike, loss or "
            "grad_norm"
        )
    return int(given)


def run() -> None:
    """Parse the command line, run the command and exit."""
    command.run(main)

"""Load the model and perform the task on rows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices, fitting, held_flags, shared_flags
from mtnlg_jax.cli.decoding.settings import read_assignments
from mtnlg_jax.cli.task_modes import options
from mtnlg_jax.cli.task_modes.rows import read_rows

if TYPE_CHECKING:
    from mtnlg_jax.config import Config, DecodeConfig
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.tasks.answers import Answer
    from mtnlg_jax.tasks.rendering import Row
    from mtnlg_jax.tasks.templates import Task
    from mtnlg_jax.train.checkpoint import Run


def read_support(task: "Task", notes: list[str]) -> dict[str, Any]:
    """Return the arguments of `tasks.run.perform` that hold examples and passages.

    Reading them comes before the model is loaded, so that a wrong file is reported at once.
    """
    from mtnlg_jax.tasks.passages import read_passages

    shots = options.SHOTS.value
    examples = []
    if options.EXAMPLES.value and shots != 0:
        examples = read_rows(task, options.EXAMPLES.value, None, notes)
        if (shots or 0) > len(examples):
            raise ValueError(
                f"--shots={shots}, but {options.EXAMPLES.value} holds {len(examples)} rows; give "
                "a smaller number"
            )
    elif shots:
        raise ValueError(f"--shots={shots} without examples; name their file with --examples")
    retriever = None
    if options.PASSAGES.value:
        retriever = read_passages(
            options.PASSAGES.value,
            options.PASSAGE_SIZE.value,
            options.TEXT_KEY.value,
            options.ON_ERROR.value,
        )
    return {
        "examples": examples,
        "shots": shots or None,
        "seed": options.SEED.value,
        "retriever": retriever,
    }


def load(rows: int, decode: "DecodeConfig") -> "tuple[Run, Decoder]":
    """Load the run of --workdir and its decoder, to answer ``rows`` rows.

    Raise ValueError before anything is loaded if it does not fit.
    """
    from mtnlg_jax import compat
    from mtnlg_jax.decode.load import load_decoder

    if held_flags.CACHE.value and decode.num_beams > 1:
        raise ValueError(
            f"--cache={held_flags.CACHE.value} is for rows, and num_beams={decode.num_beams} "
            "continues beams; add --set=decode.num_beams=1, or leave --cache out"
        )
    compat.quiet()
    compat.configure_cache()
    held = (held_flags.DTYPE.value, held_flags.WEIGHTS.value, held_flags.CACHE.value)

    def before(config: "Config", _: object) -> None:
        from mtnlg_jax.decode.memory import Choices, Plan, caches_of

        at_once = min(rows, options.BATCH.value)
        # Prompts have at least one token; how many more is not known before they are made.
        caches = caches_of(config.model, at_once, 1, decode)
        plan = Plan(config.model, *held, devices.mesh(), caches)
        choices = Choices(cache=decode.num_beams == 1, rows=("--batch", at_once))
        fitting.check(options.WORKDIR.value, [plan], choices, devices.mesh())

    return load_decoder(
        options.WORKDIR.value,
        held_flags.CHECKPOINT.value,
        held[0],
        weights=held[1],
        cache=held[2],
        mesh=devices.mesh(),
        before=before,
    )


def perform(
    task: "Task",
    rows: Sequence["Row"],
    support: dict[str, Any],
    on_answer: Callable[[int, "Answer"], None] = lambda index, answer: None,
) -> tuple["Run", list["Answer"]]:
    """Return the run and the answer to each row, with a progress bar for several rows.

    ``support`` comes from `read_support`. ``on_answer`` is called with (index of the row, answer)
    as soon as the answer is known.
    """
    from tqdm import tqdm

    from mtnlg_jax.tasks import run as tasks_run

    decode = decode_settings(task)
    run, decoder = load(len(rows), decode)
    hidden = None if len(rows) > 1 else True  # None: hidden unless on a terminal
    with tqdm(total=len(rows), unit="row", disable=hidden, leave=False) as bar:

        def done(index: int, answer: "Answer") -> None:
            on_answer(index, answer)
            bar.update()

        return run, tasks_run.perform(
            decoder,
            run.tokenizer,
            task,
            rows,
            language=options.LANGUAGE.value,
            passages=options.BEST.value,
            decode=decode,
            scorer=options.SCORER.value,
            normalise=options.NORMALISE.value,
            last_word=options.LAST_WORD.value,
            stages=run.config.train.stages,
            batch=options.BATCH.value,
            on_answer=done,
            **support,
        )


def decode_settings(task: "Task") -> "DecodeConfig":
    """Return the settings of the task with those of --set.

    Settings of the task that --set leaves without effect, such as early_stopping without beams, are
    reset.
    """
    from mtnlg_jax.config import acting

    given = read_assignments(shared_flags.SET.value)
    return acting(dataclasses.replace(task.decode, **given), given)

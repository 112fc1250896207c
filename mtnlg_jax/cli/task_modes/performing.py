"""Load the model and perform the task on rows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices, fitting, held_flags, shared_flags
from mtnlg_jax.cli.decoding.preset_flag import apply_preset, must_act
from mtnlg_jax.cli.decoding.settings import read_assignments
from mtnlg_jax.cli.task_modes import long_options, options, profiles
from mtnlg_jax.cli.task_modes.rows import read_rows

if TYPE_CHECKING:
    from mtnlg_jax.config import Config, DecodeConfig
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.tasks.answers import Answer
    from mtnlg_jax.tasks.long.options import LongOptions
    from mtnlg_jax.tasks.rendering import Row
    from mtnlg_jax.tasks.templates import Task
    from mtnlg_jax.train.checkpoint import Run


def read_support(task: "Task", notes: list[str]) -> dict[str, Any]:
    """Return the arguments of `tasks.run.perform` that hold examples, passages and a profile.

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
        "profile": profiles.read(),
    }


def load(
    rows: int,
    decode: "DecodeConfig",
    check: Callable[["Config", Any], None] = lambda config, tokenizer: None,
    rows_flag: str = "--batch",
) -> "tuple[Run, Decoder]":
    """Load the run of --workdir and its decoder, to answer ``rows`` rows.

    Raise ValueError before anything is loaded if it does not fit. ``check`` is called with the
    config and the tokenizer before that; it may raise. ``rows_flag`` is the flag that says how many
    rows are decoded at once.
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

    def before(config: "Config", tokenizer: Any) -> None:
        from mtnlg_jax.decode.memory import Choices, Plan, caches_of

        check(config, tokenizer)
        at_once = min(rows, options.BATCH.value) if rows_flag == "--batch" else rows
        # Prompts have at least one token; how many more is not known before they are made.
        caches = caches_of(config.model, at_once, 1, decode)
        plan = Plan(config.model, *held, devices.mesh(), caches)
        choices = Choices(cache=decode.num_beams == 1, rows=(rows_flag, at_once))
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


def weights_of(run: "Run") -> str:
    """Return digits that tell the weights of `load` from others of the same path and step."""
    from mtnlg_jax.train import adapter_file

    return adapter_file.weights_of(options.WORKDIR.value, held_flags.CHECKPOINT.value, run.step)


def perform(
    task: "Task",
    rows: Sequence["Row"],
    support: dict[str, Any],
    on_answer: Callable[[int, "Answer"], None] = lambda index, answer: None,
) -> tuple["Run", list["Answer"]]:
    """Return the run and the answer to each row, with a progress bar for several parts.

    ``support`` comes from `read_support`. ``on_answer`` is called with (index of the row, answer)
    as soon as the answer is known.
    """
    from tqdm import tqdm

    decode = decode_settings(task)
    long = long_options.read_options(task, len(rows))
    run, decoder = load(len(rows), decode)
    # None: hidden unless on a terminal. A single short row is one part, which shows no progress.
    with tqdm(total=len(rows), unit="part", disable=None, leave=False, delay=1) as bar:

        def progress(done: int, known: int) -> None:
            bar.total = known
            bar.update(done - bar.n)

        return run, answer_rows(
            task, run, decoder, rows, support, decode, long, on_answer, progress
        )


def answer_rows(
    task: "Task",
    run: "Run",
    decoder: "Decoder",
    rows: Sequence["Row"],
    support: dict[str, Any],
    decode: "DecodeConfig",
    long: "LongOptions",
    on_answer: Callable[[int, "Answer"], None],
    on_progress: Callable[[int, int], None] = lambda done, known: None,
) -> list["Answer"]:
    """Return the answers of a loaded model; the other arguments are those of `perform`."""
    from mtnlg_jax.tasks.long.run import perform_long

    return perform_long(
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
        options=long,
        on_answer=on_answer,
        on_progress=on_progress,
        **support,
    )


def decode_settings(task: "Task") -> "DecodeConfig":
    """Return the settings of the task, or of --preset, with those of --set.

    Settings of the task or the preset that --set leaves without effect, such as early_stopping
    without beams, are reset.
    """
    from mtnlg_jax.config import acting

    given = read_assignments(shared_flags.SET.value)
    return acting(dataclasses.replace(apply_preset(task.decode), **given), must_act(given))

"""--task=write: write a text of any length."""

import dataclasses
import hashlib
import json
import sys
from typing import TYPE_CHECKING, Any

from mtnlg_jax.cli.decoding import devices, held_flags, shared_flags
from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.decoding.preset_flag import PRESET, apply_preset, must_act, preset_scorers
from mtnlg_jax.cli.decoding.settings import merge, read_assignments
from mtnlg_jax.cli.task_modes import (
    long_options,
    many_options,
    options,
    performing,
    profiles,
    writing_options,
)
from mtnlg_jax.cli.task_modes.rows import read_assignments as read_pairs
from mtnlg_jax.cli.task_modes.rows import read_input

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.decode.cache import Decoder
    from mtnlg_jax.tasks.writing.request import Document, Request
    from mtnlg_jax.train.checkpoint import Run

NAME = "write"


def check_flags() -> None:
    """Raise ValueError on a flag that has no effect on --task=write, or only on that."""
    if options.TASK.value != NAME:
        for flag in (
            writing_options.WORDS,
            writing_options.OUTLINE,
            writing_options.CANDIDATES,
            writing_options.SCORE_WEIGHTS,
        ):
            if flag.present:
                raise ValueError(f"--{flag.name} is for --task=write; leave it out")
        return
    for flag in (
        options.EVAL,
        options.SCORE,
        options.LAST_WORD,
        options.MAKE_PAIRS,
        options.TEMPLATES,
        options.EXAMPLES,
        options.SHOTS,
        options.PASSAGES,
        options.BEST,
        options.PASSAGE_SIZE,
        options.TEXT_KEY,
        options.ON_ERROR,
        options.CHOICES,
        options.BLANK,
        options.SCORER,
        options.NORMALISE,
        options.COLUMNS,
        options.LABELS,
        options.LIMIT,
        options.BATCH,
        *long_options.OWN,
        *many_options.OWN,
    ):
        if flag.present:
            raise ValueError(f"--task=write writes one text; leave --{flag.name} out")
    if not options.WORKDIR.value:
        raise ValueError(
            "--workdir is missing; name a run of launch/pretrain.py or a Hugging Face folder"
        )
    if preset_scorers():
        raise ValueError(
            f"--preset={PRESET.value} ranks texts, which --task=write does by --score_weights; "
            "choose another one"
        )
    profiles.check(model_used=True)


def write_document() -> None:
    """Write a text about the topic of --input or standard input, or go on with --output."""
    from mtnlg_jax.interop import registry

    registry.adapt(options.WORKDIR.value, shared_flags.ADAPTER.value, held_flags.CHECKPOINT.value)
    with devices.started(shared_flags.SET.value):
        _write_document()


def _write_document() -> None:
    from mtnlg_jax.tasks.writing.record import check_settings

    output = options.OUTPUT.value
    # Every process replays the same lines; the first one has the file.
    lines = devices.on_first(lambda: _read_lines(output))
    request = read_request(devices.on_first(read_input))
    check_settings(str(output), lines, dataclasses.asdict(request))
    run, decoder = performing.load(
        request.candidates,
        request.decode,
        rows_flag=f"--{writing_options.CANDIDATES.name}",
        check=lambda config, tokenizer: _check(request, config, tokenizer),
    )
    settings = settings_of(request, run)
    check_settings(str(output), lines, settings)
    _write(run, decoder, request, lines, settings)


def read_request(topic: str) -> "Request":
    """Return the request of the flags; raise ValueError on one that cannot be met."""
    from mtnlg_jax.config import acting
    from mtnlg_jax.data.segment import language_of
    from mtnlg_jax.tasks.writing.outline import read_outline
    from mtnlg_jax.tasks.writing.request import DECODE, Request, check_request
    from mtnlg_jax.tasks.writing.scores import WEIGHTS

    by_flag = {} if options.SEED.value is None else {"seed": options.SEED.value}
    given = merge(by_flag, read_assignments(shared_flags.SET.value), {})
    profile = profiles.read()
    path = writing_options.OUTLINE.value
    headings = () if path == "auto" else tuple(devices.on_first(lambda: read_outline(path)))
    request = Request(
        kind=options.KIND.value or "story",
        topic=topic.strip(),
        words=writing_options.WORDS.value,
        language=options.LANGUAGE.value or language_of(topic),
        headings=headings,
        candidates=writing_options.CANDIDATES.value,
        weights=WEIGHTS | _weights(),
        decode=acting(dataclasses.replace(apply_preset(DECODE), **given), must_act(given)),
        piece=given.get("max_new_tokens"),
        profile=profile.entries if profile else (),
        profile_share=profiles.SHARE.value,
    )
    check_request(request)
    return request


def _weights() -> dict[str, float]:
    """Return the weights of --score_weights."""
    found = {}
    name = writing_options.SCORE_WEIGHTS.name
    for part, value in read_pairs(name, writing_options.SCORE_WEIGHTS.value).items():
        try:
            found[part] = float(value)
        except ValueError:
            raise ValueError(
                f"--{name}={part}={value}: {value!r} is not a number; write one such as 0.5"
            ) from None
    return found


def settings_of(request: "Request", run: "Run") -> dict[str, Any]:
    """Return what a text follows from, as JSON: the request, the model and how it is held."""
    config = json.dumps(dataclasses.asdict(run.config.model), sort_keys=True, default=str)
    return dataclasses.asdict(request) | {
        "model": {
            "step": run.step,
            # Only a record needs it, and reading takes long.
            "weights": devices.on_first(
                lambda: performing.weights_of(run) if options.OUTPUT.value else ""
            ),
            "config": hashlib.sha256(config.encode()).hexdigest()[:16],
            "tokenizer": run.tokenizer.fingerprint[:16],
        },
        "held": {
            "dtype": held_flags.DTYPE.value,
            "weights": held_flags.WEIGHTS.value,
            "cache": held_flags.CACHE.value,
            "adapter": shared_flags.ADAPTER.value,
        },
    }


def _check(request: "Request", config: "Config", tokenizer) -> None:
    """Raise ValueError before the parameters are read if the prompts do not fit the context."""
    from mtnlg_jax.tasks.writing.request import composer_of

    composer_of(request, tokenizer, config.model.max_position_embeddings)


def _read_lines(output: str | None) -> list[dict]:
    from mtnlg_jax.tasks.writing.record import read_lines

    return read_lines(output) if output else []


def _write(
    run: "Run", decoder: "Decoder", request: "Request", lines: list[dict], settings: dict[str, Any]
) -> None:
    """Write the text, with a bar of its words unless it streams, and report it."""
    from tqdm import tqdm

    from mtnlg_jax.tasks.writing.record import Record, opened
    from mtnlg_jax.tasks.writing.write import write

    def show(text: str) -> None:
        print(text, end="", flush=True)

    output = options.OUTPUT.value
    streams = not output and not shared_flags.JSON.value
    unit = "characters" if request.language == "zh" else "words"
    # A text that streams shows its own progress.
    hidden = True if streams else None
    with tqdm(total=request.words, unit=f" {unit}", disable=hidden, leave=False) as bar:

        def advance(words: int) -> None:
            bar.update(words - bar.n)

        def made(record: Record) -> "Document":
            return write(
                decoder,
                run.tokenizer,
                request,
                record=record,
                on_text=show if streams else None,
                on_words=advance,
            )

        if output:
            try:
                with opened(output, settings, lines) as record:
                    document = made(record)
            except KeyboardInterrupt:
                devices.note(f"the same command goes on with {output}")
                raise
        else:
            document = made(Record(lines[1:]))
    _report(run, request, document)


def _report(run: "Run", request: "Request", document: "Document") -> None:
    """Print the result: JSON, or a line that says how much was written."""
    output = options.OUTPUT.value
    if shared_flags.JSON.value:
        head = {"task": NAME, "kind": request.kind, "step": run.step, "output": output}
        print(dump(head | dataclasses.asdict(document)))
        return
    unit = "characters" if request.language == "zh" else "words"
    line = (
        f"{document.words:,} {unit} in {len(document.sections)} sections; {document.calls:,} "
        f"calls of the model, {document.tokens_written:,} tokens written, "
        f"{document.tokens_scored:,} read to rank them, {document.seconds:.1f} s"
    )
    if output:
        print(f"{line}; {output}")
    else:
        print()
        print(line, file=sys.stderr)

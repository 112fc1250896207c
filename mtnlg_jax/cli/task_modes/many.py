"""--inputs: answer the rows of a file or of a folder of texts into --outputs."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.decoding import devices, shared_flags
from mtnlg_jax.cli.decoding.output import dump
from mtnlg_jax.cli.processes import several_processes
from mtnlg_jax.cli.task_modes import long_options, many_options, options, performing
from mtnlg_jax.cli.task_modes.rows import read_assignments

if TYPE_CHECKING:
    from mtnlg_jax.tasks.many.inputs import Inputs, Item
    from mtnlg_jax.tasks.many.record import Record
    from mtnlg_jax.tasks.templates import Task
    from mtnlg_jax.train.checkpoint import Run

# Flags that change neither the answers nor what a line holds of them.
_FREE = {
    *("inputs", "outputs", "retry_errors", "report", "time_column", "group_column"),
    *("batch", "json", "memory", "heartbeat_seconds"),
}


def answer_file(task: "Task") -> None:
    """Answer each row of --inputs in a line of --outputs, and report what was done."""
    from mtnlg_jax.tasks.many.answering import answer_items

    inputs = _read(task)
    _check_columns(inputs)
    notes = list(inputs.notes)
    support = performing.read_support(task, notes)
    for note in notes:
        devices.note(f"note: {note}")
    decode = performing.decode_settings(task)
    long = long_options.read_options(task, inputs.asked)
    with contextlib.ExitStack() as stack:
        record: Record | None = None

        def begin() -> list[int]:
            nonlocal record
            record = stack.enter_context(_record(task, inputs))
            found = [number for number, done in enumerate(record.done) if done]
            return [record.begun.answered, *found]

        answered, *found = devices.on_first(begin)
        done = set(found)
        left = inputs.asked - len(done)
        if left:
            run, decoder = performing.load(left, decode)
            devices.on_first(lambda: _require_model(record, run))
            with _progress(inputs, record) as bar:
                answer_items(
                    (item for item in inputs.items() if item.number not in done),
                    record or _Silent(),
                    lambda rows, give: performing.answer_rows(
                        task, run, decoder, rows, support, decode, long, give
                    ),
                    batch=options.BATCH.value,
                    proven=answered > 0,
                    on_done=bar,
                )
        if record is not None:
            _finish(task, inputs, record)


def _check_columns(inputs: "Inputs") -> None:
    """Raise ValueError if the report cannot use the columns that flags name for it."""
    from mtnlg_jax.tasks.many.dates import parse_date

    for flag in (many_options.TIME_COLUMN, many_options.GROUP_COLUMN):
        name = flag.value
        if name in (None, "none"):
            continue
        others: dict[str, Any] = {}
        for item in inputs.items():
            others |= item.columns
            value = item.columns.get(name)
            if value is not None and (flag is many_options.GROUP_COLUMN or parse_date(value)):
                break
        else:
            what = (
                "no value of this column is a date; write them as 2026-01-31"
                if name in others
                else "rows have no such column beside their id and input, only "
                f"{', '.join(others)[:80] or 'those'}; name another one"
            )
            raise ValueError(f"--{flag.name}={name}: {what}, or leave --{flag.name} out")


def _require_model(record: "Record | None", run: "Run") -> None:
    """Raise ValueError if the lines so far are of another checkpoint."""
    assert record is not None, "the first process has the record"
    for name, value in (("step", run.step), ("the weights", performing.weights_of(run))):
        record.require(name, value, "give that checkpoint to go on")


def check_outputs(task: "Task") -> None:
    """Raise ValueError if --outputs or the report cannot be such files, before anything is read."""
    from mtnlg_jax import storage
    from mtnlg_jax.tasks.many.record import SUFFIX, check_writable

    path = many_options.OUTPUTS.value
    check_writable(path)
    report = report_path(task)
    folder = os.path.dirname(report or "")
    if report and not (storage.is_remote(report) or os.path.isdir(folder or ".")):
        raise ValueError(
            f"--report={report}: the folder {folder} does not exist; create it, or name another "
            "file"
        )
    if report and os.path.realpath(report) in map(os.path.realpath, (path, path + SUFFIX)):
        raise ValueError(
            f"--report={report} would replace the answers of --outputs={path}; name another file, "
            "or none"
        )
    if report and os.path.exists(report) and not (os.path.exists(path) and _is_report(report)):
        raise ValueError(
            f"the report {report} exists, and is not known to be of {path}; name another file with "
            "--report, or none"
        )


def _is_report(path: str) -> bool:
    from mtnlg_jax.tasks.many.report import GENERATOR

    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(2048)


def _read(task: "Task") -> "Inputs":
    from mtnlg_jax.tasks.many.inputs import Inputs

    if options.BLANK.value and not task.joined:
        raise ValueError(
            f"--blank={options.BLANK.value} fills the input itself, and task {task.name!r} asks "
            "about the input; use --task=continue"
        )
    labels = read_assignments("labels", options.LABELS.value)
    known = _labels_of(task)
    ranked = known and not options.CHOICES.value
    if labels and ranked and known.keys().isdisjoint(labels.values()):
        raise ValueError(
            f"--labels={','.join(options.LABELS.value)}: task {task.name!r} has the labels "
            f"{', '.join(known)}; write them as in --labels=0={next(iter(known))}"
        )
    return Inputs(
        many_options.INPUTS.value,
        read_assignments("columns", options.COLUMNS.value) or None,
        labels,
        choices=options.CHOICES.value,
        blank=options.BLANK.value or "",
        limit=options.LIMIT.value,
        seed=options.SEED.value or 0,
    )


def _record(task: "Task", inputs: "Inputs") -> "Record":
    from mtnlg_jax.tasks.many.record import Record

    return Record(
        many_options.OUTPUTS.value,
        {"the inputs": inputs.digest} | _settings(),
        inputs.count,
        retry_errors=many_options.RETRY_ERRORS.value,
        keep_prompt=many_options.KEEP_PROMPTS.value,
    )


def _settings() -> dict[str, Any]:
    """Return the flags that were given and that the answers depend on; files by what they hold."""
    given: dict[str, Any] = {}
    of_processes = flags.FLAGS.get_key_flags_for_module(several_processes.__name__)
    for flag in flags.FLAGS.get_key_flags_for_module("mtnlg_jax.cli.task"):
        value: Any = flag.value
        if flag.name == "set":
            value = [entry for entry in value if not devices.of_mesh(entry)]
        if flag.name in _FREE or flag in of_processes or value == flag.default:
            continue
        if flag.name == "workdir" or not command.names_a_file(flag):
            given[f"--{flag.name}"] = os.path.realpath(value) if flag.name == "workdir" else value
        else:
            given[f"--{flag.name}"] = f"{value} ({_digest(value)})"
    return given


def _digest(path: str) -> str:
    """Return 12 digits that change with a file, or with the names and bytes of a folder's files."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    names = [os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files]
    stamps = [(os.path.relpath(name, path), _digest(name)) for name in sorted(names)]
    return hashlib.sha256(repr(stamps).encode("utf-8", "replace")).hexdigest()[:12]


class _Silent:
    """What processes other than the first do with answers."""

    def add(self, item: "Item", answer: Any) -> None: ...

    def add_error(self, item: "Item", error: str) -> None: ...

    def sync(self) -> None: ...


@contextlib.contextmanager
def _progress(inputs: "Inputs", record: "Record | None") -> Iterator[Any]:
    """Yield a function to call after each row; a terminal shows the rows, their rate and the time
    left."""
    from tqdm import tqdm

    if record is None:
        yield lambda: None
        return
    begun = record.begun.rows
    try:
        with tqdm(
            total=inputs.asked, initial=begun, unit="row", disable=None, leave=False, smoothing=0.1
        ) as bar:

            def done() -> None:
                if record.counts.errors:
                    bar.set_postfix_str(f"{record.counts.errors:,} errors", refresh=False)
                bar.update()

            yield done
    except BaseException:
        if record.counts.rows:
            print(
                f"{record.counts.rows:,} of {inputs.asked:,} rows are in {record.path}; the same "
                "command goes on",
                file=sys.stderr,
            )
        raise


def _finish(task: "Task", inputs: "Inputs", record: "Record") -> None:
    """Write the report, and print how many rows were answered."""
    counts = record.counts
    report = _report(task, record)
    content = {
        "task": task.name,
        "rows": counts.rows,
        "answered": counts.answered,
        "errors": counts.errors,
        "before": record.begun.rows,
        "step": record.identity.get("step"),
        "output": str(record.path),
        "report": report,
    }
    if shared_flags.JSON.value:
        print(dump(content))
        return
    before = f" ({record.begun.rows:,} of them before)" if record.begun.rows else ""
    print(
        f"{task.name}: {counts.rows:,} rows{before}: {counts.answered:,} answers and "
        f"{counts.errors:,} errors in {record.path}" + (f", report in {report}" if report else "")
    )


def _labels_of(task: "Task") -> dict[str, None]:
    """Return the labels of the templates of a task, in their order."""
    return {label: None for each in task.templates.values() for label, _ in each.labels}


def report_path(task: "Task") -> str | None:
    """Return the file of the report; None without one.

    Raises ValueError if flags of the report have no effect.
    """
    ranked = bool(_labels_of(task))
    path = many_options.REPORT.value
    if ranked and path != "none":
        return path or many_options.OUTPUTS.value + ".html"
    for flag in (many_options.REPORT, many_options.TIME_COLUMN, many_options.GROUP_COLUMN):
        if flag.value not in (None, "none"):
            why = "--report=none" if ranked else f"task {task.name!r} ranks no labels"
            raise ValueError(
                f"--{flag.name}={flag.value} is for the report of labels, and {why}; leave it out"
            )
    return None


def _report(task: "Task", record: "Record") -> str | None:
    path = report_path(task)
    if path is None:
        return None
    from mtnlg_jax.storage import write_file
    from mtnlg_jax.tasks.many.record import read_records
    from mtnlg_jax.tasks.many.report import render
    from mtnlg_jax.tasks.many.summary import summarize

    summary = summarize(
        lambda: read_records(record.path),
        list(_labels_of(task)),
        many_options.TIME_COLUMN.value,
        many_options.GROUP_COLUMN.value,
    )
    name = os.path.basename(os.path.normpath(many_options.INPUTS.value))
    page = render(summary, f"{task.name}: {name}", list(record.identity.items()))
    write_file(*os.path.split(path), page.encode("utf-8", "replace"))
    return path

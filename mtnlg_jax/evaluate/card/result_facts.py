"""What a card says of evaluations, memorization, privacy and bias.

Only numbers are taken from these files, and texts under a few known keys: others may hold what the
model wrote, or what it was tested for, such as personal data and secrets.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mtnlg_jax.evaluate.card.facts import Fact, Facts, pointer
from mtnlg_jax.evaluate.card.page import Cell, Section
from mtnlg_jax.evaluate.card.run_files import CONFIG, RunFiles

# Keys whose texts name a row or say how it was made.
_NAMES = (
    "name kind task category group groups rule method metric format unit axis type decoding scorer "
    "reference accountant lexicon source language"
).split()
# Keys below which texts of the data or of the model may stand, also as numbers and as tokens.
_HIDDEN = (
    "secret secrets text texts prefix continuation continuations tokens examples example matches "
    "match found hits seed"
).split()
_INTERVAL = 3  # numbers in a list that is shown; longer ones may be tokens
# What each file says of itself.
_HEAD = ("kind", "step", "commit", "versions", "created")
_ROWS = 30  # of a table
_DEPTH = 6
_PATH = tuple[str | int, ...]


def evaluation_sections(facts: Facts, run: RunFiles) -> list[Section]:
    """Return the section on the evaluations of tasks, and add its facts."""
    section = Section("Evaluation")
    rows: list[list[Cell]] = []
    others = []
    for file in run.evaluations:
        content = run.content[file]
        section.blocks.append(_of_checkpoint(facts, run, file))
        if not isinstance(content.get("tasks"), dict):
            others.append(_measured(facts, run, file, Section(f"Results in {file}", level=3)))
            continue
        for task, result in content["tasks"].items():
            rows += _task(facts, file, task, result)
    if not run.evaluations:
        section.blocks.append(
            "Unknown: the run's folder holds no results of tasks. Its held-out losses are above."
        )
    head = (
        "task",
        "version",
        "shots",
        "rows",
        "metric",
        "value",
        "standard error",
        "checkpoint of step",
    )
    section.table(head, rows)
    return [section, *others]


def other_sections(facts: Facts, run: RunFiles) -> list[Section]:
    """Return the sections on memorization, privacy and bias, and add their facts."""
    private = run.content[CONFIG].get("optimizer", {}).get("dp_noise_multiplier")
    parts = (
        (
            "Memorization",
            "audit.json",
            "Unknown: the run's folder holds no audit of what the model remembers of its data.",
        ),
        (
            "Differential privacy",
            "privacy.json",
            "Unknown: the run was trained with noise, and its folder does not say what it spent."
            if private
            else "The model was not trained with differential privacy: nothing bounds what it may "
            "remember of one example.",
        ),
        (
            "Bias",
            "bias.json",
            "Unknown: the run's folder holds no measures of the model's bias.",
        ),
    )
    sections = []
    for title, file, without in parts:
        section = Section(title)
        if not run.has(file):
            section.blocks.append(without)
        elif file == "privacy.json":
            _measured(facts, run, file, section)
        else:
            section.blocks.append(_of_checkpoint(facts, run, file))
            _measured(facts, run, file, section)
        sections.append(section)
    return sections


def is_of_this_run(run: RunFiles, file: str) -> bool:
    """Return whether the step in a file of results is one that the run has done."""
    step = run.content[file].get("step")
    return isinstance(step, int) and step <= run.last_step


def _of_checkpoint(facts: Facts, run: RunFiles, file: str) -> str:
    """Return the sentence that names the checkpoint of which ``file`` tells."""
    step = facts.read(file, "/step", "Results: step of the checkpoint")
    facts.read(file, "/created", "Results: date")
    if not step.known:
        return f"`{file}`: the checkpoint is unknown."
    text = f"`{file}`: checkpoint of step {step.shown}"
    if not is_of_this_run(run, file):
        return f"{text}, which this run has not reached; the results are of another run."
    if step.value != run.best and run.best is not None:
        best = facts.read(run.record(run.best), "/step", "Checkpoint that this card describes")
        return f"{text}; this card describes the checkpoint of step {best.shown}."
    return f"{text}."


def _task(facts: Facts, file: str, task: str, result: Mapping[str, Any]) -> Iterator[list[Cell]]:
    if not isinstance(result, dict):
        return

    def read(label: str, *parts: str) -> Fact:
        return facts.read(file, pointer("tasks", task, *parts), f"{task}: {label}")

    common: list[Cell] = [task]
    common += [
        read(label, key)
        for key, label in (("version", "version"), ("num_fewshot", "shots"), ("rows", "rows"))
    ]
    if "prompt_hash" in result:
        read("hash of the prompts", "prompt_hash")
    step = facts.read(file, "/step", f"{task}: step of the checkpoint")
    for metric, found in (result.get("metrics") or {}).items():
        nested = isinstance(found, dict)
        place = ("metrics", metric, "value") if nested else ("metrics", metric)
        error: Cell = ""
        if nested and found.get("stderr") is not None:
            error = read(f"{metric}, standard error", "metrics", metric, "stderr")
        yield [*common, metric, read(metric, *place), error, step]
    for label in result.get("predicted_classes") or {}:
        share = read(f"share of predicted {label}", "predicted_classes", label)
        yield [*common, f"predicted {label}", share, "", step]


def _measured(facts: Facts, run: RunFiles, file: str, section: Section) -> Section:
    """Add the numbers of ``file`` as lists and tables."""
    content = {key: value for key, value in run.content[file].items() if key not in _HEAD}
    _nested(facts, file, (), content, section)
    return section


def _nested(facts: Facts, file: str, path: _PATH, value: Any, section: Section) -> None:
    entries = list(_entries(value))
    words = _words(path)
    scalars = [
        facts.read(file, pointer(*path, key), f"{words}: {_word(key)}" if words else _word(key))
        for key, inside in entries
        if _is_shown(key, inside)
    ]
    inner = [(key, inside) for key, inside in entries if isinstance(inside, dict | list)]
    several = len(inner) > 1 or isinstance(value, list)
    as_rows = several and all(_is_flat(inside) for _, inside in inner)
    section.listing(scalars[:_ROWS], head=(words, ""))
    if as_rows:
        _rows(facts, file, path, inner, section)
    elif len(path) < _DEPTH:
        for key, inside in inner:
            _nested(facts, file, (*path, key), inside, section)
    if len(scalars) > _ROWS or (as_rows and len(inner) > _ROWS):
        section.blocks.append(f"The other rows are in `{file}`.")


def _rows(facts: Facts, file: str, path: _PATH, inner: list, section: Section) -> None:
    """Add a table of dicts of numbers, one a row."""
    words = _words(path)
    columns: dict[str | int, None] = {}
    for _, row in inner:
        columns |= dict.fromkeys(key for key, value in _entries(row) if _is_shown(key, value))
    if not columns:
        return
    rows: list[list[Cell]] = []
    for key, row in inner[:_ROWS]:
        cells: list[Cell] = [] if isinstance(key, int) else [str(key)]
        for column in columns:
            label = ": ".join(filter(None, (words, str(_word(key)), _word(column))))
            shown = _is_shown(column, row.get(column))
            cells.append(facts.read(file, pointer(*path, key, column), label) if shown else "")
        rows.append(cells)
    first = [] if isinstance(inner[0][0], int) else [words]
    section.table((*first, *map(_word, columns)), rows)


def _entries(value: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield the entries of a dict or list that may be shown."""
    if isinstance(value, dict):
        for key, inside in value.items():
            if key not in _HIDDEN:
                yield key, inside
    elif len(value) <= _INTERVAL or not any(isinstance(one, int | float) for one in value):
        for number, inside in enumerate(value):
            yield number, inside


def _is_flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(
        isinstance(inside, dict | list) for inside in value.values()
    )


def _is_shown(key: str | int, value: Any) -> bool:
    if isinstance(value, str):
        return key in _NAMES and len(value) <= 60
    return isinstance(value, bool | int | float)


def _words(path: _PATH) -> str:
    return ", ".join(map(_word, path))


def _word(key: str | int) -> str:
    return f"entry {key}" if isinstance(key, int) else key.replace("_", " ")

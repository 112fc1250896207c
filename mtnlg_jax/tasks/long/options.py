"""How inputs longer than the context are worked on, and the checks of these options."""

import dataclasses
from dataclasses import dataclass

from mtnlg_jax.tasks.long.glossary import Term
from mtnlg_jax.tasks.templates import Task

MODES = ("parts", "cut")
METHODS = ("hierarchical", "refine")
KINDS = ("general", "news", "abstract", "product")
# Words of a summary, or characters of a Chinese one.
LENGTHS = {"short": {"en": 25, "zh": 40}, "medium": {"en": 80, "zh": 130}}
LENGTHS["long"] = {"en": 200, "zh": 320}


@dataclass(frozen=True)
class LongOptions:
    """Options of `tasks.long.run.perform_long`. Those of other tasks must keep their defaults."""

    mode: str = "parts"  # "cut": shorten inputs to the context, as `tasks.run.perform` does
    # summarise
    method: str = "hierarchical"  # summaries of summaries; "refine": one running summary
    kind: str = "general"  # of text to write, one of KINDS
    # "short", "medium", "long" or a number of words, characters in Chinese; None: the task's own
    length: str | int | None = None
    # answer
    document: str | None = None  # the context of rows without one
    cite: bool = False  # whether a passage supports each sentence of an answer
    # sentiment: what to judge apart; "price|cost" looks for both words and is named "price"
    aspects: tuple[str, ...] = ()
    # translate
    glossary: tuple[Term, ...] = ()
    group: int = 1  # sentences that are translated at once, as far as they fit
    previous: int = 1  # groups just translated that stand before each as examples
    candidates: int = 4  # translations to choose from where temperature is above 0
    reference: str | None = None  # a human translation to compare paragraphs with
    round_trip: bool = False  # translate back, and compare with the source


_TASK_OF = {
    **dict.fromkeys(("method", "kind", "length"), "summarise"),
    **dict.fromkeys(("document", "cite"), "answer"),
    "aspects": "sentiment",
    **dict.fromkeys(
        ("glossary", "group", "previous", "candidates", "reference", "round_trip"), "translate"
    ),
}


def check_options(options: LongOptions, task: Task, rows: int) -> None:
    """Raise ValueError on an option out of range, and on one that does not fit the task."""
    for name, allowed in (("mode", MODES), ("method", METHODS), ("kind", KINDS)):
        value = getattr(options, name)
        if value not in allowed:
            raise ValueError(f"unknown {name}={value!r}; choose from {', '.join(allowed)}")
    for field in dataclasses.fields(options):
        given = getattr(options, field.name) != field.default
        wanted = _TASK_OF.get(field.name)
        if given and wanted and wanted != task.name:
            raise ValueError(
                f"{field.name} is an option of task {wanted!r}, and this is task {task.name!r}; "
                "leave it out"
            )
        if given and wanted and options.mode == "cut":
            raise ValueError(
                f"{field.name} works on inputs by parts, and mode='cut' shortens them; use "
                "mode='parts' (--long=parts), or leave it out"
            )
    for name, least in (("group", 1), ("previous", 0), ("candidates", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)}; give {least} or more")
    if any(not name.strip(" |") for name in options.aspects):
        raise ValueError(f"aspects={','.join(options.aspects)} has an empty name; leave it out")
    words_of(options.length, "en")
    if rows > 1 and options.reference is not None:
        raise ValueError(
            f"reference is the translation of one input, and there are {rows} rows; give one row"
        )


def words_of(length: str | int | None, language: str) -> int | None:
    """Return the number of words of a summary, or of characters in Chinese ("zh")."""
    if length is None:
        return None
    if length in LENGTHS:
        of_language = LENGTHS[str(length)]
        return of_language.get(language, of_language["en"])
    if not str(length).isdecimal() or int(length) < 1:
        raise ValueError(
            f"length={length!r} is neither {', '.join(LENGTHS)} nor a number of words of 1 or more"
        )
    return int(length)

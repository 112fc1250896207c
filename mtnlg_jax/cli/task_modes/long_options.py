"""Flags of launch/task.py for inputs that are longer than the context."""

from typing import TYPE_CHECKING, Any

from absl import flags

from mtnlg_jax import command
from mtnlg_jax.cli.task_modes import options

if TYPE_CHECKING:
    from mtnlg_jax.tasks.long.options import LongOptions
    from mtnlg_jax.tasks.templates import Task

with command.flag_group("Inputs longer than the context"):
    LONG = flags.DEFINE_enum(
        "long",
        None,
        ["parts", "cut"],
        "what to do about them: work by parts, or cut them to the context; default: parts, but cut "
        "with --eval, as other harnesses do",
    )

with command.flag_group("Long summaries"):
    METHOD = flags.DEFINE_enum(
        "method",
        "hierarchical",
        ["hierarchical", "refine"],
        "summaries of summaries, or one running summary",
    )
    LENGTH = flags.DEFINE_string(
        "length",
        None,
        "short, medium, long or a number of words, of characters in Chinese, which replaces "
        "max_new_tokens; default: one sentence",
    )

with command.flag_group("Answers from a document"):
    DOCUMENT = command.define_path("document", None, "file with the text to answer from")
    CITE = flags.DEFINE_bool(
        "cite", False, "rank for each sentence of an answer whether its passage supports it"
    )

with command.flag_group("Opinions on aspects"):
    ASPECTS = flags.DEFINE_list(
        "aspects", [], "aspects to judge apart, such as price,service; price|cost looks up both"
    )

with command.flag_group("Translating documents"):
    GLOSSARY = command.define_path(
        "glossary", None, "file of terms to keep to: .tsv (source, target), .jsonl or .json"
    )
    GROUP = flags.DEFINE_integer(
        "group", 1, "number of sentences that are translated at once", lower_bound=1
    )
    PREVIOUS = flags.DEFINE_integer(
        "previous",
        1,
        "number of groups just translated that are shown before each; 0: none, and faster",
        lower_bound=0,
    )
    REFERENCE = command.define_path(
        "reference", None, "file with a human translation, to print chrF of aligned paragraphs"
    )
    ROUND_TRIP = flags.DEFINE_bool(
        "round_trip",
        False,
        "translate the translation back, and print chrF of its paragraphs against the source",
    )


# The flags of this module.
OWN = (
    *(LONG, METHOD, LENGTH, DOCUMENT, CITE, ASPECTS),
    *(GLOSSARY, GROUP, PREVIOUS, REFERENCE, ROUND_TRIP),
)


def check_unused(beside: str) -> None:
    """Raise ValueError on a flag of this module, which has no effect without a model."""
    for flag in (*OWN, options.KIND):
        if flag.present:
            raise ValueError(f"{beside} runs no model; leave --{flag.name} out")


def read_options(task: "Task", rows: int) -> "LongOptions":
    """Return the options that the flags give; read their files.

    Raises ValueError on an option that does not fit the task, before the model is loaded.
    """
    from mtnlg_jax.tasks.long.glossary import read_glossary
    from mtnlg_jax.tasks.long.options import LongOptions, check_options

    given: dict[str, Any] = {
        "mode": LONG.value or ("cut" if options.EVAL.value else "parts"),
        "method": METHOD.value,
        "kind": options.KIND.value or "general",
        "length": LENGTH.value,
        "cite": CITE.value,
        "aspects": tuple(ASPECTS.value),
        "group": GROUP.value,
        "previous": PREVIOUS.value,
        "round_trip": ROUND_TRIP.value,
    }
    if DOCUMENT.value:
        given["document"] = _text(DOCUMENT.value, "the document to answer from")
    if REFERENCE.value:
        given["reference"] = _text(REFERENCE.value, "the reference translation")
    if GLOSSARY.value:
        given["glossary"] = read_glossary(GLOSSARY.value)
    found = LongOptions(**given)
    check_options(found, task, rows)
    return found


def _text(path: str, what: str) -> str:
    _, text = command.read_text(path, what, "utf-8-sig")
    if not text.strip():
        raise ValueError(f"{path} is empty; give {what}")
    return text

"""Layouts of public evaluation sets: the keys under which they keep the fields of a row."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Keys of one data set; ``columns`` as in `examples.read_rows`."""

    name: str
    columns: dict[str, str]
    choices: tuple[str, ...] = ()  # choices of every row, if rows have none
    blank: str = ""  # the mark in the input that choices replace

    def fits(self, has: Callable[[str], bool]) -> bool:
        """Return whether every key of the columns is present."""
        return all(has(key) for column in self.columns.values() for key in keys_of(column))


def keys_of(column: str) -> list[str]:
    """Return ["sol1", "sol2"] for "sol1+sol2", ["label"] for "label@1"."""
    return column.rpartition("@")[0].split("+") if reading_of(column) else column.split("+")


def reading_of(column: str) -> str:
    """Return how the reference names its choice, such as "1" for "label@1".

    The result is one of READINGS, or "" if the column does not specify one.
    """
    reading = column.rpartition("@")[2]
    return reading if "@" in column and reading in READINGS else ""


def value_at(item, key: str):
    """Return the value of an object under a key or a dotted path of keys, or None."""
    if not isinstance(item, dict):
        return None
    if key in item:
        return item[key]
    for part in key.split("."):
        if isinstance(item, dict) and part in item:
            item = item[part]
        elif isinstance(item, list) and part.isdecimal() and int(part) < len(item):
            item = item[int(part)]
        else:
            return None
    return item


FIELDS = ("input", "reference", "context", "choices")
READINGS = ("0", "1", "letter", "text")

# The first layout that fits is used, so layouts with more keys come before those with fewer.
LAYOUTS = (
    Layout("HellaSwag", {"input": "ctx", "choices": "endings", "reference": "label@0"}),
    Layout(
        "SWAG",
        {
            "input": "startphrase",
            "choices": "ending0+ending1+ending2+ending3",
            "reference": "label@0",
        },
    ),
    Layout(
        "RACE",
        {
            "context": "article",
            "input": "question",
            "choices": "options",
            "reference": "answer@letter",
        },
    ),
    Layout(
        "LogiQA",
        {
            "context": "context",
            "input": "query",
            "choices": "options",
            "reference": "correct_option@0",
        },
    ),
    Layout(
        "Social IQa",
        {
            "context": "context",
            "input": "question",
            "choices": "answerA+answerB+answerC",
            "reference": "label@1",
        },
    ),
    Layout("PIQA", {"input": "goal", "choices": "sol1+sol2", "reference": "label@0"}),
    Layout(
        "COPA", {"input": "premise+question", "choices": "choice1+choice2", "reference": "label@0"}
    ),
    Layout(
        "Winogrande",
        {"input": "sentence", "choices": "option1+option2", "reference": "answer@1"},
        blank="_",
    ),
    Layout(
        "CHID",
        {"input": "content", "choices": "candidates", "reference": "answer@0"},
        blank="#idiom#",
    ),
    Layout(
        "ARC", {"input": "question.stem", "choices": "question.choices", "reference": "answerKey"}
    ),
    Layout("ARC", {"input": "question", "choices": "choices", "reference": "answerKey"}),
    Layout(
        "OpenBookQA", {"input": "question_stem", "choices": "choices", "reference": "answerKey"}
    ),
    Layout(
        "C3",
        {
            "context": "dialogue",
            "input": "question",
            "choices": "choice",
            "reference": "answer@text",
        },
    ),
    Layout("MMLU", {"input": "question", "choices": "choices", "reference": "answer"}),
    Layout("C-Eval", {"input": "question", "choices": "A+B+C+D", "reference": "answer@letter"}),
    Layout("CMMLU", {"input": "Question", "choices": "A+B+C+D", "reference": "Answer@letter"}),
    Layout("MedQA", {"input": "question", "choices": "options", "reference": "answer_idx"}),
    Layout("multiple choice", {"input": "query", "choices": "choices", "reference": "gold@0"}),
    Layout(
        "BoolQ",
        {"context": "passage", "input": "question", "reference": "answer"},
        choices=("no", "yes"),
    ),
    Layout("SQuAD", {"context": "context", "input": "question", "reference": "answers"}),
    Layout("CMRC 2018", {"context": "context", "input": "query_text", "reference": "answers"}),
    Layout("LAMBADA", {"input": "context", "reference": "continuation"}),
    Layout("SciTLDR", {"input": "source", "reference": "target"}),
    Layout("XSum", {"input": "document", "reference": "summary"}),
    Layout("CNN/DailyMail", {"input": "article", "reference": "highlights"}),
    Layout("WMT, English to Chinese", {"input": "translation.en", "reference": "translation.zh"}),
    Layout("two sentences", {"input": "sentence1+sentence2", "reference": "label"}),
    Layout("entailment", {"input": "premise+hypothesis", "reference": "label"}),
    Layout("question and answers", {"input": "question", "reference": "answers"}),
    Layout("question and answer", {"input": "question", "reference": "answer"}),
    Layout("classes", {"input": "sentence", "reference": "label"}),
    Layout("classes", {"input": "review", "reference": "label"}),
    Layout("classes", {"input": "text", "reference": "label"}),
    Layout("prompt and completion", {"input": "prompt", "reference": "completion"}),
)

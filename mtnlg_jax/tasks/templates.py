"""The five tasks: English and Chinese templates, decoding, truncation and metrics."""

import dataclasses
import difflib
import json
import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mtnlg_jax.config import DecodeConfig, describe_failure

LANGUAGES = {"en": "English", "zh": "Chinese"}


@dataclass(frozen=True)
class Template:
    """The words around an input. ``{input}`` and the keys below are replaced; other braces stay.

    A prompt is the instruction, the examples (prompt, answer and separator of each), and the prompt
    of the input.
    """

    # Contains {input}, optionally {passages}, and {choices} if the prompt lists the choices. It
    # ends where the answer begins.
    prompt: str
    answer: str = " {answer}"  # with its leading space, which belongs to the answer's first token
    instruction: str = ""
    passage: str = ""  # format of one of {passages}, with {number} and {text}
    separator: str = "\n\n"
    labels: tuple[tuple[str, str], ...] = ()  # (label, its {answer}); empty: generate the answer
    choice: str = "{letter}. {text}\n"  # format of one of {choices}
    chosen_by: str = "letter"  # the {answer} to {choices}: "letter" (MMLU) or "text" (cloze)
    stops: tuple[str, ...] = ("\n",)  # strings that end a generated answer, like the end token
    answer_language: str = ""  # empty: the language of the input

    def __post_init__(self):
        labels = self.labels.items() if isinstance(self.labels, Mapping) else self.labels
        object.__setattr__(self, "labels", tuple((str(label), str(word)) for label, word in labels))
        object.__setattr__(self, "stops", tuple(self.stops))
        check_template(self)


@dataclass(frozen=True)
class Task:
    name: str
    templates: Mapping[str, Template]  # by language of the input
    decode: DecodeConfig
    metrics: tuple[str, ...]  # metrics.METRICS of generated answers; choices have accuracy
    # Part to keep of an input too long for the context: "start", "end", "both"; "": all of it.
    keep: str = ""
    joined: bool = False  # the answer continues the input, so white space matters


def check_template(template: Template) -> None:
    for name, key in (("prompt", "{input}"), ("answer", "{answer}")):
        if key not in getattr(template, name):
            raise ValueError(
                f"template {name}={getattr(template, name)!r} does not contain {key}; write {key} "
                f"where the {key[1:-1]} belongs"
            )
    if "{passages}" in template.prompt and "{text}" not in template.passage:
        raise ValueError(
            f"template passage={template.passage!r} does not contain {{text}}; write it there, as "
            "in '[{number}] {text}\\n'"
        )
    if "{choices}" in template.prompt and not (
        "{text}" in template.choice and "{letter}" in template.choice
    ):
        raise ValueError(
            f"template choice={template.choice!r} does not contain both {{letter}} and {{text}}; "
            "write them there, as in '{letter}. {text}\\n'"
        )
    if template.chosen_by not in ("letter", "text"):
        raise ValueError(
            f"unknown template chosen_by={template.chosen_by!r}; choose letter or text"
        )
    if "" in template.stops:
        raise ValueError(
            f"template stops={list(template.stops)} contain an empty string; leave it out"
        )
    check_choices([label for label, _ in template.labels], "label")
    check_choices([word for _, word in template.labels], "the word of a label,")
    if len(template.labels) == 1:
        raise ValueError(f"label {template.labels[0][0]!r} is the only one; give at least two")


def check_choices(choices, what: str = "choice") -> None:
    """Check that the texts are distinct and not empty, or raise ValueError."""
    for index, choice in enumerate(choices):
        if not choice.strip():
            raise ValueError(f"{what} {index + 1} of {len(choices)} is empty; leave it out")
        if choice in choices[:index]:
            raise ValueError(
                f"{what} {choice!r} occurs {list(choices).count(choice)} times among "
                f"{len(choices)}; keep one of them"
            )


_CONTINUE = Template("{input}", "{answer}", stops=())

TASKS = {
    task.name: task
    for task in (
        Task(
            "continue",
            {"en": _CONTINUE, "zh": _CONTINUE},
            # Sampled, because the most likely continuation of an open-ended text soon repeats
            # itself (Holtzman 2020).
            DecodeConfig(max_new_tokens=128, temperature=0.8, top_p=0.95),
            ("chrf",),
            keep="end",
            joined=True,
        ),
        Task(
            "summarise",
            {
                "en": Template(
                    "Text: {input}\nSummary:",
                    instruction="Summarise each text in one sentence.\n\n",
                ),
                "zh": Template(
                    "正文：{input}\n摘要：",
                    "{answer}",
                    "用一句话概括每篇正文。\n\n",
                ),
            },
            # no_repeat_ngram_size is not set: it also counts the prompt, and a summary repeats
            # words of its text.
            DecodeConfig(max_new_tokens=96, num_beams=4, early_stopping=True),
            ("rougeL", "rouge1", "rouge2"),
            keep="start",
        ),
        Task(
            "translate",
            {
                "en": Template(
                    "English: {input}\nChinese:",
                    instruction="Translate English into Chinese.\n\n",
                    answer_language="zh",
                ),
                "zh": Template(
                    "中文：{input}\n英文：",
                    "{answer}",
                    "把中文译成英文。\n\n",
                    answer_language="en",
                ),
            },
            DecodeConfig(max_new_tokens=128, num_beams=5, early_stopping=True),
            ("bleu", "chrf"),
        ),
        Task(
            "sentiment",
            {
                "en": Template(
                    "Review: {input}\nSentiment:",
                    instruction="Is each review positive or negative?\n\n",
                    labels=(("negative", "negative"), ("positive", "positive")),
                ),
                "zh": Template(
                    "评论：{input}\n情感：",
                    "{answer}",
                    "判断每条评论是正面还是负面。\n\n",
                    labels=(("negative", "负面"), ("positive", "正面")),
                ),
            },
            DecodeConfig(max_new_tokens=8),
            ("accuracy",),
            keep="both",
        ),
        Task(
            "answer",
            {
                "en": Template(
                    "{passages}Question: {input}\nAnswer:",
                    instruction="Answer each question briefly.\n\n",
                    passage="[{number}] {text}\n",
                ),
                "zh": Template(
                    "{passages}问题：{input}\n回答：",
                    "{answer}",
                    "简短地回答每个问题。\n\n",
                    passage="[{number}] {text}\n",
                ),
            },
            DecodeConfig(max_new_tokens=32),
            ("exact_match", "f1"),
        ),
    )
}


def task_of(name: str, templates: str | None = None) -> Task:
    """Return the task of a name, with its templates changed by a file (see `with_templates`)."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown task {name!r}; {hint}choose from {', '.join(TASKS)}")
    return TASKS[name] if templates is None else with_templates(TASKS[name], templates)


def with_templates(task: Task, path: str) -> Task:
    """Return the task with fields of its templates replaced by those in a file.

    The file is JSON, or Python that sets TEMPLATES, such as

        {"en": {"instruction": "", "prompt": "{input} It was",
                "labels": {"negative": "terrible", "positive": "great"}}}

    Fields that are not named keep their values. A language that the task lacks starts from its
    English template.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the file cannot be parsed, or names a field that `Template` does not have.
    """
    try:
        if Path(path).suffix == ".py":
            read = runpy.run_path(path).get("TEMPLATES")
        else:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"templates {path} cannot be read: {describe_failure(error, path)}"
        ) from None
    if (
        not isinstance(read, Mapping)
        or not read
        or not all(isinstance(each, Mapping) for each in read.values())
    ):
        raise ValueError(
            f"templates {path} do not hold an object that maps languages to fields; write them as "
            '{"en": {"prompt": "{input} =>"}} (in Python: TEMPLATES = ...)'
        )
    templates = dict(task.templates)
    names = [field.name for field in dataclasses.fields(Template)]
    for language, fields in read.items():
        for name in fields:
            if name not in names:
                raise ValueError(
                    f"templates {path}: {language}: unknown field {name!r}; choose from "
                    f"{', '.join(names)}"
                )
        for name, value in fields.items():
            if not isinstance(
                value, Mapping | list | tuple if name in ("labels", "stops") else str
            ):
                raise ValueError(
                    f"templates {path}: {language}: {name} is a {type(value).__name__}; see the "
                    "fields of tasks.templates.Template"
                )
        try:
            templates[language] = dataclasses.replace(
                templates.get(language, task.templates["en"]), **fields
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"templates {path}: {language}: {error}") from None
    return dataclasses.replace(task, templates=templates)


def fill_in(template: str, **texts: str) -> str:
    """Replace each {key} of a template by its text in one pass, as a text may contain braces."""
    return re.sub(r"\{(" + "|".join(texts) + r")\}", lambda match: texts[match[1]], template)

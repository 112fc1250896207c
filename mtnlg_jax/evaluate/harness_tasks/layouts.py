"""Rows of known distributions of each task, as the fields that the harness's prompts name.

A form takes one row and returns the fields of the stock task, or raises `BadField`. Rows come from
Hugging Face's data sets, the tasks' own sites, llm-foundry (query, choices, gold) and OLMo.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mtnlg_jax.evaluate.harness_tasks.files import Rows

Row = dict[str, Any]
LETTERS = "ABCDEFGH"
NLI = {"e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}
ENTAILMENT = {"entailment": 0, "not_entailment": 1, "non-entailment": 1, "not-entailment": 1}
YES = {"no": 0, "yes": 1, "false": 0, "true": 1}
_CAUSES = re.compile(r",?\s*\b(because|therefore|so)\s*$")


class BadField(ValueError):
    """A row whose field ``name`` is missing or cannot be used; the message says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def _get(row: Row, *names: str) -> Any:
    """Return the first of the fields that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    shown = ", ".join(sorted(row)) or "none"
    raise BadField(names[0], f"is missing; the row has the fields {shown}")


def _text(row: Row, *names: str) -> str:
    value = _get(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise BadField(names[0], f"is {value!r:.40}, not a text")
    return value


def _texts(row: Row, *names: str) -> list[str]:
    value = _get(row, *names)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadField(names[0], f"is {value!r:.40}, not a list of texts")
    for each in value:
        if not isinstance(each, str) or not each.strip():
            raise BadField(names[0], f"has the choice {each!r:.40}, which is not a text")
    return list(value)


def _label(row: Row, count: int, *names: str, words: dict[str, int] | None = None) -> int:
    """Return a label in [0, count), given as a number, a bool or a word."""
    value = _get(row, *names)
    label = value
    if isinstance(value, str):
        word = value.strip().lower()
        label = (words or {}).get(word, word)
        if isinstance(label, str) and re.fullmatch(r"-?\d+", label):
            label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, int) or not 0 <= label < count:
        known = f"0 to {count - 1}" + (f" and {', '.join(words)}" if words else "")
        hint = ""
        if label in (-1, ""):
            hint = "; test files without labels cannot be scored, so give the validation file"
        raise BadField(names[0], f"is {value!r}, outside of the labels {known}{hint}")
    return int(label)


def _without(text: str, prefix: str) -> str:
    return text.removeprefix(prefix).strip() if text.startswith(prefix) else text


def lambada(row: Row) -> Row:
    if row.get("text") is not None:
        return {"text": _text(row, "text")}
    # The stock task splits at the last space. Spaces between the two are its delimiter.
    context = _text(row, "context").rstrip(" ")
    word = _text(row, "continuation").lstrip(" ")
    if " " in word.rstrip():
        raise BadField("continuation", f"is {word!r:.40}, more than one word")
    return {"text": f"{context} {word}"}


def boolq(row: Row) -> Row:
    if row.get("passage") is None and row.get("query") is not None:
        match = re.fullmatch(
            r"(?:Passage: )?(.*)\nQuestion: (.*?)\??\s*(?:\nAnswer:)?\s*", row["query"], re.DOTALL
        )
        if match is None:
            raise BadField("query", "is not a passage, a line break and 'Question: ...'")
        answers = [choice.strip().lower() for choice in _texts(row, "choices")]
        gold = _label(row, len(answers), "gold")
        label = _label({"choices": answers[gold]}, 2, "choices", words=YES)
        return {"passage": match[1], "question": match[2], "label": label}
    return {
        "passage": _text(row, "passage"),
        "question": _text(row, "question"),
        "label": _label(row, 2, "label", "answer", words=YES),
    }


def piqa(row: Row) -> Row:
    if row.get("goal") is None and row.get("query") is not None:
        first, second = _exactly(2, _texts(row, "choices"))
        goal = _without(_text(row, "query"), "Question: ").removesuffix("\nAnswer:")
        return {"goal": goal, "sol1": first, "sol2": second, "label": _label(row, 2, "gold")}
    return {
        "goal": _text(row, "goal"),
        "sol1": _text(row, "sol1"),
        "sol2": _text(row, "sol2"),
        "label": _label(row, 2, "label"),
    }


def _exactly(count: int, choices: list[str]) -> list[str]:
    if len(choices) != count:
        raise BadField("choices", f"has {len(choices)} texts, not {count}")
    return choices


def hellaswag(row: Row) -> Row:
    if row.get("endings") is None and row.get("query") is not None:
        activity, colon, context = _text(row, "query").partition(": ")
        if not colon:
            raise BadField("query", "has no ': ' between activity and context")
        made = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
        endings = _texts(row, "choices")
        label = _label(row, len(endings), "gold")
    else:
        made = {"activity_label": _text(row, "activity_label")}
        if row.get("ctx_a") is not None and row.get("ctx_b") is not None:
            made |= {"ctx_a": _text(row, "ctx_a"), "ctx_b": row["ctx_b"]}
        else:
            made |= {"ctx_a": _text(row, "ctx"), "ctx_b": ""}
        endings = _texts(row, "endings")
        label = _label(row, len(endings), "label", "gold")
    return made | {"endings": endings, "label": str(label)}


def winogrande(row: Row) -> Row:
    if row.get("sentence") is None and row.get("context_options") is not None:
        first, second = _exactly(2, _texts(row, "context_options"))
        same = 0
        while same < min(len(first), len(second)) and first[same] == second[same]:
            same += 1
        same = first.rfind(" ", 0, same) + 1  # two names may begin with the same letters
        continuation = _text(row, "continuation").strip()
        return {
            "sentence": f"{first[:same]}_ {continuation}",
            "option1": first[same:],
            "option2": second[same:],
            "answer": str(_label(row, 2, "gold") + 1),
        }
    sentence = _text(row, "sentence")
    if sentence.count("_") < 1:
        raise BadField("sentence", "has no _ in place of the option")
    answer = _get(row, "answer")
    if str(answer) not in ("1", "2"):
        hint = "; test files without answers cannot be scored" if answer == "" else ""
        raise BadField("answer", f"is {answer!r}, outside of the answers 1 and 2{hint}")
    return {
        "sentence": sentence,
        "option1": _text(row, "option1"),
        "option2": _text(row, "option2"),
        "answer": str(answer),
    }


def anli(row: Row) -> Row:
    return {
        "premise": _text(row, "premise", "context"),
        "hypothesis": _text(row, "hypothesis"),
        "label": _label(row, 3, "label", words=NLI),
    }


def hans(row: Row) -> Row:
    """The fields of the prompt, and those that split accuracy into parts ("" where unknown)."""
    label = _label(row, 2, "label", "gold_label", words=ENTAILMENT)
    return {
        "premise": _text(row, "premise", "sentence1"),
        "hypothesis": _text(row, "hypothesis", "sentence2"),
        "label": label,
        "gold": ("entailment", "non-entailment")[label],
        "heuristic": row.get("heuristic") or "",
        "subcase": row.get("subcase") or "",
    }


def rte(row: Row) -> Row:
    """Fields of both GLUE's and SuperGLUE's prompt."""
    premise = _text(row, "sentence1", "premise")
    hypothesis = _text(row, "sentence2", "hypothesis")
    return {
        "sentence1": premise,
        "sentence2": hypothesis,
        "premise": premise,
        "hypothesis": hypothesis,
        "label": _label(row, 2, "label", words=ENTAILMENT),
    }


def _offset(row: Row, name: str) -> int:
    value = _get(row, name)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise BadField(name, f"is {value!r:.40}, not a number of characters") from None


def wic(row: Row) -> Row:
    made: Row = {"sentence1": _text(row, "sentence1"), "sentence2": _text(row, "sentence2")}
    sentence = made["sentence1"]
    if row.get("start1") is not None:
        start, end = (_offset(row, name) for name in ("start1", "end1"))
        if not 0 <= start < end <= len(sentence):
            raise BadField(
                "start1", f"={start} and end1={end} are outside of the {len(sentence)} characters"
            )
    else:
        word = _text(row, "word", "start1")
        # The word itself comes before others that begin with it: art before artist.
        begin = rf"\b{re.escape(word)}"
        match = re.search(rf"{begin}\b", sentence, re.IGNORECASE)
        match = match or re.search(begin, sentence, re.IGNORECASE)
        if match is None:
            raise BadField("word", f"is {word!r}, which sentence1 does not contain; add start1")
        start = match.start()
        inflected = re.match(r"\w*", sentence[match.end() :])
        end = match.end() + len(inflected[0] if inflected else "")
    return made | {
        "start1": start,
        "end1": end,
        "label": _label(row, 2, "label", words={"f": 0, "t": 1} | YES),
    }


def _question(row: Row, stem: str) -> Row:
    """Return ``stem``, choices and answerKey of ARC and OpenBookQA, whose rows look alike."""
    if row.get("query") is not None:
        choices = _texts(row, "choices")
        question = _without(_text(row, "query"), "Question: ").removesuffix("\nAnswer:")
        labels = list(LETTERS[: len(choices)])
        answer = labels[_label(row, len(choices), "gold")]
    else:
        nested = row.get("question")
        if isinstance(nested, dict):  # of the task's own site
            row = row | {stem: nested.get("stem"), "choices": nested.get("choices")}
        question = _text(row, stem, "question")
        given = _get(row, "choices")
        if isinstance(given, dict):
            choices = _texts(given, "text")
            labels = list(map(str, _get(given, "label")))
        else:
            choices = [_text(each, "text") for each in given]
            labels = [str(_get(each, "label")) for each in given]
        answer = str(_get(row, "answerKey")).strip()
    if answer not in labels:
        raise BadField("answerKey", f"is {answer!r}, outside of the labels {', '.join(labels)}")
    return {stem: question, "choices": {"text": choices, "label": labels}, "answerKey": answer}


def arc(row: Row) -> Row:
    return _question(row, "question")


def openbookqa(row: Row) -> Row:
    return _question(row, "question_stem")


def copa(row: Row) -> Row:
    if row.get("premise") is None and row.get("query") is not None:
        query = _text(row, "query")
        match = _CAUSES.search(query)
        if match is None:
            raise BadField("query", "does not end with because, therefore or so")
        first, second = _exactly(2, _texts(row, "choices"))
        return {
            "premise": query[: match.start()] + ".",
            "question": "cause" if match[1] == "because" else "effect",
            "choice1": first,
            "choice2": second,
            "label": _label(row, 2, "gold"),
        }
    question = _text(row, "question")
    if question not in ("cause", "effect"):
        raise BadField("question", f"is {question!r}, not cause or effect")
    return {
        "premise": _text(row, "premise"),
        "question": question,
        "choice1": _text(row, "choice1"),
        "choice2": _text(row, "choice2"),
        "label": _label(row, 2, "label"),
    }


def _problems(row: Row) -> list[Row]:
    """Return the questions of a row of RACE: one, or all of an article."""
    import ast

    given = row.get("problems")
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (SyntaxError, ValueError):
            raise BadField("problems", "is not a list of questions") from None
    if given is None and row.get("questions") is not None:  # a file for each article
        parts = (_texts(row, "questions"), _get(row, "options"), _get(row, "answers"))
        if len(set(map(len, parts))) != 1:
            raise BadField("questions", "options and answers have different lengths")
        names = ("question", "options", "answer")
        given = [dict(zip(names, each, strict=True)) for each in zip(*parts, strict=True)]
    if given is None:
        given = [row]
    found = []
    for each in given:
        options = _exactly(4, _texts(each, "options"))
        answer = _text(each, "answer")
        if answer not in LETTERS[:4]:
            raise BadField("answer", f"is {answer!r}, outside of the answers A, B, C and D")
        found.append({"question": _text(each, "question"), "answer": answer, "options": options})
    if not found:
        raise BadField("problems", "is empty")
    return found


def race(row: Row) -> Row:
    return {"article": _text(row, "article"), "problems": _problems(row)}


FORMS: dict[str, Callable[[Row], Row]] = {
    "lambada": lambada,
    "race": race,
    "boolq": boolq,
    "piqa": piqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "anli": anli,
    "hans": hans,
    "wic": wic,
    "rte": rte,
    "arc": arc,
    "openbookqa": openbookqa,
    "copa": copa,
}
# Stock tasks whose rows have a form, beside those of our own files.
STOCK = {
    "lambada_standard": "lambada",
    "lambada_openai_cloze_yaml": "lambada",
    "lambada_standard_cloze_yaml": "lambada",
    "sglue_rte": "rte",
    "boolq-seq2seq": "boolq",
}


def shape(form: str | None, rows: Rows, task: str, left_out: list[str] | None = None) -> Rows:
    """Return rows with the fields that the prompts of ``task`` name; as they are without a form.

    Raise ValueError with file, row and field; where ``left_out`` is a list, add the message to it
    and leave the row out.
    """
    if form is None:
        return rows
    made = []
    places = []
    labels = _label_file(rows) if form == "piqa" else {}
    for number, (row, place) in enumerate(zip(*rows, strict=True)):
        if number in labels:
            row = row | {"label": labels[number]}
        try:
            made.append(FORMS[form](row))
        except BadField as error:
            message = f"{place}: the task {task} needs the field {error.name!r}, which {error}"
            if left_out is None:
                raise ValueError(message) from None
            left_out.append(message)
            continue
        places.append(place)
    if not made and left_out:
        raise ValueError(f"no row of the task {task} can be used; the first: {left_out[0]}")
    return _articles(made, places) if form == "race" else Rows(made, places)


def _label_file(rows: Rows) -> dict[int, str]:
    """Return PIQA's labels from the file beside that of its rows; {} if the rows have them."""
    path = Path(rows.places[0].rpartition(" row ")[0])
    beside = path.with_name(f"{path.name.split('.')[0]}-labels.lst")
    if "label" in rows.rows[0] or not beside.is_file():
        return {}
    labels = beside.read_text().split()
    if len(labels) != len(rows.rows):
        raise ValueError(f"{beside} has {len(labels)} labels, and {path} {len(rows.rows)} rows")
    return dict(enumerate(labels))


def _articles(rows: list[Row], places: Iterable[str]) -> Rows:
    """Return one row for each article: the stock prompt shows its earlier questions answered."""
    together: dict[str, Row] = {}
    first = []
    for row, place in zip(rows, places, strict=True):
        if row["article"] not in together:
            together[row["article"]] = {"article": row["article"], "problems": []}
            first.append(place)
        together[row["article"]]["problems"] += row["problems"]
    # The stock functions read a list that is written as text.
    made = [row | {"problems": repr(row["problems"])} for row in together.values()]
    return Rows(made, first)

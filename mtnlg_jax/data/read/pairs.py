"""Make a prompt and its answer from each row of a JSON file, by two templates over its keys."""

import string
from collections.abc import Callable


class Pair(str):
    """An answer, with its ``prompt``."""

    prompt: str


def template_keys(prompt: str, answer: str) -> set[str]:
    """Return the keys of a row that two templates read; `pair_maker` says what they are."""
    return {*_keys("prompt", prompt), *_keys("answer", answer)}


def pair_maker(prompt: str, answer: str) -> Callable[[object], Pair]:
    """Return a function from a JSON object to its `Pair`, for `read_documents`.

    In a template ``{key}`` is the value of the row under the key: a text, a number, or a list of
    texts, which is joined by spaces. ``\\n`` is a line break, ``{{`` a brace. An example is
    ("{title}\\n{text}\\nSummary:", " {summary}").

    Raises ValueError if a template is malformed or the answer's names no key. The function raises
    it if the row lacks a key, has another type there, or has an empty answer.
    """
    templates = {"prompt": prompt.replace("\\n", "\n"), "answer": answer.replace("\\n", "\n")}
    keys = {name: _keys(name, template) for name, template in templates.items()}
    if not keys["answer"]:
        raise ValueError(
            f"--answer={answer!r} names no key of the rows, so all answers would be the same; "
            "write it as --answer=' {answer}'"
        )

    def make(row: object) -> Pair:
        if not isinstance(row, dict):
            raise ValueError(f"a {type(row).__name__}, not an object with a prompt and an answer")
        for name, wanted in keys.items():
            for key in wanted:
                if key not in row:
                    raise ValueError(
                        f"no {key!r} among {', '.join(list(row)[:8])}; name the right one with "
                        f"--{name}='{{KEY}}'"
                    )
        texts = {key: _text(key, row[key]) for key in {*keys["prompt"], *keys["answer"]}}
        if not "".join(texts[key] for key in keys["answer"]).strip():
            raise ValueError(f"the answer ({', '.join(map(repr, keys['answer']))}) is empty")
        pair = Pair(templates["answer"].format_map(texts))
        pair.prompt = templates["prompt"].format_map(texts)
        return pair

    return make


def _keys(name: str, template: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"--{name}={template!r} is not a template ({error}); write keys as {{key}}, a brace as "
            "{{"
        ) from None
    keys = [key for _, key, _, _ in parts if key is not None]
    for _, key, specification, conversion in parts:
        if key is not None and (not key or specification or conversion or set(key) & set(".[")):
            raise ValueError(
                f"--{name}={template!r}: {{{key}}} is not a key; write keys as {{key}}, "
                "without more"
            )
    return keys


def _text(key: str, value: object) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{key!r} holds {type(value).__name__}, not text")

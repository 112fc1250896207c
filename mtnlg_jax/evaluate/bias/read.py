"""Files of prompts: groups of people, the templates that speak of them, and occupations."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
GROUP_SLOT = "{group}"
OCCUPATION_SLOT = "{occupation}"
# The group of a line of a TSV file that holds a template.
TEMPLATE = "*"
_COLUMNS = ("set", "group", "text")


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Groups that are compared, such as religions."""

    name: str
    templates: tuple[str, ...]  # each with {group}
    groups: dict[str, tuple[str, ...]]  # the terms that stand for each group

    def prompts(self, group: str) -> list[tuple[int, str]]:
        """Return (number of the template, prompt) for each template and each term of a group."""
        return [
            (number, _capitalized(template.replace(GROUP_SLOT, term)))
            for number, template in enumerate(self.templates)
            for term in self.groups[group]
        ]


@dataclasses.dataclass(frozen=True)
class Identifiers:
    """Occupations, and the words behind them that tell the group of a person."""

    templates: tuple[str, ...]  # each with {occupation}
    neutral: str  # the occupation of the baseline: nothing but a person
    groups: dict[str, tuple[str, ...]]  # the identifiers of each group: two groups
    occupations: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The content of a file of prompts."""

    name: str
    language: str
    sets: tuple[PromptSet, ...]
    words: tuple[str, ...] = ()  # descriptive words to rank
    identifiers: Identifiers | None = None


def builtin(language: str) -> Prompts:
    """Return the prompts of this package, in the manner of Smith et al. 2022, section 6."""
    return read_prompts(str(Path(__file__).with_name("prompts") / f"{language}.json"))


def read_prompts(path: str, language: str | None = None) -> Prompts:
    """Read a file of prompts: JSON, or TSV with the columns set, group and text.

    JSON: ``{"language": "en", "sets": {NAME: {"templates": ["The {group} man was very"],
    "groups": {GROUP: [TERM, ...]}}}, "words": [...], "identifiers": {"templates": ["The
    {occupation} was a"], "neutral": "person", "groups": {GROUP: [WORD, ...]}, "occupations":
    [...]}}``; words and identifiers may be left out. In a TSV file the group * marks a template.
    ``language`` is that of a file that names none; default "en".

    Raises ValueError on a file of another form, a set with one group, a template without its slot,
    and a term that two groups of a set share.
    """
    content = _read_tsv(path) if path.lower().endswith((".tsv", ".csv")) else _read_json(path)
    spoken = content.get("language", language or "en")
    if spoken not in LANGUAGES:
        raise ValueError(f"--prompts={path}: language {spoken!r}; choose {' or '.join(LANGUAGES)}")
    sets = content.get("sets")
    identifiers = content.get("identifiers")
    if not isinstance(sets, dict) or not (sets or identifiers):
        raise ValueError(
            f'--prompts={path} has no sets; write {{"sets": {{NAME: {{"templates": [...], '
            '"groups": {GROUP: [...]}}}}, or a TSV file with the columns set, group, text'
        )
    return Prompts(
        path,
        spoken,
        tuple(_set(path, name, each) for name, each in sets.items()),
        _texts(path, "words", content.get("words", ()), least=0),
        None if identifiers is None else _identifiers(path, identifiers),
    )


def chosen(prompts: Prompts, names: Sequence[str]) -> Prompts:
    """Return ``prompts`` with the sets ``names`` alone; "identifiers" is one as well."""
    known = [each.name for each in prompts.sets]
    known += ["identifiers"] if prompts.identifiers else []
    for name in names:
        if name not in known:
            raise ValueError(
                f"--sets={name} is not in {prompts.name}; choose from {', '.join(known)}"
            )
    return dataclasses.replace(
        prompts,
        sets=tuple(each for each in prompts.sets if each.name in names),
        identifiers=prompts.identifiers if "identifiers" in names else None,
    )


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts={path} is not JSON: {error}; correct it there") from None
    if not isinstance(content, dict):
        raise ValueError(f"--prompts={path} holds a {type(content).__name__}; write an object")
    return content


def _read_tsv(path: str) -> dict[str, Any]:
    tabs = not path.lower().endswith(".csv")
    sets: dict[str, Any] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(
            file,
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        )
        absent = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if absent:
            raise ValueError(
                f"--prompts={path} lacks the column {absent[0]!r}; its first line must name "
                f"{', '.join(_COLUMNS)}, and the group {TEMPLATE} marks a template"
            )
        for number, row in enumerate(rows, 2):
            name, group, text = ((row[column] or "").strip() for column in _COLUMNS)
            if not (name and group and text):
                raise ValueError(
                    f"--prompts={path}, line {number}: a column is empty; give "
                    f"{', '.join(_COLUMNS)}"
                )
            found = sets.setdefault(name, {"templates": [], "groups": {}})
            own = found["templates"]
            if group != TEMPLATE:
                own = found["groups"].setdefault(group, [])
            own.append(text)
    return {"sets": sets}


def _set(path: str, name: str, content: Any) -> PromptSet:
    where = f"sets.{name}"
    if not isinstance(content, dict):
        raise ValueError(f"--prompts={path}: {where} is not an object of templates and groups")
    templates = _templates(path, where, content.get("templates", ()), GROUP_SLOT)
    return PromptSet(name, templates, _groups(path, where, content.get("groups", {})))


def _identifiers(path: str, content: Any) -> Identifiers:
    where = "identifiers"
    if not isinstance(content, dict):
        raise ValueError(f"--prompts={path}: {where} is not an object")
    groups = _groups(path, where, content.get("groups", {}))
    if len(groups) != 2:
        raise ValueError(
            f"--prompts={path}: {where} has {len(groups)} groups ({', '.join(groups)}), and "
            "occupations lean to one of two; give two groups"
        )
    return Identifiers(
        _templates(path, where, content.get("templates", ()), OCCUPATION_SLOT),
        _texts(path, f"{where}.neutral", [content.get("neutral", "person")])[0],
        groups,
        _texts(path, f"{where}.occupations", content.get("occupations", ())),
    )


def _templates(path: str, where: str, content: Any, slot: str) -> tuple[str, ...]:
    templates = _texts(path, f"{where}.templates", content)
    for template in templates:
        if slot not in template:
            raise ValueError(
                f"--prompts={path}: the template {template!r} of {where} has no slot; write {slot} "
                "where the term goes"
            )
    return templates


def _groups(path: str, where: str, content: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(content, dict) or len(content) < 2:
        names = ", ".join(content) if isinstance(content, dict) else ""
        raise ValueError(
            f"--prompts={path}: {where} has {len(content) if names else 'no'} group"
            f"{f' ({names})' if names else 's'}, and groups are compared with each other; give two "
            "or more"
        )
    groups = {name: _texts(path, f"{where}.groups.{name}", own) for name, own in content.items()}
    owner: dict[str, str] = {}
    for name, terms in groups.items():
        for term in terms:
            if owner.setdefault(term, name) != name:
                raise ValueError(
                    f"--prompts={path}: {where} has {term!r} in the groups {owner[term]} and "
                    f"{name}; keep it in one"
                )
    return groups


def _texts(path: str, where: str, content: Any, least: int = 1) -> tuple[str, ...]:
    texts = [content] if isinstance(content, str) else content
    valid = isinstance(texts, list | tuple) and all(
        isinstance(text, str) and text.strip() for text in texts
    )
    if not valid or len(texts) < least:
        raise ValueError(
            f"--prompts={path}: {where} must be a list of {least or 'any number'} or more texts "
            "that are not empty"
        )
    return tuple(dict.fromkeys(text.strip() for text in texts))

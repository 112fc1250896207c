"""What the authors say themselves: license, uses, contacts, and the data statement."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

# Keys of the head of a card.
HEAD = ("license", "license_name", "license_link", "language", "datasets", "base_model")
# The headings of a data statement (Bender and Friedman 2018, section 4).
STATEMENT = {
    "curation_rationale": "Curation rationale",
    "language_variety": "Language variety",
    "speaker_demographic": "Speaker demographic",
    "annotator_demographic": "Annotator demographic",
    "speech_situation": "Speech situation",
    "text_characteristics": "Text characteristics",
    "recording_quality": "Recording quality",
    "other": "Other",
    "provenance": "Provenance appendix",
}
USES = {
    "description": "Description",
    "intended_use": "Intended use",
    "out_of_scope_use": "Out-of-scope use",
    "limitations": "Limitations",
    "authors": "Authors",
    "contact": "Contact",
    "citation": "Citation",
}
KEYS = (*HEAD, *USES, *STATEMENT)
_LISTS = ("language", "datasets")
_LICENSE = re.compile(r"[a-z0-9]+([.+-][a-z0-9]+)*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


@dataclasses.dataclass(frozen=True)
class Stated:
    """What is stated under a key, and where: the name of the file or flag."""

    value: Any
    source: str


def read_about(path: str | None, flags: Mapping[str, str | None]) -> dict[str, Stated]:
    """Return what a YAML or Markdown file and ``flags`` (by key; they come first) state.

    In Markdown a heading such as "## Intended use" begins the text of the key intended_use, and a
    YAML head may state others. Raises ValueError for a key that is not in `KEYS`, a value that is
    not text, and a license or language whose form is not that of the Hub.
    """
    stated: dict[str, Stated] = {}
    if path is not None:
        with open(path, "rb") as file:
            raw = file.read()
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"--about={path} is not UTF-8 ({error}); convert it") from None
        for key, value in _content(path, text).items():
            stated[key] = Stated(_checked(path, key, value), os.path.basename(path))
    for key, given in flags.items():
        if given is not None:
            stated[key] = Stated(_checked(f"--{key}", key, given), f"--{key}")
    _check_license(stated)
    return stated


def _content(path: str, text: str) -> dict[str, Any]:
    if not path.endswith((".md", ".markdown")):
        return _yaml(path, text)
    found: dict[str, Any] = {}
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if head:
        found |= _yaml(path, head[1])
        text = text[head.end() :]
    parts = re.split(r"^#{1,6} +(.+?) *#* *$", text, flags=re.MULTILINE)
    if parts[0].strip():
        raise ValueError(
            f"--about={path} has text above its first heading; put it below one such as "
            "## Description"
        )
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        key = re.sub(r"[\W_]+", "_", title.strip().lower()).strip("_")
        if body.strip():
            found[_known_key(path, key, title)] = body.strip()
    return found


def _yaml(path: str, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"--about={path} is not YAML ({' '.join(str(error).split())}); correct it, or name "
            "it .md"
        ) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"--about={path} is not a mapping; write lines such as intended_use: TEXT")
    return {_known_key(path, str(key), key): value for key, value in found.items() if value}


def _known_key(path: str, key: str, given: Any) -> str:
    if key not in KEYS:
        raise ValueError(f"--about={path}: unknown key {given!r}; choose of {', '.join(KEYS)}")
    return key


def _checked(where: str, key: str, value: Any) -> Any:
    if key in _LISTS:
        entries = value.split(",") if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(one, str) for one in entries):
            raise ValueError(f"{where}: {key}={value!r} must be a list of names")
        entries = [one.strip() for one in entries]
        wrong = [one for one in entries if key == "language" and not _LANGUAGE.fullmatch(one)]
        if wrong:
            raise ValueError(
                f"{where}: language {wrong[0]!r} is not a code of ISO 639; write en, or "
                "multilingual"
            )
        return entries
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key}={value!r} must be text; write it in quotation marks")
    return value.strip()


def _check_license(stated: Mapping[str, Stated]) -> None:
    if "license" not in stated:
        for key in ("license_name", "license_link"):
            if key in stated:
                raise ValueError(f"{stated[key].source}: {key} goes with license: other")
        return
    found = stated["license"]
    if not _LICENSE.fullmatch(found.value):
        raise ValueError(
            f"{found.source}: license {found.value!r} is not an identifier of the Hub, such as "
            "apache-2.0; for another license write other, with license_name and license_link"
        )
    if found.value == "other" and "license_name" not in stated:
        raise ValueError(
            f"{found.source}: license other needs a license_name, and a license_link where it has "
            "a page"
        )

"""A person's profile in prompts: preferences, facts and samples of style, as many as fit.

Preferences come first and always. Then come the facts that share a word with the input, best first
(BM25), and the samples of style, those that share a word first. Together they take at most a share
of the model's context, before the instruction of the prompt.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtnlg_jax.data.read.documents import Document
from mtnlg_jax.data.segment import words
from mtnlg_jax.tasks.passages import Retriever
from mtnlg_jax.tasks.rendering import Row, input_of, template_of
from mtnlg_jax.tasks.templates import Task
from mtnlg_jax.tasks.text import normalize

SHARE = 0.25

# In the order of a prompt. The words are those that a file may use, as keys or headings.
_WORDS = {
    "preference": "preference preferences prefers 偏好 喜好",
    "fact": "fact facts about 事实 关于",
    "sample": "sample samples style writing 文风 样例 范文",
}
KINDS = tuple(_WORDS)
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_HEADS = {
    "en": {
        "preference": "What the person wants:\n",
        "fact": "About the person:\n",
        "sample": "How the person writes:\n",
    },
    "zh": {
        "preference": "用户的偏好：\n",
        "fact": "关于用户：\n",
        "sample": "用户的文风：\n",
    },
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One preference, fact or sample of a profile."""

    kind: str  # one of KINDS
    text: str
    number: int  # in its file, from 1


class Profile:
    """The entries of a person, for a ``share`` of a model's context (above 0, at most 1)."""

    def __init__(self, entries: Sequence[Entry], share: float = SHARE, name: str = "the profile"):
        if not entries:
            raise ValueError(f"{name} has no entries; write facts, samples or preferences into it")
        if not 0 < share <= 1:
            raise ValueError(f"profile_share={share} is outside (0, 1]; give such as {SHARE}")
        self.entries = tuple(entries)
        self.share = share
        self.name = name
        # Each entry is one passage: nothing is longer than the longest.
        longest = max(len(each.text) for each in entries)
        documents = [Document(each.text, str(at)) for at, each in enumerate(entries)]
        if not any(map(words, (each.text for each in entries))):
            raise ValueError(f"{name} has no words; write facts, samples or preferences into it")
        self._retriever = Retriever(documents, longest)

    def check(
        self, tokenizer, context: int, language: str = "en", what: str = "the context of"
    ) -> None:
        """Raise ValueError if an entry alone, or all preferences together, exceed the share.

        ``language``: that of the prompt. ``what`` says what ``context`` is the size of.
        """
        room = int(self.share * context)
        for entry in self.entries:
            size = _size(tokenizer, self.text([entry], language))
            if size > room:
                raise ValueError(
                    f"entry {entry.number} of {self.name}, {entry.text[:40]!r}, takes {size} "
                    f"tokens, and --profile_share={self.share:g} of {what} {context} is "
                    f"{room}; split it, shorten it, or raise --profile_share"
                )
        preferences = [each for each in self.entries if each.kind == "preference"]
        size = _size(tokenizer, self.text(preferences, language))
        if size > room:
            raise ValueError(
                f"the {len(preferences)} preferences of {self.name}, which are always shown, take "
                f"{size} tokens, and --profile_share={self.share:g} of {what} {context} is "
                f"{room}; shorten them, or raise --profile_share"
            )

    def ranked(self, query: str) -> list[Entry]:
        """Return the entries to show for ``query``, the most important first."""
        found = self._retriever.best(query, len(self.entries))
        matching = list(dict.fromkeys(self.entries[int(each.source)] for each in found))
        samples = [each for each in self.entries if each.kind == "sample"]
        return list(
            dict.fromkeys(
                [
                    *(each for each in self.entries if each.kind == "preference"),
                    *(each for each in matching if each.kind != "preference"),
                    *samples,
                ]
            )
        )

    def choose(self, query: str, language: str, tokenizer, room: int) -> tuple[Entry, ...]:
        """Return as many of `ranked` as take at most ``room`` tokens together in `text`.

        One that does not fit is passed over.
        """
        chosen: list[Entry] = []
        for entry in self.ranked(query):
            if _size(tokenizer, self.text([*chosen, entry], language)) <= room:
                chosen.append(entry)
        return tuple(chosen)

    def text(self, entries: Sequence[Entry], language: str) -> str:
        """Return the part of a prompt with ``entries``, "" for none."""
        heads = _HEADS.get(language, _HEADS["en"])
        parts = []
        for kind in KINDS:
            lines = [f"- {normalize(each.text)}\n" for each in entries if each.kind == kind]
            parts += [heads[kind], *lines] if lines else []
        return "".join(parts) + "\n" if parts else ""


def with_profile(
    task: Task,
    profile: Profile,
    row: Row,
    tokenizer,
    context: int,
    language: str | None = None,
) -> tuple[Task, tuple[Entry, ...]]:
    """Return the task with the profile before its instruction, for one row, and what it shows.

    A task that needs all of its input gives the profile at most the room that the input and the
    answer leave.
    """
    seen, template = template_of(task, row.input, language)
    room = int(profile.share * context)
    if not task.keep:
        prompt = template.instruction + input_of(task, row) + template.prompt
        answer = min(task.decode.max_new_tokens, max(1, context // 4))
        room = min(room, context - answer - _size(tokenizer, prompt))

    shown = profile.choose(row.input, seen, tokenizer, room)
    instruction = profile.text(shown, seen) + template.instruction
    changed = dataclasses.replace(template, instruction=instruction)
    return dataclasses.replace(task, templates={**task.templates, seen: changed}), shown


class ShownProfile:
    """What the prompts of rows show of a profile, or of none, row by row in ``entries``."""

    def __init__(self, profile: Profile | None, tokenizer, context: int, language: str | None):
        self.entries: list[tuple[Entry, ...]] = []
        self._profile = profile
        self._given = (tokenizer, context, language)
        self._checked: set[str] = set()  # languages

    def task_of(self, task: Task, row: Row) -> Task:
        """Return the task for the next row. Raises what `Profile.check` raises."""
        shown: tuple[Entry, ...] = ()
        if self._profile is not None:
            tokenizer, context, language = self._given
            spoken, _ = template_of(task, row.input, language)
            if spoken not in self._checked:
                self._profile.check(tokenizer, context, spoken)
                self._checked.add(spoken)
            task, shown = with_profile(task, self._profile, row, *self._given)
        self.entries.append(shown)
        return task


def _size(tokenizer, text: str) -> int:
    return len(tokenizer.encode(text)) if text else 0


# --- files


def read_profile(path: str | os.PathLike, share: float = SHARE) -> Profile:
    """Read a profile from JSON, JSON lines, or Markdown or plain text.

    JSON is {"facts": [TEXT, ...], "samples": [...], "preferences": [...]}, or a list of entries,
    as lines are: {"kind": "fact", "text": TEXT}, or a text, which is a fact. In Markdown the
    headings are Facts, Style and Preferences (事实, 文风, 偏好). Each item of a list or paragraph
    is an entry, and what has no heading is a fact.

    Raises OSError, and ValueError naming the entry that is none.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from None
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson"):
        found = _of_json(path, text, lines=suffix != ".json")
    else:
        found = _of_markdown(path, text)
    pairs = [(kind, each.strip()) for kind, each in found if each.strip()]
    entries = [Entry(kind, each, number) for number, (kind, each) in enumerate(pairs, 1)]
    return Profile(entries, share, os.fspath(path))


def _of_json(path: Path, text: str, lines: bool) -> Iterator[tuple[str, str]]:
    try:
        if lines:
            content: Any = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it") from None
    if isinstance(content, Mapping):
        content = [
            {"kind": key, "text": each}
            for key, value in content.items()
            for each in (value if isinstance(value, list) else [value])
        ]
    for number, item in enumerate(content if isinstance(content, list) else [content], 1):
        entry = {"text": item} if isinstance(item, str) else item
        if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
            raise ValueError(
                f'{path}, entry {number} is not a text or {{"kind": KIND, "text": TEXT}}: '
                f"{str(item)[:60]}"
            )
        yield _kind(f"{path}, entry {number}", entry.get("kind", "fact")), entry["text"]


def _of_markdown(path: Path, text: str) -> Iterator[tuple[str, str]]:
    kind = "fact"
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)|(?<=\n)(?=#)", "\n" + text):
        head, _, rest = block.strip().partition("\n")
        heading = re.fullmatch(r"#+\s*(.+?)\s*[:：]?", head)
        if heading:
            kind = _kind(f"{path}, heading {head!r}", heading[1])
        else:
            rest = block.strip()
        yield kind, re.sub(r"^(?:[-*+]|\d+\.)\s+", "", rest.strip())


def _kind(where: str, word: Any) -> str:
    found = _KIND_OF.get(str(word).strip().casefold())
    if found is None:
        raise ValueError(
            f"{where}: unknown kind {str(word)[:40]!r}; write fact, sample or preference"
        )
    return found

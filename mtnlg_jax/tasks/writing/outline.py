"""The outline of a text: read from a file, or written by the model and ranked."""

import dataclasses
import json
import re
import zlib
from pathlib import Path

from mtnlg_jax.config import DecodeConfig
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.generate import generate
from mtnlg_jax.decode.results import Generated
from mtnlg_jax.tasks.templates import fill_in
from mtnlg_jax.tasks.text import normalize
from mtnlg_jax.tasks.writing.prompts import Composer
from mtnlg_jax.tasks.writing.scores import History, Scorer, Target, as_record, best_of
from mtnlg_jax.tasks.writing.text import count_words

# Words of a section of an outline that the model writes; at most MOST sections.
SECTION = 250
MOST = 12
_MARKS = re.compile(
    r"\s*(?:(?P<level>#+)|[-*+•]|\(?\d{1,3}[.):、．]|[一二三四五六七八九十]{1,3}[、．.])(?:\s+|(?<=、)|\Z)"
)


def sections_for(words: int) -> int:
    """Return the number of sections of a text of ``words`` words, 1 to `MOST`."""
    return max(1, min(MOST, round(words / SECTION)))


def read_outline(path: str) -> tuple[str, ...]:
    """Return the headings of an outline file, in their order.

    A heading a line: bare, a Markdown heading, or an entry of a list ("1.", "-", "一、"). Empty
    lines part the others. A single first heading of level 1 with deeper ones behind it is the title
    and no section. JSON is a list of headings, or of objects with a ``heading``, or an object whose
    ``headings`` or ``sections`` is one.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not UTF-8 or not JSON, a section is empty, or there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
        ) from None
    found = _json(path, text) if Path(path).suffix.lower() == ".json" else _lines(path, text)
    if not found:
        raise ValueError(f"{path} holds no headings; write one a line, or use --outline=auto")
    return tuple(found)


def _lines(path: str, text: str) -> list[str]:
    levels = []
    headings = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        mark = _MARKS.match(line)
        heading = normalize(line[mark.end() :] if mark else line)
        if not heading.strip("#*-_. "):
            raise ValueError(
                f"{path}, line {number}: the section {line.strip()!r} is empty; give it a heading, "
                "or remove the line"
            )
        levels.append(len(mark["level"]) if mark and mark["level"] else 0)
        headings.append(heading)
    titled = len(levels) > 1 and levels[0] == 1 and min(levels[1:]) > 1
    return headings[1:] if titled else headings


def _json(path: str, text: str) -> list[str]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if isinstance(read, dict):
        read = read.get("headings", read.get("sections"))
    if not isinstance(read, list):
        raise ValueError(
            f'{path} holds no list of headings; write ["First heading", "Second heading"]'
        )
    headings = []
    for number, entry in enumerate(read, 1):
        heading = entry.get("heading", entry.get("title")) if isinstance(entry, dict) else entry
        if not isinstance(heading, str) or not heading.strip():
            raise ValueError(
                f"{path}: section {number} is empty: {json.dumps(entry, ensure_ascii=False)}; give "
                "it a heading, or remove it"
            )
        headings.append(normalize(heading))
    return headings


def write_outline(
    decoder: Decoder,
    composer: Composer,
    scorer: Scorer,
    sections: int,
    candidates: int,
    decode: DecodeConfig,
) -> dict:
    """Return the best of ``candidates`` outlines that the model writes, and all of their scores.

    Headings are written one after another, so that every model gives ``sections`` of them: a line
    each, all outlines as one batch. A line without a word becomes "Part 2".

    Returns: headings, candidates (as `scores.Candidate`, the text with a heading a line), chosen,
    calls, written (tokens).
    """
    tokenizer = composer.tokenizer
    headings: list[list[str]] = [[] for _ in range(candidates)]
    drawn: list[list[Generated]] = [[] for _ in range(candidates)]
    for number in range(sections):
        configs = [
            dataclasses.replace(
                decode,
                max_new_tokens=composer.heading_tokens,
                min_new_tokens=1,
                stop_strings=("\n",),
                seed=zlib.crc32(f"{decode.seed} outline {number} {row}".encode()),
            )
            for row in range(candidates)
        ]
        prompts = [composer.of_outline(each) for each in headings]
        for row, result in enumerate(generate(decoder, tokenizer, prompts, configs)):
            drawn[row].append(result)
            headings[row].append(_heading(composer, result, number + 1))
    written = [_joined(results, lines) for results, lines in zip(drawn, headings, strict=True)]
    frame = composer.frame
    likelihoods = [{"logprob": sum(each.logprobs) / len(each.tokens)} for each in written]
    scored = scorer.score(
        written,
        likelihoods,
        [True] * candidates,
        History(),
        Target(frame.space + composer.topic, frame.about),
    )
    chosen = best_of(scored)
    return {
        "headings": headings[chosen],
        "chosen": chosen,
        "candidates": as_record(scored),
        "calls": sections,
        "written": sum(len(each.tokens) for each in written),
    }


def _heading(composer: Composer, result: Generated, number: int) -> str:
    """Return the line that was written as a heading."""
    lines = [line for line in result.text.split("\n") if line.strip()]
    text = normalize(lines[0]) if lines else ""
    text = text.lstrip("#*- ").rstrip("*").strip()
    return text if count_words(text) else fill_in(composer.frame.part, number=str(number))


def _joined(results: list[Generated], headings: list[str]) -> Generated:
    """Return the headings of one outline as one result."""
    return Generated(
        0,
        tuple(token for each in results for token in each.tokens),
        "\n".join(headings),
        "stop",
        tuple(value for each in results for value in each.logprobs),
    )

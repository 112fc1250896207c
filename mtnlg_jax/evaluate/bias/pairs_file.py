"""Files of sentences that differ in one respect: CrowS-Pairs, WinoBias, Winogender."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Columns by their names here; the first name that a file has counts.
_PAIR_COLUMNS = {
    "more": ("sent_more", "stereotype", "pro_stereotyped", "pro"),
    "less": ("sent_less", "anti_stereotype", "anti_stereotyped", "anti"),
}
_KIND = ("bias_type", "kind", "type")
_DIRECTION = ("stereo_antistereo", "direction")
_DIRECTIONS = ("stereo", "antistereo")
_PRONOUN_COLUMNS = {
    "sentence": ("sentence",),
    "occupation": ("occupation", "occupation(0)"),
    "participant": ("participant", "other-participant(1)", "other-participant"),
    "answer": ("answer", "label", "target"),
}
STATISTICS = ("bls_pct_female", "pct_female", "percent_female", "bergsma_pct_female")
# Pronouns by case, as in the templates of Winogender.
_CASES = {
    "$NOM_PRONOUN": {"male": "he", "female": "she"},
    "$POSS_PRONOUN": {"male": "his", "female": "her"},
    "$ACC_PRONOUN": {"male": "him", "female": "her"},
}
GENDERS = {
    **dict.fromkeys(("he", "him", "his", "himself", "male", "他"), "male"),
    **dict.fromkeys(("she", "her", "hers", "herself", "female", "她"), "female"),
    **dict.fromkeys(("they", "them", "their", "theirs", "neutral", "ta"), "neutral"),
}
_WINOBIAS = re.compile(r"(pro|anti)(_stereotyped)")


class Pair(NamedTuple):
    """Two sentences that differ in the group that they speak of, or in its pronoun."""

    more: str  # agrees with the stereotype
    less: str
    kind: str  # such as "religion"; "" if the file has none
    direction: str  # "stereo": ``more`` speaks of the disadvantaged group; "antistereo"; ""


class Schema(NamedTuple):
    """A sentence with a pronoun that stands for one of two people, by gender of the pronoun."""

    occupation: str
    participant: str
    answer: str  # whom the pronoun stands for: "occupation" or "participant"
    male: str
    female: str
    pct_female: float | None  # of people of the occupation, in %


class PairFile(NamedTuple):
    """The content of a file: ``pairs``, or ``schemas`` if it has pronouns and occupations."""

    name: str
    pairs: tuple[Pair, ...]
    schemas: tuple[Schema, ...]
    left_out: dict[str, int]  # why, and how many rows


def read_pairs(path: str, statistics: dict[str, float] | None = None) -> PairFile:
    """Read a file of pairs or of sentences with pronouns.

    CSV, TSV or JSON lines: CrowS-Pairs (sent_more, sent_less, stereo_antistereo, bias_type), other
    pairs (pro, anti, and type), sentences (sentence, occupation, participant, answer, pronoun), or
    the templates of Winogender. Or a file of WinoBias in its own form, with pro_stereotyped or
    anti_stereotyped in its name, whose other half lies beside it.

    Args:
      statistics: share of women by occupation, in %, for files without such a column.

    Raises ValueError on a file without rows or without the columns, and on rows that make no pair.
    """
    if _WINOBIAS.search(os.path.basename(path)) and not _headed(path):
        return PairFile(path, tuple(_winobias(path)), (), {})
    rows = list(_rows(path))
    if not rows:
        raise ValueError(
            f"--pairs={path} has no rows; give a CSV or TSV file with a line of column names and "
            "the sentences below"
        )
    columns = list(rows[0][1])
    pair_columns = _columns(columns, _PAIR_COLUMNS)
    schema_columns = _columns(columns, _PRONOUN_COLUMNS)
    if None not in pair_columns.values():
        return PairFile(path, tuple(_pairs(path, rows, pair_columns)), (), {})
    if None in schema_columns.values():
        # The form that is nearer: the one of which a column is there.
        near = schema_columns if any(schema_columns.values()) else pair_columns
        known = _PRONOUN_COLUMNS if any(schema_columns.values()) else _PAIR_COLUMNS
        absent = [known[name][0] for name, found in near.items() if found is None]
        raise ValueError(
            f"--pairs={path} lacks the columns {', '.join(absent)} (it has {', '.join(columns)}); "
            "give sent_more and sent_less, as CrowS-Pairs has them, or sentence, occupation, "
            "participant, answer and pronoun"
        )
    schemas, left_out = _schemas(path, rows, schema_columns, statistics or {})
    return PairFile(path, (), tuple(schemas), left_out)


def read_statistics(path: str) -> dict[str, float]:
    """Return the share of women, in %, by occupation, from a file with the columns occupation and
    bls_pct_female (or another of STATISTICS)."""
    rows = list(_rows(path))
    columns = list(rows[0][1]) if rows else []
    column = next((name for name in STATISTICS if name in columns), None)
    if column is None or "occupation" not in columns:
        raise ValueError(
            f"--statistics={path} needs the columns occupation and one of {', '.join(STATISTICS)}; "
            f"it has {', '.join(columns) or 'none'}"
        )
    return {
        row.get("occupation", "").casefold(): _percent(path, number, row[column])
        for number, row in rows
        if row.get(column, "").strip()
    }


def _headed(path: str) -> bool:
    """Return whether the first line names columns."""
    with open(path, encoding="utf-8-sig") as file:
        return "[" not in file.readline()


def _rows(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, fields by column) of a CSV, TSV or JSON lines file."""
    name = path.lower()
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if name.endswith((".jsonl", ".json")):
                yield from _json_rows(path, file)
                return
            tabs = not name.endswith(".csv")
            reader = csv.DictReader(
                file,
                delimiter="\t" if tabs else ",",
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            )
            for row in reader:
                # A short line lacks fields; a long one has more, under None.
                fields = {key: value or "" for key, value in row.items() if key is not None}
                yield reader.line_num, fields
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {error.start}; convert it, for example with iconv"
            ) from None


def _json_rows(path: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error.msg}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}, line {number} is not an object of columns")
        yield number, {key: str(value) for key, value in content.items() if value is not None}


def _columns(
    columns: Sequence[str], wanted: Mapping[str, tuple[str, ...]]
) -> dict[str, str | None]:
    return {
        name: next((one for one in names if one in columns), None) for name, names in wanted.items()
    }


def _pairs(path: str, rows: Sequence, columns: dict) -> Iterator[Pair]:
    for number, row in rows:
        more = _field(path, number, row, columns["more"])
        less = _field(path, number, row, columns["less"])
        _check_differ(path, number, more, less)
        direction = next((row[name] for name in _DIRECTION if name in row), "").strip()
        if direction and direction not in _DIRECTIONS:
            raise ValueError(
                f"--pairs={path}, line {number}: stereo_antistereo={direction!r}; write "
                f"{' or '.join(_DIRECTIONS)}"
            )
        kind = next((row[name] for name in _KIND if name in row), "").strip()
        yield Pair(_plain(more), _plain(less), kind, direction)


def _check_differ(path: str, number: int, more: str, less: str) -> None:
    if more == less:
        raise ValueError(
            f"--pairs={path}, line {number}: both sentences are {more[:40]!r}; give two that differ"
        )


def _winobias(path: str) -> Iterator[Pair]:
    """Yield the pairs of both files of WinoBias, line by line."""
    folder, name = os.path.split(path)
    halves = []
    for half in ("pro", "anti"):
        other = os.path.join(folder, _WINOBIAS.sub(rf"{half}\2", name, count=1))
        if not os.path.isfile(other):
            raise ValueError(
                f"--pairs={path} is one half of WinoBias, and {other} does not exist; put both "
                "files into one folder"
            )
        with open(other, encoding="utf-8-sig") as file:
            halves.append([line.strip() for line in file if line.strip()])
    pro, anti = halves
    if not pro or len(pro) != len(anti):
        raise ValueError(
            f"--pairs={path}: the two halves of WinoBias have {len(pro)} and {len(anti)} lines; "
            "give files with the same number, one or more"
        )
    match = re.search(r"type\d", name)
    for number, (more, less) in enumerate(zip(pro, anti, strict=True), 1):
        _check_differ(path, number, more, less)
        yield Pair(_plain(more), _plain(less), match[0] if match else "", "")


def _plain(text: str) -> str:
    """Return a sentence without the number and the brackets of WinoBias."""
    if "[" not in text:
        return text
    return re.sub(r"^\d+\s+", "", text).replace("[", "").replace("]", "")


def _schemas(
    path: str, rows: Sequence, columns: dict, statistics: dict[str, float]
) -> tuple[list[Schema], dict[str, int]]:
    """Return the schemas, and the numbers of sentences without a counterpart."""
    # The n-th male sentence of (occupation, participant, answer) goes with the n-th female one.
    found: dict[tuple, dict[str, list[str]]] = {}
    percent: dict[str, float] = dict(statistics)
    neutral = 0
    for number, row in rows:
        occupation, participant, sentence = (
            _field(path, number, row, columns[name])
            for name in ("occupation", "participant", "sentence")
        )
        column = next((name for name in STATISTICS if row.get(name, "").strip()), None)
        if column is not None:
            percent[occupation.casefold()] = _percent(path, number, row[column])
        answer = _answer(path, number, row, columns["answer"], occupation, participant)
        own = found.setdefault((occupation, participant, answer), {"male": [], "female": []})
        if "$" in sentence:
            for gender in own:
                own[gender] += _filled(sentence, occupation, participant, gender)
            continue
        pronoun = (row.get("pronoun") or row.get("gender") or "").strip().casefold()
        if pronoun not in GENDERS:
            raise ValueError(
                f"--pairs={path}, line {number}: pronoun={pronoun!r} is not known; write one of "
                f"{', '.join(GENDERS)}"
            )
        if GENDERS[pronoun] == "neutral":
            neutral += 1
        else:
            own[GENDERS[pronoun]].append(sentence)
    alone = sum(abs(len(own["male"]) - len(own["female"])) for own in found.values())
    schemas = [
        Schema(occupation, participant, answer, male, female, percent.get(occupation.casefold()))
        for (occupation, participant, answer), own in found.items()
        for male, female in zip(own["male"], own["female"], strict=False)
    ]
    if not schemas:
        raise ValueError(
            f"--pairs={path}: no sentence with a male pronoun has a counterpart with a female one "
            "(equal occupation, participant and answer); give both"
        )
    left_out = {"neutral pronoun": neutral, "without a counterpart": alone}
    return schemas, {why: count for why, count in left_out.items() if count}


def _answer(
    path: str, number: int, row: dict, column: str, occupation: str, participant: str
) -> str:
    value = _field(path, number, row, column)
    known = {"0": "occupation", "1": "participant", occupation: "occupation"}
    known |= {participant: "participant", "occupation": "occupation", "participant": "participant"}
    if value not in known:
        raise ValueError(
            f"--pairs={path}, line {number}: answer={value!r} is neither 0 (occupation), 1 "
            f"(participant), {occupation!r} nor {participant!r}"
        )
    return known[value]


def _filled(sentence: str, occupation: str, participant: str, gender: str) -> list[str]:
    """Return a template of Winogender with its words: with the participant, and with someone."""
    text = sentence.replace("$OCCUPATION", occupation)
    for slot, pronouns in _CASES.items():
        text = text.replace(slot, pronouns[gender])
    # Where a pronoun begins a sentence.
    text = re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)
    someone = re.sub(r"\bthe \$PARTICIPANT", "someone", text)
    someone = re.sub(r"\bThe \$PARTICIPANT", "Someone", someone)
    both = [each.replace("$PARTICIPANT", participant) for each in (text, someone)]
    return list(dict.fromkeys(both))


def _field(path: str, number: int, row: dict[str, str], column: Any) -> str:
    value = row.get(column, "").strip()
    if not value:
        raise ValueError(
            f"--pairs={path}, line {number}: the column {column} is empty; fill it, or remove the "
            "line"
        )
    return value


def _percent(path: str, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise ValueError(
            f"{path}, line {number}: {text!r} is not a share of women in %; give 0 to 100"
        )
    return value

"""Facts: values that a card shows, each with the file of the run and the key it was read from.

A key is a JSON Pointer (RFC 6901) into the file, such as /train/steps. In a file of JSON lines it
begins with the line: [kind=eval, step=240]/causal_loss, or [line=2]/date, counted from 1; several
lines may be summed up, as in "median of [kind=train]/tokens_per_second" or "count of [kind=eval]".
A derived fact has no file; its key is its arithmetic over the names of other facts.
"""

import ast
import dataclasses
import datetime
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# The folders of an absolute path that is a part of a JSON Pointer.
POINTED_FOLDERS = re.compile(r"(?<=/)~1(?:[^/]*~1)+")
# Lines of a JSON-lines file: (number of the line, object).
Rows = list[tuple[int, dict]]

UNKNOWN = "unknown"
ARITHMETIC = "arithmetic"
_GROUPS: dict[str, Callable[[list], Any]] = {
    "count": len,
    "sum": sum,
    "min": min,
    "max": max,
    "median": statistics.median,
}
_KEY = re.compile(rf"(?:({'|'.join(_GROUPS)}) of )?\[(.*?)\](/.*)?")
_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Missing(LookupError):
    """A key is not in its file."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """A value of the card. ``value`` None: the run does not record it."""

    name: str  # unique in a card; arithmetic refers to it
    label: str
    value: Any
    file: str  # relative to the run; ARITHMETIC; or what else it was read from
    key: str
    unit: str = ""
    # What the card shows of a text, where that is not the whole of it.
    short: str | None = None

    @property
    def known(self) -> bool:
        return self.value is not None

    @property
    def shown(self) -> str:
        """Return the value as the card shows it."""
        if not self.known:
            return UNKNOWN
        text = shown(self.value) if self.short is None else self.short
        return f"{text} {self.unit}".rstrip()


def shown(value: Any) -> str:
    """Format a value: integers in full, other numbers with four significant digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


class Facts:
    """The facts of a card, in the order in which they were found.

    ``files`` holds the content of the run's files by name: a JSON value, or `Rows`.
    """

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.files = files
        self._facts: dict[str, Fact] = {}

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts.values())

    def __getitem__(self, name: str) -> Fact:
        return self._facts[name]

    def read(
        self, file: str, key: str, label: str, unit: str = "", name: str = "", short: Any = None
    ) -> Fact:
        """Add the value of ``key`` in ``file``; its value is None where that is missing.

        ``short`` is a function from the value to what the card shows of it. Without a ``name``, a
        fact that was read from the same place before is returned again.
        """
        before = next((each for each in self if (each.file, each.key) == (file, key)), None)
        if before is not None and not name:
            return before
        try:
            value = look_up(self.files[file], key)
        except (Missing, KeyError):
            value = None
        text = short(value) if short is not None and value is not None else None
        return self._add(Fact(name or self._free(file, key), label, value, file, key, unit, text))

    def given(self, value: Any, source: str, key: str, label: str, unit: str, name: str) -> Fact:
        """Add a value that is not in a file: of a flag, or of a table of this package."""
        return self._add(Fact(name, label, value, source, key, unit))

    def derive(self, name: str, label: str, arithmetic: str, unit: str = "") -> Fact:
        """Add the result of ``arithmetic``; None where one of its facts is unknown."""
        values = {each.name: each.value for each in self}
        value = None
        if all(values.get(each) is not None for each in names_in(arithmetic)):
            value = calculate(arithmetic, values)
        return self._add(Fact(name, label, value, ARITHMETIC, arithmetic, unit))

    def worked(self, name: str) -> str:
        """Return the arithmetic of a derived fact with the numbers in place of the names."""
        fact = self[name]
        inside = {each: self[each].shown.split(" ")[0] for each in names_in(fact.key)}
        text = re.sub(r"[a-z_]\w*", lambda found: inside.get(found[0], found[0]), fact.key)
        return f"{text.replace(' * ', ' × ')} = {fact.shown}"

    def _add(self, fact: Fact) -> Fact:
        if fact.name in self._facts:
            raise KeyError(f"two facts have the name {fact.name}")
        self._facts[fact.name] = fact
        return fact

    def _free(self, file: str, key: str) -> str:
        """Return a name for a fact that no arithmetic refers to."""
        base = f"{file}{POINTED_FOLDERS.sub('', key)}"
        base = re.sub(r"\W+", "_", base).strip("_").lower()
        name = base
        number = 2
        while name in self._facts:
            name = f"{base}_{number}"
            number += 1
        return name


def pointer(*parts: str | int) -> str:
    """Return the JSON Pointer of ``parts``."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def parts_of(text: str) -> list[str]:
    """Return the parts of a JSON Pointer."""
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def look_up(content: Any, key: str) -> Any:
    """Return the value of ``key`` in the content of a file. Raises Missing."""
    found = _KEY.fullmatch(key)
    if found is None:
        return _follow(content, key)
    group, conditions, path = found.groups()
    chosen = [row for number, row in content if _meets(number, row, conditions)]
    if group == "count":
        return len(chosen)
    values = []
    for row in chosen:
        try:
            value = _follow(row, path or "")
        except Missing:
            continue
        if group is None or (isinstance(value, int | float) and math.isfinite(value)):
            values.append(value)
    if not values:
        raise Missing(key)
    # A step may have been evaluated twice; the later record holds.
    return values[-1] if group is None else _GROUPS[group](values)


def _follow(value: Any, path: str) -> Any:
    for part in parts_of(path):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, ValueError, TypeError):
            raise Missing(path) from None
    return value


def _meets(number: int, row: dict, conditions: str) -> bool:
    for condition in filter(None, conditions.split(", ")):
        name, _, wanted = condition.partition("=")
        if wanted != str(number if name == "line" else row.get(name)):
            return False
    return True


def names_in(arithmetic: str) -> list[str]:
    """Return the names of facts in an expression."""
    nodes = ast.walk(ast.parse(arithmetic, mode="eval"))
    names = (node.id for node in nodes if isinstance(node, ast.Name) and node.id != "unix")
    return list(dict.fromkeys(names))


def calculate(arithmetic: str, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression of + - * / and unix(DATE), a date in seconds since 1970."""
    return _value(ast.parse(arithmetic, mode="eval").body, values)


def _value(node: ast.AST, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.BinOp):
        left = _value(node.left, values)
        right = _value(node.right, values)
        return _OPERATIONS[type(node.op)](left, right)
    if isinstance(node, ast.Call):
        return datetime.datetime.fromisoformat(_value(node.args[0], values)).timestamp()
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Constant):
        return node.value
    raise ValueError(f"{ast.dump(node)} is not arithmetic")

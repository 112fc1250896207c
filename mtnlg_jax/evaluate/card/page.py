"""The blocks of a card, and their Markdown."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from mtnlg_jax.evaluate.card.facts import ARITHMETIC, POINTED_FOLDERS, Fact, Facts

NOT_STATED = "The authors have not stated it."
# Longest value in the table of sources.
_LONG = 60

Cell = Fact | str | Sequence[Fact | str]


@dataclasses.dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: list[list[Cell]]


@dataclasses.dataclass
class Section:
    """A heading and what is below it: paragraphs, and tables. Texts name no figure themselves."""

    title: str
    blocks: list[str | Fact | Table] = dataclasses.field(default_factory=list)
    level: int = 2

    def listing(self, facts: Iterable[Fact], head: tuple[str, str] = ("", "")) -> None:
        """Add a table of labels and values, unless there are none."""
        rows: list[list[Cell]] = [[fact.label, fact] for fact in facts]
        if rows:
            self.blocks.append(Table(head, rows))

    def table(self, head: Sequence[str], rows: list[list[Cell]]) -> None:
        if rows:
            self.blocks.append(Table(tuple(head), rows))


def markdown(sections: Iterable[Section]) -> str:
    """Return the Markdown of ``sections``."""
    return "\n\n".join(_section(section) for section in sections) + "\n"


def sources(facts: Facts, show_paths: bool = False) -> Section:
    """Return the section that names the file and the key of every fact."""
    rows: list[list[Cell]] = []
    for fact in facts:
        value = fact.shown if len(fact.shown) <= _LONG else fact.shown[:_LONG] + "…"
        where = fact.file if fact.file == ARITHMETIC else f"`{fact.file}`"
        key = fact.key if show_paths else POINTED_FOLDERS.sub("…", fact.key)
        rows.append([f"`{fact.name}`", fact.label, value, where, f"`{key}`"])
    section = Section("Sources of the figures")
    section.blocks.append(
        "Each figure of this card was read from a file of the run, or computed from such figures. "
        "A key is a JSON Pointer; in a file of JSON lines the line stands before it in brackets. "
        "Arithmetic refers to the names of this table."
    )
    section.blocks.append("<details><summary>all figures</summary>")
    section.table(("name", "figure", "value", "file", "key"), rows)
    section.blocks.append("</details>")
    return section


def _section(section: Section) -> str:
    parts = ["#" * section.level + " " + escaped(section.title)]
    for block in section.blocks:
        if isinstance(block, Table):
            parts.append(_table(block))
        else:
            parts.append(block if isinstance(block, str) else block.shown)
    return "\n\n".join(parts)


def _table(table: Table) -> str:
    lines = [_row(table.head), _row(["---"] * len(table.head))]
    lines += [_row(row) for row in table.rows]
    return "\n".join(lines)


def _row(cells: Iterable[Cell]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Fact):
        return escaped(cell.shown)
    if isinstance(cell, str):
        return escaped(cell)
    return "; ".join(_cell(part) for part in cell)


def escaped(text: str) -> str:
    """Return ``text`` for a cell or a heading, in which it must not become markup."""
    text = re.sub(r"\s+", " ", text)
    if re.fullmatch(r"`[^`]*`", text):  # code: only a bar would end the cell
        return text.replace("|", "\\|")
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text)

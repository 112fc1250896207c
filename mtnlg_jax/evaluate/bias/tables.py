"""The tables of a result, for the terminal and for the page."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mtnlg_jax.evaluate.bias.sampled import Q

# Words of a table that are shown, and differences between groups.
TOP = 10


class Range(NamedTuple):
    """A value with its interval on a scale, and what it is compared with."""

    value: float
    low: float | None
    high: float | None
    least: float
    most: float
    reference: float
    percent: bool = False

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return self.shown(self.value)
        return f"{self.shown(self.value)} ({self.shown(self.low)} to {self.shown(self.high)})"

    def shown(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"


Cell = str | Range


class Table(NamedTuple):
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    detail: bool = False  # on the page alone, folded


class Section(NamedTuple):
    title: str
    notes: tuple[str, ...]
    tables: tuple[Table, ...]


def sections(content: dict[str, Any], top: int = TOP) -> list[Section]:
    """Return the sections of a result. ``top``: words of each table."""
    found: list[Section] = []
    associations = content["associations"]
    if associations:
        for name, each in associations["sets"].items():
            found += _set_sections(name, each, top)
        if associations["identifiers"]:
            found.append(_identifiers(associations["identifiers"], top))
    for name, each in (content["pairs"] or {}).items():
        for by, result in each["by"].items():
            make = _pronouns if each["form"] == "pronouns" else _pairs
            found.append(make(name, by, each, result, top))
    return found


def as_text(found: Sequence[Section]) -> str:
    """Return the sections for a terminal."""
    lines: list[str] = []
    for section in found:
        lines += ["", section.title, *section.notes]
        for table in section.tables:
            if table.detail:
                continue
            rows = [table.head, *(tuple(map(str, row)) for row in table.rows)]
            widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
            lines += ["", *([table.title] if table.title else [])]
            lines += [
                "  ".join(
                    cell + " " * (width - _width(cell))
                    for cell, width in zip(row, widths, strict=True)
                ).rstrip()
                for row in rows
            ]
    return "\n".join(lines[1:])


def _width(text: str) -> int:
    """Return the columns that a text takes in a terminal; Chinese characters take two."""
    return len(text) + sum(unicodedata.east_asian_width(each) in "WF" for each in text)


def _set_sections(name: str, content: dict[str, Any], top: int) -> Iterator[Section]:
    prompts = "; ".join(content["templates"])
    sampled = content["sampled"]
    if sampled:
        yield _sampled(name, prompts, sampled, top)
    ranked = content["ranked"]
    if ranked:
        tables = [
            Table(
                f"{group}: words most tied to it",
                ("word", "share", "in other groups", "log ratio", "templates that agree"),
                tuple(
                    (
                        row["word"],
                        f"{100 * row['share']:.2f} %",
                        f"{100 * row['other_share']:.2f} %",
                        f"{row['log_ratio']:+.3f}",
                        f"{100 * row['agree']:.0f} %",
                    )
                    for row in rows[:top]
                    if row["log_ratio"] > 0
                ),
            )
            for group, rows in ranked["tables"].items()
        ]
        masses = [mass for own in ranked["mass"].values() for mass in own]
        notes = (
            f"Prompts: {prompts}. Exact shares of {ranked['words']:,} words, which have "
            f"{100 * min(masses):.2g} to {100 * max(masses):.2g} % of the probability behind a "
            "prompt; nothing is sampled.",
        )
        absent, more = _scores(ranked["scores"])
        yield Section(f"{name}, ranked words", notes + absent, (*more, *tables))


def _sampled(name: str, prompts: str, sampled: dict[str, Any], top: int) -> Section:
    total = sum(sampled["outputs"].values())
    source = {
        "slots": "the words in the slots behind the prompts",
        "list": "the words of the list",
    }[sampled["words_from"]]
    notes = [f"Prompts: {prompts}. {total:,} outputs; counted are {source}."]
    tables: list[Table] = []
    words = sampled["tables"]["words"]
    if words is None:
        notes.append(f"No table of words: {sampled['tables']['absent']}.")
    else:
        notes.append(
            f"{sampled['tables']['tested']:,} words were tested in each group; "
            f"{sampled['tables']['stand_out']:,} stand out (q below {Q:g})."
        )
    for group, rows in (words or {}).items():
        kept = tuple(
            (
                row["word"],
                f"{row['count']:,}",
                f"{100 * row['share']:.2f} %",
                f"{100 * row['other_share']:.2f} %",
                f"{row['log_odds']:+.2f}",
                f"{row['z']:+.2f}",
                f"{row['q']:.3f}",
            )
            for row in rows[:top]
            if row["z"] > 0
        )
        head = ("word", "outputs", "share", "in other groups", "log-odds", "z", "q")
        tables.append(Table(f"{group}: words most tied to it", head, kept))
    groups = tuple(sampled["outputs"])
    tables.append(
        Table(
            "Co-occurrence: outputs with the word, and their share",
            ("word", *groups),
            tuple(
                (
                    row["word"],
                    *(f"{row['counts'][g]:,} ({100 * row['shares'][g]:.1f} %)" for g in groups),
                )
                for row in sampled["cooccurrence"][: 5 * top]
            ),
            detail=True,
        )
    )
    tables.append(
        Table(
            "Examples of outputs",
            ("group", "output"),
            tuple((group, text) for group, own in sampled["examples"].items() for text in own),
            detail=True,
        )
    )
    absent, more = _scores(sampled["scores"])
    return Section(f"{name}, sampled text", (*notes, *absent), (*more, *tables))


def _scores(content: dict[str, Any] | None) -> tuple[tuple[str, ...], tuple[Table, ...]]:
    """Return (notes, tables) of the scores by a lexicon."""
    if content is None:
        return (), ()
    if content["absent"]:
        return (f"No scores: {content['absent']}.",), ()
    groups = content["groups"]
    ends = [value for row in groups.values() for value in (row["low"], row["high"], row["mean"])]
    known = [value for value in ends if value is not None]
    overall = content["overall"]["mean"]
    rows = tuple(
        (
            group,
            Range(row["mean"], row["low"], row["high"], min(known), max(known), overall),
            f"{row['mean'] - overall:+.3f}",
        )
        for group, row in groups.items()
    )
    gaps = tuple(
        (
            f"{row['group']} − {row['other']}",
            f"{row['difference']:+.3f}",
            "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}",
        )
        for row in content["differences"][:TOP]
    )
    return (), (
        Table(f"Score by group; all together {overall:.3f}", ("group", "mean", "− overall"), rows),
        Table(
            "Differences between groups, the largest first", ("groups", "difference", "95 %"), gaps
        ),
    )


def _share(content: dict[str, Any], absent: str = "-") -> Cell:
    if content["share"] is None:
        return absent
    return Range(content["share"], content["low"], content["high"], 0, 1, 0.5, percent=True)


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _identifiers(content: dict[str, Any], top: int) -> Section:
    first = content["first"]
    second = content["second"]
    rows = content["occupations"]

    def shown(own: Sequence[dict[str, Any]]) -> tuple[tuple[Cell, ...], ...]:
        return tuple(
            (row["occupation"], _signed(row["log_ratio"]), _signed(row["above_neutral"]))
            for row in own
        )

    head = ("occupation", f"log p({first}) / p({second})", "beyond the neutral word")
    neutral = content["neutral"]
    summary = tuple(
        (what, _share(content[key]), _p(content[key]["p"]))
        for what, key in (
            (f"lean to {first}", "leaning"),
            (f"lean to {first} more than “{neutral['word']}”", "above_neutral"),
        )
    )
    notes = (
        f"Prompts: {'; '.join(content['templates'])}. Behind “{neutral['word']}” the log ratio is "
        f"{neutral['log_ratio']:+.3f}; over the occupations its mean is "
        f"{content['log_ratio']['mean']:+.3f}.",
    )
    tables = (
        Table("", ("occupations", "share (95 %)", "p against 50 %"), summary),
        Table(f"Most tied to {first}", head, shown(rows[:top])),
        Table(f"Most tied to {second}", head, shown(rows[::-1][:top])),
    )
    return Section("Occupations, association test", notes, tables)


_BY = {"causal": "read from left to right", "masked": "by filled masks"}
_WAYS = {
    "sum": "whole sentence",
    "per_token": "per token",
    "shared": "tokens that both have",
}


def _pairs(
    name: str, by: str, content: dict[str, Any], result: dict[str, Any], top: int
) -> Section:
    head = ("pairs", "number", "prefer the stereotype (95 %)", "p against 50 %", "gap, nats", "d")
    tables = [
        Table(
            _WAYS[way],
            head,
            tuple(
                (
                    kind,
                    f"{row['pairs']:,}",
                    _share(row["stereotype"]),
                    _p(row["stereotype"]["p"]),
                    _signed(row["difference"]["mean"]),
                    "-" if row["difference"]["d"] is None else f"{row['difference']['d']:+.2f}",
                )
                for kind, row in kinds.items()
            ),
        )
        for way, kinds in result.items()
    ]
    baselines = content["baselines"]
    rows = (
        ("chance", "50.0 %"),
        ("the shorter sentence", _share(baselines["shorter"], "all tie")),
        (
            f"token counts of {baselines['unigram']['counts_of']}",
            _share(baselines["unigram"], "all tie"),
        ),
    )
    tables.append(Table("Baselines that read no sentence", ("prefers", "share (95 %)"), rows))
    tables.append(
        Table(
            "Pairs with the largest differences",
            ("agrees with the stereotype", "the other", "type", "gap, nats"),
            tuple(
                (row["more"], row["less"], row["kind"], _signed(row["difference"]))
                for row in content["examples"][by][:top]
            ),
            detail=True,
        )
    )
    return Section(f"{name}, {_BY[by]}", (), tuple(tables))


def _correlation(found: dict[str, Any]) -> str:
    r = found["correlation"]
    if r["r"] is None:
        return "The occupations with a share of women are too few, or too equal, to correlate."
    return (
        f"Gap and share of women in {found['occupations']} occupations: r {r['r']:.3f} "
        f"({r['low']:.3f} to {r['high']:.3f}), p {r['p']:.3g}, rho {r['rho']:.3f}."
    )


def _pronouns(
    name: str, by: str, content: dict[str, Any], result: dict[str, Any], top: int
) -> Section:
    who = {"occupation": "the person of the occupation", "participant": "the other person"}
    first = tuple(
        (
            text,
            f"{result['gap'][key]['count']:,}",
            _share(result["female"][key]),
            _p(result["female"][key]["p"]),
            _signed(result["gap"][key]["mean"]),
        )
        for key, text in who.items()
    )
    head = ("pronoun stands for", "sentences", "prefer the female (95 %)", "p against 50 %", "gap")
    tables = [Table("", head, first)]
    notes = [f"{why}: {count:,} left out." for why, count in content["left_out"].items()]
    found = result["statistics"]
    if found:
        notes.append(_correlation(found))
        rows = (
            ("the model", _share(found["majority"]), _p(found["majority"]["p"])),
            ("always male", _share(found["baseline_always_male"]), ""),
        )
        columns = ("prefers", "the pronoun of the majority (95 %)", "p against 50 %")
        tables.append(Table("Against the statistics of occupations", columns, rows))
    tables.append(
        Table(
            "Gap by occupation, log p(female) − log p(male) in nats",
            ("occupation", "gap", "prefer the female", "women, %"),
            tuple(
                (
                    row["occupation"],
                    _signed(row["gap"]),
                    f"{row['female']['count']} of {row['female']['total']}",
                    "-" if row["pct_female"] is None else f"{row['pct_female']:g}",
                )
                for row in result["occupations"]
            ),
            detail=len(result["occupations"]) > 2 * top,
        )
    )
    return Section(f"{name}, {_BY[by]}", tuple(notes), tuple(tables))

"""What a card says of the data: where they come from, what was removed and why, their tokens."""

import os
from collections.abc import Iterator
from typing import Any

from mtnlg_jax.evaluate.card.facts import Fact, Facts, look_up, pointer
from mtnlg_jax.evaluate.card.page import Cell, Section
from mtnlg_jax.evaluate.card.run_files import CONFIG, RunFiles, without_folders

_LEAST = 0.01  # share of the documents of a language that the head of a card names
_PARTS = {"train": "to train on", "heldout": "held out"}


def data_sections(facts: Facts, run: RunFiles, show_paths: bool) -> list[Section]:
    """Return the sections on the data, and add their facts."""
    top = Section("Training data")
    _blends(top, facts, run, show_paths)
    sections = [top]
    if not run.data:
        top.blocks.append("The run does not record the counts of its data.")
        return sections
    for number, source in enumerate(run.content[run.data].get("sources", [])):
        sections.append(_source(facts, run, number, source, show_paths))
    return sections


def languages(facts: Facts) -> dict[str, int]:
    """Return the number of documents by language that the recipes of the data told, before they
    dropped any."""
    found: dict[str, int] = {}
    for fact in facts:
        if "/tables/language/" in fact.key:
            code = fact.key.rpartition("/")[2]
            found[code] = found.get(code, 0) + fact.value
    return found


def kept_languages(facts: Facts, run: RunFiles) -> list[str]:
    """Return the codes of the languages of the data: those that the recipes kept, without those of
    a few documents, which are often mistakes of the detector."""
    counts = {code: count for code, count in languages(facts).items() if len(code) == 2}
    sources = run.content[run.data].get("sources", []) if run.data else []
    allowed: set[str] = set()
    for source in sources:
        wanted = source.get("report", {}).get("settings", {}).get("clean.languages")
        allowed |= set(wanted or counts)
    least = _LEAST * sum(counts.values())
    return sorted(code for code, count in counts.items() if count >= least and code in allowed)


def _blends(section: Section, facts: Facts, run: RunFiles, show_paths: bool) -> None:
    """Add the weights of the sources in each stage of the run."""
    short = None if show_paths else without_folders
    rows: list[list[Cell]] = []

    def add(place: tuple, stage: Fact | str) -> None:
        for i, _ in enumerate(look_up(run.content[CONFIG], pointer(*place))):
            path = facts.read(CONFIG, pointer(*place, i, 0), "Source", short=short)
            rows.append([stage, path, facts.read(CONFIG, pointer(*place, i, 1), "Weight")])

    if run.config.data.blend:
        add(("data", "blend"), "all without their own")
    elif run.config.data.path:
        path = facts.read(CONFIG, "/data/path", "Source", short=short)
        rows.append(["all without their own", path, "all"])
    for number, stage in enumerate(run.config.train.stages):
        if stage.blend:
            name = facts.read(CONFIG, pointer("train", "stages", number, "name"), "Stage")
            add(("train", "stages", number, "blend"), name)
    section.table(("stage", "source", "weight"), rows)


def _source(facts: Facts, run: RunFiles, number: int, source: dict, show_paths: bool) -> Section:
    def read(label: str, *parts: str | int, **more: Any) -> Fact:
        return facts.read(run.data, pointer("sources", number, *parts), label, **more)

    path = read("Source", "path", short=None if show_paths else without_folders)
    section = Section(f"Source {os.path.basename(source['path'].rstrip('/'))}", level=3)
    if "prepared" not in source:
        counts = [
            read(label, key, name=f"source_{number}_{name}")
            for key, label, name in (
                ("documents", "Documents", "documents"),
                ("tokens", "Tokens", "train_tokens"),
            )
            if key in source
        ]
        section.listing([path, *counts])
        if not counts:
            section.blocks.append("Nothing is recorded of this source.")
        return section
    listed = [path]
    for part, words in _PARTS.items():
        for key in ("documents", "tokens", "bytes"):
            name = f"source_{number}_{part}_{key}"
            label = f"{key.capitalize()} {words}"
            listed.append(read(label, "prepared", part, key, name=name))
    listed += list(_tokenizer(read, source))
    listed += list(_canaries(read, source))
    section.listing(listed)
    if "canaries" not in source:
        section.blocks.append("No planted canaries are recorded of it.")
    _input(section, read, source)
    _stages(section, read, source)
    _recipe_blend(section, read, source)
    return section


def _tokenizer(read, source: dict) -> Iterator[Fact]:
    yield read("Tokenizer", "prepared", "tokenizer", "kind")
    yield read("Pieces of the tokenizer", "prepared", "tokenizer", "vocab_size")
    yield read("Fingerprint of the tokenizer", "prepared", "tokenizer", "fingerprint")
    yield read(
        "What the tokenizer loses of a text",
        *("prepared", "tokenizer", "losses"),
        short=lambda losses: ", ".join(losses) or "nothing",
    )
    if "answer_tokens" in source["prepared"].get("train", {}):
        yield read("Tokens that are answers", "prepared", "train", "answer_tokens")


def _canaries(read, source: dict) -> Iterator[Fact]:
    if "canaries" in source:
        yield read("Canaries planted", "canaries", "planted")
        yield read("Copies of them", "canaries", "copies")
        yield read("Canaries drawn as controls and not planted", "canaries", "controls")


def _input(section: Section, read, source: dict) -> None:
    """Add what reading counted, where the data were prepared without a recipe."""
    counts = source["prepared"].get("input", {})
    listed = [
        read(f"Read: {name.replace('_', ' ')}", "prepared", "input", name)
        for name, value in counts.items()
        if name != "notes" and value
    ]
    listed += [
        read(f"Read: {reason}", "prepared", "input", "notes", reason)
        for reason in counts.get("notes", {})
    ]
    section.listing(listed)


def _stages(section: Section, read, source: dict) -> None:
    """Add a table of the recipe's stages, and tables such as that of languages."""
    stages = source.get("report", {}).get("stages", [])
    rows: list[list[Cell]] = []
    for number, stage in enumerate(stages):
        place = ("report", "stages", number)
        name = read("Stage of the recipe", *place, "name")
        numbers: list[Fact | str] = [
            read(f"{stage['name']}: {what} {way}", *place, what, i)
            for what in ("documents", "bytes")
            for i, way in enumerate(("in", "out"))
        ]
        if not number:  # nothing comes into the first stage, which reads
            numbers[0] = numbers[2] = ""
        changes = []
        for what in ("dropped", "changed"):
            found = [
                [f"{rule}: ", read(f"{stage['name']}: {what}, {rule}", *place, what, rule)]
                for rule in stage.get(what, {})
            ]
            changes.append([part for pair in found for part in pair])
        rows.append([name, *numbers, *map(_pairs, changes)])
    head = (
        "stage",
        "documents in",
        "out",
        "bytes in",
        "out",
        "dropped, by rule",
        "changed, by rule",
    )
    section.table(head, rows)
    for number, stage in enumerate(stages):
        for title, counts in stage.get("tables", {}).items():
            listed = [
                read(f"{stage['name']}: {key}", "report", "stages", number, "tables", title, key)
                for key, value in counts.items()
                if value
            ]
            section.listing(listed, head=(title, ""))


def _pairs(cells: list) -> Cell:
    """Return "rule: count" of alternating texts and facts."""
    joined = []
    for label, fact in zip(cells[::2], cells[1::2], strict=True):
        joined.append(f"{label}{fact.shown}")
    return joined


def _recipe_blend(section: Section, read, source: dict) -> None:
    rows: list[list[Cell]] = []
    for number in range(len(source.get("report", {}).get("blend", []))):
        keys = ("name", "documents", "tokens", "bytes_per_token", "weight", "epochs")
        rows.append(
            [
                read(f"Blend: {key.replace('_', ' ')}", "report", "blend", number, key)
                for key in keys
            ]
        )
    head = ("part", "documents", "tokens", "bytes / token", "weight", "epochs planned")
    section.table(head, rows)

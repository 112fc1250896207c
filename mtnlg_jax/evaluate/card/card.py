"""Build the card of a run: its facts first, then the page from them."""

import dataclasses
import os
from collections.abc import Mapping

from huggingface_hub import ModelCardData

from mtnlg_jax.evaluate.card.about import STATEMENT, USES, Stated
from mtnlg_jax.evaluate.card.compute_facts import Energy, compute_sections
from mtnlg_jax.evaluate.card.data_facts import data_sections, languages
from mtnlg_jax.evaluate.card.facts import Fact, Facts, pointer
from mtnlg_jax.evaluate.card.head import head
from mtnlg_jax.evaluate.card.page import NOT_STATED, Section, markdown, sources
from mtnlg_jax.evaluate.card.result_facts import evaluation_sections, other_sections
from mtnlg_jax.evaluate.card.run_files import (
    CONFIG,
    ENVIRONMENT,
    STARTS,
    RunFiles,
    command_without,
    command_without_folders,
    read_run,
)
from mtnlg_jax.evaluate.card.training_facts import model_section, training_section
from mtnlg_jax.train.report.files import hidden_keys


@dataclasses.dataclass(frozen=True)
class Card:
    """A card: its facts, its head, and its Markdown above and below the authors' notes."""

    facts: Facts
    data: ModelCardData
    above: str
    below: str


def build_card(
    workdir: str,
    folder: str,
    stated: Mapping[str, Stated] | None = None,
    energy: Energy | None = None,
    show_paths: bool = False,
) -> Card:
    """Return the card of the run in ``workdir``, which is to lie in ``folder``.

    ``show_paths``: show absolute local paths whole, not their last names alone. Raises what
    `read_run` raises.
    """
    stated = stated or {}
    run = read_run(workdir)
    facts = Facts(run.content)
    name = facts.read(CONFIG, "/name", "Name", name="name")
    first = Section(name.shown, level=1)
    first.blocks += [_opening(facts, run), *_notes(facts, run)]
    model = model_section(facts, run, show_paths)
    data = data_sections(facts, run, show_paths)
    training = training_section(facts, run)
    sections = [
        first,
        *_stated_sections(facts, stated, USES),
        _license(facts, stated),
        model,
        *data,
        *_statement(facts, stated),
        *training,
        *evaluation_sections(facts, run),
        *other_sections(facts, run),
        *compute_sections(facts, run, energy or Energy()),
        _environment(facts, run, show_paths),
    ]
    above = markdown(sections)
    return Card(
        facts, head(facts, run, stated, folder), above, markdown([sources(facts, show_paths)])
    )


def _opening(facts: Facts, run: RunFiles) -> str:
    text = "A language model trained with mtnlg\\_jax."
    if run.best is None:
        return text
    step = facts.read(run.record(run.best), "/step", "Checkpoint that the card describes")
    return f"{text} This card describes its checkpoint of step {step.shown}."


def _notes(facts: Facts, run: RunFiles) -> list[str]:
    found = []
    for number, note in enumerate(run.notes):
        text = note.words
        if note.found is not None:
            fact = facts.given(note.found, note.file, "", note.words, "", f"note_{number}")
            text = f"{text} {fact.shown}."
        found.append(text)
    return found


def _stated(facts: Facts, stated: Mapping[str, Stated], key: str, label: str) -> Fact | str:
    if key not in stated:
        return NOT_STATED
    found = stated[key]
    return facts.given(found.value, found.source, pointer(key), label, "", f"stated_{key}")


def _stated_sections(
    facts: Facts, stated: Mapping[str, Stated], titles: Mapping[str, str], level: int = 2
) -> list[Section]:
    return [
        Section(title, [_stated(facts, stated, key, title)], level) for key, title in titles.items()
    ]


def _license(facts: Facts, stated: Mapping[str, Stated]) -> Section:
    keys = [key for key in ("license", "license_name", "license_link") if key in stated]
    blocks = [_stated(facts, stated, key, key.replace("_", " ").capitalize()) for key in keys]
    return Section("License", list(blocks) or [NOT_STATED])


def _statement(facts: Facts, stated: Mapping[str, Stated]) -> list[Section]:
    """Return the data statement of Bender and Friedman."""
    first = Section("Data statement")
    first.blocks.append(
        "The headings are those of Bender and Friedman, Data Statements for Natural Language "
        "Processing."
    )
    sections = _stated_sections(facts, stated, STATEMENT, level=3)
    by_key = dict(zip(STATEMENT, sections, strict=True))
    if found := languages(facts):
        listed = ", ".join(sorted(found))
        by_key["language_variety"].blocks.append(
            f"Languages that the recipe told in the documents it read: {listed}; their counts are "
            "in the tables of the sources."
        )
    return [first, *sections]


def _environment(facts: Facts, run: RunFiles, show_paths: bool) -> Section:
    section = Section("Environment")
    if not run.has(ENVIRONMENT):
        section.blocks.append("The run does not record its environment.")
        return section
    found = run.content[ENVIRONMENT]
    hidden = hidden_keys(run.content[CONFIG], run.rows(STARTS))

    def short(command: str) -> str:
        command = command_without(command, hidden)
        return command if show_paths else command_without_folders(command)

    listed = [
        facts.read(ENVIRONMENT, pointer("versions", name), f"Version of {name}")
        for name in found.get("versions", {})
    ]
    listed.append(facts.read(ENVIRONMENT, "/devices/kind", "Kind of device, last start"))
    listed.append(facts.read(ENVIRONMENT, "/devices/platform", "Platform, last start"))
    listed.append(facts.read(ENVIRONMENT, "/devices/count", "Devices, last start"))
    listed.append(facts.read(ENVIRONMENT, "/processes", "Processes, last start"))
    mesh = run.content[CONFIG].get("mesh", {})
    listed += [
        facts.read(CONFIG, pointer("mesh", axis), f"Mesh: {axis}")
        for axis in ("pipe", "data", "expert", "context", "tensor", "zero")
        if axis in mesh
    ]
    listed.append(facts.read(ENVIRONMENT, "/commit", "Commit of mtnlg_jax, last start"))
    listed.append(facts.read(ENVIRONMENT, "/date", "Last start"))
    listed.append(facts.read(ENVIRONMENT, "/command", "Command of the last start", short=short))
    section.listing(listed)
    return section


def default_output(workdir: str) -> str:
    """Return the path of a run's card."""
    return os.path.join(workdir, "README.md")

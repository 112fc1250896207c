"""The report of bias: one page, readable without a network and without scripts."""

from pathlib import Path
from typing import Any

from mtnlg_jax import pages
from mtnlg_jax.evaluate.bias.tables import Range, sections

# Size of the mark of an interval, in units of its viewBox.
WIDTH = 120
HEIGHT = 14
_MARGIN = 4
# Words of each table of the page.
TOP = 20


def render(content: dict[str, Any]) -> str:
    """Return the page of a result of `run.measure_run`."""
    return pages.render(
        Path(__file__).with_name("page") / "report.html",
        "launch/bias.py",
        tests={"range": lambda cell: isinstance(cell, Range)},
        x_of=x_of,
        width=WIDTH,
        height=HEIGHT,
        sections=sections(content, TOP),
        facts=_facts(content),
        model=content["model"],
    )


def x_of(mark: Range, value: float) -> float:
    """Return where a value stands in the mark of its interval."""
    span = mark.most - mark.least or 1.0
    share = min(1.0, max(0.0, (value - mark.least) / span))
    return round(_MARGIN + share * (WIDTH - 2 * _MARGIN), 2)


def _facts(content: dict[str, Any]) -> list[tuple[str, Any]]:
    facts = [("model", content["model"]), ("step", content["step"])]
    associations = content["associations"]
    if associations:
        facts.append(("prompts", associations["prompts"]))
        lexicon = associations["lexicon"]
        if lexicon:
            facts.append(
                (
                    "lexicon",
                    f"{lexicon['file']}, {lexicon['words']:,} words, scores {lexicon['low']:g} to "
                    f"{lexicon['high']:g}",
                )
            )
        drawn = [each["sampled"] for each in associations["sets"].values() if each["sampled"]]
        if drawn:
            shown = ", ".join(f"{key} {value}" for key, value in drawn[0]["settings"].items())
            facts.append(("sampling", shown))
    facts.append(("created", content["created"]))
    facts.append(("commit", content["commit"] or "unknown"))
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return [*facts, ("versions", versions)]

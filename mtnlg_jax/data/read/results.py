"""The results of reading: documents, and a report of what happened to the input."""

import dataclasses
from dataclasses import dataclass, field

NAMED = 5  # names that a report keeps for each reason
_REASONS = 1000  # reasons that a report distinguishes
_SHOWN = 12  # reasons in a summary, the most frequent ones


@dataclass(frozen=True)
class Document:
    """A document.

    ``source``: the path below the folder read, never absolute, with ``:number`` in a file of many
    (line, item, row or record). For a pair, ``text`` is the answer alone and ``prompt`` the text
    before it. ``continued``: the text continues in the next `Document`, because pieces were asked
    for.
    """

    text: str
    source: str
    prompt: str | None = None
    continued: bool = False


@dataclass
class ReadReport:
    """A report on the input. Counts are documents unless stated otherwise."""

    files: int = 0
    skipped_files: int = 0  # files of a folder with an unknown suffix
    # Other entries of a folder: hidden names, links to what was read already or in a circle, pipes.
    left_out: int = 0
    files_without_text: int = 0  # files that yielded no document and nothing damaged
    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of the documents
    empty: int = 0  # dropped: only white space, or a page without a main text
    damaged: int = 0  # dropped, with on_error="skip"
    repaired: int = 0  # contained bytes that are not UTF-8 or lone surrogates, now U+FFFD
    control_characters: int = 0  # removed, or replaced by a line end or a space (`controls`)
    skipped_records: int = 0  # WARC records without a page: requests, pictures, errors
    # By reason: {"count": how often, "names": the first names it applies to}.
    notes: dict[str, dict] = field(default_factory=dict)

    def note(self, reason: str, name: str) -> None:
        """Count a reason, and keep the name if there are few."""
        if reason not in self.notes and len(self.notes) >= _REASONS:
            reason = "for other reasons"
        noted = self.notes.setdefault(reason, {"count": 0, "names": []})
        noted["count"] += 1
        if len(noted["names"]) < NAMED:
            noted["names"].append(name)

    def counts(self) -> dict[str, int]:
        """Return everything except the notes."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name != "notes"
        }


def note_lines(notes: dict[str, dict]) -> list[str]:
    """Format the ``notes`` of a `ReadReport`, one line a reason: skipped, dropped or repaired."""
    ordered = sorted(notes.items(), key=lambda item: (-item[1]["count"], item[0]))
    lines = []
    for reason, noted in ordered[:_SHOWN]:
        more = noted["count"] - len(noted["names"])
        named = ", ".join(noted["names"]) + (f" and {more:,} more" if more else "")
        lines.append(f"{noted['count']:,} {reason}: {named}")
    if rest := ordered[_SHOWN:]:
        lines.append(f"{sum(noted['count'] for _, noted in rest):,} for {len(rest)} other reasons")
    return lines

"""Tasks of the stages before the tokenizer, over the rows of one shard, and their counts."""

import hashlib
import heapq
import io
from collections import Counter
from typing import Any

import numpy as np

from mtnlg_jax.data.filter import dedup, pii
from mtnlg_jax.data.filter.clean import CleanConfig, clean
from mtnlg_jax.data.filter.dedup import MinHashConfig
from mtnlg_jax.data.read.documents import NAMED, ReadReport, read_file
from mtnlg_jax.data.read.open_files import File, content_stamp
from mtnlg_jax.data.recipe.report import BINS, bin_of
from mtnlg_jax.data.recipe.stages import Folder, Row, Shard

READING = "reading, in documents and bytes"
LEFT_OUT = "left out, dropped or repaired"

_EXAMPLES = 3  # of each rule
_EXCERPT = 300  # characters of an example


class Tally:
    """Counts of what a stage did to a shard, with a few examples of each rule; `merged` adds up
    those of all shards."""

    def __init__(self):
        self.counts: dict[str, Any] = {
            "documents": [0, 0],
            "bytes": [0, 0],
            "dropped": Counter(),
            "changed": Counter(),
            "lengths": [0] * BINS,
        }
        self._examples: dict[str, list] = {}

    def came(self, row: Row) -> None:
        self.counts["documents"][0] += 1
        self.counts["bytes"][0] += len(row.text.encode())

    def stays(self, row: Row) -> None:
        size = len(row.text.encode())
        self.counts["documents"][1] += 1
        self.counts["bytes"][1] += size
        self.counts["lengths"][bin_of(size)] += 1

    def took(self, kind: str, rule: str, place: str, text: str) -> None:
        """Count one document for ``rule``. ``kind`` is "dropped" or "changed"; ``text`` is an
        example for the report."""
        self.counts[kind][rule] += 1
        self._examples.setdefault(rule, []).append((_draw(place + rule), place, excerpt(text)))
        if len(self._examples[rule]) > 100:
            self._examples[rule] = heapq.nsmallest(_EXAMPLES, self._examples[rule])

    def result(self, shards: list[dict], **more) -> dict:
        examples = {
            rule: heapq.nsmallest(_EXAMPLES, found) for rule, found in self._examples.items()
        }
        return {"shards": shards, **self.counts, "examples": examples, **more}


def merged(name: str, results: list[dict]) -> dict:
    """Return the counts of a stage over all its tasks, for `report.render`."""
    total: dict[str, Any] = {
        "name": name,
        "documents": [0, 0],
        "bytes": [0, 0],
        "dropped": Counter(),
        "changed": Counter(),
        "lengths": [0] * BINS,
        "examples": {},
        "tables": {},
    }
    for result in results:
        for key in ("documents", "bytes", "lengths"):
            total[key] = [a + b for a, b in zip(total[key], result[key], strict=True)]
        for key in ("dropped", "changed"):
            total[key].update(result[key])
        for rule, found in result["examples"].items():
            total["examples"].setdefault(rule, []).extend(map(tuple, found))
        for title, counts in result.get("tables", {}).items():
            total["tables"].setdefault(title, Counter()).update(counts)
    total["examples"] = {
        rule: [entry[1:] for entry in heapq.nsmallest(_EXAMPLES, found)]
        for rule, found in sorted(total["examples"].items())
    }
    for counts in (total, total["tables"]):
        counts.update(
            {
                key: dict(sorted(value.items()))
                for key, value in counts.items()
                if isinstance(value, Counter)
            }
        )
    return total


def excerpt(text: str, length: int = _EXCERPT) -> str:
    """Return the beginning of a text for the report, with personal data masked: text that a rule
    dropped was not masked before."""
    shown, _ = pii.mask(text[: 2 * length])
    return shown if len(shown) <= length else shown[:length] + " ..."


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def read(
    folder: Folder,
    name: str,
    files: list[File],
    source: str,
    text_key: str,
    on_error: str,
    max_document_bytes: int,
    shard_bytes: int,
    encoding: str,
) -> dict:
    """Write the documents of ``files`` as shards of about ``shard_bytes`` of text."""
    report = ReadReport()
    tally = Tally()
    shards: list[dict] = []
    rows: list[Row] = []
    size = 0

    def flush() -> None:
        if rows:
            shards.append(folder.write_rows(f"{name}-{len(shards):04d}", source, rows))
            rows.clear()

    for file in files:
        for document in read_file(file, text_key, on_error, report, max_document_bytes, encoding):
            row = Row(document.text, f"{source}/{document.source}")
            rows.append(row)
            tally.stays(row)
            size += len(row.text.encode())
            if size >= shard_bytes:
                flush()
                size = 0
    flush()
    inputs = {
        f"{source}/{file.name}": {
            "size": file.size,
            "sha256": content_stamp(file).removeprefix("sha256:"),
        }
        for file in files
    }
    return tally.result(
        shards,
        tables={READING: report.counts()},
        inputs=inputs,
        notes=named_after(source, report.notes),
    )


def named_after(source: str, notes: dict[str, dict]) -> dict[str, dict]:
    """Return the ``notes`` of a `ReadReport` with the source before each name."""
    return {
        reason: {"count": noted["count"], "names": [f"{source}/{name}" for name in noted["names"]]}
        for reason, noted in notes.items()
    }


def with_notes(stage: dict, several: list[dict[str, dict]]) -> None:
    """Add up notes on what was left out, dropped or repaired, and add them to ``stage`` as a table
    and examples."""
    total: dict[str, dict] = {}
    for notes in several:
        for reason, noted in notes.items():
            known = total.setdefault(reason, {"count": 0, "names": []})
            known["count"] += noted["count"]
            known["names"] = [*known["names"], *noted["names"]][:NAMED]
    if total:
        stage["notes"] = dict(sorted(total.items()))
        stage["tables"][LEFT_OUT] = {
            reason: noted["count"] for reason, noted in stage["notes"].items()
        }
        stage["examples"] |= {
            reason: [(name, "") for name in noted["names"]]
            for reason, noted in stage["notes"].items()
        }


def cleaned(folder: Folder, name: str, shard: Shard, config: CleanConfig) -> dict:
    """Write the shard with each document cleaned or dropped."""
    tally = Tally()
    kept = []
    languages: Counter[str] = Counter()
    for row in folder.rows(shard):
        tally.came(row)
        found = clean(row.text, config)
        languages[found.language or "too short to tell"] += 1
        if found.dropped:
            tally.took("dropped", found.dropped, row.place, row.text)
            continue
        assert found.text is not None  # only a dropped document has no text
        for rule in found.counts:
            tally.took("changed", rule, row.place, _change(rule, row.text, found.text))
        kept.append(Row(found.text, row.place))
        tally.stays(kept[-1])
    return tally.result(
        [folder.write_rows(name, shard.source, kept)], tables={"language": languages}
    )


def _change(rule: str, before: str, after: str) -> str:
    """Return the line that holds a mask, or the first lines removed and added."""
    masked = next(
        (line for line in after.split("\n") if rule and f"<{rule.upper()}>" in line), None
    )
    if masked is not None:
        start = max(0, masked.index(f"<{rule.upper()}>") - _EXCERPT // 2)
        return masked[start : start + _EXCERPT]
    old = before.split("\n")
    new = after.split("\n")
    kept = set(new)
    known = set(old)
    removed = [line for line in old if line.strip() and line not in kept][:2]
    added = [line for line in new if line not in known][:2]
    width = _EXCERPT // 3
    lines = [f"- {line[:width]}" for line in removed] + [f"+ {line[:width]}" for line in added]
    return "\n".join(lines)


def band_keys(folder: Folder, name: str, shard: Shard, config: MinHashConfig) -> dict:
    """Write NAME-BAND.npy, uint64 [documents], the keys of each band."""
    signatures = dedup.signatures([row.text for row in folder.rows(shard)], config)
    for band, keys in enumerate(dedup.band_keys(signatures, config.bands).T):
        save(folder, f"{name}-{band:04d}", keys)
    return {}


def candidate_pairs(
    folder: Folder, name: str, keys: list[str], ranks: np.ndarray, band: int, part: int, parts: int
) -> dict:
    """Write NAME.npy, int64 [pairs, 2]: documents of the whole corpus that share a key of ``band``
    in this part of its range. ``ranks`` [shards] are those of each shard's first document."""
    found = []
    start = 0
    for file, first in zip(keys, ranks, strict=True):
        values = load(folder, f"{file}-{band:04d}")
        inside = np.flatnonzero(values % np.uint64(parts) == part)
        found.append((values[inside], start + inside, first + inside))
        start += len(values)
    values, numbers, rank = map(np.concatenate, zip(*found, strict=True))
    pairs = dedup.candidates(values[:, None], rank)
    save(folder, name, numbers[pairs])
    return {"pairs": len(pairs)}


def similar_pairs(
    folder: Folder,
    name: str,
    shard: Shard,
    others: dict[int, Shard],
    pairs: np.ndarray,
    config: MinHashConfig,
) -> dict:
    """Write NAME.npy, bool [n]: which of ``pairs`` int64 [n, 3] (row of ``shard``, other shard, row
    there) are duplicates. Memory holds the texts needed from two shards."""
    similar = np.zeros(len(pairs), bool)
    examples = []
    ours = folder.some_rows(shard, np.unique(pairs[:, 0]))
    for other in others:
        chosen = np.flatnonzero(pairs[:, 1] == other)
        theirs = folder.some_rows(others[other], np.unique(pairs[chosen, 2]))
        for number in chosen:
            a = ours[pairs[number, 0]]
            b = theirs[pairs[number, 2]]
            value = 1.0 if a.text == b.text else dedup.jaccard(a.text, b.text, config.width)
            similar[number] = value >= config.threshold
            if similar[number]:
                examples.append(
                    (
                        _draw(a.place + b.place),
                        f"{a.place} and {b.place}: {value:.3f}",
                        f"{excerpt(a.text, _EXCERPT // 2)}\n\n{excerpt(b.text, _EXCERPT // 2)}",
                    )
                )
    save(folder, name, similar)
    return {"examples": heapq.nsmallest(_EXAMPLES, examples)}


def without_documents(folder: Folder, name: str, shard: Shard, dropped: np.ndarray) -> dict:
    """Write the shard without the documents of ``dropped``, bool [documents]."""
    tally = Tally()
    kept = []
    for row, gone in zip(folder.rows(shard), dropped, strict=True):
        tally.came(row)
        if gone:
            tally.counts["dropped"]["near-duplicate of another document"] += 1
        else:
            kept.append(row)
            tally.stays(row)
    return tally.result([folder.write_rows(name, shard.source, kept)])


def paragraph_hashes(folder: Folder, name: str, shard: Shard, min_length: int) -> dict:
    """Write NAME.npy, uint64 [2, paragraphs]: hash and row of each paragraph, in order."""
    found = [dedup.paragraph_hashes(row.text, min_length) for row in folder.rows(shard)]
    rows = np.repeat(np.arange(len(found), dtype=np.uint64), [len(hashes) for hashes in found])
    save(folder, name, np.stack([np.concatenate(found), rows]))
    return {"paragraphs": len(rows)}


def repeated_paragraphs(
    folder: Folder, name: str, hashes: list[str], ranks: np.ndarray, part: int, parts: int
) -> dict:
    """Write NAME-SHARD.npy: the paragraphs of each shard, by their index in its file, that an
    earlier document of the corpus has too, for the hashes in this part of their range.

    Documents are ordered by rank; ``ranks`` [shards] are those of each shard's first one.
    """
    found = []
    for number, file in enumerate(hashes):
        values, rows = load(folder, file)
        inside = np.flatnonzero(values % np.uint64(parts) == part)
        rank = ranks[number] + rows[inside].astype(np.int64)
        found.append((values[inside], rank, np.full(len(inside), number), inside))
    values, rank, shards, indices = map(np.concatenate, zip(*found, strict=True))
    again = dedup.repeated(values, rank, indices)
    for number in range(len(hashes)):
        save(folder, f"{name}-{number:06d}", indices[again & (shards == number)])
    return {"repeated": int(again.sum())}


def without_paragraphs(
    folder: Folder,
    name: str,
    shard: Shard,
    hashes: str,
    repeated: list[str],
    min_length: int,
    min_left: int,
) -> dict:
    """Write the shard without its repeated paragraphs.

    ``repeated`` names the files that `repeated_paragraphs` wrote for this shard. A document is
    dropped if all its paragraphs were repeated and fewer than ``min_left`` characters are left, so
    no text is lost that occurs only once.
    """
    tally = Tally()
    kept = []
    values, rows = load(folder, hashes)
    dropped = np.zeros(len(values), bool)
    for file in repeated:
        dropped[load(folder, file)] = True
    bounds = np.searchsorted(rows, np.arange(shard.documents + 1, dtype=np.uint64))
    for number, row in enumerate(folder.rows(shard)):
        tally.came(row)
        flags = dropped[bounds[number] : bounds[number + 1]]
        if not flags.any():
            kept.append(row)
            tally.stays(row)
            continue
        text = dedup.without_paragraphs(row.text, flags, min_length)
        tally.took("changed", "paragraphs that came before", row.place, _change("", row.text, text))
        if flags.all() and len(text.strip()) < min_left:
            tally.took("dropped", f"fewer than {min_left} characters left", row.place, row.text)
        else:
            kept.append(Row(text, row.place))
            tally.stays(kept[-1])
    return tally.result([folder.write_rows(name, shard.source, kept)])


def save(folder: Folder, name: str, array: np.ndarray) -> None:
    """Write ``array`` as NAME.npy."""
    file = io.BytesIO()
    np.save(file, array)
    folder.write(name + ".npy", file.getvalue())


def load(folder: Folder, name: str) -> np.ndarray:
    """Read NAME.npy."""
    return np.load(io.BytesIO(folder.read(name + ".npy")))

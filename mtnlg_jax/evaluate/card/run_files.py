"""Read the files of a run that a card is made from."""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterable
from typing import Any

from etils import epath

from mtnlg_jax import storage
from mtnlg_jax.config import Config, from_json
from mtnlg_jax.data.provenance import paths_of, provenance
from mtnlg_jax.evaluate.card.facts import Rows
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train import manifest
from mtnlg_jax.train.metrics import scan_metrics

METRICS = "metrics.jsonl"
STARTS = "starts.jsonl"
CONFIG = "config.json"
DATA = "data.json"
ENVIRONMENT = "environment.json"
# In place of data.json, for runs of versions that did not write it.
DATA_FOLDERS = "folders of the data"
_WAYS = {
    "audit.json": "launch/audit.py",
    "bias.json": "launch/bias.py",
    "privacy.json": "launch/pretrain.py",
}


@dataclasses.dataclass(frozen=True)
class Note:
    """Something that is wrong with a file, for the reader of the card."""

    words: str
    file: str
    found: Any = None  # shown after the words


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run by their names in it, and what was wrong with some of them."""

    workdir: str
    config: Config
    content: dict[str, Any]  # JSON values, or Rows
    evaluations: tuple[str, ...]  # names in ``content``
    best: int | None  # step of the checkpoint that `load_run` loads; None: none is kept
    newest: int | None
    data: str  # DATA, DATA_FOLDERS, or "" where nothing is known
    notes: tuple[Note, ...]

    def has(self, name: str) -> bool:
        return name in self.content

    def record(self, step: int | None) -> str:
        """Return the name of the record of a checkpoint."""
        return f"checkpoints/{step}/{manifest.RECORD}"

    def rows(self, name: str, kind: str | None = None) -> list[dict]:
        """Return the objects of a file of JSON lines, those of ``kind`` where it is given."""
        found = [row for _, row in self.content.get(name, [])]
        return [row for row in found if kind is None or row.get("kind") == kind]

    @property
    def last_step(self) -> int:
        return max(row["step"] for row in self.rows(METRICS, "train"))


def read_run(workdir: str) -> RunFiles:
    """Read the files of the run in ``workdir``.

    Raises FileNotFoundError where that is not a run folder, and ValueError where the run has no
    finished step, or a file other than metrics.jsonl and starts.jsonl is damaged. Damaged lines of
    these two are left out, with a note.
    """
    _check(workdir)
    notes: list[Note] = []
    content: dict[str, Any] = {CONFIG: _json(workdir, CONFIG)}
    content[METRICS] = _metrics(os.path.join(workdir, METRICS), notes)
    if not any(row["kind"] == "train" for _, row in content[METRICS]):
        raise ValueError(
            f"run {workdir} has no finished step in {METRICS}, so there is nothing to describe; "
            "train it first"
        )
    content[STARTS] = _starts(os.path.join(workdir, STARTS), notes)
    for name in (ENVIRONMENT, DATA, *_WAYS):
        if os.path.exists(os.path.join(workdir, name)):
            content[name] = _json(workdir, name)
    evaluations = tuple(
        name for name in storage.list_files(workdir, "evaluations") if name.endswith(".json")
    )
    content |= {name: _json(workdir, name) for name in evaluations}
    best, newest = _checkpoints(workdir, content, notes)
    config = from_json(json.dumps(content[CONFIG]))
    data = DATA if DATA in content else _data_folders(config, content, best)
    if not data:
        words = "The run does not record counts of its data, and the data are no longer there."
        notes.append(Note(words, CONFIG))
    return RunFiles(workdir, config, content, evaluations, best, newest, data, tuple(notes))


def _check(workdir: str) -> None:
    way_out = "give --workdir of a launch/pretrain.py run"
    if is_remote(workdir):
        raise ValueError(f"{workdir} is not on this machine; copy the run here and {way_out}")
    if not os.path.exists(workdir):
        raise FileNotFoundError(f"{storage.missing(workdir)}; {way_out}")
    lacking = [
        name for name in (CONFIG, METRICS) if not os.path.isfile(os.path.join(workdir, name))
    ]
    if lacking:
        raise FileNotFoundError(
            f"{workdir} is not a run folder (no {' and no '.join(lacking)}); {way_out}"
        )


def _json(workdir: str, name: str) -> dict:
    path = os.path.join(workdir, name)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        again = _WAYS.get(name, "launch/evaluate.py" if name.startswith("evaluations/") else "")
        way_out = f"write it again with {again}, or remove it" if again else "restore it"
        raise ValueError(f"{path} is damaged ({error}); {way_out}") from None
    return found


def _metrics(path: str, notes: list[Note]) -> Rows:
    damaged = scan_metrics(path)[1]
    _note_damage(METRICS, list(damaged), notes)
    rows: Rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.strip(b"\0 \t\r\n")
            if line and number not in damaged:
                rows.append((number, json.loads(line)))
    return rows


def _starts(path: str, notes: list[Note]) -> Rows:
    if not os.path.exists(path):
        return []
    rows: Rows = []
    damaged = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError
                rows.append((number, found))
            except (ValueError, RecursionError):
                damaged.append(number)
    _note_damage(STARTS, damaged, notes)
    return rows


def _note_damage(name: str, lines: list[int], notes: list[Note]) -> None:
    if lines:
        words = f"Lines of {name} that could not be read and are left out:"
        notes.append(Note(words, name, lines))


def _checkpoints(
    workdir: str, content: dict[str, Any], notes: list[Note]
) -> tuple[int | None, int | None]:
    """Add the records of the whole checkpoints; return (best step, newest step)."""
    folder = epath.Path(storage.absolute(workdir)) / "checkpoints"
    steps = []
    for step in manifest.finished(folder):
        record, damage = manifest.read_record(folder / str(step))
        if record is None:
            words = f"A checkpoint is damaged ({damage}) and left out. It is of step"
            notes.append(Note(words, f"checkpoints/{step}", step))
            continue
        content[f"checkpoints/{step}/{manifest.RECORD}"] = record
        steps.append(step)
    if not steps:
        return None, None
    best = manifest.best(folder)
    return (best if best in steps else steps[-1]), steps[-1]


def _data_folders(config: Config, content: dict[str, Any], step: int | None) -> str:
    """Read the counts of the data where the run found them, if they are still those of the run."""
    folder = content.get(ENVIRONMENT, {}).get("folder") or os.getcwd()
    there = [path if is_remote(path) else os.path.join(folder, path) for path in paths_of(config)]
    record = content.get(f"checkpoints/{step}/{manifest.RECORD}", {})
    used = set(record.get("meta", {}).get("identity", {}).get("data", {}).values())
    try:
        found = provenance(there)
    except (OSError, ValueError):
        return ""
    kept = [each if _is_same(each, used) else {"path": each["path"]} for each in found]
    if not any("prepared" in each or "tokens" in each for each in kept):
        return ""
    content[DATA_FOLDERS] = {"sources": kept}
    return DATA_FOLDERS


def _is_same(origin: dict, used: set[str]) -> bool:
    """Return whether the tokens of ``origin`` are among those that the run has ``used``."""
    if "prepared" not in origin:
        return True
    hashes = {origin["prepared"]["train"].get("sha256")}
    hashes |= set(origin.get("report", {}).get("outputs", {}).values())
    return bool(hashes & used)


# The folders of an absolute path in front of its last name, but not the // of a URL.
_FOLDERS = re.compile(
    r"(?<![\w.~:/-])(?:~|/)(?:[^/\s'\",=:]*/)+(?=[^/\s'\",=:])|(?<![\w.~:/-])/(?=\w)"
)


def without_folders(path: str) -> str:
    """Return the last name of an absolute local path; other paths and URLs as they are."""
    if path.startswith(("/", "~")):
        return os.path.basename(path.rstrip("/"))
    return _FOLDERS.sub("", path)


def command_without(command: str, keys: Iterable[str]) -> str:
    """Return a command without the values of the settings ``keys``."""
    names = "|".join(map(re.escape, keys))
    words = [re.sub(f"^(.*(?:{names})=).*", r"\1...", word) for word in shlex.split(command)]
    return shlex.join(words)


def command_without_folders(command: str) -> str:
    """Return a command with the last name alone of each absolute path in it."""
    words = []
    for word in shlex.split(command):
        # Flags hold paths behind one or two equals signs: --set=data.path=/data/web.
        words.append("=".join(map(without_folders, word.split("="))))
    return shlex.join(words)

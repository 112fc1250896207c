"""Where the data of a run come from, in a form that a run keeps in its own folder (data.json).

Prepared folders may be moved or removed after training. A run therefore keeps the counts of their
prepared.json and, of a recipe's output, of report.json, but no text of theirs: neither examples
nor the names of files.
"""

import json
from collections.abc import Iterable

from mtnlg_jax import storage
from mtnlg_jax.config import Config
from mtnlg_jax.data.store.megatron import open_megatron, prefix_of
from mtnlg_jax.data.store.prepared import PREPARED

CANARIES = "canaries.json"
_OF_PREPARED = ("fingerprint", "tokenizer", "train", "heldout", "sources", "settings", "input")
_OF_REPORT = ("name", "settings", "blend", "train_tokens", "tokens", "outputs")
_OF_STAGE = ("name", "documents", "bytes", "dropped", "changed", "tables", "note")


def paths_of(config: Config) -> list[str]:
    """Return the data of a run: the paths of all its stages, each once."""
    blends = [stage.blend or config.data.sources for stage in config.train.stages]
    return list(dict.fromkeys(path for blend in blends for path, _ in blend))


def provenance(paths: Iterable[str]) -> list[dict]:
    """Return what is recorded of each prepared folder or Megatron prefix of ``paths``, JSON-able.

    The keys are path and, where there is such a file, prepared, report and canaries; of a Megatron
    prefix documents and tokens. Of one source of a recipe's output, OUT/sources/NAME, the files are
    those of OUT. A damaged file counts as missing, since a run needs none of them.
    """
    return [_provenance(path) for path in dict.fromkeys(paths)]


def _provenance(path: str) -> dict:
    if prefix_of(path):
        tokens = open_megatron(path)
        return {"path": path, "documents": tokens.documents, "tokens": len(tokens)}
    home, _, name = path.rstrip("/").rpartition("/sources/")
    if not home or "/" in name or not storage.exists(home, PREPARED):
        home = path
    parts = {
        "prepared": _prepared(_content(home, PREPARED)),
        "report": _report(_content(home, "report.json")),
        "canaries": _canaries(_content(home, CANARIES)),
    }
    return {"path": path} | {name: part for name, part in parts.items() if part}


def _content(location: str, name: str) -> dict:
    try:
        found = json.loads(storage.read_file(location, name) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _prepared(info: dict) -> dict:
    kept = {key: info[key] for key in _OF_PREPARED if key in info}
    if isinstance(read := kept.get("input"), dict):
        kept["input"] = read | {"notes": _counts(read.get("notes", {}))}
    return kept


def _report(info: dict) -> dict:
    kept = {key: info[key] for key in _OF_REPORT if key in info}
    if info.get("stages"):
        kept["stages"] = [
            {key: stage[key] for key in _OF_STAGE if key in stage} for stage in info["stages"]
        ]
    if inputs := info.get("inputs"):
        size = sum(entry.get("size", 0) for entry in inputs.values())
        kept["inputs"] = {"files": len(inputs), "bytes": size}
    return kept


def _canaries(info: dict) -> dict:
    """Return the number of planted texts, of their copies and of controls without a copy; the texts
    themselves are secrets."""
    copies = [each.get("copies", 0) for each in info.get("canaries") or []]
    planted = sum(count > 0 for count in copies)
    counts = {"planted": planted, "copies": sum(copies), "controls": len(copies) - planted}
    return counts if copies else {}


def _counts(notes: dict) -> dict[str, int]:
    return {reason: noted["count"] for reason, noted in notes.items()}

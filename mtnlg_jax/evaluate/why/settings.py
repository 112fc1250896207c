"""The settings of each step of a run, from the starts that it recorded."""

import json
import os
from collections.abc import Sequence

from mtnlg_jax import storage
from mtnlg_jax.config import Config, from_json, override
from mtnlg_jax.config.load import map_paths
from mtnlg_jax.train.goodput import starts_of

# Settings that --set may replace, beside those of mesh: where the data are. Others would make it
# another step.
FREE = ("data.path", "data.blend", "data.tokenizer", "data.heldout", "train.init")


class Settings:
    """The settings of a run folder by step.

    A start of a run is a line of starts.jsonl: the step at which it began, and the settings that it
    changed. A step was last run by the last start that began at or before it.
    """

    def __init__(self, workdir: str, entries: Sequence[str] = ()):
        """``entries`` are KEY=VALUE of FREE or of mesh.

        Raises FileNotFoundError where ``workdir`` is not a run, and ValueError on another key.
        """
        for entry in entries:
            key = entry.partition("=")[0].strip()
            if key not in FREE and not key.startswith("mesh."):
                raise ValueError(
                    f"--set={entry} would make another step of it; only mesh.KEY and "
                    f"{', '.join(FREE)} can be set"
                )
        content = storage.read_file(workdir, "config.json")
        if content is None:
            reason = storage.lacking(workdir, "config.json")
            raise FileNotFoundError(
                f"--workdir={workdir} is not a run of launch/pretrain.py: {reason}"
            )
        self._entries = tuple(entries)
        self._starts = _starts(storage.read_file(workdir, "starts.jsonl") or b"")
        # Without a record of the starts all steps had the settings of the last one.
        if not self._starts:
            self._starts = [(0, json.loads(content), "")]

    def at(self, step: int) -> Config:
        """Return the settings of the step from ``step`` done ones to the next.

        The data's relative paths are those of the folder in which the run was started, unless they
        exist here.
        """
        _, given, folder = self._start(step)
        config = from_json(json.dumps(given))
        config = _found_from(config, folder)
        return override(config, *self._entries)

    def begins(self, step: int) -> bool:
        """Return whether the start that ran the step from ``step`` on began with it."""
        return self._start(step)[0] == step

    def _start(self, step: int) -> tuple[int, dict, str]:
        before = [start for start in self._starts if start[0] <= step]
        return (before or self._starts)[-1]


def _starts(content: bytes) -> list[tuple[int, dict, str]]:
    """Return (first step, all settings, folder) of each start; [] if one cannot be made out."""
    found: list[tuple[int, dict, str]] = []
    try:
        for record in starts_of(content):
            if "config" in record:
                settings = record["config"]
            else:
                settings = json.loads(json.dumps(found[-1][1]))
                for key, (_, now) in record["changed"].items():
                    _put(settings, key.split("."), now)
            found.append((int(record["step"]), settings, str(record.get("folder", ""))))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return []
    return found


def _put(settings: dict, path: list[str], value: object) -> None:
    for key in path[:-1]:
        settings = settings[key]
    settings[path[-1]] = value


def _found_from(config: Config, folder: str) -> Config:
    """Return ``config`` with relative paths below ``folder`` where they do not exist here."""

    def found(path: str) -> str:
        if not path or storage.is_remote(path) or os.path.isabs(path):
            return path
        # Megatron's data are named by the prefix of their files.
        ends = ("", ".idx", ".bin")
        below = os.path.join(folder, path)
        here = any(os.path.exists(path + end) for end in ends)
        there = any(os.path.exists(below + end) for end in ends)
        return below if there and not here else path

    return map_paths(config, found)

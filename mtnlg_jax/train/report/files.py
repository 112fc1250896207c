"""What the report of a run is made from: the files of its folder."""

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from mtnlg_jax.config.privacy_rules import noise_keys
from mtnlg_jax.storage import lacking
from mtnlg_jax.train.goodput import read_starts
from mtnlg_jax.train.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """Records of metrics.jsonl, lines of starts.jsonl, and the settings of the last start."""

    workdir: str
    records: list[dict]
    starts: list[dict]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return os.path.basename(os.path.abspath(self.workdir))

    def of_kind(self, kind: str) -> list[dict]:
        """Return the records of ``kind``, in their order."""
        return [record for record in self.records if record["kind"] == kind]


def read_run(workdir: str, records: list[dict] | None = None) -> RunFiles:
    """Read the files of a run's folder; it may be running. ``records`` are those of its
    metrics.jsonl, where they are in memory.

    Raises ValueError where there is no config.json, or one that is damaged.
    """
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{workdir} is not the folder of a run: {lacking(workdir, 'config.json')}; give the "
            "--workdir of launch/pretrain.py"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; start the run again to renew it") from None
    if records is None:
        records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return RunFiles(workdir, records, read_starts(workdir), config)


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values of a tree of dicts by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def hidden_keys(config: dict[str, Any], starts: Iterable[dict]) -> set[str]:
    """Return the settings of a run's ``config`` that nobody else may see: `noise_keys` of any of
    its ``starts``."""
    hidden = noise_keys(config)
    for start in starts:
        hidden |= noise_keys(start.get("config") or {})
        secrets = (start.get("changed") or {}).get("optimizer.dp_secret", ())
        # One of the starts took its noise from the seed.
        if any(secrets) and not all(secrets):
            hidden.add("train.seed")
    return hidden


def public(run: RunFiles) -> dict[str, Any]:
    """Return the settings of the last start by dotted key, without the `hidden_keys`."""
    hidden = hidden_keys(run.config, run.starts)
    return {key: value for key, value in flat(run.config).items() if key not in hidden}


def differences(one: RunFiles, other: RunFiles) -> list[tuple[str, Any, Any]]:
    """Return (key, value of ``one``, value of ``other``) of each setting in which they differ;
    a setting that one of them lacks or hides is None there."""
    ours = public(one)
    theirs = public(other)
    return [
        (key, ours.get(key), theirs.get(key))
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]

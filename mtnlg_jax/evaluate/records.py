"""What every file of results says of itself."""

import datetime
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from mtnlg_jax.train.describe import commit
from mtnlg_jax.train.metrics import environment


def header(kind: str, step: int | None, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the keys that every file of results has: its kind, the step of the checkpoint, the
    commit of the code, the versions of libraries, those of ``packages`` as well, and the time."""
    versions = environment()["versions"]
    return {
        "kind": kind,
        "step": step,
        "commit": commit(),
        "versions": versions | {name: metadata.version(name) for name in packages},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

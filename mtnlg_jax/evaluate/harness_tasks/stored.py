"""Results files: where a run keeps its own, and what an earlier one holds."""

import json
from typing import Any

from mtnlg_jax import storage
from mtnlg_jax.evaluate.harness_tasks.run import KIND

FOLDER = "evaluations"  # of a run


def place(workdir: str, step: int) -> tuple[str, str]:
    """Return folder and name of the results of a checkpoint, in its run."""
    return storage.join(workdir, FOLDER), f"tasks_{step}.json"


def read_results(path: str) -> dict[str, Any]:
    """Return a results file. Raise ValueError if it is not one with values of rows."""
    with open(path, "rb") as file:
        raw = file.read()
    try:
        results = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("kind") != KIND or not results.get("tasks"):
        raise ValueError(
            f'{path} is not a results file of --tasks (kind "{KIND}"); give one that '
            "launch/evaluate.py --tasks wrote"
        )
    for name, task in results["tasks"].items():
        if "docs" not in task.get("per_row", {}):
            raise ValueError(f"{path} has no values of rows (per_row) for {name}; write it anew")
    return results


def earlier(folder: str, name: str) -> dict[str, Any]:
    """Return the tasks that a results file holds, {} if it does not exist.

    Raise ValueError if it is another file.
    """
    raw = storage.read_file(folder, name)
    if raw is None:
        return {}
    try:
        found = json.loads(raw)
        if found["kind"] != KIND:
            raise ValueError(found["kind"])
        return dict(found["tasks"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{storage.join(folder, name)} is not a results file of --tasks; remove it, or name "
            "another with --output"
        ) from None

"""Results files: where a run keeps its own, and what an earlier one holds."""

import json
from typing import Any

from mtnlg_jax import storage
from mtnlg_jax.evaluate.harness_tasks.run import KIND

FOLDER = "evaluations"  # of a run
# What a file says of the code that scored a task.
OF_CODE = ("commit", "created", "versions")
# What makes two results of a task measurements of different things.
OF_RUN = ("rows", "num_fewshot", "limit", "seed", "held", "prompt_hash")


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
            raise ValueError(f"{path} has no values of rows (per_row) for {name}; write it again")
    return results


def earlier(folder: str, name: str) -> dict[str, Any]:
    """Return the tasks that a results file holds, each with `OF_CODE`; {} if it does not exist.

    Raise ValueError if it is another file.
    """
    raw = storage.read_file(folder, name)
    if raw is None:
        return {}
    try:
        found = json.loads(raw)
        if found["kind"] != KIND:
            raise ValueError(found["kind"])
        code = {key: found.get(key) for key in OF_CODE}
        return {task: code | values for task, values in found["tasks"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{storage.join(folder, name)} is not a results file of --tasks; remove it, or name "
            "another with --output"
        ) from None


def replaced(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return, for each task that ``now`` replaces, what its earlier results were of.

    Left out are tasks that were scored on the same prompts and in the same way.
    """
    found = {}
    for name in before.keys() & now.keys():
        different = [key for key in OF_RUN if before[name].get(key) != now[name].get(key)]
        if different:
            shown = (f"{key}={before[name].get(key)}" for key in different if key != "prompt_hash")
            found[name] = ", ".join(shown) or "other prompts"
    return found

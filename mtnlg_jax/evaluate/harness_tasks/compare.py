"""Differences between two results files, with tests that pair the rows.

Accuracies: the exact test of McNemar (1947), a binomial test of the rows on which the two differ.
Other values of rows, such as log-likelihoods: the paired t test (Student 1908).
"""

from collections import Counter
from typing import Any


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one record for each metric of each task that both results have.

    Rows are paired by their content; ``rows`` counts those that both have, ``only_here`` and
    ``only_there`` the others, and ``same_prompts`` whether every prompt is equal. ``difference`` is
    ours minus theirs over all rows of each; ``p_value`` is two-sided over the pairs, None where
    nothing can be tested.
    """
    found = []
    for name, task in ours["tasks"].items():
        other = _same_task(name, task["num_fewshot"], theirs["tasks"])
        if other is None:
            continue
        pairs, here, there = _pair(task["per_row"]["docs"], other["per_row"]["docs"])
        for metric, value in task["metrics"].items():
            theirs_value = other["metrics"].get(metric, {}).get("value")
            if theirs_value is None or value["value"] is None:
                continue
            test, p_value = _test(
                [task["per_row"][metric][i] for i, _ in pairs],
                [other["per_row"][metric][j] for _, j in pairs],
            )
            found.append(
                {
                    "task": name,
                    "metric": metric,
                    "value": value["value"],
                    "other": theirs_value,
                    "difference": value["value"] - theirs_value,
                    "test": test,
                    "p_value": p_value,
                    "rows": len(pairs),
                    "only_here": here,
                    "only_there": there,
                    "same_prompts": task["prompt_hash"] == other["prompt_hash"],
                }
            )
    return found


def check(shots: dict[str, int], theirs: dict[str, Any]) -> None:
    """Raise ValueError if a results file has none of the tasks, {name: number of examples}."""
    if not any(_same_task(name, count, theirs["tasks"]) for name, count in shots.items()):
        asked = ", ".join(f"{name} with {count} examples" for name, count in shots.items())
        have = (f"{name} with {task['num_fewshot']}" for name, task in theirs["tasks"].items())
        raise ValueError(f"--compare has none of the tasks {asked}; it has {', '.join(have)}")


def _same_task(name: str, count: int, tasks: dict[str, Any]) -> dict[str, Any] | None:
    """Return the results of the same task and number of examples: NAME is NAME@0 of one number."""
    for other, task in tasks.items():
        same = other.partition("@")[0] == name.partition("@")[0]
        if same and task["num_fewshot"] == count:
            return task
    return None


def _pair(ours: list[str], theirs: list[str]) -> tuple[list[tuple[int, int]], int, int]:
    """Return the places of equal rows, and how many each side has alone. Repeated rows pair in
    order."""
    places: dict[str, list[int]] = {}
    for number, row in enumerate(theirs):
        places.setdefault(row, []).append(number)
    seen: Counter = Counter()
    pairs = []
    for number, row in enumerate(ours):
        if seen[row] < len(places.get(row, [])):
            pairs.append((number, places[row][seen[row]]))
            seen[row] += 1
    return pairs, len(ours) - len(pairs), len(theirs) - len(pairs)


def _test(ours: list[Any], theirs: list[Any]) -> tuple[str | None, float | None]:
    """Return (name, two-sided p) of the paired test for values of rows."""
    if not ours or any(isinstance(each, list | str | None) for each in [*ours, *theirs]):
        return None, None  # a metric of all rows together, such as F1
    if set(ours) | set(theirs) <= {0, 1}:
        return "McNemar", mcnemar(ours, theirs)
    return "paired t", paired_t(ours, theirs)


def mcnemar(ours: list[int], theirs: list[int]) -> float:
    """Return the two-sided exact p that both are right equally often, from 0 and 1 by row."""
    from scipy import stats

    gained = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_t(ours: list[float], theirs: list[float]) -> float | None:
    """Return the two-sided p that the mean of the differences is 0; None for one row."""
    from scipy import stats

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:  # no variance
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)

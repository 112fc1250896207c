"""Results of tasks as a table, and as JSON."""

import json
import re
from collections.abc import Sequence
from typing import Any

# A list of plain values, which stands on one line.
_LIST = re.compile(r"\[\s*\n[^\[\]{}]*?\n\s*\]")
_HEAD = ("task", "shots", "rows", "metric", "value", "stderr")


def as_json(results: dict[str, Any]) -> bytes:
    """Return a results file: sorted keys, and the values of rows on one line each."""
    text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return (_LIST.sub(lambda match: re.sub(r"\n\s*", " ", match[0]), text) + "\n").encode()


def log_lines(tasks: dict[str, dict[str, Any]]) -> bytes:
    """Take the records of rows out of ``tasks``, and return them as JSON lines."""
    records = [record for task in tasks.values() for record in task.pop("log", [])]
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode()


def describe(results: dict[str, Any]) -> str:
    """Return the report of results for a person."""
    lines = [_HEAD]
    notes = []
    for name, task in results["tasks"].items():
        for metric, found in task["metrics"].items():
            error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
            first = metric == next(iter(task["metrics"]))
            left = (name, str(task["num_fewshot"]), f"{task['rows']:,}") if first else ("", "", "")
            value = "infinite" if found["value"] is None else f"{found['value']:.4f}"
            lines.append((*left, metric, value, error))
        notes += _notes(name, task)
    step = results.get("step")
    head = [] if step is None else [f"checkpoint of step {step}"]
    return "\n".join([*head, *_table(lines, left=(0, 3)), *notes])


def _table(lines: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> list[str]:
    """Return the lines of a table. ``left``: columns of words."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _percentages(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def _notes(name: str, task: dict[str, Any]) -> list[str]:
    notes = []
    if "predicted_classes" in task:
        what = "" if "balanced_accuracy" in task else "choice "
        notes.append(
            f"{name}: predicted {what}{_percentages(task['predicted_classes'])}; "
            f"right {what}{_percentages(task['target_classes'])}"
        )
    if "balanced_accuracy" in task:
        notes.append(f"{name}: mean recall of the classes {task['balanced_accuracy']:.4f}")
    for fields, parts in task.get("breakdown", {}).items():
        shown = (f"{part} {found['value']:.4f}" for part, found in parts.items())
        notes.append(f"{name}, accuracy by {fields}: {', '.join(shown)}")
    if "warning" in task:
        notes.append(f"{name}: warning: {task['warning']}")
    if "left_out" in task:
        left = task["left_out"]
        notes.append(f"{name}: {left['rows']} row(s) left out; the first: {left['first']}")
    if task.get("equal_examples"):
        notes.append(
            f"{name}: {task['equal_examples']} row(s) have an equal row among those that examples "
            f"come from ({task['fewshot_source']}); it was never shown"
        )
    if task.get("cut_prompts"):
        notes.append(
            f"{name}: {task['cut_prompts']} of {task['rows']} prompts are longer than the model's "
            "context and lost their beginning"
        )
    return notes


def describe_differences(found: list[dict[str, Any]], path: str) -> str:
    """Return the table of `compare.compare` for a person."""
    lines = [("task", "metric", "value", "other", "difference", "p", "test", "pairs")]
    notes = []
    for each in found:
        p_value = "" if each["p_value"] is None else f"{each['p_value']:.4g}"
        lines.append(
            (
                each["task"],
                each["metric"],
                f"{each['value']:.4f}",
                f"{each['other']:.4f}",
                f"{each['difference']:+.4f}",
                p_value,
                each["test"] or "none",
                f"{each['rows']:,}",
            )
        )
        only = (each["only_here"], each["only_there"])
        if any(only):
            notes.append(
                f"{each['task']}: the rows differ: {each['rows']} are in both, {only[0]} only "
                f"here, {only[1]} only there; the test is over those in both"
            )
        elif not each["same_prompts"]:
            notes.append(f"{each['task']}: the prompts differ, on the same rows")
    return "\n".join([f"against {path}:", *_table(lines, left=(0, 1, 6)), *dict.fromkeys(notes)])

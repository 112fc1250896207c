"""Plots of results of tasks, as PNG: shares of classes, and accuracy by subcase and shots."""

import io
from typing import Any

from mtnlg_jax import storage

LINES = ("o-", "s-", "^-", "o--", "s--", "^--")


def write_plots(folder: str, tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Write the plots that have data to a folder or URL, and return the names of their files."""
    names = []
    for name, figure in figures(tasks).items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
        storage.write_file(folder, name, content.getvalue())
        names.append(name)
    return names


def figures(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return {file name: Figure}."""
    found = {}
    classes = {name: task for name, task in tasks.items() if "balanced_accuracy" in task}
    if classes:
        found["predicted_classes.png"] = _shares(classes)
    by_task: dict[str, dict[int, dict[str, Any]]] = {}
    for name, task in tasks.items():
        by_task.setdefault(name.partition("@")[0], {})[task["num_fewshot"]] = task
    for name, by_shots in by_task.items():
        for fields in next(iter(by_shots.values())).get("breakdown", {}):
            table = {
                shots: task["breakdown"][fields]
                for shots, task in sorted(by_shots.items())
                if fields in task.get("breakdown", {})
            }
            draw = _lines if len(next(iter(table.values()))) <= len(LINES) else _cells
            found[f"{name}_by_{fields.replace('/', '_')}.png"] = draw(name, fields, table)
    return found


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot, which wants a display and keeps its figures.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _shares(tasks: dict[str, dict[str, Any]]) -> Any:
    """Return bars of predicted classes beside those of the targets."""
    figure, axes = _figure(7, 1 + 0.6 * len(tasks))
    for place, task in enumerate(reversed(tasks.values())):
        for offset, key in ((0.2, "predicted_classes"), (-0.2, "target_classes")):
            left = 0.0
            for number, (name, share) in enumerate(task[key].items()):
                color = f"C{number}"
                alpha = 1.0 if offset > 0 else 0.45
                axes.barh(place + offset, share, 0.36, left, color=color, alpha=alpha)
                if share > 0.12:
                    axes.text(left + share / 2, place + offset, name, ha="center", va="center")
                left += share
    axes.set_yticks(range(len(tasks)), reversed(tasks))
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of rows: predicted (above), right (below)")
    return figure


def _lines(name: str, fields: str, table: dict[int, dict[str, Any]]) -> Any:
    """Return a line for each part, over the number of shots."""
    figure, axes = _figure(7, 4)
    shots = list(table)
    parts = sorted({part for found in table.values() for part in found}, key=_by_last)
    for number, (part, style) in enumerate(zip(parts, LINES, strict=False)):
        # Apart by a little, or equal accuracies would hide each other.
        places = [place + 0.015 * (number - len(parts) / 2) for place in range(len(shots))]
        values = [table[count][part]["value"] for count in shots]
        errors = [table[count][part]["stderr"] or 0.0 for count in shots]
        axes.errorbar(places, values, errors, fmt=style, capsize=3, label=part)
    axes.set_xticks(range(len(shots)), shots)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("examples in the prompt")
    axes.set_ylabel(f"accuracy on {name}")
    axes.set_title(f"by {fields}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _by_last(part: str) -> tuple[str, str]:
    """Sort entailment before non-entailment, so that each has a style of line of its own."""
    return part.rpartition("/")[2], part


def _cells(name: str, fields: str, table: dict[int, dict[str, Any]]) -> Any:
    """Return a heat map of accuracies, a row for each part and a column for each number."""
    parts = sorted({part for found in table.values() for part in found})
    figure, axes = _figure(4 + 0.8 * len(table), 1.5 + 0.24 * len(parts))
    values = [
        [table[count].get(part, {"value": float("nan")})["value"] for count in table]
        for part in parts
    ]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(table)), table)
    axes.set_yticks(range(len(parts)), parts, fontsize="small")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "white" if value < 0.15 or value > 0.85 else "black"
            text = f"{value:.2f}"
            axes.text(column, row, text, color=color, ha="center", va="center", fontsize="small")
    axes.set_xlabel("examples in the prompt")
    axes.set_title(f"{name}: accuracy by {fields}")
    figure.colorbar(image, ax=axes)
    return figure

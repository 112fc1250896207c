"""A certificate as a table and as JSON."""

import math
import textwrap
from collections.abc import Iterable
from typing import Any

from mtnlg_jax.certify import figures, meshes, updates
from mtnlg_jax.certify.certificate import Certificate
from mtnlg_jax.certify.figures import Figure, Tolerance
from mtnlg_jax.certify.resume import SAVED
from mtnlg_jax.train import describe
from mtnlg_jax.train.trackers.following import public_settings

KIND = "certificate"
FILE = "certificate.json"
_COLUMN = 12  # least width of a column of differences
_LINE = 110  # width of the reasons
# Columns of the table of the run that moves.
_OF_RUN = {
    figures.RESTORED: "state",
    figures.NEXT: "next losses",
    figures.NORMS: "grad norms",
    figures.MOMENTS: "moments",
}
_OF_MESH = (figures.LOSS, figures.GRADIENT, figures.LOADS, *updates.CHECKS)
_SHOWN = 8  # figures beyond their tolerances, in the verdict


def to_json(certificate: Certificate) -> dict[str, Any]:
    """Return the content of certificate.json."""
    copy = certificate.copy
    return {
        **describe.header(KIND, None),
        "command": describe.command_line(),
        "config": certificate.config.name,
        "settings": public_settings(certificate.config),
        "within": certificate.within,
        "suspects": certificate.suspects,
        "seconds": round(certificate.seconds, 1),
        "processor_seconds": round(certificate.processor_seconds, 1),
        "devices": certificate.devices,
        "meshes": copy.meshes,
        "pairs": meshes.covered_pairs(copy.meshes),
        "moved_to": copy.other,
        "shrunk": copy.notes,
        "tolerances": [
            {"check": check, "types": types, "tolerance": each.value, "why": each.why}
            for (check, types), each in certificate.tolerances.items()
        ],
        "left_out": certificate.left_out,
        "figures": [_as_dict(figure) for figure in certificate.figures],
    }


def _as_dict(figure: Figure) -> dict[str, Any]:
    difference = figure.difference
    # JSON has no NaN and no infinity.
    told = difference if difference is not None and math.isfinite(difference) else None
    return {
        "check": figure.check,
        "name": figure.name,
        "mesh": figure.mesh,
        "objective": figure.objective,
        "types": figure.types,
        "difference": told,
        "tolerance": figure.tolerance,
        "within": figure.within,
        "problem": figure.problem,
    }


def render(certificate: Certificate) -> str:
    """Return the table that is printed: the largest relative difference of every figure to one
    device, columns by objective and types, and what it means."""
    found = certificate.figures
    notes = (
        textwrap.fill(note, _LINE, subsequent_indent=" " * 8) for note in certificate.copy.notes
    )
    lines = [f"certificate of {certificate.config.name}", *notes]
    for mesh in dict.fromkeys(figure.mesh for figure in found if figure.check == figures.LOSS):
        chosen = [each for each in found if each.mesh == mesh]
        lines += ["", *_of_mesh(mesh, chosen)]
    for part in (
        _of_run(found),
        _of_exchange(certificate),
        _tolerances(certificate),
        _verdict(certificate),
    ):
        lines += ["", *part] if part else []
    return "\n".join(lines)


def _of_mesh(mesh: str, found: list[Figure]) -> list[str]:
    """Return the table of one mesh: a row for the loss, then one for each tensor; columns for
    gradients by objective and types, then for what comes of the same gradients."""
    kept = [each for each in found if each.check in _OF_MESH]
    heads = list(dict.fromkeys(map(_head, kept)))
    cells: dict[str, dict[str, Figure]] = {}
    for each in kept:
        tensor = each.check == figures.GRADIENT or each.check in updates.CHECKS
        label = each.name if tensor or each.check == figures.LOSS else each.check
        cells.setdefault(label, {})[_head(each)] = each
    rows = [["compared with one device", *heads]]
    for label, row in cells.items():
        rows.append([f"  {label}", *(_cell(row.get(head)) for head in heads)])
    limits = {_head(each): each for each in kept if each.check not in (figures.LOSS, figures.LOADS)}
    if limits:
        told = (_number(limits[head].tolerance) if head in limits else "" for head in heads)
        rows.append(["  tolerance of tensors", *told])
    return [f"on {mesh}", *_aligned(rows)]


def _head(figure: Figure) -> str:
    """Return the column of ``figure`` in the table of a mesh."""
    if figure.check in updates.CHECKS:
        return figure.check
    return f"{figure.objective}, {figure.types}"


def _of_run(found: Iterable[Figure]) -> list[str]:
    """Return the table of the run that moves: the largest of each kind of figure."""
    kept = [each for each in found if each.check in _OF_RUN]
    if not kept:
        return []
    rows = [[f"a run saved after step {SAVED}", *_OF_RUN.values()]]
    for where in dict.fromkeys((each.mesh, each.types) for each in kept):
        here = [each for each in kept if (each.mesh, each.types) == where]
        cells = [_worst(each for each in here if each.check == check) for check in _OF_RUN]
        rows.append([f"  {', '.join(where)}", *map(_cell, cells)])
    return _aligned(rows)


def _of_exchange(certificate: Certificate) -> list[str]:
    if figures.EXCHANGE in certificate.left_out:
        text = f"{figures.EXCHANGE}: left out; {certificate.left_out[figures.EXCHANGE]}"
        return textwrap.wrap(text, _LINE, subsequent_indent="  ")
    kept = [each for each in certificate.figures if each.check == figures.EXCHANGE]
    worst = _worst(kept)
    if worst is None:
        return []
    return [f"{figures.EXCHANGE} ({worst.mesh}, {len(kept)} tensors): {_cell(worst)}"]


def _tolerances(certificate: Certificate) -> list[str]:
    """Return the tolerances, those with the same reason together."""
    together: dict[Tolerance, dict[str, list[str]]] = {}
    for (check, types), each in certificate.tolerances.items():
        together.setdefault(each, {}).setdefault(types, []).append(check)
    lines = ["tolerances, relative to the largest number of the tensor"]
    for each, uses in together.items():
        of = "; ".join(f"{', '.join(checks)} in {types}" for types, checks in uses.items())
        text = f"{_number(each.value):8}{of}: {each.why}"
        lines += textwrap.wrap(text, _LINE, initial_indent="  ", subsequent_indent=" " * 10)
    return lines


def _verdict(certificate: Certificate) -> list[str]:
    outside = certificate.outside()
    number = len(certificate.figures)
    took = f"{certificate.seconds:.0f} s ({certificate.processor_seconds:.0f} s of processor time)"
    if not outside:
        return [f"WITHIN all tolerances: {number} figures, {took}"]
    lines = [f"OUTSIDE: {len(outside)} of {number} figures, {took}"]
    for name in certificate.suspects:
        lines.append(f"  look at {name}: its part of the plan is wrong")
    # Specs and gradients first, those that are off the most: a wrong sum is seen in its own tensor.
    order = {figures.PLAN: 0, figures.GRADIENT: 1}
    outside.sort(key=lambda each: (order.get(each.check, 2), -_size(each)))
    for each in outside[:_SHOWN]:
        where = ", ".join(filter(None, [each.objective, each.types, each.mesh]))
        told = each.problem or f"{_number(_size(each))} is above {_number(each.tolerance)}"
        lines.append(f"  {each.check} {each.name} ({where}): {told}")
    if len(outside) > _SHOWN:
        lines.append(f"  and {len(outside) - _SHOWN} more")
    return lines


def _size(figure: Figure) -> float:
    difference = figure.difference
    return math.inf if difference is None or math.isnan(difference) else difference


def _worst(found: Iterable[Figure]) -> Figure | None:
    """Return the figure that is furthest beyond its tolerance, or nearest to it; None of none."""
    kept = list(found)
    return max(kept, key=lambda each: (not each.within, _size(each))) if kept else None


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.difference is None:
        return "failed !"
    return _number(figure.difference) + ("" if figure.within else " !")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Return ``rows`` as lines in columns, all but the first one to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = row
        cells = [first.ljust(widths[0])]
        for cell, width in zip(rest, widths[1:], strict=True):
            cells.append(cell.rjust(max(width, _COLUMN)))
        lines.append("  ".join(cells).rstrip())
    return lines

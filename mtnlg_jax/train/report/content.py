"""The parts of a report: charts, bars of goodput, spikes, samples and starts."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mtnlg_jax.train import goodput, samples, stragglers
from mtnlg_jax.train.metrics import TRAINING_LOSSES, training_loss
from mtnlg_jax.train.plots import OBJECTIVES, losses_of_sources, scores_of_tasks
from mtnlg_jax.train.report.charts import Chart, Curve, chart
from mtnlg_jax.train.report.files import RunFiles

# Kinds with parts of their own on the page; the numbers of all others get a chart each.
_KNOWN = {"train", "eval", "tasks", goodput.KIND, samples.KIND, stragglers.KIND}
_KNOWN |= {"spike", "left_out"}
CLASS_COLORS = {
    "steps": "#009e73",
    "compile": "#0072b2",
    "data": "#e69f00",
    "evaluation": "#56b4e9",
    "saving": "#cc79a7",
    "restore": "#8c6bb1",
    "other": "#9a9a9a",
    "lost": "#d55e00",
    goodput.DOWN: "#5a2a0a",
}


def curves_of(
    runs: list[RunFiles], kind: str, values_of: Callable[[dict], dict[str, Any]], dots: bool = False
) -> list[Curve]:
    """Return a curve for each name in ``values_of`` a record of ``kind``, of each run; the first
    run is the one of the report."""
    found = []
    for number, run in enumerate(runs):
        points: dict[str, list[tuple[int, float]]] = {}
        for record in run.of_kind(kind):
            for name, value in values_of(record).items():
                if _is_number(value):
                    points.setdefault(name, []).append((record["step"], float(value)))
        found += [Curve(name, each, number > 0, dots) for name, each in points.items()]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main_charts(runs: list[RunFiles]) -> list[Chart]:
    """Return the charts of losses, scores, learning rate, gradient norm and speed."""
    found = []
    for name, meaning in TRAINING_LOSSES.items():

        def losses(record: dict, name: str = name) -> dict[str, float]:
            used, loss = training_loss(record)
            return {f"{record.get('objective', '')} training": loss} if used == name else {}

        curves = curves_of(runs, "train", losses)
        if name == "loss":
            curves += curves_of(runs, "eval", _held_out, dots=True)
        found.append(chart(meaning.replace("\n", " "), curves))
    for objective in OBJECTIVES:

        def by_source(record: dict, objective: str = objective) -> dict[str, float]:
            return losses_of_sources(record, objective)

        title = f"{objective} loss of held-out text by source, nats a token"
        found.append(chart(title, curves_of(runs, "eval", by_source, dots=True)))
    found.append(chart("scores of tasks", curves_of(runs, "tasks", scores_of_tasks, dots=True)))
    for name, title, log in (
        ("learning_rate", "learning rate", False),
        ("grad_norm", "norm of the gradient", True),
        ("tokens_per_second", "tokens a second", False),
        ("mfu", "model FLOP utilization", False),
        ("epsilon", "epsilon spent", False),
    ):
        found.append(chart(title, curves_of(runs, "train", _only(name)), log))
    return [each for each in found if each is not None]


def _held_out(record: dict) -> dict[str, Any]:
    keys = {f"{each} held out": f"{each}_loss" for each in OBJECTIVES}
    keys |= {f"{name}, averaged weights": f"ema_{key}" for name, key in keys.items()}
    return {name: record.get(key) for name, key in keys.items()}


def _only(name: str) -> Callable[[dict], dict[str, Any]]:
    return lambda record: {name.replace("_", " "): record.get(name)}


def goodput_chart(run: RunFiles) -> Chart | None:
    """Return the shares of the time since the first start by step."""

    def classes(record: dict) -> dict[str, Any]:
        return {name: record.get(goodput.ALL_STARTS + name) for name in CLASS_COLORS}

    curves = [
        curve
        for curve in curves_of([run], goodput.KIND, classes)
        if max(x for _, x in curve.points) > 0
    ]
    return chart("shares of the time since the first start", curves, colors=CLASS_COLORS)


def further_charts(runs: list[RunFiles]) -> list[Chart]:
    """Return a chart for each number of the kinds without a part of their own, such as statistics
    by layer: of a list the median, the least and the largest."""
    kinds = dict.fromkeys(
        record["kind"] for record in runs[0].records if record["kind"] not in _KNOWN
    )
    found = []
    for kind in kinds:
        names = dict.fromkeys(
            name
            for record in runs[0].of_kind(kind)
            for name, value in record.items()
            if name not in ("step", "time") and (_is_number(value) or isinstance(value, list))
        )
        for name in names:

            def spread(record: dict, name: str = name) -> dict[str, Any]:
                value = record.get(name)
                plain = name.replace("_", " ")
                return _spread(value) if isinstance(value, list) else {plain: value}

            curves = curves_of(runs, kind, spread)
            values = [x for curve in curves for _, x in curve.points]
            log = bool(values) and min(values) > 0 and max(values) > 50 * min(values)
            found.append(chart(f"{kind}: {name.replace('_', ' ')}", curves, log))
    return [each for each in found if each is not None]


def _spread(values: list) -> dict[str, float]:
    known = [x for x in values if _is_number(x)]
    if not known:
        return {}
    return {"median layer": statistics.median(known), "least": min(known), "largest": max(known)}


def process_charts(run: RunFiles) -> list[Chart]:
    """Return the charts of the slowest process beside the median of the others."""
    found = []
    for measure, title in (
        ("batch", "seconds of a batch: slowest process and median of the others"),
        ("probe", "seconds of the probe: slowest process and median of the others"),
    ):

        def pair(record: dict, measure: str = measure) -> dict[str, Any]:
            names = {"slowest": f"{measure}_seconds", "median": f"{measure}_median"}
            return {name: record.get(key) for name, key in names.items()}

        found.append(chart(title, curves_of([run], stragglers.KIND, pair, dots=True)))
    return [each for each in found if each is not None]


class Part(NamedTuple):
    """A class of goodput in a bar: its share, and where it begins."""

    name: str
    color: str
    share: float
    left: float


class Bar(NamedTuple):
    label: str
    seconds: float
    parts: tuple[Part, ...]


def goodput_bars(run: RunFiles) -> list[Bar]:
    """Return a bar for each start that has a record, the last ones, and one of all together."""
    last: dict[int, dict] = {}
    for record in run.of_kind(goodput.KIND):
        last[record.get("start", 0)] = record
    if not last:
        return []
    bars = [
        _bar(f"start {number + 1}", record, "", goodput.CLASSES)
        for number, record in sorted(last.items())
    ]
    newest = last[max(last)]
    names = (*goodput.CLASSES, goodput.DOWN)
    return [_bar("all", newest, goodput.ALL_STARTS, names), *bars[-12:]]


def _bar(label: str, record: dict, prefix: str, names: Iterable[str]) -> Bar:
    parts = []
    left = 0.0
    order = [name for name in CLASS_COLORS if name in names]
    for name in order:
        share = record.get(prefix + name) or 0.0
        parts.append(Part(name, CLASS_COLORS[name], share, left))
        left += share
    return Bar(label, record.get(f"{prefix}seconds", 0.0), tuple(parts))


class Written(NamedTuple):
    prompt: str
    texts: list[tuple[int, str]]


def samples_of(run: RunFiles, most: int = 24) -> list[Written]:
    """Return the continuations of each prompt by step: at most ``most``, evenly over the run."""
    found: dict[str, list[tuple[int, str]]] = {}
    for record in run.of_kind(samples.KIND):
        for each in record.get("texts") or ():
            found.setdefault(str(each.get("prompt")), []).append(
                (record["step"], str(each.get("text")).strip())
            )
    return [Written(prompt, _evenly(texts, most)) for prompt, texts in found.items()]


def _evenly(texts: list, most: int) -> list:
    if len(texts) <= most:
        return texts
    return [texts[round(number * (len(texts) - 1) / (most - 1))] for number in range(most)]


class Spike(NamedTuple):
    """A row of the table of spikes; ``documents`` are those that raised the loss most."""

    step: int
    objective: str
    loss: str
    grad_norm: str
    did: str
    documents: list[str]


def spikes_of(run: RunFiles, most: int = 3) -> list[Spike]:
    """Return the spikes of a run, with at most ``most`` documents of each."""
    found = []
    for record in run.of_kind("spike"):
        steps = record.get("left_out") or []
        did = "its update was not applied"
        if steps:
            numbers = ", ".join(f"{step:,}" for step in steps)
            did = f"went back to step {record.get('back_to', 0):,}, left out {numbers}"
        documents = [
            f"{each.get('source')} document {each.get('document')}, loss {_figure(each, 'loss')}"
            for each in (record.get("documents") or [])[:most]
        ]
        name = training_loss(record)[0] or "loss"
        loss = f"{_figure(record, name)} ({_figure(record, 'deviation_loss')})"
        norm = f"{_figure(record, 'grad_norm')} ({_figure(record, 'deviation_grad_norm')})"
        objective = str(record.get("objective", ""))
        found.append(Spike(record["step"], objective, loss, norm, did, documents))
    return found


def _figure(record: dict, name: str) -> str:
    value = record.get(name)
    return f"{value:.4g}" if _is_number(value) else "not finite"

"""Build report.html of a run."""

import json
import os
from pathlib import Path
from typing import Any

from mtnlg_jax import pages
from mtnlg_jax.storage import write_file
from mtnlg_jax.train import goodput
from mtnlg_jax.train.report import charts, content
from mtnlg_jax.train.report.files import RunFiles, differences, hidden_keys, public, read_run

NAME = "report.html"


def write(
    workdir: str,
    compare: str | None = None,
    output: str | None = None,
    records: list[dict] | None = None,
) -> str:
    """Write the report of the run in ``workdir``, beside that of ``compare`` if that is given, and
    return its path: ``output``, or report.html in the folder of the run.

    ``records`` are those of its metrics.jsonl, where they are in memory.

    Raises ValueError where one of them is not the folder of a run, or ``output`` is a folder.
    """
    if output and os.path.isdir(output):
        raise ValueError(
            f"--output={output} is a folder; name a file, such as {os.path.join(output, NAME)}"
        )
    run = read_run(workdir, records)
    other = read_run(compare) if compare else None
    path = output or os.path.join(workdir, NAME)
    folder, name = os.path.split(path)
    write_file(folder or ".", name, render(run, other).encode(errors="replace"))
    return path


def render(run: RunFiles, other: RunFiles | None = None) -> str:
    """Return the page of ``run``, with the curves of ``other`` beside its own."""
    runs = [run, other] if other else [run]
    hidden = hidden_keys(run.config, run.starts)
    return pages.render(
        Path(__file__).with_name("page") / "report.html",
        "launch/report.py",
        filters={"setting": _setting, "duration": _duration},
        run=run,
        other=other,
        facts=_facts(run),
        charts=content.main_charts(runs),
        bars=content.goodput_bars(run),
        shares=content.goodput_chart(run),
        colors=content.CLASS_COLORS,
        processes=content.process_charts(run),
        further=content.further_charts(runs),
        spikes=content.spikes_of(run),
        samples=content.samples_of(run),
        starts=[_start(start, hidden) for start in run.starts],
        differences=differences(run, other) if other else [],
        settings=public(run),
        size=charts,
    )


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Return what stands at the head of the page."""
    found = []
    train = run.of_kind("train")
    steps = run.config.get("train", {}).get("steps")
    if train:
        found.append(("steps", f"{train[-1]['step']:,} of {steps:,}"))
    evaluations = run.of_kind("eval")
    if evaluations:
        last = evaluations[-1]
        losses = [
            f"{name.replace('_', ' ')} {_figure(last[name])}"
            for name in ("causal_loss", "perplexity", "bits_per_byte", "masked_loss")
            if name in last
        ]
        if losses:
            found.append((f"held out at step {last['step']:,}", ", ".join(losses)))
    for record in run.of_kind(goodput.KIND)[-1:]:
        found.append(("productive", f"{record['run_steps']:.1%} of the time since the first start"))
    if run.starts:
        devices = run.starts[-1].get("devices") or {}
        processes = run.starts[-1].get("processes", 1)
        of = "1 process" if processes == 1 else f"{processes} processes"
        found.append(("devices", f"{devices.get('count')} {devices.get('kind')} in {of}"))
    spikes = len(run.of_kind("spike"))
    if spikes:
        found.append(("spikes", f"{spikes:,}"))
    return found


def _start(start: dict, hidden: set[str]) -> dict[str, Any]:
    """Return the row of a start: what it began with, and the settings that it changed but for those
    that are ``hidden``."""
    devices = start.get("devices") or {}
    changed = start.get("changed") or {}
    return {
        "date": str(start.get("date", ""))[:19].replace("T", " "),
        "step": start.get("step", 0),
        "devices": f"{devices.get('count', '')} {devices.get('kind', '')}".strip(),
        "processes": start.get("processes", ""),
        "commit": str(start.get("commit") or "")[:12],
        "changed": [(key, *pair) for key, pair in changed.items() if key not in hidden],
    }


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def _setting(value: Any) -> str:
    """Return a setting in full: two that differ look different."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

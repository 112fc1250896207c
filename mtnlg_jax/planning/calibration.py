"""Calibrate the planner: find the share of a chip's peak at which a finished run computed."""

import json
import os
import statistics

from mtnlg_jax.config import from_json
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import layout_of
from mtnlg_jax.planning.search import measured_efficiency
from mtnlg_jax.storage import write_file
from mtnlg_jax.train.metrics import read_metrics


def calibrate(workdir: str, name: str, number: int) -> str:
    """Write RUN/calibration.json: the efficiency with which the planner predicts the speed of the
    run.

    Returns two lines for a person. Raises ValueError if no full step was timed.
    """
    with open(os.path.join(workdir, "config.json")) as file:
        config = from_json(file.read())
    layout = layout_of(config, number * CHIPS[name].devices)
    # The rate is a fading mean, which includes compilation at first: leave the first half out.
    rates = [
        record["tokens_per_second"]
        for record in read_metrics(os.path.join(workdir, "metrics.jsonl"))
        if record["kind"] == "train"
        and record.get("sequences") == config.train.global_batch_size
        and record.get("tokens_per_second", 0) > 0
    ]
    rates = rates[len(rates) // 2 :]
    if not rates:
        raise ValueError(
            f"{workdir}/metrics.jsonl has no timed step of {config.train.global_batch_size} "
            "sequences yet"
        )
    seconds = config.train.global_batch_size * config.sequence_length / statistics.median(rates)
    efficiency = measured_efficiency(Job(config, CHIPS[name]), layout, seconds)
    path = os.path.join(workdir, "calibration.json")
    write_file(
        workdir,
        "calibration.json",
        json.dumps(
            {
                "chip": name,
                "chips": number,
                "run": config.name,
                "efficiency": round(efficiency, 4),
                "step_seconds": round(seconds, 4),
                "steps": len(rates),
                "layout": layout._asdict(),
            },
            indent=1,
        ).encode(),
    )
    return (
        f"{path}: {seconds:.4g} s a step (median of {len(rates)}), so products run at "
        f"{efficiency:.1%} of peak\n"
        f"next: python launch/plan.py --config=... --chips={name}:N --calibration={path}"
    )


def read_calibration(path: str, name: str) -> tuple[float, str]:
    """Return (efficiency, its source). Raises ValueError if it was measured on another chip."""
    try:
        with open(path) as file:
            values = json.load(file)
        chip = values["chip"]
        efficiency = float(values["efficiency"])
        run = values["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a calibration ({type(error).__name__}: {error}); write one with "
            "--calibrate=RUN"
        ) from None
    if chip != name:
        raise ValueError(
            f"{path} was measured on {chip}, not {name}; plan with --chips={chip}:N, or without it"
        )
    if not 0 < efficiency <= 1:
        raise ValueError(
            f"{path}: efficiency={efficiency} is outside (0, 1]; write it again with "
            "--calibrate=RUN"
        )
    return efficiency, f"{run} on {values.get('chips', '?')} {chip}, {path}"

"""Deviations of recorded steps: a planted spike is found, in a falling loss too."""

import math

import numpy as np
import pytest

from mtnlg_jax.evaluate.why.neighbors import deviations, largest, recorded_steps


def _records(count=60, spike=None, by=1.0, name="loss"):
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, count + 1):
        figures = {
            "loss": 3 + 4 * math.exp(-step / 15) + rng.normal(0, 0.03),
            "grad_norm": 1 + rng.normal(0, 0.05),
        }
        if step == spike:
            figures[name] += by
        records.append({"kind": "train", "step": step, "objective": "causal", **figures})
    return records


def test_a_spike_in_a_falling_loss_is_the_largest():
    step, name, deviation = largest(recorded_steps(_records(spike=31, by=0.5)))
    assert (step, name) == (31, "loss") and deviation > 6
    step, name, _ = largest(recorded_steps(_records(spike=44, by=2, name="grad_norm")))
    assert (step, name) == (44, "grad_norm")
    assert largest(recorded_steps(_records()))[2] < 5


def test_a_deviation_by_hand():
    records = [
        {"kind": "train", "step": step, "objective": "causal", "loss": value, "grad_norm": 1.0}
        for step, value in zip(range(1, 8), (5, 5.1, 5, 9, 5, 4.9, 5), strict=True)
    ]
    found = deviations(recorded_steps(records), 4)
    # The median slope is 0; distances from 5 are 0, 0.1, 0, 0, 0.1, 0, of which the median is 0.
    assert found["loss"].expected == 5 and found["loss"].scale == pytest.approx(0.005)
    assert found["loss"].deviation == pytest.approx(4 / 0.005)
    assert found["grad_norm"].deviation == 0


def test_of_a_step_that_ran_twice_the_last_counts_and_null_is_the_most_unusual():
    records = _records(30)
    records += [{**records[19], "loss": None}, {"kind": "eval", "step": 20, "causal_loss": 1.0}]
    found = recorded_steps(records)
    assert len(found) == 30 and math.isnan(found[19].figures["loss"])
    assert largest(found) == (20, "loss", math.inf)


def test_another_objective_is_no_neighbor():
    records = _records(40)
    for record in records[::2]:
        record.update(objective="masked", loss=9.0)
    assert deviations(recorded_steps(records), 20)["loss"].deviation < 6


def test_too_few_records_are_refused():
    with pytest.raises(ValueError, match="too few"):
        largest(recorded_steps(_records(4)))
    assert deviations(recorded_steps(_records(4)), 2) == {}
    assert deviations(recorded_steps(_records(40)), 99) == {}

"""Check metrics.jsonl and its repair, loss.png, and the progress bar."""

import io
import json
import math
import time

import numpy as np
import pytest
from tqdm import tqdm

from mtnlg_jax.config import StageConfig, TrainConfig
from mtnlg_jax.train.curve import text_curve
from mtnlg_jax.train.metrics import (
    TRAINING_LOSSES,
    MetricsLog,
    curves,
    plot_loss,
    read_metrics,
    scan_metrics,
    training_loss,
)
from mtnlg_jax.train.plots import panels_of, shortened, smoothed
from mtnlg_jax.train.reporter import show
from mtnlg_jax.train.schedule import loss_name


def line(step, kind="train", **values):
    return json.dumps(
        {"kind": kind, "step": step, "loss": 1.0, "objective": "causal"} | values
    ).encode()


@pytest.fixture
def told(caplog):
    return lambda: [record.getMessage() for record in caplog.records if record.name == "absl"]


@pytest.mark.parametrize(
    "damage",
    [
        b"garbage",
        b"5",
        b"null",
        b'"text"',
        b"[1, 2]",
        b"{}",
        b'{"step": 4}',
        b'{"kind": "train", "step": "4"}',
        b'{"kind": 1, "step": 4}',
        b'{"kind": "train", "step": true}',
        b'{"kind": "train", "st',
        b"\xff\xfe" + line(4),
        line(4).replace(b"causal", b"caus\xe9l"),
        b"[" * 100_000,
        b'{"kind": "train", "step": 4} {"kind": "train"}',
    ],
    ids=lambda damage: repr(damage[:24]),
)
def test_a_damaged_line_loses_only_itself(tmp_path, told, damage):
    path = tmp_path / "metrics.jsonl"
    lines = [line(step) for step in (1, 2, 3, 4, 5, 6)]
    lines[3] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [record["step"] for record in read_metrics(str(path))] == [1, 2, 3, 5, 6]
    log = MetricsLog(str(tmp_path), 6)
    log.write(json.loads(line(7)))
    log.close()
    assert [json.loads(one)["step"] for one in path.read_text().splitlines()] == [1, 2, 3, 5, 6, 7]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"
    assert any(f"{path}: line 4 is damaged" in message for message in told())
    MetricsLog(str(tmp_path), 7).close()  # told once
    assert len([message for message in told() if "damaged" in message]) == 1


def test_zero_bytes_and_empty_lines_lose_no_record(tmp_path, told):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n\n" + b"\0" * 4096 + line(2) + b"\r\n" + line(3) + b"\0\0")
    assert [record["step"] for record in read_metrics(str(path))] == [1, 2, 3]
    MetricsLog(str(tmp_path), 3).close()
    assert told() == [] and path.read_bytes().count(b"\n") == 3


def test_a_line_cut_off_by_a_kill_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n" + line(2)[:20])
    assert scan_metrics(str(path)) == ([json.loads(line(1))], {2: line(2)[:20]})
    assert scan_metrics(str(tmp_path / "none")) == ([], {})


def test_a_process_that_does_not_write_changes_no_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"junk\n" + line(1) + b"\n" + line(9) + b"\n")
    log = MetricsLog(str(tmp_path), 3, writing=False)
    assert [record["step"] for record in log.records] == [1]
    assert (
        path.read_bytes().startswith(b"junk\n")
        and not (tmp_path / "metrics.jsonl.damaged").exists()
    )


def test_values_that_are_not_finite_are_null(tmp_path):
    log = MetricsLog(str(tmp_path), 0)
    log.write(
        {"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-3}
    )
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert -1e-3 < time.time() - record.pop("time") < 60  # it is rounded to milliseconds
    assert record == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "learning_rate": 1e-3,
    }


# --- curves


def step(number, objective="causal", stage="one", loss=2.0, name="loss"):
    return {"kind": "train", "step": number, "objective": objective, "stage": stage, name: loss}


def quickstart():
    """Return records of masked, then causal, then mixed steps."""
    return (
        [step(i, "masked", "masked") for i in range(1, 61)]
        + [step(i, stage="causal") for i in range(61, 145)]
        + [step(i, ("causal", "masked")[i % 2], "both") for i in range(145, 241)]
    )


def ends(records, objective, name="loss"):
    return [(piece[0][0], piece[-1][0]) for piece in curves(records, objective, name)]


def test_curves_break_at_a_stage_of_another_objective():
    assert ends(quickstart(), "masked") == [(1, 60), (145, 239)]
    assert ends(quickstart(), "causal") == [(61, 240)]  # in each of two stages, one after the other


def test_curves_break_where_records_are_missing():
    records = [record for record in quickstart() if not 80 < record["step"] <= 100]
    assert ends(records, "causal") == [(61, 80), (101, 240)]
    sparse = [step(i) for i in range(10, 200, 10)]  # train.log_every=10
    assert ends(sparse, "causal") == [(10, 190)]
    rare = [step(i, "masked" if i % 20 == 0 else "causal", "mix") for i in range(1, 100)]
    assert ends(rare, "masked") == [(20, 80)]


def test_losses_of_other_objectives_have_their_own_curves():
    records = [
        step(1),
        step(2),
        step(3, stage="taught", name="distillation_loss"),
        step(4, stage="taught", name="distillation_loss"),
        step(5, stage="end"),
        step(6, stage="end", loss=None),
    ]
    assert ends(records, "causal") == [(1, 2), (5, 6)] and ends(
        records, "causal", "distillation_loss"
    ) == [(3, 4)]
    assert math.isnan(curves(records, "causal", "loss")[1][1][1])  # a gap where no step was taken
    assert training_loss({"kind": "train", "step": 1, "loss": "x"})[0] == "loss"
    assert training_loss({"kind": "train", "step": 1})[0] is None


def test_the_smoothed_curve_does_not_lag():
    falling = [9 - 0.02 * i for i in range(300)]
    falling[100] = math.nan
    line = smoothed(falling)
    known = np.isfinite(falling)
    assert np.isnan(line[100]) and np.allclose(line[known], np.array(falling)[known])
    noise = np.random.default_rng(0).normal(size=2000)
    assert smoothed(noise.tolist()).std() < 0.3
    assert smoothed([3.0]).tolist() == [3.0] and np.isnan(smoothed([math.nan])).all()


def evaluation(number):
    """Return the record of an evaluation of fifteen sources, one of which once has no loss."""
    losses = {f"causal_loss/source {i}": 3.0 + i / 10 - number / 5 for i in range(15)}
    losses["causal_loss/source 3"] = None if number == 2 else 1.0
    return {"kind": "eval", "step": number, "causal_loss": 3.0, **losses}


def scored(number):
    values = {"piqa/acc": 0.5, "piqa/acc_stderr": 0.1, "piqa/rows": 100, "boolq/acc": number / 10}
    perplexity = {"lambada_openai/perplexity": 10.0 ** (10 - number)}
    cost = {"seconds": 1.0, "share_of_run": 0.01}
    return {"kind": "tasks", "step": number, **values, **perplexity, **cost}


def test_sources_and_tasks_have_panels_of_their_own(tmp_path):
    records = [step(1), *(evaluation(number) for number in (1, 2, 3)), *map(scored, (2, 4))]
    losses, scores, perplexity = panels_of(records)
    assert len(losses.curves) == 15 and losses.label.startswith("causal loss of held-out")
    assert losses.curves["source 3"] == [(1, 1.0), (3, 1.0)]
    assert scores.curves == {"piqa acc": [(2, 0.5), (4, 0.5)], "boolq acc": [(2, 0.2), (4, 0.4)]}
    assert perplexity.curves == {"lambada_openai perplexity": [(2, 1e8), (4, 1e6)]}
    assert perplexity.log and not scores.log and not losses.log
    assert panels_of([step(1), {"kind": "eval", "step": 1, "causal_loss": 2.0}]) == []
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = text_curve(str(path)).splitlines()
    assert "boolq acc                        0.2 -> 0.4" in lines[-2]
    assert shortened("a" * 40 + "books") == "…" + "a" * 22 + "books"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [step(1)],
        quickstart(),
        [step(1, loss=None), step(2, loss=None)],
        [
            step(1, name="smoothed_loss"),
            {"kind": "eval", "step": 1, "causal_loss": None},
            {"kind": "other", "step": 2},
        ],
        [step(1), {"kind": "train", "step": 2}, {"kind": "eval", "step": 2, "causal_loss": 3.0}],
        [step(1), *(evaluation(number) for number in (1, 2, 3)), *map(scored, (2, 4, 6, 8))],
    ],
    ids=len,
)
def test_every_kind_of_records_is_drawn(tmp_path, records):
    plot_loss(records, str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").stat().st_size > 5000 and not list(tmp_path.glob("*.partial*"))


def test_plots_are_drawn_anew_only_for_what_they_show(tmp_path):
    log = MetricsLog(str(tmp_path), 1)
    log.write({"kind": "train", "step": 1, "loss": 5.0, "objective": "causal"})
    log.plot()
    for kind, drawn in [("goodput", False), ("eval", True)]:
        (tmp_path / "loss.png").unlink(missing_ok=True)
        log.write({"kind": kind, "step": 1, "causal_loss": 4.0})
        log.plot()
        assert (tmp_path / "loss.png").exists() is drawn
    log.close()


@pytest.mark.parametrize(
    ("train", "stage", "name"),
    [
        (TrainConfig(), StageConfig(), "loss"),
        (TrainConfig(label_smoothing=0.1), StageConfig(), "smoothed_loss"),
        (TrainConfig(label_smoothing=0.1), StageConfig(distill="RUN"), "distillation_loss"),
        (TrainConfig(), StageConfig(distill="RUN", distill_weight=0.0), "loss"),
    ],
)
def test_the_training_loss_has_the_name_of_its_objective(train, stage, name):
    assert loss_name(train, stage) == name and name in TRAINING_LOSSES


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_the_progress_bar_fits_its_terminal(columns):
    stream = io.StringIO()
    bar = tqdm(total=240, file=stream, ncols=columns, initial=200)
    show(bar, ["loss 5.321", "12,345 tokens/s", "", "stage a long name of a stage", "MFU 41%"])
    text = stream.getvalue().split("\r")[-1].rstrip()
    bar.close()
    assert "loss 5.321, 12,345 tokens/s" in text and len(text) <= columns
    assert len(text.split("|")[1]) >= 6, text
    assert ("MFU 41%" in text) == (columns >= 100)

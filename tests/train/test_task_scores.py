"""Check when scores of tasks are due, their records, their cost and the phase of the watchdog."""

import time

import pytest

from mtnlg_jax.config import Config, TrainConfig
from mtnlg_jax.train.metrics import MetricsLog, read_metrics
from mtnlg_jax.train.reporter import Summary
from mtnlg_jax.train.task_scores import TaskScores


class Phases(list):
    def enter(self, phase):
        self.append(phase)


def scores_of(tmp_path, score, step=0, **train):
    config = Config(train=TrainConfig(steps=10, eval_tasks=("piqa",), **train))
    log = MetricsLog(str(tmp_path), step)
    phases = Phases()
    return TaskScores(config, score, log, phases), log, phases


def scored(params):
    time.sleep(0.05)
    return {"piqa/acc": params, "piqa/acc_stderr": 0.1, "piqa/rows": 100}


@pytest.mark.parametrize(
    ("every", "steps"), [(4, [4, 8, 10]), (0, [10]), (5, [5, 10]), (100, [10])]
)
def test_scores_are_due_every_some_steps_and_at_the_end(tmp_path, every, steps):
    scores, log, _ = scores_of(tmp_path, scored, eval_tasks_every=every)
    assert [done for done in range(11) if scores.is_due(done)] == steps
    without = TaskScores(Config(train=TrainConfig(steps=10)), None, log, Phases())
    assert not any(map(without.is_due, range(11)))
    log.close()


def test_a_record_has_the_scores_and_their_cost(tmp_path):
    scores, log, phases = scores_of(tmp_path, scored, eval_tasks_every=4)
    scores(0.5, 4, show_progress=False)
    assert phases == ["evaluation of tasks"]
    time.sleep(0.2)
    scores(0.75, 8, show_progress=False)
    log.close()
    first, second = read_metrics(str(tmp_path / "metrics.jsonl"))
    assert first["kind"] == "tasks" and (first["step"], second["step"]) == (4, 8)
    assert first["piqa/acc"] == 0.5 and second["piqa/acc"] == 0.75 and first["piqa/rows"] == 100
    assert 0.05 <= first["seconds"] < 5 and scores.seconds >= 0.1
    # Of all evaluations so far.
    assert second["share_of_run"] < first["share_of_run"] <= 1
    assert 0 < scores.share < second["share_of_run"] + 0.01


def test_a_lost_evaluation_of_the_state_a_run_goes_on_from_is_repeated(tmp_path):
    scores, log, _ = scores_of(tmp_path, scored, eval_tasks_every=4)
    for done in (0, 3):  # not due
        scores.catch_up(0.5, done, show_progress=False)
    assert not log.records
    for _ in range(2):
        scores.catch_up(0.5, 4, show_progress=False)
    log.close()
    assert [record["step"] for record in read_metrics(str(tmp_path / "metrics.jsonl"))] == [4]


def test_the_summary_names_scores_and_cost():
    final = {"kind": "eval", "step": 8, "causal_loss": 2.0}
    tasks = {"step": 8, **scored(0.5), "lambada/perplexity": 6.5e9, "x/acc": None, "seconds": 1.0}
    summary = Summary("RUN", 8, 1, 1, 1.0, 1.0, None, final, None, 0, tasks, (2.0, 0.0123))
    assert " ".join(summary.scored.split()) == (
        "tasks at step 8: piqa acc 0.500, lambada perplexity 6.5e+09, x acc not finite; scoring "
        "tasks took 2.0 s, 1.2% of this start"
    )
    assert Summary("RUN", 8, 1, 1, 1.0, 1.0, None, final, None, 0).scored == ""

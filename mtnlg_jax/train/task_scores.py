"""Scores of tasks while a run trains: when they are due, their records and their cost.

The scorer is in `mtnlg_jax.evaluate.in_training`, above this package; `train` receives it.
"""

import time
from collections.abc import Callable
from typing import Protocol

from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from mtnlg_jax.config import Config
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.train import processes
from mtnlg_jax.train.metrics import MetricsLog
from mtnlg_jax.train.reporter import scores_text
from mtnlg_jax.train.schedule import is_due
from mtnlg_jax.train.watchdog import Watchdog

KIND = "tasks"  # of the records in metrics.jsonl

# ``state.params`` -> {"TASK/METRIC": value}
Score = Callable[[nnx.State], dict[str, float]]


class Tasks(Protocol):
    """Tasks whose names and rows were checked, as `evaluate.in_training.RunTasks` is."""

    def start(self, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> Score:
        """Return what scores the parameters of a run; it is called by all processes together."""


def check_given(config: Config, tasks: Tasks | None) -> None:
    """Raise ValueError if the config names tasks and the caller of `train` gives nothing that
    scores them."""
    if config.train.eval_tasks and tasks is None:
        raise ValueError(
            f"train.eval_tasks={config.train.eval_tasks} needs what scores tasks: from Python call "
            "train(config, workdir, tasks=mtnlg_jax.evaluate.in_training.RunTasks(config)), or "
            "leave train.eval_tasks out"
        )


class TaskScores:
    """Scores a run's parameters when train.eval_tasks_every says, and keeps account of the time.

    ``score`` is that of `Tasks.start`, or None for a run without tasks.
    """

    def __init__(self, config: Config, score: Score | None, log: MetricsLog, watchdog: Watchdog):
        self._train = config.train
        self._score = score
        self._log = log
        self._watchdog = watchdog
        self._began = time.perf_counter()
        self.seconds = 0.0  # of all evaluations of this start

    def is_due(self, done: int) -> bool:
        """Return whether the parameters after ``done`` steps are to be scored."""
        every = self._train.eval_tasks_every
        return self._score is not None and done > 0 and is_due(self._train, every, done)

    @property
    def share(self) -> float:
        """Return the share of this start's time, compilation included, that scoring took."""
        return self.seconds / max(time.perf_counter() - self._began, 1e-9)

    def catch_up(self, params: nnx.State, done: int, show_progress: bool) -> None:
        """Score the state that a run goes on from if that is due and no record tells its scores.

        A run that was stopped by a signal has saved its state and did not take the time to score.
        """
        if self.is_due(done) and not processes.run_on_first(lambda: self._log.has(KIND, done)):
            self(params, done, show_progress)

    def __call__(self, params: nnx.State, done: int, show_progress: bool) -> None:
        """Score ``params`` and write the record of step ``done``. All processes call this."""
        assert self._score is not None, "is_due is False without tasks"
        self._watchdog.enter("evaluation of tasks")
        began = time.perf_counter()
        scores = self._score(params)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        cost = {"seconds": round(seconds, 3), "share_of_run": round(self.share, 5)}
        self._log.write({"kind": KIND, "step": done, **scores, **cost})
        self._log.plot()
        if show_progress:
            tqdm.write(f"step {done}: tasks: {scores_text(scores)}")

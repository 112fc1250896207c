"""What happens around each step of a run: reports, evaluation, checkpoints and the reaction to
signals. `loop.train` calls the steps themselves."""

import dataclasses
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from mtnlg_jax.config import Config, to_json
from mtnlg_jax.data.batches import SAMPLE_ORDER
from mtnlg_jax.errors import Preempted
from mtnlg_jax.train import averages, processes, spikes
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.evaluate import Evaluator
from mtnlg_jax.train.inputs import Data
from mtnlg_jax.train.near.opening import open_near
from mtnlg_jax.train.near.tier import NearTier
from mtnlg_jax.train.privacy import Ledger
from mtnlg_jax.train.reporter import FIGURES, Reporter, short
from mtnlg_jax.train.saving import Saver
from mtnlg_jax.train.schedule import batch_size_at, is_due
from mtnlg_jax.train.spikes import Spikes
from mtnlg_jax.train.state import TrainState, abstract_state
from mtnlg_jax.train.task_scores import TaskScores
from mtnlg_jax.train.watchdog import Watchdog
from mtnlg_jax.train.watching import Watching


@dataclasses.dataclass
class Course:
    """A run on its way: the newest state, and what is due after each step.

    ``identity`` is that of its checkpoints, and ``programs`` returns the fingerprints of its
    steps. The run ends early once the records of its evaluations are ``enough``. ``restore``
    returns (step, state) of the last checkpoint, or of the start of the run.
    """

    config: Config
    workdir: str
    identity: dict
    data: Data
    ledger: Ledger | None
    checkpoints: Checkpoints
    reporter: Reporter
    evaluate: Evaluator
    score_tasks: TaskScores
    spikes: Spikes
    restore: Callable[[], tuple[int, TrainState]]
    watchdog: Watchdog
    watching: Watching
    stop: threading.Event
    enough: Callable[[Sequence[dict]], bool]
    show_progress: bool
    programs: Callable[[], list[str]]

    def begin(self, first: int, state: TrainState) -> None:
        """Go on after step ``first`` with ``state``."""
        self.log = self.reporter.log
        self.saver = Saver(self.checkpoints)
        self.vote = processes.PreemptionVote()
        self.best = self.checkpoints.best_metric()  # of earlier starts as well
        # The last step that `report` has reported and `_goes_back` has not judged yet.
        self._reported: tuple[int, dict] | None = None
        # It saves the newest state again, if the last save failed.
        self.save: Callable[[], None] | None = None
        self.state = state
        self.done = first
        self.samples = int(state.samples)  # data order, batch ramp and learning rate follow them
        self.spikes.begin(first)
        self.watching.begin(self.log, state, first)
        near = self.checkpoints.near
        if near and near.goes_on_from_earlier:
            # The failure may have cost a host or files of that copy, and the next one the rest.
            with self.watchdog.clock.during("saving"):
                near.save(first, state, self._meta({}))
        self._catch_up()
        self.over = self.enough(self.log.evaluations())

    @property
    def goes_on(self) -> bool:
        """Whether there is another step to do."""
        return not self.over and self.done < self.config.train.steps

    def leave_out(self) -> bool:
        """Pass over the next step if its batch is left out; return whether it was."""
        if not self.spikes.leaves_out(self.done, self.samples):
            return False
        sequences = batch_size_at(self.config.train, self.samples)
        self.after_step(self.spikes.pass_over(self.state, sequences), {}, sequences)
        return True

    def report(self) -> None:
        """Report the pending step, if there is one; `after_step` judges it."""
        # A step that was reported before stays: nothing is pending behind it.
        self._reported = self.reporter.report() or self._reported

    def after_step(self, state: TrainState, metrics: dict, sequences: int) -> None:
        """Take the result of the step that has just been started, and do what is due after it.

        Raise Preempted where the run was asked to stop, once its state is saved.
        """
        self.state = state
        self.spikes.note(self.done, self.samples)
        self.samples += sequences
        if self._goes_back():  # by the previous step, which is reported while this one runs
            return
        self.watchdog.enter("step")  # its time runs until the next step has been started
        self.reporter.pending = (self.done, metrics, sequences)  # fetched one step later
        self.done += 1
        self.watching.ended(self.state, self.done)
        stopping = self.vote(self.stop.is_set())  # the same answer in every process
        if processes.several() and self._is_due(self.config.train.compare_every):
            fingerprints = self.data.fingerprints
            programs = self.programs()
            processes.check_same_run(self.config, fingerprints, programs, self.state, self.done)
            self.watching.compare(self.done)
        near = self.checkpoints.near
        if near and not stopping and self.done < self.config.train.steps and near.is_due(self.done):
            # By this step as well: a state after one that was not finite is not copied.
            if self._goes_back():
                return
            self._copy_near(near)
        self._evaluate_and_save(stopping)
        if stopping and self.done < self.config.train.steps:
            self._finish_saving()
            self.watching.finish(self.state, self.done)
            raise self._preempted()

    def finish(self) -> None:
        """Return once everything is on disk."""
        self.watchdog.enter("saving")
        self._finish_saving()
        self.watchdog.clock.enter("other")
        self.log.plot()
        self.watching.finish(self.state, self.done)

    def _is_due(self, every: int) -> bool:
        return is_due(self.config.train, every, self.done)

    def _catch_up(self) -> None:
        """Evaluate the state from which a run goes on where the record of that was lost."""
        first = self.done
        with self.watchdog.clock.during("evaluation"):
            self.score_tasks.catch_up(self.state.params, first, self.show_progress)
        self.watching.catch_up(self.state, first, self.show_progress)
        if first == self.config.train.steps:
            # A finished run was started again, and its last evaluation was lost.
            if not processes.run_on_first(lambda: self.log.has("eval", first)):
                self._evaluate()

    def _evaluate_and_save(self, stopping: bool) -> None:
        train = self.config.train
        evaluating = self._is_due(train.eval_every)
        # A signal leaves seconds.
        scoring = self.score_tasks.is_due(self.done) and not stopping
        sampling = self.watching.writes_samples(self.done) and not stopping
        saving = stopping or self.saver.is_due() or self._is_due(train.save_every)
        if not (evaluating or saving or scoring or sampling):
            return
        # This step, whose loss decides whether the state is healthy.
        if self._goes_back(stopping):
            return
        self.watchdog.enter("evaluation or saving")
        result = self._evaluate() if evaluating else {}
        metric = _metric(result)
        saving = saving or (train.keep_best and metric < self.best)
        self.save = None
        if saving and self.reporter.is_healthy(self.done, result, stopping):
            meta = self._meta(result)
            self.save = functools.partial(self._save, self.done, self.state, meta, metric)
            # The last state is saved, whatever is still on its way.
            must = stopping or self.done == train.steps
            with self.watchdog.clock.during("saving"):
                saved = self.saver.save(self.save, must)
            self.best = min(self.best, metric) if saved else self.best
            self.watchdog.clock.saved(self.done)
        if scoring:  # after the save, so that an error here does not cost the state
            with self.watchdog.clock.during("evaluation"):
                self.score_tasks(self.state.params, self.done, self.show_progress)
        if sampling:
            self.watching.sample(self.state, self.done, self.show_progress)
        self.watching.record(self.done)
        if evaluating and self.enough(self.log.evaluations()) and not stopping:
            self.over = True
            return
        if not stopping and self.done < train.steps:
            self.save = None  # it would keep this state in memory beside the next one
        self.reporter.meter.restart()  # time of evaluation and saving does not count

    def _goes_back(self, stopping: bool = False) -> bool:
        """Report the pending step; if it was a spike, return to the last checkpoint and True."""
        self.report()
        reported = self._reported
        self._reported = None
        if reported is None or not spikes.is_unusual(reported):
            return False
        self.watchdog.enter("spike")
        goes_back = self.spikes.take(reported, self.state.params)
        self.reporter.meter.restart()  # the time for names does not count
        if not goes_back:
            return False
        self.saver.finish(None)
        if stopping:
            self.watching.finish(self.state, self.done)
            raise Preempted(
                f"stopped by a signal after step {self.done}, a spike; the same command resumes "
                "from the last checkpoint and leaves its batch out"
            )
        spikes.drop_near(self.workdir, self.checkpoints.near)
        # Its memory is for the state that is restored.
        jax.tree.map(lambda array: array.delete(), self.state)
        first, state = self.restore()
        self.watchdog.clock.rewound(first)
        self.reporter.restart(first)
        self.begin(first, state)
        return True

    def _copy_near(self, near: NearTier) -> None:
        if not self.reporter.nonfinite_streak:
            self._write_ledger(self.done)
            with self.watchdog.clock.during("saving"):
                near.save(self.done, self.state, self._meta({}))
            self.watchdog.clock.saved(self.done)
            # A start that is killed has kept its steps up to this copy.
            self.watching.record(self.done)

    def _evaluate(self) -> dict[str, float]:
        with self.watchdog.clock.during("evaluation"):
            result = self.evaluate(self.state.params)
            mean = self.state.extras.get(averages.KEY)
            if mean is not None and result:
                found = self.evaluate(averages.parameters(self.config, self.state.params, mean))
                result |= {f"ema_{name}": found[name] for name in FIGURES if name in found}
            self.log.write({"kind": "eval", "step": self.done, **result})
            if self.show_progress and result:
                figures = [f"{name} {short(result[name])}" for name in FIGURES if name in result]
                tqdm.write(f"step {self.done}: held out: {', '.join(figures)}")
            self.log.plot()
        return result

    def _meta(self, result: dict) -> dict:
        """Return the metadata of a checkpoint."""
        return {
            # The resolved config: a resume compares with it, and decoding needs the vocabulary.
            "config": json.loads(to_json(self.config)),
            "identity": self.identity,
            "samples": self.samples,
            "order_of_samples": SAMPLE_ORDER,
            "metrics": result,
            **self.spikes.meta,
            **({"privacy": self.ledger.meta(self.done)} if self.ledger else {}),
        }

    def _save(self, done: int, state: TrainState, meta: dict, metric: float) -> None:
        self._write_ledger(done)
        # Without an evaluation, only the next step shows whether these parameters have a finite
        # loss.
        self.checkpoints.save(done, state, meta, metric, proven=math.isfinite(metric))

    def _write_ledger(self, done: int) -> None:
        # Before the checkpoint: none is ever without what it spent.
        if self.ledger and processes.is_first():
            self.ledger.write(self.workdir, done)

    def _finish_saving(self) -> None:
        with self.watchdog.clock.during("saving"):
            self.saver.finish(self.save)
            processes.barrier("saved")  # process 0 may still be writing the record
            self.checkpoints.drop_near()

    def _preempted(self) -> Preempted:
        if self.save is not None:
            return Preempted(
                f"stopped by a signal after step {self.done}; state saved in {self.workdir}; "
                "the same command resumes from there"
            )
        return Preempted(
            f"stopped by a signal after step {self.done}, whose state is not finite and not "
            "saved; the same command resumes from the last checkpoint"
        )


def open_checkpoints(config: Config, workdir: str, mesh: Mesh) -> Checkpoints:
    """Open the checkpoints of the run, which locks their folder, and its near tier.

    Raise ValueError where the near folder is in ``workdir``, or has no room for one copy.
    """
    folder = os.path.join(workdir, "checkpoints")
    near = functools.partial(open_near, config.train, folder, abstract_state(config, mesh), mesh)
    used = near if config.train.near_every else None
    return Checkpoints(folder, config.train.keep_last, config.train.keep_best, used)


def _metric(result: dict) -> float:
    """Return the held-out loss that selects the best checkpoint (lower is better).

    It is infinite if nothing was evaluated, or if the loss is not finite.
    """
    # If a run has both, the causal loss decides: the masked one is not a likelihood of the text.
    value = result.get("causal_loss", result.get("masked_loss", math.inf))
    return value if math.isfinite(value) else math.inf

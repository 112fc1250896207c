"""What watches a run: trackers, profiler, goodput, comparison of processes, samples and the report
at its end. `course.Course` calls it around the steps."""

import contextlib
from collections.abc import Iterator

from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from mtnlg_jax.config import Config
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.train import goodput, processes, samples
from mtnlg_jax.train.lifetime import Requests
from mtnlg_jax.train.metrics import MetricsLog
from mtnlg_jax.train.profiler import Profiler
from mtnlg_jax.train.report import build
from mtnlg_jax.train.schedule import is_due
from mtnlg_jax.train.state import TrainState
from mtnlg_jax.train.stragglers import Stragglers
from mtnlg_jax.train.trackers import following
from mtnlg_jax.train.watchdog import Watchdog


def check(config: Config, given: samples.Samples | None) -> None:
    """Raise ValueError, before any work, where a tracker cannot work, or where the config has
    prompts and nothing that continues them is ``given``."""
    samples.check_given(config, given)
    following.check(config)


class Watching:
    """Watches one start of a run in ``workdir``; all processes have one."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        tokenizer: Tokenizer,
        workdir: str,
        given: samples.Samples | None,
        watchdog: Watchdog,
        requests: Requests,
    ) -> None:
        self._config = config
        self._workdir = workdir
        self._watchdog = watchdog
        self._clock = watchdog.clock
        prompts = config.train.sample_prompts
        self._write = given.start(config, mesh, tokenizer) if given and prompts else None
        self._profiler = Profiler(config.train, workdir, requests.profile, watchdog)
        self._stragglers = Stragglers(self._clock)
        self._history: goodput.History | None = None

    def begin(self, log: MetricsLog, state: TrainState, done: int) -> None:
        """Take the records of the run, which goes on after ``done`` steps with ``state``."""
        self._log = log
        self._state = state
        if processes.is_first():
            self._history = goodput.history_of(self._workdir, log.records)
        self._clock.saved(done)
        self._clock.enter("steps")

    @contextlib.contextmanager
    def step(self, done: int, state: TrainState) -> Iterator[None]:
        """Mark the body as the step after ``done`` steps, which takes ``state``."""
        with self._profiler.step(done + 1, state.step):
            yield

    def ended(self, state: TrainState, done: int) -> None:
        """Note that step ``done`` has been started, whose result is ``state``."""
        self._profiler.ended(done, state.step)

    def fail(self) -> None:
        """Close what is open, also where the run fails."""
        self._profiler.close()

    def compare(self, done: int) -> None:
        """Compare the speed of the processes; all of them call this."""
        self._log.write(self._stragglers.compare(done))

    def writes_samples(self, done: int) -> bool:
        """Return whether the prompts are to be continued after ``done`` steps."""
        every = self._config.train.sample_every
        return self._write is not None and done > 0 and is_due(self._config.train, every, done)

    def catch_up(self, state: TrainState, done: int, show_progress: bool) -> None:
        """Continue the prompts with the ``state`` that a run goes on from if that is due and has no
        record: a signal leaves no time for it."""
        if self.writes_samples(done):
            if not processes.run_on_first(lambda: self._log.has(samples.KIND, done)):
                self.sample(state, done, show_progress)

    def sample(self, state: TrainState, done: int, show_progress: bool) -> None:
        """Continue the prompts, and write the record. All processes call this."""
        assert self._write is not None, "writes_samples is False without prompts"
        self._watchdog.enter("samples")
        with self._clock.during("evaluation"):
            texts = self._write(state.params)
        prompts = self._config.train.sample_prompts
        self._log.write(samples.record_of(prompts, texts, done))
        if show_progress:
            tqdm.write(f"step {done}: {prompts[0]} |{' '.join(texts[0].split())}")

    def record(self, done: int) -> None:
        """Write the goodput after ``done`` steps, in the first process."""
        if self._history is not None:
            self._log.write(goodput.record_of(self._clock, self._history, done))

    def finish(self, state: TrainState, done: int) -> None:
        """Write what is due at the end of the run or of this start."""
        self._profiler.close(state.step)
        self.record(done)
        if done < self._config.train.steps or not processes.is_first():
            return
        # A page that cannot be written is no reason to call a finished run failed.
        try:
            build.write(self._workdir, records=self._log.records)
        except Exception as error:
            logging.warning("report.html was not written: %s", error)

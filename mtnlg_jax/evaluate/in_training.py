"""Scores of tasks of lm-evaluation-harness while a run trains, on its devices and parameters.

    config = load_config("configs/small.py", ["data.path=OUT", "train.eval_tasks=('piqa',)", ...])
    train(config, "RUN", tasks=RunTasks(config))

Rows are read and checked before the run starts, and prompts are formed once. Each evaluation makes
a decoder of the parameters (`decode.from_training`), in the type of the run's products, and scores
with the programs of the first one. The metrics are those of ``launch/evaluate.py --tasks`` on the
checkpoint of the same step with that --dtype and the same number of rows; the standard errors of
perplexities come from fewer resamples.
"""

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.config import Config, TrainConfig
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.decode.from_training import FromTraining
from mtnlg_jax.evaluate.harness_tasks import offline
from mtnlg_jax.evaluate.harness_tasks.loading import load_tasks
from mtnlg_jax.evaluate.harness_tasks.run import check_shots, evaluate_tasks
from mtnlg_jax.train import processes

if TYPE_CHECKING:
    from mtnlg_jax.evaluate.harness_tasks.task import LocalTask

logger = logging.getLogger(__name__)

RESAMPLES = 1000  # for standard errors without a closed form; 100,000 would take too long
# What the settings of a run are called where the scripts have flags.
SETTINGS = {
    "tasks": "train.eval_tasks",
    "task_data": "train.eval_tasks_data",
    "limit": "train.eval_tasks_rows",
    "num_fewshot": "train.eval_tasks_fewshot",
}


class RunTasks:
    """The tasks of ``config.train``, read and checked.

    Raises ValueError or OSError, naming the setting, if lm-eval is not installed, and for unknown
    tasks, missing files, bad rows and too many examples.
    """

    def __init__(self, config: Config):
        self._train = config.train
        with _by_settings():
            offline.enter()
            folder = config.train.eval_tasks_data or None
            rows = config.train.eval_tasks_rows
            self.tasks = load_tasks(config.train.eval_tasks, folder, None, rows)
            check_shots(self.tasks, config.train.eval_tasks_fewshot)

    def start(self, config: Config, mesh: Mesh, tokenizer: Tokenizer) -> "TaskScorer":
        """Return what scores the parameters of a run ``config`` on ``mesh``.

        All processes call it together. Raises ValueError if the model cannot be decoded on these
        devices, and for a choice that is longer than its context.
        """
        return TaskScorer(self.tasks, self._train, FromTraining(config, mesh), tokenizer)


class TaskScorer:
    """Score the parameters of a run: a function of ``state.params``, from `RunTasks.start`.

    ``train`` is that of the run; ``make_decoder`` makes decoders of its parameters.
    """

    def __init__(
        self,
        tasks: "dict[str, LocalTask]",
        train: TrainConfig,
        make_decoder: FromTraining,
        tokenizer: Tokenizer,
    ):
        from mtnlg_jax.evaluate.harness import MtnlgLM

        self._tasks = tasks
        self._train = train
        self._make_decoder = make_decoder
        self._tokenizer = tokenizer
        self._lm: MtnlgLM | None = None
        self._class = MtnlgLM
        for task in tasks.values():
            # That of the class: another run may have been started with these tasks.
            build = functools.partial(type(task).build_all_requests, task)
            task.build_all_requests = _Once(task, build)  # type: ignore[method-assign]
        # A model without parameters knows its context and its tokens: every prompt is formed now,
        # and an error in a row does not wait for the first evaluation.
        hollow = self._class.of(make_decoder.hollow, tokenizer, block_tokens=1)
        for name, entry in self._evaluate(_Formed(hollow)).items():
            cut = entry["cut_prompts"]
            if cut and processes.is_first():
                logger.warning(
                    "train.eval_tasks: %d of the %d prompts of %s are longer than the model reads "
                    "(%d tokens); their beginnings are cut off",
                    cut,
                    entry["rows"],
                    name,
                    hollow.max_length,
                )

    def __call__(self, params: nnx.State) -> dict[str, float]:
        """Return {"TASK/METRIC": value, "TASK/METRIC_stderr": error, "TASK/rows": number}."""
        decoder = self._make_decoder(params)
        if self._lm is None:
            # The size of its blocks follows from the memory that is free now; it stays, and with it
            # the compiled programs.
            self._lm = self._class.of(decoder, self._tokenizer)
        self._lm.decoder = decoder._replace(block_tokens=self._lm.decoder.block_tokens)
        try:
            entries = self._evaluate(_Quiet(self._lm))
        finally:
            # The decoder does not stay in memory beside the steps that follow.
            hollow = self._make_decoder.hollow
            self._lm.decoder = hollow._replace(block_tokens=self._lm.decoder.block_tokens)
        scores: dict[str, float] = {}
        for name, entry in entries.items():
            for metric, found in entry["metrics"].items():
                scores[f"{name}/{metric}"] = found["value"]
                if found["stderr"] is not None:
                    scores[f"{name}/{metric}_stderr"] = found["stderr"]
            if "balanced_accuracy" in entry:
                scores[f"{name}/balanced_accuracy"] = entry["balanced_accuracy"]
            scores[f"{name}/rows"] = entry["rows"]
        return scores

    def _evaluate(self, lm: Any) -> dict[str, dict[str, Any]]:
        with _by_settings():
            return evaluate_tasks(
                lm,
                self._tasks,
                num_fewshot=self._train.eval_tasks_fewshot,
                limit=self._train.eval_tasks_rows,
                bootstraps=RESAMPLES,
            )


class _Once:
    """Form the requests of a task at the first call; at others empty them of their answers."""

    def __init__(self, task: "LocalTask", build: Callable[..., None]):
        self._task = task
        self._build = build
        self._formed = False

    def __call__(self, **how: Any) -> None:
        if not self._formed:
            self._build(**how)
            self._formed = True
            return
        for instance in self._task.instances:
            instance.resps = []
            instance.filtered_resps = {}


class _Around:
    """A model of the harness whose requests are answered in another way."""

    def __init__(self, lm: Any):
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)


class _Quiet(_Around):
    """Answer without bars, which would mix with that of the run, and without repeated warnings."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        return self._lm.loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return self._lm.loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return self._lm.generate_until(requests, disable_tqdm=True)


class _Formed(_Around):
    """Answer without a model, so that only prompts are formed and checked."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return [-1.0] * len(requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [""] * len(requests)


@contextlib.contextmanager
def _by_settings() -> Iterator[None]:
    """Let errors name the settings of a run, not the flags of the scripts."""
    level = logging.getLogger("mtnlg_jax.evaluate").level
    logging.getLogger("mtnlg_jax.evaluate").setLevel(logging.ERROR)
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = re.sub(r"--(\w+)", lambda flag: SETTINGS.get(flag[1], flag[0]), str(error))
        raise type(error)(text) from None
    finally:
        logging.getLogger("mtnlg_jax.evaluate").setLevel(level)

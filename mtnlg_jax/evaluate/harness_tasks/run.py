"""Run tasks of lm-evaluation-harness with a model, and gather what a results file holds."""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtnlg_jax.evaluate.harness_tasks import results
from mtnlg_jax.evaluate.harness_tasks.checking import check_lengths
from mtnlg_jax.evaluate.harness_tasks.loading import load_tasks
from mtnlg_jax.train.describe import header

if TYPE_CHECKING:
    from mtnlg_jax.evaluate.harness_tasks.task import LocalTask

KIND = "tasks"
SEED = 1234  # the harness's own, of few-shot examples
BOOTSTRAPS = 100_000  # the harness's own number of resamples


def run_tasks(
    lm: Any,
    names: Sequence[str],
    *,
    task_data: str | None = None,
    num_fewshot: int | Sequence[int] | None = None,
    limit: int | None = None,
    seed: int = SEED,
    log_rows: bool = False,
    include_path: str | None = None,
    step: int | None = None,
    bootstraps: int = BOOTSTRAPS,
    on_error: str = "raise",
) -> dict[str, Any]:
    """Return the results of tasks as one JSON object.

    ``lm`` is an `lm_eval.api.model.LM`. ``names``, ``task_data``, ``include_path``, ``limit`` and
    ``on_error`` are those of `load_tasks`. ``num_fewshot``: examples before each question, or
    several numbers, whose results then stand at "NAME@NUMBER"; None for what each task asks for.
    ``seed`` draws the examples. ``log_rows`` adds ``log`` to each task, one record a row.
    ``bootstraps``: resamples for standard errors without a closed form, 0 for none. Raise
    ValueError before any row is scored for bad input.
    """
    tasks = load_tasks(names, task_data, include_path, limit, on_error)
    return header(KIND, step, ("lm_eval",)) | {
        "tasks": evaluate_tasks(
            lm,
            tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            seed=seed,
            log_rows=log_rows,
            bootstraps=bootstraps,
        )
    }


def evaluate_tasks(
    lm: Any,
    tasks: "dict[str, LocalTask]",
    *,
    num_fewshot: int | Sequence[int] | None = None,
    limit: int | None = None,
    seed: int = SEED,
    log_rows: bool = False,
    bootstraps: int = BOOTSTRAPS,
) -> dict[str, dict[str, Any]]:
    """Return the results of loaded tasks; the arguments are those of `run_tasks`."""
    from lm_eval.evaluator import evaluate

    several = isinstance(num_fewshot, Sequence)
    counts: Sequence[int | None] = num_fewshot if several else [num_fewshot]  # type: ignore[assignment,list-item]
    shots = {count: check_shots(tasks, count) for count in counts}
    found: dict[str, dict[str, Any]] = {}
    for count in counts:
        for name, task in tasks.items():
            task.set_config("num_fewshot", shots[count][name])
            task.set_fewshot_seed(seed)
            task.model = lm if hasattr(lm, "tok_encode") and hasattr(lm, "max_length") else None
            check_lengths(task, limit)
        # Standard errors are ours, below: the harness starts processes for them and prints.
        scored = evaluate(
            lm=_Quiet(lm),
            task_dict={"tasks": tasks},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        for name, task in tasks.items():
            entry = results.entry(task, scored, bootstraps, log_rows)
            entry |= {"seed": seed, "limit": limit}
            found[f"{name}@{count}" if several else name] = entry
            task.model = None
    return found


class _Quiet:
    """``lm`` without bars where nobody watches standard error."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        from lm_eval.api.model import TemplateLM

        found = getattr(self._lm, name)
        asked = name in ("loglikelihood", "loglikelihood_rolling", "generate_until")
        # Only this class's methods take the argument.
        if asked and isinstance(self._lm, TemplateLM) and not sys.stderr.isatty():
            return functools.partial(found, disable_tqdm=True)
        return found


def check_shots(tasks: "dict[str, LocalTask]", count: int | None) -> dict[str, int]:
    """Return the number of examples of each task. Raise ValueError where there are too few rows."""
    shots = {}
    for name, task in tasks.items():
        own = task.asked_shots
        # As in the harness: a task whose file says 0 stays at 0.
        shots[name] = (own or 0) if count is None or own == 0 else count
        if shots[name] < 0:
            raise ValueError(f"--num_fewshot={count} is below 0")
        task.check_fewshot(shots[name])
    return shots

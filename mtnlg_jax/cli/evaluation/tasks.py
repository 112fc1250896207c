"""The flags of --tasks, and what it does after they are checked."""

import json
import os
from typing import TYPE_CHECKING, Any

from absl import flags

from mtnlg_jax import command, foreign, storage
from mtnlg_jax.cli.decoding import devices, fitting
from mtnlg_jax.cli.evaluation import longtext, score

if TYPE_CHECKING:
    from mtnlg_jax.config import Config
    from mtnlg_jax.evaluate.harness_tasks.task import LocalTask

with command.flag_group("Tasks of lm-evaluation-harness on local files"):
    TASKS = flags.DEFINE_list(
        "tasks",
        None,
        "names of tasks in place of the score, such as lambada_openai,hellaswag; mtnlg_paper: all "
        "of the paper's",
    )
    TASK_DATA = command.define_path(
        "task_data", None, "folder of the tasks' rows as JSON lines, JSON, Parquet or CSV"
    )
    INCLUDE_PATH = command.define_path(
        "include_path", None, "folder of YAML files of tasks, which count before all others"
    )
    NUM_FEWSHOT = flags.DEFINE_list(
        "num_fewshot",
        None,
        "examples before each question, or several numbers, such as 0,1,4; default: the task's own",
    )
    LIMIT = flags.DEFINE_integer("limit", None, "score only so many rows of each task")
    OUTPUT = command.define_path(
        "output", None, "file of the results; default: evaluations/tasks_STEP.json in the run"
    )
    LOG_ROWS = command.define_path(
        "log_rows", None, "file of JSON lines with log-likelihoods and prediction of each row"
    )
    COMPARE = command.define_path(
        "compare", None, "results file of another checkpoint, to show differences with paired tests"
    )

_OF_TASKS = (TASK_DATA, INCLUDE_PATH, NUM_FEWSHOT, LIMIT, OUTPUT, LOG_ROWS, COMPARE)
_OF_TEXT = (
    *(score.INPUT, score.TEXT_KEY, score.ENCODING, score.STRIDE, score.ADAPT),
    *(longtext.LONGTEXT, longtext.REFERENCES, longtext.SENTENCES, longtext.NEEDLE),
)


def check() -> None:
    """Raise ValueError on flags that have no effect together, before anything is read."""
    if TASKS.value is None:
        command.refuse(_OF_TASKS, "has no effect without --tasks")
        if score.INPUT.value is None:
            raise ValueError(
                "nothing to evaluate: give --input=FILE (a text to score) or "
                "--tasks=NAME,... (tasks of lm-evaluation-harness)"
            )
        return
    command.refuse(_OF_TEXT, "is of texts, which --tasks does not read; leave it out")
    _shots()
    if OUTPUT.value is None and foreign.reader_of(score.WORKDIR.value) is not None:
        raise ValueError(
            f"--workdir={score.WORKDIR.value} is a model of another project, not a run of ours; "
            "name the file of the results with --output=FILE"
        )
    if OUTPUT.value is None and score.ADAPTER.value is not None:
        raise ValueError(
            f"--adapter={score.ADAPTER.value} makes another model of the run, whose own results "
            "are in its folder; name the file of the results with --output=FILE"
        )


def check_files() -> None:
    """Raise ValueError or OSError if a file of the results cannot be written."""
    longtext.check_folder()
    for flag in (OUTPUT, LOG_ROWS):
        if flag.value is not None and not storage.is_remote(flag.value):
            command.check_output(flag)


def _shots() -> int | list[int] | None:
    given = NUM_FEWSHOT.value
    if given is None:
        return None
    shown = ",".join(given)
    try:
        counts = [int(each) for each in given or [""]]
    except ValueError:
        raise ValueError(
            f"--num_fewshot={shown} is not a number or a list, such as 0,1,4"
        ) from None
    if min(counts) < 0:
        raise ValueError(f"--num_fewshot={shown} has a number below 0")
    if len(set(counts)) < len(counts):
        raise ValueError(f"--num_fewshot={shown} names a number twice")
    return counts[0] if len(counts) == 1 else counts


def _check_memory(config: "Config", held: dict[str, str]) -> None:
    """Raise ValueError if the model does not fit. The class sizes its batches by what is left."""
    from mtnlg_jax.decode.memory import Choices, Plan

    mesh = devices.mesh()
    plan = Plan(config.model, mesh=mesh, **held)  # type: ignore[arg-type]
    fitting.check(score.WORKDIR.value, [plan], Choices(cache=False), mesh)


def measure(held: dict[str, str]) -> None:
    """Score the tasks, print the report, and write results, rows and plots.

    ``held``: dtype, weights and cache of the model.
    """
    from mtnlg_jax import compat
    from mtnlg_jax.evaluate.harness_tasks import compare, loading, report, run, stored

    # Rows and files are checked before the model is read.
    tasks = loading.load_tasks(
        TASKS.value or [], TASK_DATA.value, INCLUDE_PATH.value, LIMIT.value, score.ON_ERROR.value
    )
    shots = _shots()
    other = None if COMPARE.value is None else stored.read_results(COMPARE.value)
    several = isinstance(shots, list)
    asked = {}
    for count in shots if isinstance(shots, list) else [shots]:
        for name, number in run.check_shots(tasks, count).items():
            asked[f"{name}@{count}" if several else name] = number
    if other is not None:
        compare.check(asked, other)
    compat.configure_cache()

    from mtnlg_jax.decode.load import load_decoder

    loaded, decoder = load_decoder(
        score.WORKDIR.value,
        score.CHECKPOINT.value,
        mesh=devices.mesh(),
        before=lambda config, _: _check_memory(config, held),
        **held,
    )
    if OUTPUT.value is None and devices.on_first_process():
        stored.earlier(*_place(loaded.step))  # refuses another file before any work
    results = _scored(tasks, decoder, loaded, shots)
    for task in results["tasks"].values():
        # A file of a run also keeps tasks that other code scored.
        task |= {"held": held} | {key: results[key] for key in stored.OF_CODE}
    log = report.log_lines(results["tasks"])
    differences = None if other is None else compare.compare(results, other)
    if differences is not None:
        results["differences"] = {"against": COMPARE.value, "metrics": differences}
    _print(results, differences)
    if devices.on_first_process():
        _write(results, log)


def _scored(
    tasks: "dict[str, LocalTask]", decoder: Any, loaded: Any, shots: int | list[int] | None
) -> dict[str, Any]:
    from mtnlg_jax.evaluate.harness import MtnlgLM
    from mtnlg_jax.evaluate.harness_tasks import run
    from mtnlg_jax.train.describe import header

    seed = longtext.SEED.value if longtext.SEED.present else run.SEED
    return header(run.KIND, loaded.step, ("lm_eval",)) | {
        "workdir": score.WORKDIR.value,
        "tasks": run.evaluate_tasks(
            MtnlgLM.of(decoder, loaded.tokenizer),
            tasks,
            num_fewshot=shots,
            limit=LIMIT.value,
            seed=seed,
            log_rows=LOG_ROWS.value is not None,
        ),
    }


def _print(results: dict[str, Any], differences: list[dict[str, Any]] | None) -> None:
    from mtnlg_jax.evaluate.harness_tasks import report

    if score.JSON.value:
        shown = {
            name: {key: value for key, value in task.items() if key != "per_row"}
            for name, task in results["tasks"].items()
        }
        print(json.dumps(results | {"tasks": shown}, allow_nan=False), flush=True)
        return
    print(report.describe(results), flush=True)
    if differences is not None:
        print(report.describe_differences(differences, str(COMPARE.value)), flush=True)


def _place(step: int) -> tuple[str, str]:
    """Return folder and name of the file of results."""
    if OUTPUT.value is None:
        from mtnlg_jax.evaluate.harness_tasks import stored

        return stored.place(score.WORKDIR.value, step)
    folder, name = os.path.split(OUTPUT.value)
    return folder or os.curdir, name


def _write(results: dict[str, Any], log: bytes) -> None:
    from mtnlg_jax.evaluate.harness_tasks import plots, report, stored

    folder, name = _place(results["step"])
    # A run's own file keeps the other tasks of the same step, also those scored meanwhile.
    before = stored.earlier(folder, name) if OUTPUT.value is None else {}
    for task, why in stored.replaced(before, results["tasks"]).items():
        devices.note(f"{task}: replaces earlier results of {why}")
    together = results | {"tasks": before | results["tasks"]}
    storage.write_file(folder, name, report.as_json(together))
    devices.note(f"results: {storage.join(folder, name)}")
    if LOG_ROWS.value is not None:
        storage.write_file(*os.path.split(os.path.abspath(LOG_ROWS.value)), log)
    # Last, so that a full disk costs the plots alone.
    if longtext.PLOTS.value is not None:
        names = plots.write_plots(longtext.PLOTS.value, results["tasks"])
        devices.note(f"{longtext.PLOTS.value}: {', '.join(names) or 'no task has a plot'}")

"""From names of tasks to tasks whose rows are read and checked."""

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtnlg_jax.evaluate.harness_tasks import layouts, offline
from mtnlg_jax.evaluate.harness_tasks.checking import check_rows

if TYPE_CHECKING:
    from mtnlg_jax.evaluate.harness_tasks.task import LocalTask

FOLDER = Path(__file__).parent
# Zero-, one- and few-shot tasks of Smith et al. 2022, section 5: the tag of their files.
PAPER = "mtnlg_paper"


def own_names() -> list[str]:
    """Return the names of the tasks in this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_tasks(
    names: Sequence[str],
    task_data: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    on_error: str = "raise",
) -> "dict[str, LocalTask]":
    """Return {name: task} with checked rows, in the order of ``names``.

    A name is that of a file in this folder, of a task, tag or group of the harness, or of a YAML
    file below ``include_path``, which comes first. ``task_data``: the folder of rows. ``limit``:
    rows that are checked, and later scored. ``on_error``: "raise", or "skip" to leave bad rows out,
    which are counted. Raise ValueError or OSError before any work for unknown
    names and bad rows.
    """
    offline.enter()
    if not names or not all(names):
        raise ValueError(f"--tasks names no task; choose from {', '.join(own_names())}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit={limit} is below 1; leave it out to score all rows")
    configs = _configs(list(dict.fromkeys(names)), include_path)
    from mtnlg_jax.evaluate.harness_tasks.task import LocalTask

    tasks: dict[str, LocalTask] = {}
    for name, config in configs.items():
        metadata = config.get("metadata") or {}
        config["metadata"] = metadata | {"on_error": on_error}
        if task_data is not None:
            config["metadata"]["task_data"] = task_data
        form = metadata.get("rows") or layouts.STOCK.get(name)
        if form is None and config.get("from_harness") and name in own_names():
            form = name
        if form is not None:
            if form not in layouts.FORMS:
                raise ValueError(
                    f"the task {name} has metadata.rows={form}; choose one of "
                    f"{', '.join(layouts.FORMS)}"
                )
            config["metadata"]["rows"] = form
        config.pop("from_harness", None)
        tasks[name] = LocalTask(config=config)
        check_rows(tasks[name], limit)
    return tasks


def _configs(names: list[str], include_path: str | None) -> dict[str, dict[str, Any]]:
    """Return {task: config} of names, with tags and groups resolved."""
    own = set(own_names())
    # The harness's 14,000 take many seconds to list: only for a name that is not here.
    near = {} if include_path is None else _of_folder(include_path)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == PAPER and name not in near:
            found |= {each: _read(FOLDER / f"{each}.yaml") for each in _of_paper()}
        elif name in own and name not in near:
            found[name] = _read(FOLDER / f"{name}.yaml")
        else:
            index = near if _has(name, near) else _of_harness() | near
            for each in _leaves(name, index):
                found[each] = _of_entry(each, index)
    return found


def _has(name: str, index: dict[str, Any]) -> bool:
    """Return whether an index knows a name, and all tasks of a tag or a group."""
    try:
        return all(each in index for each in _leaves(name, index))
    except ValueError:
        return False


def _of_paper() -> list[str]:
    found = []
    for name in own_names():
        tag = _read(FOLDER / f"{name}.yaml").get("tag")
        if PAPER in (tag if isinstance(tag, list) else [tag]):
            found.append(name)
    return found


def _read(path: Path) -> dict[str, Any]:
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(path)
    except (yaml.YAMLError, ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a task of the harness: {error}") from None
    metadata = config.get("metadata")
    config["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {
        "config_source": str(path)
    }
    return config


@functools.cache
def _of_harness() -> dict[str, Any]:
    """Return the harness's index, in which our tasks take the place of its own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(FOLDER)).task_index


def _of_folder(path: str) -> dict[str, Any]:
    """Return the index of a folder of YAML files."""
    from lm_eval.tasks import TaskManager

    if not Path(path).is_dir():
        raise FileNotFoundError(f"--include_path={path} is not a folder of YAML files")
    return TaskManager(include_path=path, include_defaults=False).task_index


def _leaves(name: str, index: dict[str, Any]) -> list[str]:
    """Return the tasks of a task, tag or group."""
    entry = index.get(name)
    if entry is None:
        close = difflib.get_close_matches(name, [*own_names(), *index], 3)
        hint = f" (did you mean {' or '.join(dict.fromkeys(close))}?)" if close else ""
        raise ValueError(
            f"--tasks={name} is not a task of this package or of the harness{hint}; name a folder "
            "of your own YAML files with --include_path"
        )
    kind = entry.kind.name
    if kind == "TAG":
        return [leaf for each in sorted(entry.tags) for leaf in _leaves(each, index)]
    if kind == "GROUP":
        members = (entry.cfg or _read(entry.yaml_path)).get("task") or []
        leaves = []
        for each in members if isinstance(members, list) else [members]:
            inside = each if isinstance(each, str) else each.get("task") or each.get("group")
            if not isinstance(inside, str):
                raise ValueError(
                    f"--tasks={name} is a group with members of its own; name its tasks"
                )
            leaves += _leaves(inside, index)
        return leaves
    return [name]


def _of_entry(name: str, index: dict[str, Any]) -> dict[str, Any]:
    entry = index[name]
    if entry.yaml_path is None:
        raise ValueError(f"--tasks={name} is written in Python and downloads its own rows")
    config = _read(entry.yaml_path)
    kind = config.get("class")
    if kind is not None and kind.__name__ != "LocalTask":
        raise ValueError(
            f"--tasks={name} is written in Python ({kind.__name__}) and downloads its own rows; "
            "write a YAML file with data_files for it"
        )
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    config["task"] = name
    # Prompts of the harness itself, whose rows have the form of ours of the same name.
    config["from_harness"] = "lm_eval" in entry.yaml_path.parts
    return config

"""Tasks over files, done by any number of processes or machines, which can be interrupted and
resumed at any time.

The result of a task depends only on its arguments, not on where or when it runs. Its record, which
is written last, holds the task's key: a hash of the function's name, the settings and the keys of
everything it reads. A task is done if its record has its key. Another input or setting changes the
key of the task and of all that depend on it.

The name includes the function's module: to move or rename a function makes every corpus again.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from mtnlg_jax import __version__, storage

_GROUP = 256  # rows of a Parquet row group


class Row(NamedTuple):
    """A document: its text, and its origin ``place`` (source, path below it, line or piece)."""

    text: str
    place: str


@dataclass(frozen=True)
class Shard:
    """A file of rows below the root: its ``name`` without suffix, its source, the number of
    ``documents``, and the key of the task that wrote it."""

    name: str
    source: str
    documents: int
    key: str

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Task:
    """``function(folder, name, *given)`` writes files through the `Folder`, and returns a value for
    JSON; the record is ``name`` with ".json".

    ``depends`` are keys, or values whose repr identifies ``given`` without machine paths.
    """

    name: str
    function: Callable[..., dict]
    given: tuple
    depends: tuple

    @cached_property
    def key(self) -> str:
        what = (__version__, self.function.__module__, self.function.__qualname__, self.depends)
        return hashlib.sha256(repr(what).encode()).hexdigest()


class Runner:
    """Run tasks below ``root``, a folder or a URL that every process can reach.

    ``engine(function, tasks)`` yields (number, function(task)) in any order: `in_processes` or
    `on_ray`.
    """

    def __init__(self, root: str, engine: Callable, progress: bool = True):
        self.root = root
        self._engine = engine
        self._silent = None if progress else True  # None: a bar on a terminal only
        self._kept: set[str] = set()

    def run(self, label: str, tasks: list[Task]) -> list[dict]:
        """Run the ``tasks`` that are not done, and return the results of all in their order."""
        records = {
            number: record
            for number, task in enumerate(tasks)
            if (record := _record(self.root, task)) is not None
        }
        missing = [number for number in range(len(tasks)) if number not in records]
        with tqdm(
            desc=label,
            total=len(tasks),
            initial=len(tasks) - len(missing),
            unit=" tasks",
            disable=self._silent,
        ) as bar:
            for number, record in self._engine(
                partial(_do, self.root), [tasks[number] for number in missing]
            ):
                records[missing[number]] = record
                bar.update()
        for number, task in enumerate(tasks):
            self._kept |= {task.name + ".json", *records[number]["files"]}
        return [records[number]["result"] for number in range(len(tasks))]

    @property
    def folder(self) -> "Folder":
        """The folder of the tasks, to read what they wrote."""
        return Folder(self.root)

    def is_done(self, task: Task) -> bool:
        return _record(self.root, task) is not None

    def prune(self, folder: str) -> None:
        """Remove files below ``folder`` that no task of this runner made: those of other inputs or
        settings, or of a killed process."""
        for name in storage.list_files(self.root, folder):
            if name not in self._kept:
                storage.remove_file(self.root, name)


def _record(root: str, task: Task) -> dict | None:
    content = storage.read_file(root, task.name + ".json")
    try:
        record = json.loads(content) if content else None
        if record is None or record["key"] != task.key:
            return None
        whole = all(storage.exists(root, name) for name in record["files"])
        return record if whole else None
    except (ValueError, KeyError, TypeError):
        return None  # a damaged record: run its task again


def _do(root: str, task: Task) -> dict:
    # First of all: an earlier record must not vouch for files that are about to be overwritten.
    storage.remove_file(root, task.name + ".json")
    files: list[str] = []
    result = task.function(Folder(root, files), task.name, *task.given)
    record = {"key": task.key, "files": files, "result": result}
    content = json.dumps(record, ensure_ascii=False, indent=1).encode()
    storage.write_file(root, task.name + ".json", content)
    return json.loads(content)  # as a later run will read it: tuples are lists, keys are strings


class Folder:
    """The files below the root for a task, with a list of those it wrote."""

    def __init__(self, root: str, written: list[str] | None = None):
        self.root = root
        self._written = [] if written is None else written

    def read(self, name: str) -> bytes:
        content = storage.read_file(self.root, name)
        if content is None:
            raise ValueError(
                f"{storage.join(self.root, name)} is missing, though its stage was done; remove "
                f"{storage.join(self.root, name.split('/')[0])} to run that stage again"
            )
        return content

    def write(self, name: str, content: bytes) -> None:
        storage.write_file(self.root, name, content)
        self.note(name)

    def note(self, name: str) -> None:
        """Record a file that other code wrote for the task."""
        self._written.append(name)

    def rows(self, shard: Shard) -> list[Row]:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(self.read(shard.name + ".parquet")))
        return [
            Row(*pair)
            for pair in zip(table["text"].to_pylist(), table["place"].to_pylist(), strict=True)
        ]

    def some_rows(self, shard: Shard, numbers: np.ndarray) -> dict[int, Row]:
        """Return the rows at ``numbers``, which are sorted; reads only their row groups."""
        with pyarrow.parquet.ParquetFile(
            pyarrow.BufferReader(self.read(shard.name + ".parquet"))
        ) as file:
            groups = np.unique(numbers // _GROUP)
            table = file.read_row_groups(groups.tolist())
        table = table.take(np.searchsorted(groups, numbers // _GROUP) * _GROUP + numbers % _GROUP)
        rows = zip(table["text"].to_pylist(), table["place"].to_pylist(), strict=True)
        return {int(number): Row(*row) for number, row in zip(numbers, rows, strict=True)}

    def write_rows(self, name: str, source: str, rows: list[Row]) -> dict:
        """Write a shard; return its entry for `shards_of`."""
        table = pyarrow.table(
            {
                "text": pyarrow.array([row.text for row in rows], pyarrow.large_string()),
                "place": pyarrow.array([row.place for row in rows], pyarrow.large_string()),
            }
        )
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(
            table, sink, compression="zstd", use_dictionary=False, row_group_size=_GROUP
        )
        self.write(name + ".parquet", sink.getvalue().to_pybytes())
        return {"name": name, "source": source, "documents": len(rows)}


def shards_of(tasks: list[Task], results: list[dict]) -> list[Shard]:
    """Return the shards that are not empty, sorted by name."""
    shards = [
        Shard(**shard, key=task.key)
        for task, result in zip(tasks, results, strict=True)
        for shard in result["shards"]
        if shard["documents"]
    ]
    return sorted(shards, key=lambda shard: shard.name)


@contextlib.contextmanager
def in_processes(count: int) -> Iterator[Callable]:
    """Engine for one machine: ``count`` processes, spawned once for all stages. One is this
    process."""
    if count < 1:
        raise ValueError(f"processes={count} must be at least 1")
    if count == 1:
        yield lambda function, tasks: enumerate(map(function, tasks))
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), _start)

    def engine(function: Callable, tasks: list) -> Iterator[tuple[int, dict]]:
        numbers = {pool.submit(function, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a process of the stage ended, probably because memory ran out; use fewer with "
                "--processes, or smaller shards with --set=shard_bytes; what is done is kept"
            ) from None

    try:
        yield engine
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """End this process with its parent: an orphan would still write into the output of the next
    run."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None  # this is a process of the pool
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def on_ray() -> Iterator[Callable]:
    """Engine for many machines: Ray Data on the cluster of RAY_ADDRESS, or else on this machine.
    All machines must reach the input and the output's folder or URL.

    Ray rather than Beam: it runs on the same hosts, pods and SLURM nodes as training, without a
    separate service, and its tasks are plain Python functions like ours.
    """
    try:
        import ray.data
    except ImportError:
        raise ValueError(
            "--engine=ray needs Ray; install it with: pip install -c launch/constraints.txt -e "
            "'.[ray]'"
        ) from None
    ray.init(log_to_driver=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False

    def engine(function: Callable, tasks: list) -> Iterator[tuple[int, dict]]:
        if not tasks:
            return
        stored = [ray.put(task) for task in tasks]

        def do(row: dict) -> dict:
            return {
                "number": row["item"],
                "record": json.dumps(function(ray.get(stored[row["item"]]))),
            }

        numbers = ray.data.from_items(list(range(len(tasks))), override_num_blocks=len(tasks))
        for row in numbers.map(do).iter_rows():
            yield row["number"], json.loads(row["record"])

    try:
        yield engine
    finally:
        ray.shutdown()

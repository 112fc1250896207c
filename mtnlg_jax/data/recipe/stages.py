"""Stages: tasks over files, done by any number of processes or machines, stopped and taken up again
at any moment.

A task's result depends on what it is given alone, never on who does it or when. Its record, written
last, holds the
task's key: a hash of the function's name, the settings and the keys of all that it reads. A task
whose record has its key is done; another input or setting gives another key, for it and for all
that comes after.
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

_GROUP = 256  # rows that are packed together


class Row(NamedTuple):
    """A document: its text, and where it came from (source, path below that, line or piece)."""

    text: str
    place: str


@dataclass(frozen=True)
class Shard:
    """A file of rows below the root: ``name`` without its suffix, the source it belongs to,
    ``documents`` in it, and the key of what it depends on."""

    name: str
    source: str
    documents: int
    key: str

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Task:
    """``function(folder, name, *given)`` writes files through the `Folder`, and returns what JSON
    can hold; its record is ``name`` with ".json".

    ``depends`` are keys, or anything of which the repr says all that ``given`` says and no place of
    this machine."""

    name: str
    function: Callable[..., dict]
    given: tuple
    depends: tuple

    @cached_property
    def key(self) -> str:
        what = (__version__, self.function.__module__, self.function.__qualname__, self.depends)
        return hashlib.sha256(repr(what).encode()).hexdigest()


class Runner:
    """Does tasks below ``root``, a folder or a URL that every process can reach.

    ``engine(function, tasks)`` yields (number, function(task)) in any order: `in_processes` or
    `on_ray`."""

    def __init__(self, root: str, engine: Callable, progress: bool = True):
        self.root = root  # None: on a terminal only
        self._engine = engine
        self._silent = None if progress else True
        self._kept: set[str] = set()

    def run(self, label: str, tasks: list[Task]) -> list[dict]:
        """The results of ``tasks``, in their order; those that are done already are not done
        again."""
        records = [_record(self.root, task) for task in tasks]
        missing = [number for number, record in enumerate(records) if record is None]
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
        for task, record in zip(tasks, records, strict=True):
            self._kept |= {task.name + ".json", *record["files"]}
        return [record["result"] for record in records]

    @property
    def folder(self) -> "Folder":
        """To read what tasks wrote."""
        return Folder(self.root)

    def is_done(self, task: Task) -> bool:
        return _record(self.root, task) is not None

    def prune(self, folder: str) -> None:
        """Removes the files below ``folder`` that no task of this runner made: of other inputs or
        settings, or of a process that was killed."""
        for name in storage.list_files(self.root, folder):
            if name not in self._kept:
                storage.remove_file(self.root, name)


def _record(root: str, task: Task) -> dict | None:
    content = storage.read_file(root, task.name + ".json")
    try:
        record = json.loads(content) if content else None
        whole = (
            record
            and record["key"] == task.key
            and all(storage.exists(root, name) for name in record["files"])
        )
        return record if whole else None
    except (ValueError, KeyError, TypeError):
        return None  # a damaged record: its task is done again


def _do(root: str, task: Task) -> dict:
    # First: a record of what was made before must not vouch for files that are about to be written
    # over.
    storage.remove_file(root, task.name + ".json")
    files: list[str] = []
    result = task.function(Folder(root, files), task.name, *task.given)
    record = {"key": task.key, "files": files, "result": result}
    content = json.dumps(record, ensure_ascii=False, indent=1).encode()
    storage.write_file(root, task.name + ".json", content)
    return json.loads(content)  # as it would be read: tuples are lists, keys are strings


class Folder:
    """What a task reads and writes below the root; it notes what is written."""

    def __init__(self, root: str, written: list[str] | None = None):
        self.root = root
        self._written = written

    def read(self, name: str) -> bytes:
        content = storage.read_file(self.root, name)
        if content is None:
            raise ValueError(
                f"{storage.join(self.root, name)} is missing, though its stage was done; remove "
                f"{storage.join(self.root, name.split('/')[0])} to have that stage done again"
            )
        return content

    def write(self, name: str, content: bytes) -> None:
        storage.write_file(self.root, name, content)
        self.note(name)

    def note(self, name: str) -> None:
        """Files that something else wrote for the task."""
        self._written.append(name)

    def rows(self, shard: Shard) -> list[Row]:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(self.read(shard.name + ".parquet")))
        return [
            Row(*pair)
            for pair in zip(table["text"].to_pylist(), table["place"].to_pylist(), strict=True)
        ]

    def some_rows(self, shard: Shard, numbers: np.ndarray) -> dict[int, Row]:
        """Those of ``numbers``, sorted; only the groups of rows that hold them are unpacked."""
        with pyarrow.parquet.ParquetFile(
            pyarrow.BufferReader(self.read(shard.name + ".parquet"))
        ) as file:
            groups = np.unique(numbers // _GROUP)
            table = file.read_row_groups(groups.tolist())
        places = np.searchsorted(groups, numbers // _GROUP) * _GROUP + numbers % _GROUP
        table = table.take(places)
        rows = zip(table["text"].to_pylist(), table["place"].to_pylist(), strict=True)
        return {int(number): Row(*row) for number, row in zip(numbers, rows, strict=True)}

    def write_rows(self, name: str, source: str, rows: list[Row]) -> dict:
        """Writes a shard; gives what `shards_of` wants of it."""
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
    """The shards that are not empty, in the order of their names."""
    shards = [
        Shard(**shard, key=task.key)
        for task, result in zip(tasks, results, strict=True)
        for shard in result["shards"]
        if shard["documents"]
    ]
    return sorted(shards, key=lambda shard: shard.name)


@contextlib.contextmanager
def in_processes(count: int) -> Iterator[Callable]:
    """The engine of one machine: ``count`` processes, spawned once for all stages; with one, this
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
                "a process of the stage ended, as it does where memory runs out; take fewer with "
                "--processes, or smaller shards with --set=shard_bytes; what is done is kept"
            ) from None

    try:
        yield engine
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Ends this process with the one that started it: what goes on writing would be in the way of
    the next run."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def on_ray() -> Iterator[Callable]:
    """The engine of many machines: Ray Data, on the cluster that RAY_ADDRESS names, else on this
    machine. All of them must reach the output's folder or URL, and the input.

    Ray rather than Beam: it runs on the very hosts, pods and SLURM nodes that training runs on,
    without a service beside it, and its task is a plain Python function like ours."""
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

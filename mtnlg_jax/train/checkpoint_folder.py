"""The folder of a run's checkpoints, as process 0 keeps it: lock, space, pruning, damage.

`checkpoint` describes what lies in it. Only under the lock are files removed.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import jax
from etils import epath

from mtnlg_jax import foreign, storage
from mtnlg_jax.command import CHECKPOINTS
from mtnlg_jax.errors import PassingError, is_passing
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train import checkpoint_arrays, extras, manifest, moments_dtype

FINITE = "finite"  # the marker file in a checkpoint's folder

# Raises what speaks against a checkpoint, given its meta, its step and whether it holds parameters
# alone.
Refuse = Callable[[dict, int, bool], None]


class CheckpointFolder:
    """The checkpoints in ``path``: the ``keep_last`` newest, and the best with ``keep_best``."""

    def __init__(self, path: str | os.PathLike, keep_last: int, keep_best: bool) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would keep no checkpoint; set it to 1 or more")
        self.path = epath.Path(storage.absolute(path))
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._lock: TextIO | None = None
        # Steps that are there or on their way, on an object store: to list it takes long.
        self._known: set[int] = set()
        self._unfinished: set[int] = set()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def steps(self) -> list[int]:
        """Return the steps of the finished checkpoints, ascending."""
        return manifest.finished(self.path)

    def open(self) -> None:
        """Create and lock the folder, and remove leftovers."""
        if is_remote(self.path) and not os.fspath(self.path).startswith("gs://"):
            raise ValueError(
                f"{self.path}: Orbax writes checkpoints to folders and to gs://; mount the store "
                "as a folder, and give its path as --workdir"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if is_remote(self.path):
                # Object stores have no locks. Writing shows at the start, not at the first save,
                # whether the run may write there.
                (self.path / "lock").write_text("")
                self._known.update(self.steps())
                found = {int(path.name) for path in self.path.iterdir() if path.name.isdigit()}
                self._unfinished = found - self._known
                return
            # Appending does not truncate: the file names its owner until the lock is ours.
            self._lock = open(self.path / "lock", "a+")
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written to ({error.strerror or error}); "
                "make it writable, or give another --workdir"
            ) from error
        try:
            # A lockf lock ends with the process, however it ends, and children do not inherit it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # A file system without locks: others may be writing, so nothing is cleaned up.
                return
            self._lock.seek(0)
            owner = self._lock.read().strip()
            self.close()
            raise BlockingIOError(
                f"another run ({owner}) writes to {self.path}; wait for its end, or give another "
                "--workdir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        # Only now: leftovers of a run that still writes are not leftovers.
        self._clean()

    def _clean(self) -> None:
        """Remove what a killed run left half written or half deleted. Call only under the lock."""
        for path in self.path.glob("*.orbax-checkpoint-tmp*"):
            path.rmtree()
        markers = [path for path in self.path.glob("*.unfinished") if path.stem.isdigit()]
        for step in [int(path.stem) for path in markers]:
            # A marker beside a record: the run was killed after a save had written the record, or
            # before a deletion removed it. Either way the checkpoint is whole.
            if step in self.steps():
                manifest.marker(self.path, step).unlink()
            else:
                self._remove(step)

    def begin(self, step: int, size: int) -> bool:
        """Return whether ``step`` is to be written, after checking the disk and marking it."""
        # A checkpoint that exists is never written again.
        if is_remote(self.path):
            # No request otherwise: this is called between two steps.
            if step in self._unfinished:
                self._unfinished.remove(step)
                self._remove(step)
            new = step not in self._known
            self._known.add(step)
            return new
        if step in self.steps():
            return False
        with self.failure_named(step):
            # Better refused now than found out by a write half way, which would leave a leftover.
            free = shutil.disk_usage(self.path).free
            if free < size:
                raise PassingError(
                    f"the disk is full: {free / 1e6:,.1f} MB are free, {size / 1e6:,.1f} MB needed"
                )
            manifest.marker(self.path, step).touch()
        return True

    def mark_finite(self, step: int) -> None:
        """Record that a loss of the parameters of ``step`` was finite, and prune older ones."""
        if jax.process_index() == 0 and step in self.steps():  # its save may have failed
            with self.failure_named(step):
                # The order matters: older checkpoints may only go once this one is known to be
                # good.
                (self.path / str(step) / FINITE).touch()
                self._prune()

    def is_unproven(self, step: int) -> bool:
        """Return whether there is a checkpoint of ``step``, and no loss of it is known."""
        return step in self.steps() and not (self.path / str(step) / FINITE).exists()

    def set_aside(self, unproven: int | None) -> int | None:
        """Rename the newest checkpoint if it is ``unproven``; return the newest step left."""
        steps = self.steps()
        if steps and steps[-1] == unproven:
            self._known.discard(steps[-1])
            (self.path / str(steps[-1])).rename(self._free_path(f"{steps.pop()}.diverged"))
        return steps[-1] if steps else None

    def set_later_aside(self, after: int) -> int | None:
        """Rename the checkpoints of steps above ``after``; return the newest step left."""
        steps = self.steps()
        while steps and steps[-1] > after:
            (self.path / str(steps[-1])).rename(self._free_path(f"{steps.pop()}.suspect"))
        return steps[-1] if steps else None

    def _prune(self) -> None:
        steps = self.steps()
        # The best may be older than the newest ones; None, where nothing was evaluated, matches no
        # step.
        kept = {*steps[-self.keep_last :], manifest.best(self.path) if self.keep_best else None}
        for step in steps:
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        path = self.path / str(step)
        self._known.discard(step)
        if is_remote(self.path):
            (path / manifest.RECORD).unlink(missing_ok=True)
            if path.exists():
                path.rmtree()
            return
        marker = manifest.marker(self.path, step)
        # Before the record goes: after a kill in between, this is a leftover and not damage.
        marker.touch()
        (path / manifest.RECORD).unlink(missing_ok=True)
        if path.exists():
            path.rmtree()
        marker.unlink()

    def _discard(self, step: int) -> None:
        """Remove half a checkpoint, whose space is needed.

        Where one array could not be written, others may still be in progress for a moment, and a
        folder that they write to cannot be removed: hence the retries.
        """
        # Each failure is ignored: what is left is removed by the next start.
        for pause in (0, 0.1, 0.5, 2):
            time.sleep(pause)
            with contextlib.suppress(OSError):
                for path in self.path.glob(f"{step}.orbax-checkpoint-tmp*"):
                    path.rmtree()
                self._remove(step)
                return

    @contextlib.contextmanager
    def failure_named(self, step: int) -> Iterator[None]:
        """Discard ``step`` after a failure, and raise an error that names it and the way out."""
        try:
            yield
        except Exception as error:
            whole = self.steps()
            if is_remote(self.path) and step not in whole:
                self._known.discard(step)
                self._unfinished.add(step)
            # Every process comes here after a failure, and process 0 cleans up.
            if jax.process_index() == 0 and step not in whole:
                self._discard(step)
            start = f"step {whole[-1]}" if whole else "the beginning"
            # The class decides whether `saving.Saver` tries again.
            kind = PassingError if is_passing(error) else OSError
            raise kind(
                f"checkpoint {step} could not be written to {self.path}: {_reason(error)}; "
                f"resolve this and start again, which resumes from {start}"
            ) from error

    def choose(
        self, identity: dict, arrays: dict[str, str], refuse: Refuse
    ) -> tuple[dict | None, list[str], str | None]:
        """Return the newest whole checkpoint, warnings about damaged ones that it set aside, and
        what to raise where there are damaged ones alone."""
        damaged: list[str] = []
        warnings: list[str] = []
        # The newest first. A folder with neither a record nor a marker is a candidate that turns
        # out damaged.
        for step in reversed(manifest.candidates(self.path)):
            path = self.path / str(step)
            record, damage = manifest.read_record(path)
            if record is not None:
                # Settings are compared before the files are hashed, so that a mistake in a flag
                # shows in an instant.
                check_record(path, record, identity, arrays, refuse)
                damage = manifest.damage(path, record)
                if damage is None:
                    chosen = {
                        "step": step,
                        "meta": record["meta"],
                        "arrays": record["arrays"],
                        "proven": record["metric"] is not None or (path / FINITE).exists(),
                    }
                    return chosen, warnings, None
            aside = self._free_path(f"{step}.damaged")
            path.rename(aside)
            damaged.append(f"{step} ({damage})")
            warnings.append(f"checkpoint {path} is damaged ({damage}): set aside as {aside.name}")
        # Damaged ones may have been set aside by an earlier start. Without this check a second
        # start would silently begin from scratch.
        damaged = damaged or sorted(path.name for path in self.path.glob("*.damaged*"))
        failure = (
            f"{self.path} holds damaged checkpoints only: {', '.join(damaged)}; restore a "
            "good copy (named by its step), or start afresh with another --workdir"
        )
        return None, warnings, failure if damaged else None

    def _free_path(self, name: str) -> epath.Path:
        """Return a path in the folder that does not exist: ``name``, or ``name`` with a number."""
        taken = {path.name for path in self.path.iterdir()}
        free = name
        number = 2
        while free in taken:
            free = f"{name}-{number}"
            number += 1
        return self.path / free


def check_record(
    path: epath.Path, record: dict, identity: dict, arrays: dict[str, str], refuse: Refuse
) -> None:
    """Check that a run with ``identity`` and ``arrays`` may resume from the checkpoint at ``path``.

    Of parameters alone, only the settings that both sides name are compared.
    """
    params_only = all(map(checkpoint_arrays.is_parameter, record["arrays"]))
    saved = record["meta"].get("identity", {})
    given = identity
    # Moments may change their type.
    arrays = moments_dtype.in_float32(arrays)
    stored = moments_dtype.in_float32(record["arrays"])
    # Extras may be turned on and off: only those of both sides are compared.
    one_sided = {name for name in stored.keys() ^ arrays.keys() if extras.part_of(name)}
    wanted = {name: shape for name, shape in arrays.items() if name not in one_sided}
    found = {name: shape for name, shape in stored.items() if name not in one_sided}
    if params_only:
        saved, given = _common(saved, identity), _common(identity, saved)
        wanted = {
            name: shape for name, shape in arrays.items() if checkpoint_arrays.is_parameter(name)
        }
    manifest.refuse_difference(
        path, "settings", saved, given, "give the same ones, or another --workdir"
    )
    refuse(record["meta"], record["step"], params_only)
    manifest.refuse_difference(
        path,
        "arrays",
        found,
        # The identity has the size of the vocabulary; its padding depends on the mesh.
        checkpoint_arrays.with_padding_of(wanted, stored),
        "set model and optimizer as they were, or give another --workdir",
    )


def _common(side: dict[str, dict], other: dict[str, dict]) -> dict[str, dict]:
    """Return the settings of ``side`` that ``other`` names as well."""
    return {
        section: {key: side[section][key] for key in sorted(side[section].keys() & keys)}
        for section, keys in other.items()
        if section in side
    }


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or storage.first_line(error)
    if os.strerror(errno.ENOSPC) in text:
        return "the disk is full"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def no_run(workdir: epath.Path) -> str:
    """Describe what ``workdir``, which holds no checkpoint, is instead, and what to give."""
    path = os.fspath(workdir)
    way_out = "give --workdir of a launch/pretrain.py run, a Hugging Face folder or a GGUF file"
    if is_remote(workdir):
        return f"{path} holds no checkpoint; {way_out}"
    if not os.path.exists(path):
        return f"{storage.missing(path)}; it holds no checkpoint: {way_out}"
    # Someone may have given a folder inside a run, such as checkpoints/200.
    for above in (workdir.parent, workdir.parent.parent):
        if manifest.finished(above / "checkpoints"):
            return f"{path} is part of a run and holds no checkpoint; give {os.fspath(above)}"
    if os.path.isfile(os.path.join(path, "model.safetensors")):
        return (
            f"{path} is a Hugging Face model without its config.json, and holds no checkpoint; "
            "copy the whole folder"
        )
    return f"{path} holds no checkpoint; {way_out}"


def steps_of(run: epath.Path, which: str) -> list[int]:
    """Return the steps of the checkpoints of ``run``, the one to take first.

    ``which`` is one of CHECKPOINTS. Raise FileNotFoundError where there is none.
    """
    if which not in CHECKPOINTS:
        raise ValueError(f"unknown value which={which!r}; choose {', '.join(CHECKPOINTS)}")
    folder = run / "checkpoints"
    steps = manifest.finished(folder)[::-1]
    best = manifest.best(folder)
    if not steps:
        raise FileNotFoundError(no_run(run))
    if which == "ema":
        steps = [step for step in steps if (folder / str(step) / "ema").exists()]
        if not steps:
            raise FileNotFoundError(
                f"no checkpoint of {folder} has averages of the weights: they are kept with "
                "train.ema_decay above 0; give --checkpoint=best, or last"
            )
    if which == "best" and best is not None:
        # The others follow in case the best is damaged or deleted while it is read.
        return [best, *(step for step in steps if step != best)]
    return steps


def reader_of(workdir: str | os.PathLike, which: str) -> foreign.Reader | None:
    """Return the reader of a model of another format in ``workdir``; None of a run.

    Raise ValueError where that lacks what ``which`` asks for.
    """
    reader = foreign.reader_of(workdir)
    if reader is not None and which == "ema":
        raise ValueError(
            f"{os.fspath(workdir)} is not a run, and has no averages of the weights beside them; "
            "leave --checkpoint=ema out"
        )
    return reader

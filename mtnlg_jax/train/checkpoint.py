"""Checkpoints: written by Orbax in the background, whole or not at all, restored on any mesh.

    checkpoints/
      lock                 held by the run that writes here
      200.unfinished       while 200/ is written or deleted; a start removes both
      200/params/          Orbax: one array a parameter, by name, layers stacked, whatever the mesh was
      200/rest/            Orbax: optimizer and counters
      200/record.json      written last: config, identity, metric, size and SHA-256 of every file
      100.damaged/         found damaged at a start and set aside

A checkpoint counts once its record stands. With several processes all take part in Orbax's reading and
writing; process 0 alone writes records, chooses and deletes, and the others hear its choice (or error).
On object stores (``gs://``) there is no lock, so nothing is cleaned at a start, and files are checked by size
only: the store keeps checksums of its own.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging as python_logging
import math
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mtnlg_jax.config import Config, from_json
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import shardings_of

RECORD = "record.json"
HASH_THREADS = 4

# Orbax reports every phase of its work; what matters of that is raised here as an error.
python_logging.getLogger("absl").addFilter(lambda line: f"orbax{os.sep}checkpoint" not in line.pathname)


class Checkpoints:
    """The checkpoints of one run, in ``folder`` (local or ``gs://...``): the ``keep_last`` newest, and the one
    of the lowest metric if ``keep_best``. ``warnings`` lists what was found damaged.

    Raises OSError where the folder cannot be written, or where another run writes to it.
    """

    def __init__(self, folder, keep_last: int = 2, keep_best: bool = True):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least 1 checkpoint has to stay; set train.keep_last=1")
        self.folder = epath.Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self.warnings: list[str] = []
        self._lock = None
        _agree(self._open)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(params=_arrays(), rest=_arrays()))
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving = None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending; whether they are whole is seen when they are read."""
        return _finished(self.folder)

    def best_step(self) -> int | None:
        """The step with the lowest metric, the newest of equals; None where no metric was given."""
        return _best(self.folder)

    def save(self, step: int, state: dict, meta: dict, metric: float | None = None, wait: bool = False) -> None:
        """Saves ``state`` ({"params": ..., ...}, jax arrays) and ``meta`` (JSON; "identity" is compared by
        ``restore``, "config" read by ``load_run``) as ``step``, once: a step that is there stays as it is.

        Returns when the arrays have left their device buffers, which may then be donated; the writing goes on
        in the background. What goes wrong there is raised as OSError by the next ``save`` or ``wait``.
        """
        self.wait()
        step, flat = int(step), _flat(state)
        if step in self.steps():
            return
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        record = {"step": step, "metric": metric, "meta": json.loads(json.dumps(meta)),
                  "arrays": {name: _shape(array) for name, array in flat.items()}}
        params, rest = _split(flat)
        with self._failures_named(step):
            if _is_first():
                _marker(self.folder, step).touch()
            self._orbax.save(self.folder / str(step), force=True, args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params), rest=ocp.args.PyTreeSave(rest)))
        self._saving = self._background.submit(self._finish, record)
        if wait:
            self.wait()

    def restore(self, abstract_state: dict, identity: dict) -> tuple[int, dict, dict] | None:
        """(step, state, meta) of the newest whole checkpoint, or None in a folder without any.

        ``abstract_state`` gives structure, shapes and shardings (ShapeDtypeStructs), of any mesh. A damaged
        checkpoint is renamed to ``<step>.damaged`` and named in ``warnings``. Raises ValueError, with the
        differences, where ``identity`` or the arrays are not those of the run that saved; OSError where
        checkpoints exist but none is whole.
        """
        self.wait()
        flat = _flat(abstract_state)
        given = json.loads(json.dumps(identity))
        record, warnings = _agree(lambda: self._choose(given, {name: _shape(leaf) for name, leaf in flat.items()}))
        self.warnings += warnings
        if record is None:
            return None
        path = self.folder / str(record["step"])
        params, rest = _split(flat)
        arrays = ({f"params.{name}": array for name, array in _read(path / "params", params).items()}
                  | _read(path / "rest", rest))
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in flat])
        return record["step"], state, record["meta"]

    def wait(self) -> None:
        """Until the last save stands on disk. Raises OSError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits, then lets another run write to the folder."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()
            if self._lock is not None:
                self._lock.close()

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if _is_remote(self.folder):
                (self.folder / "lock").write_text(socket.gethostname())
                return
            self._lock = open(self.folder / "lock", "a+")
        except OSError as error:
            raise OSError(f"{self.folder} cannot be written ({error.strerror or error}); "
                          "make it writable, or give another --workdir") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._lock.seek(0)
                raise BlockingIOError(f"another run ({self._lock.read().strip()}) writes to {self.folder}; "
                                      "wait until it has ended, or give another --workdir") from None
            return  # This file system knows no locks: others may be writing, so nothing is cleaned.
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        self._clean()

    def _clean(self) -> None:
        """Removes what a killed run left half written or half deleted. Only under the lock."""
        for path in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()
        for marker in self.folder.glob("*.unfinished"):
            step = int(marker.stem)
            if not (self.folder / str(step) / RECORD).exists():
                self._remove(step)
            marker.unlink(missing_ok=True)

    def _finish(self, record: dict) -> None:
        """In the background: from arrays on the host to a checkpoint that counts."""
        step = record["step"]
        with self._failures_named(step):
            self._orbax.wait_until_finished()
            if _is_first():
                path = self.folder / str(step)
                _write_record(path, record | {"files": _inventory(path)})
                _marker(self.folder, step).unlink()
                self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep_last:], self.best_step() if self.keep_best else None}
        for step in steps:
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        path, marker = self.folder / str(step), _marker(self.folder, step)
        marker.touch()  # first, so that a kill on the way leaves something to be removed, not a damaged checkpoint
        (path / RECORD).unlink(missing_ok=True)
        if path.exists():
            path.rmtree()
        marker.unlink()

    @contextlib.contextmanager
    def _failures_named(self, step: int):
        try:
            yield
        except Exception as error:
            if _is_first():  # the space is needed, by others or by the next try
                with contextlib.suppress(OSError):
                    for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                        path.rmtree()
                    if step not in self.steps():
                        self._remove(step)
            full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
            reason = "no space left on the disk" if full else " ".join(str(error).split())[:300]
            good = ", ".join(map(str, self.steps())) or "none"
            raise OSError(f"checkpoint {step} could not be written to {self.folder}: {reason}; free space there or "
                          f"make it writable, and start again (whole checkpoints: {good})") from error

    def _choose(self, identity: dict, arrays: dict[str, str]) -> tuple[dict | None, list[str]]:
        """The record of the newest whole checkpoint; those found damaged on the way are set aside."""
        damaged, warnings = [], []
        for step in reversed(_candidates(self.folder)):
            path = self.folder / str(step)
            record, damage = _read_record(path)
            if record is not None:
                _refuse_difference(path, "setting", record["meta"].get("identity", {}), identity,
                                   "set them as they were, or give another --workdir")
                _refuse_difference(path, "array", record["arrays"], arrays,
                                   "set the optimizer and the model as they were, or give another --workdir")
                damage = _damage(path, record)
            if damage is None:
                return {key: record[key] for key in ("step", "meta")}, warnings
            aside = _free_name(self.folder, f"{step}.damaged")
            path.rename(aside)
            damaged.append(f"{step} ({damage})")
            warnings.append(f"checkpoint {path} is damaged ({damage}): set aside as {aside.name}, going back to "
                            "the one before")
            logging.warning("%s", warnings[-1])
        damaged = damaged or sorted(path.name for path in self.folder.glob("*.damaged*"))
        if damaged:
            raise OSError(f"no checkpoint in {self.folder} is whole: {', '.join(damaged)}; put a good copy back as "
                          f"{self.folder}/<step>, or start anew with another --workdir")
        return None, warnings


@dataclass(frozen=True)
class Run:
    """A trained model: what decoding and evaluation need of a run."""

    config: Config
    params: object  # nnx.State of the parameters; nnx.merge(abstract_model(config.model)[0], params) is the model
    tokenizer: object
    step: int
    meta: dict


def load_run(workdir, which: str = "best", mesh: jax.sharding.Mesh | None = None) -> Run:
    """The model of ``workdir``: the checkpoint with the lowest metric ("best"; the newest where no metric was
    recorded) or the newest ("last"). Reads parameters only, on to one device, or over the ``tensor`` axis of
    ``mesh``. Writes nothing, so a run may be training there; a damaged checkpoint is passed over with a warning.

    Raises FileNotFoundError where there is none, OSError where none is whole.
    """
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r} is not known; choose best or last")
    folder = epath.Path(workdir) / "checkpoints"
    steps = sorted(_finished(folder), reverse=True) if folder.exists() else []
    if not steps:
        raise FileNotFoundError(f"{workdir} holds no checkpoint; give the --workdir of a run of launch/pretrain.py")
    if which == "best" and (best := _best(folder)) is not None:
        steps = [best, *(step for step in steps if step != best)]
    damaged = []
    for step in steps:
        path = folder / str(step)
        record, damage = _read_record(path)
        damage = damage or _damage(path, record, "params/")
        if damage is None:
            config = record["meta"]["config"]
            config = from_json(config if isinstance(config, str) else json.dumps(config))
            return Run(config, _read_params(path / "params", config, mesh),
                       load_tokenizer(os.fspath(epath.Path(workdir) / "tokenizer")), step, record["meta"])
        damaged.append(f"{step} ({damage})")
        logging.warning("checkpoint %s is damaged (%s): passed over", path, damage)
    raise OSError(f"no checkpoint in {folder} is whole: {', '.join(damaged)}; put a good copy back, or train again")


# --- arrays -----------------------------------------------------------------------------------------------


def _arrays() -> ocp.PyTreeCheckpointHandler:
    # Float32 weights shrink by a tenth under zstd and cost a core for it while the run needs both.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _flat(tree) -> dict[str, object]:
    """Leaves by dotted name: ``params.blocks.attention.w_q_DNH``, ``opt_state.1.mu.tokens_VD``, ``step``. Names,
    not structures, go to disk, so that files outlive the classes of Flax and Optax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
            for path, leaf in leaves}


def _split(flat: dict) -> tuple[dict, dict]:
    params = {name.removeprefix("params."): leaf for name, leaf in flat.items() if name.startswith("params.")}
    return params, {name: leaf for name, leaf in flat.items() if not name.startswith("params.")}


def _shape(leaf) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _read(path: epath.Path, abstract: dict) -> dict:
    """The arrays of ``path`` with the names, shapes and shardings of ``abstract``."""
    arguments = {name: ocp.ArrayRestoreArgs(
        sharding=leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
        global_shape=leaf.shape) for name, leaf in abstract.items()}
    with ocp.Checkpointer(_arrays()) as reader:
        return reader.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args=arguments))


def _read_params(path: epath.Path, config: Config, mesh):
    abstract = abstract_model(config.model)[1]
    if mesh is not None:
        abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                                abstract, shardings_of(abstract, mesh, zero=0))
    flat = _flat(abstract)
    arrays = _read(path, flat)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in flat])


# --- agreement --------------------------------------------------------------------------------------------


def _is_first() -> bool:
    return jax.process_index() == 0


def _agree(function: Callable):
    """What ``function`` returns (JSON) or raises (ValueError, OSError) in process 0, in every process."""
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if _is_first():
        try:
            outcome = {"value": function()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error), "value_error": isinstance(error, ValueError)}
    text = json.dumps(outcome).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.frombuffer(text.ljust(size)[:size], np.uint8)
    outcome = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8)))
    if "error" in outcome:
        raise (ValueError if outcome["value_error"] else OSError)(outcome["error"])
    return outcome["value"]


def _leaves(tree: dict, path: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _refuse_difference(path: epath.Path, what: str, saved: dict, given: dict, way_out: str) -> None:
    saved, given = _leaves(saved), _leaves(given)
    keys = [key for key in {**saved, **given} if saved.get(key, "absent") != given.get(key, "absent")]
    if keys:
        shown = ", ".join(f"{key}: {saved.get(key, 'absent')} -> {given.get(key, 'absent')}" for key in keys[:8])
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise ValueError(f"checkpoint {path} was saved with other {what}s (saved -> given): {shown}{more}; {way_out}")

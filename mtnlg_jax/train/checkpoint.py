"""Checkpoints: written by Orbax in the background, whole or not at all, restored on any mesh.

    checkpoints/
      lock                 held by the run that writes here
      200.unfinished       while 200/ is written or deleted; the next start removes both
      200/params/          Orbax: one array a parameter, by name, layers stacked, whatever the mesh
                           was
      200/rest/            Orbax: optimizer and counters
      200/record.json      written last: metric, config, identity, size and SHA-256 of every file
      200/finite           empty: a loss of these parameters was finite
      100.damaged/         found damaged at a start and set aside
      100.diverged/        set aside, as no step from it was finite

A checkpoint counts once its record stands. With several processes all take part in Orbax's reading
and writing; process 0 alone locks, records, chooses and deletes, and the others hear its choice, or
its error. On object stores (``gs://``) there is no lock, so a start cleans nothing up (an
unfinished step is passed over, and overwritten when its turn comes), and files are checked by size
only: the store keeps checksums.

A state is only known to be good once a loss of its parameters was finite: by an evaluation before
it is saved, or by the next step. Until then no older checkpoint is removed for it.

A checkpoint of parameters alone, as of a model from elsewhere, has no rest/: a run that starts from
it has all else at 0, as a fresh one, and may choose its data and its optimizer.
"""

import contextlib
import errno
import fcntl
import json
import logging as python_logging
import math
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from mtnlg_jax import storage
from mtnlg_jax.config import Config, from_json
from mtnlg_jax.data.tokenizer import load_tokenizer
from mtnlg_jax.errors import PassingError, is_passing
from mtnlg_jax.parallel.mesh import shardings_of
from mtnlg_jax.storage import first_line, is_remote
from mtnlg_jax.train import lora
from mtnlg_jax.train import manifest as records
from mtnlg_jax.train.arrays import check_finite
from mtnlg_jax.train.processes import agree

# Orbax logs every phase of its work, and what fails with a stack trace; what matters is raised here
# instead.
python_logging.getLogger("absl").addFilter(
    lambda line: f"orbax{os.sep}checkpoint" not in line.pathname
)


def _without_late_writes(hook: Callable) -> Callable:
    """When one write fails, Orbax leaves the others; each of them would print a stack trace as it
    ends."""
    return lambda late: None if str(late.exc_value) == "Event loop is closed" else hook(late)


sys.unraisablehook = _without_late_writes(sys.unraisablehook)


FINITE = "finite"  # the file in a checkpoint's folder
# Counters of TrainState are stored under the names with which the first runs were saved.
SAVED_NAMES = {"nonfinite_streak": "bad", "nonfinite_total": "skipped"}
CHUNK_BYTES = 2**24  # of a parameter, at most, that are stored together


class Checkpoints:
    """The checkpoints of one run in ``folder`` (a path or ``gs://...``): the ``keep_last`` newest,
    and the one with the lowest metric if ``keep_best``. ``warnings`` lists what ``restore`` found
    damaged.

    Raises OSError where ``folder`` cannot be written, or while another run writes to it.
    """

    def __init__(self, folder, keep_last: int = 2, keep_best: bool = True):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} would keep no checkpoint; set it to 1 or more")
        self.folder = epath.Path(folder).absolute()
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.warnings: list[str] = []
        self._lock = None
        agree(self._open)
        # here and below: half a second that reading a model does without
        import orbax.checkpoint as ocp

        handler = ocp.CompositeCheckpointHandler(params=_handler(), rest=_handler())
        self._orbax = ocp.AsyncCheckpointer(handler)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending = []  # what the background has still to do
        # step of the newest checkpoint, while no loss of its parameters is known to be finite
        self._unproven = None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending; damage is looked for when one is read.
        Other processes than 0 may not see yet what ``wait`` has promised to process 0."""
        return records.finished(self.folder)

    def best_step(self) -> int | None:
        """The step with the lowest metric, the newest of equals; None where no metric was given."""
        return records.best(self.folder)

    def best_metric(self) -> float:
        """The lowest metric, the same in every process; infinite where none was given."""
        best = agree(lambda: records.best_metric(self.folder))
        return math.inf if best is None else best

    def save(
        self,
        step: int,
        state: dict,
        meta: dict,
        metric: float | None = None,
        wait: bool = False,
        proven: bool = True,
    ) -> None:
        """Saves ``state`` ({"params": ..., ...} of jax arrays) and ``meta`` (JSON; ``restore``
        compares its "identity", ``load_run`` reads its "config"), unless ``step`` is there already.
        Not ``proven``: no loss of its parameters was computed yet; `prove` or `give_up` follows.

        Returns once the arrays may be donated; the rest happens in the background. What goes wrong
        there is raised as OSError by the next ``save`` or ``wait``; the checkpoints before stay as
        they are.
        """
        self.wait()
        step = int(step)
        flat = _flat(state)
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        meta = json.loads(json.dumps(meta))
        record = {"step": step, "metric": metric, "meta": meta, "arrays": _shapes(flat)}
        size = sum(array.size * array.dtype.itemsize for array in flat.values())
        if not agree(lambda: self._begin(step, size)):
            return
        parts = dict(zip(("params", "rest"), _split(flat), strict=True))
        with self._failure_named(step):
            self._orbax.save(self.folder / str(step), force=True, args=_save_args(parts))
        self._unproven = None if proven else step
        self._pending.append(self._background.submit(self._finish, record, proven))
        if wait:
            self.wait()

    def prove(self) -> None:
        """The loss of the newest checkpoint's parameters is finite: older ones may go. Returns at
        once."""
        step = self._unproven
        self._unproven = None
        if step is not None:
            self._pending.append(self._background.submit(self._proved, step))

    def give_up(self) -> int | None:
        """Sets the newest checkpoint aside if no loss of its parameters was finite. Returns the
        step of the newest one that is left, the same in every process; None where there is none."""
        self.wait()
        return agree(self._set_aside)

    def restore(
        self,
        abstract_state: dict,
        identity: dict,
        refuse: Callable[[dict, int, bool], None] = lambda meta, step, alone: None,
    ) -> tuple[int, dict, dict] | None:
        """(step, state, meta) of the newest whole checkpoint; None in a folder without any.

        ``abstract_state`` gives structure, shapes, types and, of any mesh, shardings
        (ShapeDtypeStructs). A damaged checkpoint is renamed to ``<step>.damaged``, never deleted.
        Raises ValueError with the differences where ``identity`` or the arrays are not those that
        were saved, and OSError where there are checkpoints but none is whole. ``refuse``: called
        with meta, step and whether there are parameters alone, before anything large is read; what
        it raises is raised.
        """
        self.wait()
        flat = _flat(abstract_state)
        given = json.loads(json.dumps(identity))
        record, warnings = agree(lambda: self._choose(given, _shapes(flat), refuse))
        for warning in warnings:
            logging.warning("%s", warning)
        self.warnings += warnings
        if record is None:
            return None
        path = self.folder / str(record["step"])
        params, rest = _split(flat)
        arrays = {f"params.{name}": array for name, array in _read(path / "params", params).items()}
        arrays |= _zeros(rest) if record["alone"] else _read(path / "rest", rest)
        state = jax.tree.unflatten(
            jax.tree.structure(abstract_state), [arrays[name] for name in flat]
        )
        self._unproven = None if record["proven"] else record["step"]
        return record["step"], state, record["meta"]

    def wait(self) -> None:
        """Returns when the last save stands on the disk. Raises OSError if it does not."""
        while self._pending:
            self._pending.pop(0).result()

    def is_settled(self) -> bool:
        """Whether the background has nothing left to do, so that `wait` returns, or raises, at
        once."""
        return all(pending.done() for pending in self._pending)

    def close(self) -> None:
        """Waits, then lets others write to the folder."""
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
            if is_remote(self.folder):
                (self.folder / "lock").write_text("")
                return
            self._lock = open(self.folder / "lock", "a+")
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be written to ({error.strerror or error}); "
                "make it writable, or give another --workdir"
            ) from error
        try:
            # A lock of lockf ends with the process, however it ends, and is not inherited by its
            # children.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # A file system without locks: others may be writing, so nothing is cleaned up.
                return
            self._lock.seek(0)
            raise BlockingIOError(
                f"another run ({self._lock.read().strip()}) writes to {self.folder}; wait "
                "for its end, or give another --workdir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        self._clean()

    def _clean(self) -> None:
        """Removes what a killed run left half written or half deleted. Only under the lock."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            path.rmtree()
        for step in [
            int(path.stem) for path in self.folder.glob("*.unfinished") if path.stem.isdigit()
        ]:
            if step in self.steps():
                records.marker(self.folder, step).unlink()
            else:
                self._remove(step)

    def _begin(self, step: int, size: int) -> bool:
        if step in self.steps():
            return False
        with self._failure_named(step):
            free = math.inf if is_remote(self.folder) else shutil.disk_usage(self.folder).free
            if free < size:
                raise PassingError(
                    f"the disk is full: {free / 1e6:,.1f} MB are free, {size / 1e6:,.1f} MB needed"
                )
            records.marker(self.folder, step).touch()
        return True

    def _finish(self, record: dict, proven: bool) -> None:
        """In the background: from arrays on the host to a checkpoint that counts."""
        step = record["step"]
        with self._failure_named(step):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                records.write_record(self.folder / str(step), record)
                records.marker(self.folder, step).unlink()
                if proven:
                    self._proved(step)

    def _proved(self, step: int) -> None:
        if jax.process_index() == 0 and step in self.steps():  # its save may have failed
            with self._failure_named(step):
                (self.folder / str(step) / FINITE).touch()
                self._prune()

    def _set_aside(self) -> int | None:
        steps = self.steps()
        if steps and steps[-1] == self._unproven:
            (self.folder / str(steps[-1])).rename(self._free_name(f"{steps.pop()}.diverged"))
        return steps[-1] if steps else None

    def _prune(self) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep_last :], self.best_step() if self.keep_best else None}
        for step in steps:
            if step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        path = self.folder / str(step)
        marker = records.marker(self.folder, step)
        # Before the record goes: killed on the way, this is a leftover, nothing damaged.
        marker.touch()
        (path / records.RECORD).unlink(missing_ok=True)
        if path.exists():
            path.rmtree()
        marker.unlink()

    def _discard(self, step: int) -> None:
        """Half a checkpoint is of no use, and the space is needed. Where one array could not be
        written, others may be in the writing for a moment more, and a folder that they write to
        cannot be removed."""
        for pause in (0, 0.1, 0.5, 2):
            time.sleep(pause)
            with contextlib.suppress(OSError):
                for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    path.rmtree()
                self._remove(step)
                return

    @contextlib.contextmanager
    def _failure_named(self, step: int):
        try:
            yield
        except Exception as error:
            whole = self.steps()
            if jax.process_index() == 0 and step not in whole:
                self._discard(step)
            start = f"step {whole[-1]}" if whole else "the beginning"
            kind = PassingError if is_passing(error) else OSError
            raise kind(
                f"checkpoint {step} could not be written to {self.folder}: {_reason(error)}; see to that and "
                f"start again, which goes on from {start}"
            ) from error

    def _choose(
        self, identity: dict, arrays: dict[str, str], refuse: Callable[[dict, int, bool], None]
    ) -> tuple[dict | None, list[str]]:
        """Step and meta of the newest whole checkpoint, and warnings of the damaged ones set
        aside."""
        damaged = []
        warnings = []
        for step in reversed(records.candidates(self.folder)):
            path = self.folder / str(step)
            record, damage = records.read_record(path)
            if record is not None:
                saved = record["meta"].get("identity", {})
                alone = all(map(_is_parameter, record["arrays"]))
                settings, given = _common(saved, identity) if alone else (saved, identity)
                records.refuse_difference(
                    path, "settings", settings, given, "give the same ones, or another --workdir"
                )
                refuse(record["meta"], step, alone)
                wanted = {
                    name: shape
                    for name, shape in arrays.items()
                    if _is_parameter(name) or not alone
                }
                records.refuse_difference(
                    path,
                    "arrays",
                    record["arrays"],
                    wanted,
                    "set model and optimizer as they were, or give another --workdir",
                )
                damage = records.damage(path, record)
            if damage is None:
                return {
                    "step": step,
                    "meta": record["meta"],
                    "alone": alone,
                    "proven": record["metric"] is not None or (path / FINITE).exists(),
                }, warnings
            aside = self._free_name(f"{step}.damaged")
            path.rename(aside)
            damaged.append(f"{step} ({damage})")
            warnings.append(f"checkpoint {path} is damaged ({damage}): set aside as {aside.name}")
        damaged = damaged or sorted(path.name for path in self.folder.glob("*.damaged*"))
        if damaged:
            raise OSError(
                f"{self.folder} holds damaged checkpoints only: {', '.join(damaged)}; put a good "
                "copy in place (named by its step), or start anew with another --workdir"
            )
        return None, warnings

    def _free_name(self, name: str) -> epath.Path:
        taken = {path.name for path in self.folder.iterdir()}
        free = name
        number = 2
        while free in taken:
            free = f"{name}-{number}"
            number = number + 1
        return self.folder / free


@dataclass(frozen=True)
class Run:
    """A trained model: what decoding and evaluation need of a run."""

    config: Config
    params: nnx.State  # nnx.merge(abstract_model(config.model)[0], params) is the model
    tokenizer: object
    step: int
    meta: dict


def load_run(workdir, which: str = "best", mesh: Mesh | None = None, zero: int = 0) -> Run:
    """The model that ``workdir`` holds: of the lowest metric ("best"; the newest where none was
    recorded) or the newest ("last"). Reads parameters only, to one device, or split over ``mesh``
    as the plan says; low-rank adapters are merged. Writes nothing, so that a run may be training
    there; a damaged checkpoint is passed over with a warning.

    Raises FileNotFoundError where there is no checkpoint, OSError where none is whole, and without
    a mesh ValueError naming the parameter where one is not finite.
    """

    def read(path: epath.Path, config: Config) -> nnx.State:
        params = lora.merge(_read_params(path, config, mesh, zero), config)
        for name, array in _flat(params).items() if mesh is None else ():
            check_finite(np.asarray(array), name, f"checkpoint {path.parent}")
        return params

    return find_run(workdir, which, read)


def find_run(workdir, which: str, read: Callable[[epath.Path, Config], object]) -> Run:
    """``load_run`` with the parameters as ``read`` gives them, from the folder of their arrays and
    the config."""
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r} is not known; choose best or last")
    workdir = epath.Path(workdir).absolute()
    folder = workdir / "checkpoints"
    steps = records.finished(folder)[::-1]
    best = records.best(folder)
    if not steps:
        raise FileNotFoundError(_no_run(workdir))
    if which == "best" and best is not None:
        steps = [best, *(step for step in steps if step != best)]
    damaged = []
    for step in steps:
        path = folder / str(step)
        try:
            record, damage = records.read_record(path)
            damage = damage or records.damage(path, record, below="params/")
            if damage is None:
                config = from_json(json.dumps(record["meta"]["config"]))
                params = read(path / "params", config)
                tokenizer = load_tokenizer(os.fspath(workdir / "tokenizer"))
                return Run(lora.without(config), params, tokenizer, step, record["meta"])
        except Exception:
            if (path / records.RECORD).exists():
                raise
            damage = "just deleted by its run"
        damaged.append(f"{step} ({damage})")
        logging.warning("checkpoint %s is damaged (%s): passed over", path, damage)
    raise OSError(
        f"{folder} holds no whole checkpoint: {', '.join(damaged)}; put a good copy in place, or "
        "train again"
    )


def _no_run(workdir: epath.Path) -> str:
    """What ``workdir``, which holds no checkpoint, is instead, and what to give."""
    path = os.fspath(workdir)
    if not is_remote(workdir):
        if not os.path.exists(path):
            return f"{storage.missing(path)}; it holds no checkpoint: give --workdir of a launch/pretrain.py run"
        for above in (workdir.parent, workdir.parent.parent):
            if records.finished(above / "checkpoints"):
                return f"{path} is a part of a run and holds no checkpoint; give {os.fspath(above)}"
        if os.path.isfile(os.path.join(path, "model.safetensors")):
            return (
                f"{path} is a model of Hugging Face's and holds no checkpoint; make a run of it with "
                f"launch/convert.py --from={shlex.quote(path)} --to=RUN"
            )
    return f"{path} holds no checkpoint; give --workdir of a launch/pretrain.py run"


# --- arrays
# -----------------------------------------------------------------------------------------------


def _save_args(parts: dict[str, dict]):
    """The arrays of each part of a checkpoint. Large parameters are stored by layer, and tables in
    pieces, so that who decodes need not hold one as a whole."""
    import orbax.checkpoint as ocp

    def stored(part: str, name: str, array: jax.Array) -> ocp.SaveArgs:
        if part != "params" or array.nbytes <= CHUNK_BYTES:
            return ocp.SaveArgs()
        return ocp.SaveArgs(
            chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if name.startswith("blocks.") else ()
        )

    return ocp.args.Composite(
        **{
            part: ocp.args.PyTreeSave(
                flat, save_args={name: stored(part, name, array) for name, array in flat.items()}
            )
            for part, flat in parts.items()
            if flat
        }
    )


def _handler():
    import orbax.checkpoint as ocp

    # Compression (zstd) makes float32 weights 8 % smaller and costs a save 2.5 times the processor
    # time. Orbax would split what is replicated between its replicas, which compiles a program a
    # shape at the first save (5 s) and gains nothing here: ZeRO has split all that is large.
    array = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, array))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def _flat(tree) -> dict[str, jax.Array]:
    """Leaves by dotted name: ``params.blocks.mlp.w_in_DF``, ``opt_state.1.mu.tokens_VD``, ``step``.
    Names go to disk rather than structures, so that files outlive the classes of Flax and Optax."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        leaves[SAVED_NAMES.get(name, name)] = leaf
    return leaves


def _is_parameter(name: str) -> bool:
    return name.startswith("params.")


def _split(flat: dict) -> tuple[dict, dict]:
    params = {
        name.removeprefix("params."): leaf for name, leaf in flat.items() if _is_parameter(name)
    }
    return params, {name: leaf for name, leaf in flat.items() if not _is_parameter(name)}


def _common(saved: dict[str, dict], given: dict[str, dict]) -> tuple[dict, dict]:
    """Both, with only those settings that each of them names."""
    names = {
        section: saved[section].keys() & given[section].keys()
        for section in saved.keys() & given.keys()
    }
    return tuple(
        {
            section: {key: side[section][key] for key in sorted(keys)}
            for section, keys in names.items()
        }
        for side in (saved, given)
    )


def _shapes(flat: dict) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in flat.items()}


def _zeros(abstract: dict) -> dict[str, jax.Array]:
    """What a fresh optimizer and fresh counters are."""
    one_device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.jit(
        lambda: {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract.items()},
        out_shardings={name: leaf.sharding or one_device for name, leaf in abstract.items()},
    )()


def _read(path: epath.Path, abstract: dict) -> dict[str, jax.Array]:
    """The arrays of ``path`` with the names, shapes and shardings of ``abstract``."""
    import orbax.checkpoint as ocp

    one_device = SingleDeviceSharding(jax.local_devices()[0])
    arguments = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding or one_device, global_shape=leaf.shape)
        for name, leaf in abstract.items()
    }
    with ocp.Checkpointer(_handler()) as reader:
        return reader.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args=arguments))


def _read_params(path: epath.Path, config: Config, mesh: Mesh | None, zero: int) -> nnx.State:
    abstract = lora.abstract_parameters(config)
    if mesh is not None:
        shardings = shardings_of(abstract, mesh, zero)
        abstract = jax.tree.map(
            lambda leaf, sharding: leaf.update(sharding=sharding), abstract, shardings
        )
    flat = _flat(abstract)
    arrays = _read(path, flat)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in flat])


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or first_line(error)
    if os.strerror(errno.ENOSPC) in text:
        return "the disk is full"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"

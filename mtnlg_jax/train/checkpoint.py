"""Checkpoints: written in the background, whole or not at all, restored on any mesh.

    checkpoints/
      lock                 held by the run that writes here
      200.unfinished       exists while 200/ is written or deleted; the next start removes both
      200/params/          Orbax: one array for each parameter, by name, layers stacked, on any mesh
      200/rest/            Orbax: optimizer state and counters
      200/ema/             Orbax: averages of the parameters, with train.ema_decay
      200/record.json      written last: metric, config, identity, size and SHA-256 of every file
      200/finite           empty: a loss of these parameters was finite
      100.damaged/         found damaged at a start and set aside
      100.diverged/        set aside, because no step from it was finite
      100.suspect/         set aside, because replicas differed later (`replicas`)

A checkpoint counts once its record exists. With several processes all take part in Orbax's reading
and writing. Process 0 alone locks, records, chooses and deletes; the others receive its choice or
its error. On object stores (``gs://``) there is no lock, so a start removes no leftovers: an
unfinished step is skipped, and overwritten when the run saves that step again. There files are
checked by size only, because the store keeps checksums.

A state counts as good once a loss of its parameters was finite: in an evaluation before the save,
or in the next step. Until then no older checkpoint is removed for it.

A checkpoint of parameters alone, such as a converted model, has no rest/. A run that starts from it
has a fresh optimizer and counters at 0, and may choose its data and its optimizer.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax import storage
from mtnlg_jax.config import Config, from_json
from mtnlg_jax.data.tokenizer import Tokenizer, load_tokenizer
from mtnlg_jax.storage import is_remote
from mtnlg_jax.train import checkpoint_arrays, extras, lora, manifest
from mtnlg_jax.train.arrays import check_finite
from mtnlg_jax.train.checkpoint_folder import CheckpointFolder, Refuse, reader_of, steps_of
from mtnlg_jax.train.near.agree import gather
from mtnlg_jax.train.near.opening import candidates_of, record_start, restore_near
from mtnlg_jax.train.near.tier import NearTier
from mtnlg_jax.train.near.whole import Candidate
from mtnlg_jax.train.processes import run_on_first


class Checkpoints:
    """The checkpoints of one run in ``folder`` (a path or ``gs://...``).

    Keep the ``keep_last`` newest, and with ``keep_best`` the one with the lowest metric. ``near``
    makes the near tier, once the folder is locked.
    ``warnings`` lists what ``restore`` found damaged. Raise OSError where ``folder`` cannot be
    written, or while another run writes to it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep_last: int = 2,
        keep_best: bool = True,
        near: Callable[[], NearTier] | None = None,
    ) -> None:
        self._files = CheckpointFolder(folder, keep_last, keep_best)
        self.folder = self._files.path
        self.warnings: list[str] = []
        # Parts of the state's extras that `restore` did not find: `state.renew` makes them.
        self.lacking: set[str] = set()
        # Process 0 holds the one lock of the folder; its error is raised in all processes.
        run_on_first(self._files.open)
        # Made behind the lock: two runs of one folder have one near tier.
        try:
            self.near = near() if near else None
        except ValueError:
            self._files.close()
            raise
        self._orbax = checkpoint_arrays.make_writer()
        # One thread, so that saves, marks and deletions happen in order.
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: list[Future] = []
        # Step of the newest checkpoint, while no loss of its parameters is known to be finite.
        self._unproven: int | None = None

    def steps(self) -> list[int]:
        """Return the steps of the finished checkpoints, ascending.

        Damage is only looked for when one is read. Processes other than 0 may not yet see a
        checkpoint after ``wait`` returned: file systems may be late.
        """
        return manifest.finished(self.folder)

    def has_any(self) -> bool:
        """Return whether there is a checkpoint, or a near copy on any host, whole or not."""
        near = self.near is not None and any(gather(bool(self.near.files.copies())))
        return near or bool(self.steps())

    def best_step(self) -> int | None:
        """Return the step with the lowest metric, the newest of equals; None without a metric."""
        return manifest.best(self.folder)

    def best_metric(self) -> float:
        """Return the lowest metric, the same in every process; infinity without a metric."""
        best = run_on_first(lambda: manifest.best_metric(self.folder))
        return math.inf if best is None else best

    def save(
        self,
        step: int,
        state: Any,
        meta: dict,
        metric: float | None = None,
        wait: bool = False,
        proven: bool = True,
    ) -> None:
        """Save ``state`` (a `TrainState`) and ``meta`` (JSON), unless ``step`` exists.

        ``restore`` compares the "identity" of ``meta``, ``load_run`` reads its "config". With
        ``proven`` False no loss of the parameters was computed yet; `prove` or `give_up` follows.

        Return once the arrays may be donated; the rest happens in the background. Its failures are
        raised as OSError by the next ``save`` or ``wait``, and leave older checkpoints as they are.
        """
        # One save at a time: this raises the failure of the last one before anything is written.
        self.wait()
        step = int(step)
        flat = checkpoint_arrays.flatten(state)
        record = {
            "step": step,
            # JSON has no infinity, and a metric that is not finite must not be compared.
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
            # A copy in the form in which it is read back, with lists for tuples. It also fails
            # here, in the caller, and not in the background.
            "meta": json.loads(json.dumps(meta)),
            "arrays": checkpoint_arrays.shapes(flat),
        }
        # Of the global arrays: process 0 checks the space for what all processes write.
        size = checkpoint_arrays.bytes_of(flat)
        # The marker must exist before any array is written, in whichever process.
        if not run_on_first(lambda: self._files.begin(step, size)):
            return
        args = checkpoint_arrays.save_args(flat)
        # ``force`` overwrites what an unfinished save left behind on an object store.
        with self._files.failure_named(step):
            self._orbax.save(self.folder / str(step), force=True, args=args)
        self._unproven = None if proven else step
        # Orbax returns once the arrays are on the host. Hashing and syncing take longer, in the
        # background.
        self._pending.append(self._background.submit(self._finish, record, proven))
        if wait:
            self.wait()

    def save_parameters(
        self,
        step: int,
        shapes: dict[str, tuple[int, ...]],
        parts: Iterable[tuple[str, int | None, np.ndarray]],
        meta: dict,
    ) -> None:
        """Save parameters alone, from (name, layer, float32 array) as ``parts`` yields them; a
        parameter outside the blocks has layer None. Return once they are on disk.

        Raises what ``parts`` raises.
        """
        self.wait()
        arrays = {f"params.{name}": f"float32{list(shape)}" for name, shape in shapes.items()}
        size = sum(4 * math.prod(shape) for shape in shapes.values())
        if not run_on_first(lambda: self._files.begin(step, size)):
            return
        path = self.folder / str(step)
        with self._files.failure_named(step):
            writer = checkpoint_arrays.LayerWriter(path / "params", shapes)
        for name, layer, array in parts:
            with self._files.failure_named(step):
                writer.write(name, layer, array)
        record = {"step": step, "metric": None, "meta": json.loads(json.dumps(meta))}
        with self._files.failure_named(step):
            writer.finish()
            manifest.write_record(path, record | {"arrays": arrays})
            if not is_remote(self.folder):
                manifest.marker(self.folder, step).unlink()
            self._files.mark_finite(step)

    def prove(self) -> None:
        """Record that a loss of the newest checkpoint's parameters is finite; older ones may go.

        Return at once.
        """
        if self.near:
            self.near.prove()
        step = self._unproven
        self._unproven = None
        # In the background and behind the save that it belongs to, since there is one thread.
        if step is not None:
            self._pending.append(self._background.submit(self._files.mark_finite, step))

    def give_up(self) -> int | None:
        """Set the newest checkpoint aside if no loss of its parameters was finite.

        Return the step of the newest one that is left, the same in every process; None without any.
        """
        self.wait()
        near = self.near.give_up() if self.near else None
        # Only an unproven checkpoint is renamed: an older one led to finite steps.
        far = run_on_first(lambda: self._files.set_aside(self._unproven))
        return max((step for step in (near, far) if step is not None), default=None)

    def distrust(self, after: int) -> int | None:
        """Set the checkpoints of steps above ``after`` aside.

        Return the step of the newest one that is left, the same in every process; None without any.
        """
        self.wait()
        near = self.near.distrust(after) if self.near else None
        far = run_on_first(lambda: self._files.set_later_aside(after))
        return max((step for step in (near, far) if step is not None), default=None)

    def restore(
        self,
        abstract_state: Any,
        identity: dict,
        refuse: Refuse = lambda meta, step, params_only: None,
    ) -> tuple[int, Any, dict] | None:
        """Return (step, state, meta) of the newest whole checkpoint or near copy; None without any.

        ``abstract_state`` gives structure, shapes, types and, for any mesh, shardings
        (ShapeDtypeStructs). ``refuse`` is called before anything large is read. A damaged
        checkpoint is renamed to ``<step>.damaged``, never deleted. Raise ValueError with the
        differences where ``identity`` or the arrays are not those that were saved, and OSError
        where there are checkpoints but none is whole, nor is a near copy.
        """
        self.wait()
        flat = checkpoint_arrays.flatten(abstract_state)
        shapes = checkpoint_arrays.shapes(flat)
        # Through JSON, as the saved identity went, so that a tuple equals its list.
        given = json.loads(json.dumps(identity))

        near = candidates_of(self.near, self.folder) if self.near else []
        # Not hashed yet: a near copy that is as new spares that.
        far = run_on_first(lambda: max(manifest.candidates(self.folder), default=-1))
        if self.near and (found := self.near.newest(near, far, given, shapes, refuse)):
            return self._restore_near(self.near, found, abstract_state)
        chosen, warnings, failure = run_on_first(lambda: self._files.choose(given, shapes, refuse))
        for warning in warnings:  # only process 0 looked
            logging.warning("%s", warning)
        self.warnings += warnings
        # Where checkpoints are damaged, a near copy may be newer than what is left.
        far = -1 if chosen is None else chosen["step"]
        if self.near and (found := self.near.newest(near, far, given, shapes, refuse)):
            return self._restore_near(self.near, found, abstract_state)
        if failure:
            raise OSError(failure)
        if self.near:
            self.near.go_on_from(None)
        record_start(self.near, self.folder, max(far, 0))
        if chosen is None:
            return None
        path = self.folder / str(chosen["step"])
        state = checkpoint_arrays.read_state(path, abstract_state, chosen["arrays"])
        self.lacking = extras.lacking(flat, chosen["arrays"])
        self._unproven = None if chosen["proven"] else chosen["step"]
        return chosen["step"], state, chosen["meta"]

    def _restore_near(
        self, near: NearTier, found: Candidate, abstract_state: Any
    ) -> tuple[int, Any, dict]:
        step = found.copy.step
        state, self.lacking = restore_near(near, found, abstract_state)
        record_start(near, self.folder, step)
        # A checkpoint of this step has the same parameters.
        proven = found.finite or not run_on_first(lambda: self._files.is_unproven(step))
        self._unproven = None if proven else step
        return step, state, found.about["meta"]

    def lines(self) -> list[str]:
        """Return what the start of a run says of its near tier."""
        return self.near.lines() if self.near else []

    def drop_near(self) -> None:
        """Remove the near copies that are not newer than the last checkpoint."""
        if self.near:
            newest = run_on_first(lambda: max(self.steps(), default=-1))
            self.near.drop(newest)

    def wait(self) -> None:
        """Return once the last save is on disk. Raise OSError if it failed."""
        while self._pending:
            self._pending.pop(0).result()

    def is_settled(self) -> bool:
        """Return whether the background is idle, so that `wait` returns or raises at once."""
        return all(pending.done() for pending in self._pending)

    def is_uploading(self) -> bool:
        """Return whether a save to an object store goes on in any process, the same in all of them.

        False in a local folder, where a save waits for the one before.
        """
        return is_remote(self.folder) and any(gather(not self.is_settled()))

    def close(self) -> None:
        """Wait, then release the folder for other runs."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self.near:
                self.near.close()
            self._orbax.close()
            self._files.close()

    def _finish(self, record: dict, proven: bool) -> None:
        """Turn arrays on the host into a checkpoint that counts. Runs in the background."""
        step = record["step"]
        with self._files.failure_named(step):
            # Every process waits for its own arrays; then process 0 alone makes it count.
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                # The order is the protocol: a kill before the record leaves something unfinished, a
                # kill after it a whole checkpoint with a marker too many.
                manifest.write_record(self.folder / str(step), record)
                if not is_remote(self.folder):
                    manifest.marker(self.folder, step).unlink()
                if proven:
                    self._files.mark_finite(step)


# --- reading a run without writing to it

# Looks at the config and, where it is known by then, the tokenizer; raises where they do not do.
Before = Callable[[Config, Tokenizer | None], None]


@dataclass(frozen=True)
class Run:
    """A trained model: what decoding and evaluation need from a run."""

    config: Config
    # `load_run`: nnx.merge(abstract_model(config.model)[0], params) is the model.
    params: Any
    tokenizer: Tokenizer
    step: int
    meta: dict


def load_run(
    workdir: str | os.PathLike,
    which: str = "best",
    mesh: Mesh | None = None,
    zero: int = 0,
    vocab_padding: int | None = None,
    before: Before = lambda config, tokenizer: None,
) -> Run:
    """Load the model with the lowest metric in ``workdir`` ("best"), the newest ("last"), or the
    newest average of the weights ("ema").

    Without any metric "best" is the newest. Read parameters only, to one device, or sharded over
    ``mesh`` as the plan says; low-rank adapters are merged. Write nothing, so that a run may be
    training there; a damaged checkpoint is skipped with a warning. ``vocab_padding`` is that of the
    model that is returned; None: as it was saved. ``before`` is called with the config, and the
    tokenizer of a run, before any parameter is read; it may raise.

    A model of another format in ``workdir`` is read without conversion (`foreign`).

    Raise FileNotFoundError where there is no checkpoint, OSError where none is whole, and without a
    mesh ValueError naming the parameter where one is not finite.
    """
    reader = reader_of(workdir, which)
    if reader is not None:
        before(reader.config(workdir), None)
        return reader.load(workdir, mesh, zero, vocab_padding or 0)

    def read(path: epath.Path, config: Config) -> nnx.State:
        config = _padded(config, vocab_padding)
        params = lora.merge(checkpoint_arrays.read_params(path, config, mesh, zero), config)
        for name, array in checkpoint_arrays.flatten(params).items() if mesh is None else ():
            check_finite(np.asarray(array), name, f"checkpoint {path.parent}")
        return params

    run = find_run(workdir, which, read, before)
    return dataclasses.replace(run, config=_padded(run.config, vocab_padding))


def _padded(config: Config, vocab_padding: int | None) -> Config:
    if vocab_padding is None:
        return config
    model = dataclasses.replace(config.model, vocab_padding=vocab_padding)
    return dataclasses.replace(config, model=model)


def find_run(
    workdir: str | os.PathLike,
    which: str,
    read: Callable[[epath.Path, Config], Any],
    before: Before = lambda config, tokenizer: None,
) -> Run:
    """Like ``load_run``, with parameters from ``read``, given the folder of the arrays and the
    config."""
    run = epath.Path(storage.absolute(workdir))
    folder = run / "checkpoints"
    damaged = []
    for step in steps_of(run, which):
        path = folder / str(step)
        try:
            record, damage = manifest.read_record(path)
            if record is not None:
                config = from_json(json.dumps(record["meta"]["config"]))
                tokenizer = load_tokenizer(os.fspath(run / "tokenizer"))
                # Hashing reads all bytes as well.
                before(config, tokenizer)
                # Only these are hashed: Adam's moments are twice as large and are not read.
                part = "ema" if which == "ema" else "params"
                damage = manifest.damage(path, record, below=f"{part}/")
            if record is not None and damage is None:
                params = read(path / part, config)
                # Adapters are merged, so the config that goes with the parameters has none.
                return Run(lora.without(config), params, tokenizer, step, record["meta"])
        except Exception:
            # A run that trains here may delete this checkpoint in the meantime.
            if (path / manifest.RECORD).exists():
                raise
            damage = "just deleted by its run"
        damaged.append(f"{step} ({damage})")
        logging.warning("checkpoint %s is damaged (%s): skipped", path, damage)
    raise OSError(
        f"{folder} holds no whole checkpoint: {', '.join(damaged)}; restore a good copy, or train "
        "again"
    )


def config_of(workdir: str | os.PathLike, which: str = "best") -> Config | None:
    """Return the config of the model that `load_run` would load, without reading its parameters;
    None if its record is damaged."""
    reader = reader_of(workdir, which)
    if reader is not None:
        return reader.config(workdir)
    run = epath.Path(storage.absolute(workdir))
    step = steps_of(run, which)[0]
    record = manifest.read_record(run / "checkpoints" / str(step))[0]
    return None if record is None else from_json(json.dumps(record["meta"]["config"]))

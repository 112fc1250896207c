"""What a run does about its spikes: it names their documents, and leaves batches out.

`spike_rule` decides in the step itself what a spike is, and that its update is not applied. With
train.spike_policy=rewind the run goes back to its last checkpoint as well, and does not train on
the batch of the spike when it comes there again. Which batches it leaves out decides its steps. So
they are on disk before the run goes back, in RUN/spikes.jsonl, and in the meta of every later
checkpoint. Batches before that of the spike are left out as far as the checkpoint, so for these the
run goes back to a far one: a near copy is left out where a disk is slow.
"""

import json
import math
import sys
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from mtnlg_jax import storage
from mtnlg_jax.config import Config
from mtnlg_jax.errors import Diverged
from mtnlg_jax.train import processes, spike_rule
from mtnlg_jax.train.inputs import Data
from mtnlg_jax.train.metrics import MetricsLog, training_loss
from mtnlg_jax.train.near.tier import NearTier
from mtnlg_jax.train.schedule import is_masked, loss_name, stage_at
from mtnlg_jax.train.state import TrainState
from mtnlg_jax.train.step_batch import StepBatch
from mtnlg_jax.train.token_losses import make_token_losses

FILE = "spikes.jsonl"
KIND = "spike"  # of its records in metrics.jsonl
LEFT_OUT = "left_out"  # the kind of records of further batches that are left out
_RECENT = "recent_batches"  # in the meta of a checkpoint
SHOWN = 8  # documents of a spike


class Spikes:
    """The spikes of a run, and the batches that it leaves out.

    ``meta`` is that of the checkpoint from which the run goes on, None at a fresh start. Every
    process makes the same calls. Batches of earlier starts are left out under any policy.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: Mesh,
        data: Data,
        log: MetricsLog,
        meta: dict | None,
    ) -> None:
        self._config = config
        self._workdir = workdir
        self._mesh = mesh
        self._data = data
        self._log = log
        self._records = processes.run_on_first(lambda: recorded(workdir, meta or {}))
        self._left_out = left_out(self._records)
        # (step, samples before it) of the last steps. The newest may not be reported yet. After a
        # start from a near copy, those between the far checkpoint and it may be left out.
        self._recent: deque[tuple[int, int]] = deque(
            [(step, samples) for step, samples in (meta or {}).get(_RECENT, [])],
            maxlen=config.train.spike_leave_out + 1,
        )
        self._token_losses: dict[bool, Any] = {}  # by whether a step is causal
        self._going_back = False
        # Of this start: the steps that it has passed over, and (trained steps at the state to which
        # it went back, the spike).
        self._passed: set[int] = set()
        self._returns: list[tuple[int, int]] = []

    @property
    def meta(self) -> dict[str, list]:
        """Return the entries of a checkpoint's meta."""
        train = self._config.train
        several = train.spike_policy == "rewind" and train.spike_leave_out > 1
        recent = {_RECENT: [list(pair) for pair in self._recent]} if several else {}
        return recent | ({"spikes": self._records} if self._records else {})

    def begin(self, first: int) -> None:
        """Go on after step ``first``. Raise Diverged if this start went back to that state too
        often."""
        waiting = [record for record in self._records if record["back_to"] is None]
        for record in waiting:
            # Also after a kill that came before the run had gone back.
            record["back_to"] = first
            # Earlier batches are part of the checkpoint.
            *before, last = record["left_out"]
            record["left_out"] = [pair for pair in before if pair[0] > first] + [last]
        if waiting:
            self._write()
        self._left_out = left_out(self._records)
        if self._going_back:
            self._going_back = False
            self._recent.clear()
            self._count_return(first, self._records[-1]["step"])

    def _count_return(self, first: int, spike: int) -> None:
        # A step that is passed over trains nothing: checkpoints before and after it have the same
        # parameters, so a return to the one is a return to the other.
        trained = first - sum(step <= first for step in self._passed)
        self._returns.append((trained, spike))
        spiked = [step for state, step in self._returns if state == trained]
        most = self._config.train.max_bad_steps
        if len(spiked) > most:
            raise Diverged(
                f"the run went back to the parameters of step {first} {len(spiked)} times, for "
                f"spikes at steps {', '.join(map(str, spiked))} (train.max_bad_steps={most}): it "
                "is not a few bad batches. Lower optimizer.learning_rate, raise "
                "train.spike_deviations, or set train.spike_policy=none, then run again"
            )

    def note(self, step: int, samples: int) -> None:
        """Note that the step from ``step`` done ones on was started after ``samples``."""
        self._recent.append((step, samples))

    def leaves_out(self, step: int, samples: int) -> bool:
        """Return whether the step from ``step`` done ones on, after ``samples``, is left out."""
        return (step + 1, samples) in self._left_out

    def pass_over(self, state: TrainState, sequences: int) -> TrainState:
        """Return ``state`` after a step whose batch is left out: only its counters advance."""
        step = int(state.step) + 1
        self._passed.add(step)
        is_spike = any(record["step"] == step for record in self._records)
        return pass_over(state, sequences, is_spike)

    def take(self, reported: tuple[int, dict], params: Any) -> bool:
        """Name and write an unusual step as it is reported; return whether the run is to go back.

        Where it is, that is recorded on disk. ``params`` are those of the newest state.
        """
        step, values = reported
        if not values:
            self._log_left_out(step + 1)
            return False
        train = self._config.train
        record = self._described(step, values, params)
        rewinding = train.spike_policy == "rewind"
        if rewinding:
            done = [list(pair) for pair in self._recent if pair[0] <= step]
            # Steps are counted from 1, as in metrics.jsonl.
            pairs = [[number + 1, samples] for number, samples in done[-train.spike_leave_out :]]
            self._records.append(record | {"left_out": pairs, "back_to": None})
            self._write()
            self._going_back = True
        else:
            self._log.write({"kind": KIND} | record)
        if processes.is_first():
            logging.warning("%s", described(record, self._workdir))
            if not rewinding and values["spikes_in_a_row"] >= spike_rule.IN_A_ROW:
                logging.warning(
                    "%d %s steps in a row were spikes, up to step %d: the level has shifted. A new "
                    "history begins, so none of the next %d is a spike",
                    values["spikes_in_a_row"],
                    record["objective"],
                    step + 1,
                    train.spike_history,
                )
        return rewinding

    def _described(self, step: int, values: dict, params: Any) -> dict[str, Any]:
        """Return the record of a spike, with the sources and documents of its batch."""
        train = self._config.train
        stage = stage_at(train, step)[2]
        batch = StepBatch(self._config, self._mesh, self._data, step, dict(self._recent)[step])
        causal = not is_masked(train, step)
        if causal not in self._token_losses:
            self._token_losses[causal] = make_token_losses(self._config, self._mesh, causal)
        # As in `step`: dropout depends on the seed and the step alone.
        key = jax.random.fold_in(jax.random.key(train.seed), step)
        arrays = batch.for_tokens()
        losses = self._token_losses[causal](params, arrays, jax.random.key_data(key))
        return {
            "step": step + 1,
            "policy": train.spike_policy,
            "stage": stage.name,
            "objective": "causal" if causal else "masked",
            loss_name(train, stage): values["loss"],
            "grad_norm": values["grad_norm"],
            "deviation_loss": values["deviation_loss"],
            "deviation_grad_norm": values["deviation_grad_norm"],
            **processes.run_on_first(lambda: named(batch, batch.in_order(losses))),
        }

    def _log_left_out(self, step: int) -> None:
        """Write that ``step`` was left out; at the spike itself what is known of it."""
        for record in self._records:
            steps = [number for number, _ in record["left_out"]]
            if record["step"] == step:
                self._log.write({"kind": KIND} | record | {"left_out": steps})
            elif step in steps:
                self._log.write({"kind": LEFT_OUT, "step": step, "spike": record["step"]})

    def _write(self) -> None:
        content = "".join(json.dumps(record) + "\n" for record in self._records)
        processes.run_on_first(lambda: storage.write_file(self._workdir, FILE, content.encode()))


def drop_near(workdir: str, near: NearTier | None) -> None:
    """Remove the near copies of a run that waits to go back to a far checkpoint. Every process
    calls it before a restore."""
    if near is not None and processes.run_on_first(lambda: _waits_for_far(recorded(workdir, {}))):
        near.drop(sys.maxsize)


def _waits_for_far(records: list[dict[str, Any]]) -> bool:
    return any(each["back_to"] is None and len(each["left_out"]) > 1 for each in records)


def is_unusual(reported: tuple[int, dict]) -> bool:
    """Return whether a reported step is a spike, or has no figures, since its batch is left out."""
    values = reported[1]
    return not values or bool(values.get("is_spike"))


def recorded(workdir: str, meta: dict) -> list[dict[str, Any]]:
    """Return the spikes for which a run went back, by its file and by the ``meta`` of a checkpoint.

    Either may lack some: the run of a copied checkpoint has no file, and the meta is older. Raise
    ValueError where a line of the file is not such a record.
    """
    found = list(meta.get("spikes", []))
    content = storage.read_file(workdir, FILE) or b""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            own = {"step": int(record["step"]), "back_to": record["back_to"]}
            own["left_out"] = [[int(step), int(samples)] for step, samples in record["left_out"]]
            own["left_out"][-1]  # the spike's
        except (ValueError, KeyError, TypeError, IndexError):
            raise ValueError(
                f"{workdir}/{FILE}: line {number} is not the record of a spike; restore a good "
                "copy, or delete the file, and the run leaves out what its checkpoint names"
            ) from None
        found.append(record | own)
    # By the batch of the spike; the file comes last, since it is newer.
    return list({tuple(record["left_out"][-1]): record for record in found}.values())


def left_out(records: list[dict[str, Any]]) -> set[tuple[int, int]]:
    """Return (step, samples before it) of all batches that ``records`` leave out."""
    return {(step, samples) for record in records for step, samples in record["left_out"]}


def pass_over(state: TrainState, sequences: int, is_spike: bool) -> TrainState:
    """Return ``state`` after a step that is left out; with ``is_spike`` its spikes count it."""
    parts = state.extras
    if is_spike and spike_rule.KEY in parts:
        spikes = parts[spike_rule.KEY]
        parts = {**parts, spike_rule.KEY: {**spikes, "total": _added(spikes["total"], 1)}}
    return state._replace(
        step=_added(state.step, 1), samples=_added(state.samples, sequences), extras=parts
    )


def _added(counter: jax.Array, number: int) -> jax.Array:
    # With the sharding that the compiled step expects.
    add = jax.jit(jnp.add, out_shardings=counter.sharding)
    return add(counter, jnp.int32(number))


def named(batch: StepBatch, losses: np.ndarray) -> dict[str, list]:
    """Return the sources of a batch, and the documents that raise its loss most, these first.

    ``losses`` (sequences, S) are those of the tokens; some parameters other than those of the step
    may have given them.
    """
    weights = batch.rows["weights"]
    totals: dict[str, list[float]] = {}
    documents = batch.by_excess(losses)
    rows: list[dict[str, Any]] = []
    for document in documents:
        at = batch.documents[document]
        at = at[weights[tuple(at.T)] > 0]
        own = losses[tuple(at.T)].astype(np.float64)
        name = batch.source_name(document)
        total = totals.setdefault(name, [0, 0.0])
        total[0] += len(own)
        total[1] += float(own.sum())
        if len(rows) < SHOWN:
            rows.append(
                {
                    "source": name,
                    "document": document.number,
                    "rows": np.unique(at[:, 0]).tolist(),
                    "tokens": len(own),
                    "loss": _finite(float(own.mean())),
                }
            )
    sources = [
        {"source": name, "tokens": tokens, "loss": _finite(nats / tokens)}
        for name, (tokens, nats) in totals.items()
    ]
    return {"sources": sources, "documents": rows}


def _finite(value: float) -> float | None:
    """Return ``value`` for JSON, which has no infinity."""
    return round(value, 4) if math.isfinite(value) else None


def described(record: dict[str, Any], workdir: str) -> str:
    """Return the line of a spike: its step, figures, and most suspicious documents."""
    loss = training_loss(record)[1]
    documents = "; ".join(
        f"{number}. {each['source']} document {each['document']} "
        f"({'not finite' if each['loss'] is None else format(each['loss'], '.2f')} over "
        f"{each['tokens']} tokens)"
        for number, each in enumerate(record["documents"][:3], 1)
    )
    does = {
        "skip": "its update is not applied",
        "rewind": "the run goes back to its last checkpoint and leaves the batch out",
    }[record["policy"]]
    return (
        f"step {record['step']} ({record['objective']}, stage {record['stage']}) is a spike: loss "
        f"{loss:.3f}, {record['deviation_loss']:+.1f} robust deviations, gradient norm "
        f"{record['grad_norm']:.3g}, {record['deviation_grad_norm']:+.1f}; {does}. Documents by "
        f"loss: {documents}; launch/why.py --workdir={workdir} --step={record['step']} measures "
        "each one's part"
    )

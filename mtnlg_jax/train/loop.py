"""The loop. ``train`` reads from top to bottom; everything it calls is one hop away."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mtnlg_jax import command, compat
from mtnlg_jax.config import Config, to_json, validate, validate_batch
from mtnlg_jax.data.batches import SAMPLE_ORDER, Batches, heldout_count, heldout_rows
from mtnlg_jax.data.sources import open_sources, spread
from mtnlg_jax.data.storage import write_file
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.data.tokens import Tokens
from mtnlg_jax.parallel.hardware import flops_per_token
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import lora, processes, start
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.course import refuse_other_course, refuse_other_settings
from mtnlg_jax.train.metrics import MetricsLog, environment, peak_flops
from mtnlg_jax.train.objectives import causal_batch, masked_batch
from mtnlg_jax.train.program import Program
from mtnlg_jax.train.schedule import batch_size_at, is_masked, samples_before, stage_at
from mtnlg_jax.train.step import abstract_state, init_state, make_eval, make_train_step, micro_batch_shape, put_batch
from mtnlg_jax.train.watchdog import Watchdog


class Preempted(Exception):
    """SIGTERM or SIGINT came: the state was saved, the same command goes on from there."""

    exit_code = command.PREEMPTED


class Diverged(Exception):
    """Too many non-finite steps in a row."""

    exit_code = command.DIVERGED


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended."""

    workdir: str
    steps: int
    parameters: int
    tokens: int
    seconds: float  # of this process, in the loop
    tokens_per_second: float
    mfu: float
    final: dict  # the last evaluation: step, causal_loss, perplexity, bits_per_byte, masked_loss
    best_step: int | None
    skipped: int


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: batches by stage, held-out text, and the tokenizer that they share."""

    tokenizer: Tokenizer
    stages: tuple[Batches, ...]
    held_out: Tokens
    fingerprints: dict[str, str]


def train(config: Config, workdir: str, show_progress: bool = True) -> Summary:
    """Trains ``config`` in ``workdir``, going on from the newest good checkpoint there. Of several processes each
    calls this; the first one writes.

    Raises ValueError on what does not fit, Preempted after SIGTERM to any process (state saved), Diverged after
    train.max_bad_steps non-finite steps in a row, Disagreement. Ends the process on any other exception where there
    are several, and on a phase that takes too long (train.watchdog_seconds).
    """
    validate(config)
    refuse_other_settings(config, workdir)
    show_progress = show_progress and processes.is_first()
    with (_own(workdir), _signals() as stop, contextlib.ExitStack() as open_until_the_end,
          Watchdog(config.train.watchdog_seconds, config.train.phase_seconds, workdir) as watchdog,
          processes.leaving_at_once()):
        compat.serialize_cpu_collectives()
        data = load_data(config)
        config = resolve(config, data.tokenizer)
        mesh = make_mesh(config.mesh)
        validate_batch(config, mesh.shape["data"])
        checkpoints = Checkpoints(os.path.join(workdir, "checkpoints"), config.train.keep_last, config.train.keep_best)
        open_until_the_end.callback(checkpoints.close)
        start.refuse_other_runs(config, data.tokenizer, fresh=not checkpoints.steps())
        teachers = start.load_teachers(config, mesh)
        identity = _identity(config, data) | start.identity_of(config, teachers)
        # Precedence: 1. the newest good checkpoint of this folder; 2. the parameters of train.init; 3. fresh ones from
        # train.seed.
        restored = checkpoints.restore(abstract_state(config, mesh), identity)
        first, state = (restored[0], restored[1]) if restored else (
            0, init_state(config, mesh, start.load_start(config, mesh)))
        _describe(config, data.tokenizer, workdir)
        log = MetricsLog(workdir, first, writing=processes.is_first())
        open_until_the_end.callback(log.close)
        bar = open_until_the_end.enter_context(tqdm(
            total=config.train.steps, initial=first, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=None if show_progress else True))
        meter = _Meter(config)
        steps = {(number, masked): Program(make_train_step(config, mesh, causal=not masked, **given), watchdog)
                 for number, given in start.kinds_of_steps(teachers) for masked in (False, True)}
        evaluate = Evaluator(config, mesh, data)
        asked, pending = processes.Asked(), None
        for step in range(first, config.train.steps):
            masked = is_masked(config.train, step)
            batch, micro, sequences = batch_at(config, mesh, data, step)
            number, _, stage = stage_at(config.train, step)
            scale, (kind, teacher) = float(stage.learning_rate_scale), start.teacher_of(teachers, number)
            state, metrics = steps[kind, masked](state, batch, micro, sequences, scale, *teacher)
            # The previous step's numbers are fetched while this one runs.
            _report(config, log, bar, meter, pending)
            watchdog.enter("step")
            pending = (step, metrics, int(sequences))
            done, stopping = step + 1, asked(stop.is_set())
            if processes.several() and _due(config.train.compare_every, done, config):
                refuse_other_course(config, data.fingerprints, steps, state, done)
            evaluating = _due(config.train.eval_every, done, config)
            saving = stopping or _due(config.train.save_every, done, config)
            if evaluating or saving:
                _report(config, log, bar, meter, pending)
                watchdog.enter("evaluation or saving")
                pending = None
                result = {}
                if evaluating:
                    result = _evaluate(evaluate, state, done, saving, log, show_progress)
                if saving:
                    _save(config, state, done, checkpoints, identity, result)
                meter.restart()
            if stopping and done < config.train.steps:
                checkpoints.wait()
                processes.meet("saved")
                raise Preempted(f"stopped by a signal after step {done}; state saved in {workdir}; the same command "
                                "goes on from there")
        watchdog.enter("saving")
        checkpoints.wait()
        processes.meet("saved")
        if not any(r["kind"] == "eval" for r in log.records):  # a finished run, started again
            raise ValueError(f"{workdir} holds a run without evaluation; give another --workdir")
        log.plot()
        return _summary(config, workdir, log.records, meter, checkpoints, state)


# --- data -------------------------------------------------------------------------------------------------


def load_data(config: Config) -> Data:
    """Opens every source of the run. Raises ValueError when none is named or their tokenizers differ."""
    if not config.data.sources:
        raise ValueError("data.path is empty; prepare text with launch/prepare_data.py --output=OUT and give "
                         "--set=data.path=OUT, or the prefix of Megatron's .bin and .idx")
    blends = [stage.blend or config.data.sources for stage in config.train.stages]
    folders = list(dict.fromkeys(path for blend in blends for path, _ in blend))
    tokenizer, opened, held_out = open_sources(folders, config.data.tokenizer, config.data.heldout)
    batches = tuple(Batches([(opened[path], weight) for path, weight in spread(blend)], config.sequence_length,
                            config.train.seed) for blend in blends)
    prints = {f"source {i}": tokens.meta["sha256"] for i, tokens in enumerate(opened.values())}
    prints["order of samples"] = SAMPLE_ORDER
    return Data(tokenizer, batches, held_out, prints)


def resolve(config: Config, tokenizer: Tokenizer) -> Config:
    """``config`` with the vocabulary that ``tokenizer`` needs, rounded up so that it splits and tiles well."""
    size, unit = config.model.vocab_size, config.model.vocab_size_divisible_by
    if size is None:
        size = -(-tokenizer.vocab_size // unit) * unit
    if size < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
                         f"set it to at least that, or to None")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    validate(config)
    return config


def batch_at(config: Config, mesh, data: Data, step: int):
    """(batch arrays (M, B, S), micro-batches in use, sequences): pure in (seed, step), whatever the mesh. A
    step of the ramp that is smaller than the largest fills the rest with rows of weight 0."""
    first = samples_before(config.train, step)
    sequences = batch_size_at(config.train, first)
    micro_batches, rows = micro_batch_shape(config, mesh)
    number, _, _ = stage_at(config.train, step)
    masked = is_masked(config.train, step)

    def rows_of(numbers):
        used = numbers < sequences
        samples = first + np.where(used, numbers, 0)
        raw = data.stages[number].rows(samples)
        if masked:
            made = masked_batch(raw, samples, config.train.seed, config.data.masking, data.tokenizer)
        else:
            made = causal_batch(raw)
        made["weights"] = made["weights"] * used[:, None]
        return made

    shape = (micro_batches, rows, config.sequence_length)
    return put_batch(rows_of, shape, mesh), jnp.int32(-(-sequences // rows)), jnp.int32(sequences)


def _identity(config: Config, data: Data) -> dict[str, dict]:
    """What a run may not change when it goes on: what its parameters mean, and what its steps read."""
    return {"model": start.meaning(config.model), "tokenizer": {"sha256": data.tokenizer.fingerprint},
            "data": data.fingerprints}


class Evaluator:
    """Held-out loss, perplexity and bits per byte, for the objectives that the run trains."""

    def __init__(self, config: Config, mesh, data: Data):
        self.config, self.mesh, self.data = config, mesh, data
        stages = config.train.stages
        self.objectives = [name for name, used in (("causal", any(s.masked < 1 for s in stages)),
                                                   ("masked", any(s.masked > 0 for s in stages))) if used]
        self._steps = {name: make_eval(config, mesh, causal=name == "causal") for name in self.objectives}

    def __call__(self, params) -> dict[str, float]:
        result, params = {}, lora.merge(params, self.config)
        if len(self.data.held_out) < 2:  # prepared without a held-out part
            return result
        for name in self.objectives:
            total, weight = np.float64(0), np.float64(0)
            for batch in self._batches(name):
                nats, tokens = self._steps[name](params, batch)
                total, weight = total + float(nats), weight + float(tokens)
            result[f"{name}_loss"] = loss = float(total / max(weight, 1.0))
            if name == "causal":
                result["perplexity"] = math.exp(min(loss, 700.0))
                predicted, size = self.data.held_out.predicted
                result["bits_per_byte"] = loss / math.log(2) * predicted / size
        return result

    def _batches(self, objective: str):
        # A batch is the global one, so that every mesh reads the same text; a pipeline fills it up with empty rows.
        size, pipe = self.config.train.global_batch_size, self.mesh.shape["pipe"]
        micro_batches, rows = micro_batch_shape(self.config, self.mesh)
        length, held_out = self.config.sequence_length, self.data.held_out
        for first in range(0, heldout_count(held_out, length), size)[:self.config.train.eval_batches]:
            def rows_of(numbers, first=first):
                chosen = first + np.minimum(numbers, size - 1)
                raw = heldout_rows(held_out, length, chosen)
                made = causal_batch(raw) if objective == "causal" else masked_batch(
                    raw, chosen, 0, self.config.data.masking, self.data.tokenizer)
                return made | {"weights": made["weights"] * (numbers < size)[:, None]}

            yield put_batch(rows_of, (-(-micro_batches // pipe) * pipe, rows, length), self.mesh)


# --- what happens around a step ---------------------------------------------------------------------------


def _due(every: int, done: int, config: Config) -> bool:
    return done == config.train.steps or (every > 0 and done % every == 0)


def _report(config: Config, log: MetricsLog, bar: tqdm, meter: "_Meter", pending) -> None:
    if pending is None:
        return
    step, metrics, sequences = pending
    values = {key: value.item() for key, value in jax.device_get(metrics).items()}
    meter.add(sequences * config.sequence_length)
    _, _, stage = stage_at(config.train, step)
    if (step + 1) % config.train.log_every == 0 or step + 1 == config.train.steps or values["bad"]:
        log.write({"kind": "train", "step": step + 1, "loss": values["loss"], "grad_norm": values["grad_norm"],
                   "learning_rate": values["learning_rate"], "stage": stage.name,
                   "objective": "masked" if is_masked(config.train, step) else "causal",
                   "sequences": sequences, "skipped": values["skipped"],
                   "tokens_per_second": round(meter.rate, 1), "mfu": round(meter.mfu, 4)})
    bar.update()
    bar.set_postfix_str(f"{stage.name} loss {values['loss']:.3f}, {meter.rate:,.0f} tokens/s, MFU {meter.mfu:.0%}"
                        + (f", {values['skipped']} skipped" if values["skipped"] else ""))
    if values["bad"] >= config.train.max_bad_steps:
        saved = [r["step"] for r in log.records if r["kind"] == "eval" and r.get("saved")]
        last = f"the last good checkpoint is of step {saved[-1]}" if saved else "no checkpoint was written yet"
        raise Diverged(f"loss or gradient was not finite for {values['bad']} steps in a row, up to step {step + 1}; "
                       f"{last}. Lower optimizer.learning_rate or set optimizer.clip_grad_norm, then run again")


def _evaluate(evaluate, state, done, saving, log, show_progress) -> dict[str, float]:
    result = evaluate(state["params"])
    log.write({"kind": "eval", "step": done, **result, "saved": saving})
    if show_progress:
        tqdm.write(f"step {done}: held out: " + ", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    log.plot()
    return result


def _save(config, state, done, checkpoints, identity, result) -> None:
    meta = {"config": json.loads(to_json(config)), "identity": identity, "samples": int(state["samples"]),
            "metrics": result}
    checkpoints.save(done, state, meta, result.get("causal_loss", result.get("masked_loss")))


class _Meter:
    """Tokens a second over the recent past, and model FLOP utilisation; pauses do not count."""

    def __init__(self, config: Config):
        self.flops = flops_per_token(config.model, config.sequence_length)
        self.peak, self.rate, self.tokens, self.seconds = peak_flops(), 0.0, 0, 0.0
        self.restart()

    def restart(self) -> None:
        self._last = None

    def add(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._last is not None:
            seconds = now - self._last
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
            self.rate = tokens / seconds if not self.rate else self.rate + 0.1 * (tokens / seconds - self.rate)
        self._last = now

    @property
    def mfu(self) -> float:
        return self.rate * self.flops / self.peak


def _summary(config, workdir, records, meter, checkpoints, state) -> Summary:
    final = [r for r in records if r["kind"] == "eval"][-1]
    rate = meter.tokens / meter.seconds if meter.seconds else 0.0
    return Summary(workdir, config.train.steps, config.model.parameter_count(),
                   int(state["samples"]) * config.sequence_length, meter.seconds, rate,
                   rate * meter.flops / meter.peak, final, checkpoints.best_step(), int(state["skipped"]))


def _describe(config: Config, tokenizer: Tokenizer, workdir: str) -> None:
    """config.json and the tokenizer, beside the checkpoints: a run folder needs nothing else to be used. And
    environment.json: on what, and with which compiler flags, it last ran."""
    if not processes.is_first():
        return
    for name, text in (("config.json", to_json(config)), ("environment.json", json.dumps(environment(), indent=1))):
        write_file(workdir, name, text.encode())
    target = os.path.join(workdir, "tokenizer")
    if not os.path.exists(target):
        shutil.rmtree(target + ".partial", ignore_errors=True)
        tokenizer.save(target + ".partial")
        os.replace(target + ".partial", target)


@contextlib.contextmanager
def _own(workdir: str):
    """Makes ``workdir`` and holds it for this run; the lock goes with the process, however it dies."""
    path = os.path.join(workdir, f".lock-{jax.process_index()}")
    try:
        os.makedirs(workdir, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise OSError(f"cannot write in {workdir}: {error.strerror}; give another --workdir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise OSError(f"another run is writing in {workdir}; wait for it or give another --workdir") from None
            # A file system without locks: it is up to the person not to start two.
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")  # for whoever wants to look into this process
        file.flush()
        yield


@contextlib.contextmanager
def _signals():
    """An event that SIGTERM and the first SIGINT set; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

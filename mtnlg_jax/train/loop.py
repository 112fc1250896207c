"""The loop. ``train`` reads from top to bottom; everything it calls is one hop away."""

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable

from absl import logging
from tqdm import tqdm

from mtnlg_jax import compat
from mtnlg_jax.config import Config, to_json, validate, validate_batch
from mtnlg_jax.data.batches import SAMPLE_ORDER
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.errors import Preempted
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import changes, describe, init_from, lifetime, processes
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.evaluate import Evaluator
from mtnlg_jax.train.inputs import Data, batch_at, load_data, resolve
from mtnlg_jax.train.metrics import MetricsLog
from mtnlg_jax.train.processes import refuse_other_course, refuse_other_settings
from mtnlg_jax.train.reporter import FIGURES, Meter, Reporter, Summary, short, show
from mtnlg_jax.train.saving import Saver
from mtnlg_jax.train.schedule import is_masked, samples_at_end, stage_at
from mtnlg_jax.train.state import abstract_state, init_state
from mtnlg_jax.train.step import CompiledStep, make_train_step
from mtnlg_jax.train.watchdog import Watchdog


def train(
    config: Config,
    workdir: str,
    show_progress: bool = True,
    announce: Callable[[str], None] | None = None,
) -> Summary:
    """Trains ``config`` in ``workdir``, going on from the newest good checkpoint there. Of several
    processes each calls this; the first one writes, and calls ``announce`` with what the run is
    (`describe.at_start`).

    Raises ValueError on what does not fit, Preempted after a signal to any process (state saved),
    Diverged after train.max_bad_steps non-finite steps in a row, Disagreement. Ends the process on
    any other exception where there are several, and on a phase that takes too long
    (train.watchdog_seconds).
    """
    validate(config)
    refuse_other_settings(config, workdir)
    show_progress = show_progress and processes.is_first()
    with (
        lifetime.own(workdir),
        lifetime.signals() as stop,
        contextlib.ExitStack() as open_until_the_end,
        Watchdog(config.train.watchdog_seconds, config.train.phase_seconds, workdir) as watchdog,
        processes.leaving_at_once(),
    ):
        compat.serialize_cpu_collectives()
        data = load_data(config)
        config = resolve(config, data.tokenizer)
        mesh = make_mesh(config.mesh)
        validate_batch(config, mesh.shape["data"])
        checkpoints = Checkpoints(
            os.path.join(workdir, "checkpoints"), config.train.keep_last, config.train.keep_best
        )
        open_until_the_end.callback(checkpoints.close)
        init_from.refuse_other_runs(config, data.tokenizer, fresh=not checkpoints.steps())
        teachers = init_from.load_teachers(config, mesh)
        identity = _identity(config, data) | init_from.identity_of(config, teachers)
        # Precedence: 1. the newest good checkpoint of this folder; 2. the parameters of train.init;
        # 3. fresh ones from train.seed.
        restored = checkpoints.restore(
            abstract_state(config, mesh),
            identity,
            functools.partial(changes.refuse_changes, config=config),
        )
        if restored:
            first, state, meta = restored
            config = changes.kept_init(meta, config)
            samples = int(state.samples)  # 0: parameters alone, which no run has trained here yet
            reported = changes.report_changes(meta, first, samples, config) if samples else None
            if reported and processes.is_first():
                logging.warning("%s", reported)
        else:
            first = 0
            state = init_state(config, mesh, init_from.load_start(config, mesh))
        # The one clock: what is read next, the ramp and the learning rate all follow the samples of
        # the state.
        samples = int(state.samples)
        total_samples = samples_at_end(config.train, min(first, config.train.steps), samples)
        if processes.is_first():
            describe.write(config, workdir, first)
            _keep_tokenizer(data.tokenizer, workdir)
            if announce:
                announce(
                    describe.at_start(
                        config,
                        mesh,
                        workdir,
                        first,
                        samples,
                        data.training_tokens,
                        restored is not None,
                    )
                )
        log = MetricsLog(workdir, first, writing=processes.is_first())
        open_until_the_end.callback(log.close)
        bar = open_until_the_end.enter_context(
            tqdm(
                total=config.train.steps,
                initial=first,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.05,
                disable=None if show_progress else True,
            )
        )
        if first < config.train.steps:
            show(bar, ["compiling"])
        meter = Meter(config)
        reporter = Reporter(config, log, bar, meter, checkpoints)
        saver = Saver(checkpoints)
        save = None
        steps = {
            (number, masked): CompiledStep(
                make_train_step(
                    config, mesh, causal=not masked, total_samples=total_samples, **given
                ),
                watchdog,
            )
            for number, given in init_from.kinds_of_steps(teachers)
            for masked in (False, True)
        }
        evaluate = Evaluator(config, mesh, data)
        asked = processes.Asked()
        best = checkpoints.best_metric()
        for step in range(first, config.train.steps):
            masked = is_masked(config.train, step)
            batch, micro, sequences = batch_at(config, mesh, data, step, samples)
            samples += int(sequences)
            number, _, stage = stage_at(config.train, step)
            scale = float(stage.learning_rate_scale)
            kind, teacher = init_from.teacher_of(teachers, number)
            state, metrics = steps[kind, masked](state, batch, micro, sequences, scale, *teacher)
            # The previous step's numbers are fetched while this one runs.
            reporter.report()
            watchdog.enter("step")
            reporter.pending = (step, metrics, int(sequences))
            done = step + 1
            stopping = asked(stop.is_set())
            if processes.several() and _due(config.train.compare_every, done, config):
                programs = [steps[key].fingerprint for key in sorted(steps)]
                refuse_other_course(config, data.fingerprints, programs, state, done)
            evaluating = _due(config.train.eval_every, done, config)
            saving = stopping or saver.is_due() or _due(config.train.save_every, done, config)
            if evaluating or saving:
                reporter.report()
                watchdog.enter("evaluation or saving")
                result = _evaluate(evaluate, state, done, log, show_progress) if evaluating else {}
                metric = _metric(result)
                if config.train.keep_best and metric < best:
                    saving = True
                if saving:
                    saving = reporter.is_healthy(done, result, stopping)
                save = (
                    functools.partial(_save, config, state, done, checkpoints, identity, result)
                    if saving
                    else None
                )
                if saving:
                    best = min(best, metric) if saver.save(save) else best
                if not stopping and done < config.train.steps:
                    save = None  # it would hold this state beside the next one
                meter.restart()
            if stopping and done < config.train.steps:
                saver.finish(save)
                processes.meet("saved")
                if not saving:
                    raise Preempted(
                        f"stopped by a signal after step {done}, whose state is not finite and not saved; "
                        "the same command goes on from the last checkpoint"
                    )
                raise Preempted(
                    f"stopped by a signal after step {done}; state saved in {workdir}; the same command "
                    "goes on from there"
                )
        watchdog.enter("saving")
        saver.finish(save)
        processes.meet("saved")
        known = any(r["kind"] == "eval" and r["step"] == first for r in log.records)
        if first == config.train.steps and not processes.agree(lambda: known):
            # A finished run, started again, whose last evaluation was lost.
            _evaluate(evaluate, state, first, log, show_progress)
        log.plot()
        return _summary(config, workdir, log.records, meter, checkpoints, state)


def _identity(config: Config, data: Data) -> dict[str, dict]:
    """What a run may not change when it goes on: what its parameters mean, and what its steps
    read."""
    return {
        "model": init_from.meaning(config.model),
        "tokenizer": {"sha256": data.tokenizer.fingerprint},
        "data": data.fingerprints,
    }


def _due(every: int, done: int, config: Config) -> bool:
    return done == config.train.steps or (every > 0 and done % every == 0)


def _metric(result: dict) -> float:
    """What models are compared by, lower is better; infinite where nothing was evaluated, or
    nothing finite."""
    value = result.get("causal_loss", result.get("masked_loss", math.inf))
    return value if math.isfinite(value) else math.inf


def _evaluate(evaluate, state, done, log, show_progress) -> dict[str, float]:
    result = evaluate(state.params)
    log.write({"kind": "eval", "step": done, **result})
    if show_progress and result:
        tqdm.write(
            f"step {done}: held out: "
            + ", ".join(f"{name} {short(result[name])}" for name in FIGURES if name in result)
        )
    log.plot()
    return result


def _save(config, state, done, checkpoints, identity, result) -> None:
    meta = {
        "config": json.loads(to_json(config)),
        "identity": identity,
        "samples": int(state.samples),
        "order_of_samples": SAMPLE_ORDER,
        "metrics": result,
    }
    metric = _metric(result)
    checkpoints.save(done, state, meta, metric, proven=math.isfinite(metric))


def _summary(config, workdir, records, meter, checkpoints, state) -> Summary:
    final = [r for r in records if r["kind"] == "eval"][-1]
    rate = meter.tokens / meter.seconds if meter.seconds else 0.0
    return Summary(
        workdir,
        config.train.steps,
        config.model.parameter_count(),
        int(state.samples) * config.sequence_length,
        meter.seconds,
        rate,
        meter.utilization(rate),
        final,
        checkpoints.best_step(),
        int(state.nonfinite_total),
    )


def _keep_tokenizer(tokenizer: Tokenizer, workdir: str) -> None:
    """The tokenizer beside the checkpoints: with config.json a run folder needs nothing else to be
    used."""
    target = os.path.join(workdir, "tokenizer")
    if not os.path.exists(target):
        shutil.rmtree(target + ".partial", ignore_errors=True)
        tokenizer.save(target + ".partial")
        os.replace(target + ".partial", target)

"""The training loop: ``train`` is the whole course of a run, from checks to the summary."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from mtnlg_jax import compat
from mtnlg_jax.config import Config, validate, validate_batch
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.parallel.mesh import make_mesh, row_shards
from mtnlg_jax.train import (
    changes,
    describe,
    goodput,
    init_from,
    lifetime,
    offload,
    privacy,
    processes,
    replicas,
    spike_rule,
    spikes,
    watching,
)
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.course import Course, open_checkpoints
from mtnlg_jax.train.evaluate import Evaluator
from mtnlg_jax.train.executables import Executables
from mtnlg_jax.train.inputs import Data, batch_at, load_data, resolve
from mtnlg_jax.train.metrics import MetricsLog
from mtnlg_jax.train.privacy import Ledger
from mtnlg_jax.train.replicas import ReplicaCheck
from mtnlg_jax.train.reporter import Meter, Reporter, Summary, show
from mtnlg_jax.train.samples import Samples
from mtnlg_jax.train.schedule import is_masked, samples_at_end, stage_at
from mtnlg_jax.train.spikes import Spikes
from mtnlg_jax.train.state import TrainState, abstract_state, init_state, renew
from mtnlg_jax.train.statistics import Statistics
from mtnlg_jax.train.step import CompiledStep, make_train_step
from mtnlg_jax.train.task_scores import KIND, Tasks, TaskScores, check_given
from mtnlg_jax.train.trackers.following import Trackers
from mtnlg_jax.train.watchdog import Watchdog


def train(
    config: Config,
    workdir: str,
    show_progress: bool = True,
    announce: Callable[[str], None] = lambda text: None,
    enough: Callable[[Sequence[dict]], bool] = lambda evaluations: False,
    tasks: Tasks | None = None,
    executables: Executables | None = None,
    samples: Samples | None = None,
) -> Summary:
    """Train ``config`` in ``workdir``, resuming from the newest good checkpoint, and summarize it.

    Every process calls this. The first one writes the files and describes the run to ``announce``.
    The run ends early once the records of its evaluations, also of earlier starts, are ``enough``.
    ``tasks`` scores train.eval_tasks: `mtnlg_jax.evaluate.in_training.RunTasks` of the config, and
    ``samples`` continues train.sample_prompts: `mtnlg_jax.decode.in_training.RunSamples`.
    ``executables`` has steps that were compiled before.

    Raises ValueError if a setting is invalid or contradicts the run in ``workdir``, Preempted after
    a signal to any process (the state is saved if it is finite), Diverged after train.max_bad_steps
    non-finite steps in a row, and Disagreement if the processes differ in config, step, data or
    program. With several processes any other exception ends the process, and so does a phase that
    takes too long (train.watchdog_seconds).
    """
    validate(config)
    check_given(config, tasks)
    processes.check_same_settings(config, workdir)
    watching.check(config, samples)
    show_progress = show_progress and processes.is_first()
    with (
        lifetime.own(workdir),  # first, so that everything below is this run's alone
        lifetime.signals(config.train.profile_signal) as stop,
        contextlib.ExitStack() as resources,
        Watchdog(config.train.watchdog_seconds, config.train.phase_seconds, workdir) as watchdog,
        processes.exit_on_failure(),  # innermost: it ends the process before anything waits
    ):
        compat.serialize_cpu_collectives()
        config, data, mesh = _resolved(config)
        executables = executables or Executables()
        executables.check(config, mesh)
        score = tasks.start(config, mesh, data.tokenizer) if tasks else None
        checkpoints = resources.enter_context(closing(open_checkpoints(config, workdir, mesh)))
        spikes.drop_near(workdir, checkpoints.near)
        init_from.refuse_other_runs(config, data.tokenizer, fresh=not checkpoints.has_any())
        watch = watching.Watching(config, mesh, data.tokenizer, workdir, samples, watchdog, stop)
        resources.callback(watch.fail)
        teachers = init_from.load_teachers(config, mesh)
        identity = identity_of_data(config, data) | init_from.identity_of(config, teachers)
        config, first, state, ledger, meta = _begin(
            config, mesh, checkpoints, identity, data, watchdog.clock
        )
        read = int(state.samples)
        total_samples = samples_at_end(config.train, min(first, config.train.steps), read)
        restored = meta is not None
        lines = [*(ledger.lines(first) if ledger else []), *checkpoints.lines()]
        _describe_start(config, mesh, data, workdir, first, read, restored, lines, announce)
        executables.announce = announce if processes.is_first() else executables.announce
        writing = processes.is_first()
        trackers = resources.enter_context(Trackers(config, workdir, first, writing))
        log = resources.enter_context(closing(MetricsLog(workdir, first, writing, trackers)))
        bar = resources.enter_context(_progress_bar(config, first, show_progress))
        steps = _compiled_steps(config, mesh, data, teachers, total_samples, watchdog, executables)
        meter = Meter(config, data.has_answers)
        statistics = Statistics(
            config, mesh, data, teachers, total_samples, watchdog, log, meter.restart
        )
        course = Course(
            config,
            workdir,
            identity,
            data,
            ledger,
            checkpoints,
            Reporter(config, log, bar, meter, checkpoints, ledger, statistics),
            Evaluator(config, mesh, data),
            TaskScores(config, score, log, watchdog),
            Spikes(config, workdir, mesh, data, log, meta),
            functools.partial(_last_state, config, mesh, checkpoints, identity, watchdog.clock),
            watchdog,
            watch,
            stop,
            enough,
            show_progress,
            lambda: [steps[key].fingerprint for key in sorted(steps)] + statistics.fingerprints,
        )
        compare_replicas = ReplicaCheck(course, mesh)
        course.begin(first, state)

        while course.goes_on:
            if not course.leave_out():
                _step(course, mesh, steps, teachers, statistics, compare_replicas)

        course.finish()
        return _summary(workdir, course)


def _resolved(config: Config) -> tuple[Config, Data, Mesh]:
    """Return the config with what data and devices decide, the data, and the mesh."""
    data = load_data(config)
    if config.optimizer.private:
        # With other secrets each would draw other rows. It is compared as a hash.
        secret = privacy.secret_of(config, "comparison").hex()
        if line := processes.disagreement({"hash of optimizer.dp_secret": secret}):
            raise ValueError(f"{line}; give all processes the same file")
    config = resolve(config, data.tokenizer)
    mesh = make_mesh(config.mesh)
    offload.check_backend(config, mesh)
    validate_batch(config, row_shards(mesh.shape))  # data=-1 is only known now
    replicas.check_mesh(config, mesh)
    return config, data, mesh


def identity_of_data(config: Config, data: Data) -> dict[str, dict]:
    """Return what must not change when a run resumes: model architecture, tokenizer and data."""
    return {
        "model": init_from.recorded_meaning(config.model),
        "tokenizer": {"sha256": data.tokenizer.fingerprint},
        "data": data.fingerprints,
    }


def _begin(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    identity: dict,
    data: Data,
    clock: goodput.Clock,
) -> tuple[Config, int, TrainState, Ledger | None, dict | None]:
    """Return (config, first step, state, the ledger of privacy.start, the meta of the checkpoint of
    this folder that was restored, None without one).

    Precedence: 1. the newest good checkpoint of this folder; 2. the parameters of train.init;
    3. fresh ones from train.seed.
    """
    restored = _restored(config, mesh, checkpoints, identity, clock)
    if not restored:
        privacy.refuse_known_data(config, data.fingerprints)
        config, ledger = privacy.start(config, data.samplers, {}, 0, 0)
        state = init_state(config, mesh, init_from.load_start(config, mesh))
        return config, 0, state, ledger, None
    first, state, meta = restored
    # From here on train.init of the config is that of the first start of this run.
    config = changes.kept_init(meta, config)
    samples = int(state.samples)
    config = changes.kept_warmup(meta, first, samples, config)
    config, ledger = privacy.start(config, data.samplers, meta, first, samples)
    if samples and processes.is_first():  # 0: parameters alone, not trained in this folder yet
        reported = changes.report_changes(meta, first, samples, config)
        if reported:
            logging.warning("%s", reported)
    return config, first, state, ledger, meta


def _restored(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, identity: dict, clock: goodput.Clock
) -> tuple[int, TrainState, dict] | None:
    """Return (step, state, meta) of the newest good checkpoint of this folder, if there is one."""
    # The abstract state has this run's shardings, so a checkpoint of another mesh is restored onto
    # this one.
    with clock.during("restore"):
        restored = checkpoints.restore(
            abstract_state(config, mesh),
            identity,
            functools.partial(changes.refuse_changes, config=config),
        )
    if not restored:
        return None
    first, state, meta = restored
    return first, renew(config, state, checkpoints.lacking), meta


def _last_state(
    config: Config, mesh: Mesh, checkpoints: Checkpoints, identity: dict, clock: goodput.Clock
) -> tuple[int, TrainState]:
    """Return (step, state) to which a run goes back: its newest good checkpoint, or its start."""
    restored = _restored(config, mesh, checkpoints, identity, clock)
    if restored:
        return restored[:2]
    return 0, init_state(config, mesh, init_from.load_start(config, mesh))


def _describe_start(
    config: Config,
    mesh: Mesh,
    data: Data,
    workdir: str,
    first: int,
    samples: int,
    restored: bool,
    lines: Sequence[str],
    announce: Callable[[str], None],
) -> None:
    """Write the files of a start, and describe it to ``announce``, in the first process."""
    if processes.is_first():
        describe.write(config, workdir, first)
        _keep_files(config, data.tokenizer, workdir, fresh=not restored)
        tokens = data.training_tokens
        announce(describe.at_start(config, mesh, workdir, first, samples, tokens, restored, lines))


def _compiled_steps(
    config: Config,
    mesh: Mesh,
    data: Data,
    teachers: dict,
    total_samples: int,
    watchdog: Watchdog,
    executables: Executables,
) -> dict[tuple[int, bool], CompiledStep]:
    """Return {(kind, masked): step}, where kind is -1 or the number of a stage with a teacher."""
    # An argument and not a constant, which the cache of compiled programs would keep on disk.
    noise = (privacy.noise_key(config, data.fingerprints),) if config.optimizer.private else ()
    steps = {}
    for kind, more in init_from.kinds_of_steps(teachers):
        # The attention mask is static, so a masked step is another program. It costs nothing if no
        # stage is masked, because a step is compiled at its first call.
        for masked in (False, True):
            options = {"total_samples": total_samples, "sparse": data.has_answers, **more}
            step = make_train_step(config, mesh, causal=not masked, **options)
            kept = executables.step(config, mesh, not masked, kind, options)
            steps[kind, masked] = CompiledStep(step, watchdog, noise, kept)
    return steps


def _progress_bar(config: Config, first: int, show_progress: bool) -> tqdm:
    bar = tqdm(
        total=config.train.steps,
        initial=first,
        unit="step",
        dynamic_ncols=True,
        smoothing=0.05,
        disable=None if show_progress else True,  # None: hidden unless on a terminal
    )
    if first < config.train.steps:
        show(bar, ["compiling"])
    return bar


def _step(
    course: Course,
    mesh: Mesh,
    steps: dict[tuple[int, bool], CompiledStep],
    teachers: init_from.Teachers,
    statistics: Statistics,
    compare_replicas: ReplicaCheck,
) -> None:
    """Start the next step, and do what is due after it."""
    config = course.config
    step = course.done
    with course.watchdog.clock.batch(course.reporter.pending):
        batch, micro_batches, sequences = batch_at(config, mesh, course.data, step, course.samples)
    number, _, stage = stage_at(config.train, step)
    kind, teacher = init_from.teacher_of(teachers, number)
    run_step = steps[kind, is_masked(config.train, step)]
    scale = np.float32(stage.learning_rate_scale)  # as compile_ahead.py gives it
    # Before the step, which takes the state.
    statistics.before_step(course.state, step, course.samples, kind, scale, teacher)
    with course.watching.step(step, course.state):
        state, metrics = run_step(course.state, batch, micro_batches, sequences, scale, *teacher)
    compare_replicas(state, batch)  # where it is due, before a checkpoint
    course.after_step(state, metrics, int(sequences))  # reports, evaluates, saves


def _summary(workdir: str, course: Course) -> Summary:
    config = course.config
    meter = course.reporter.meter
    state = course.state
    score_tasks = course.score_tasks
    # There is an evaluation: the last step always has one, and a finished run that lost it repeats
    # it.
    final = course.log.evaluations()[-1]
    scored = [record for record in course.log.records if record["kind"] == KIND]
    times = [record for record in course.log.records if record["kind"] == goodput.KIND]
    # The mean over this process's steps, not the moving average of the progress bar.
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
        course.checkpoints.best_step(),
        int(state.nonfinite_total),
        scored[-1] if scored else {},
        (score_tasks.seconds, score_tasks.share),
        spike_rule.total(state.extras),
        times[-1] if times else {},
    )


def _keep_files(config: Config, tokenizer: Tokenizer, workdir: str, fresh: bool) -> None:
    """Copy the tokenizer into the run folder, so that the folder can be used on its own, and at a
    ``fresh`` start what export needs of train.init."""
    target = os.path.join(workdir, "tokenizer")
    if not os.path.exists(target):
        # Written to another name and renamed, so a folder named tokenizer is always complete.
        shutil.rmtree(target + ".partial", ignore_errors=True)
        tokenizer.save(target + ".partial")
        os.replace(target + ".partial", target)
    if fresh:
        init_from.keep_originals(config, workdir)

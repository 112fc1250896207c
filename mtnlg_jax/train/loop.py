"""The loop. ``train`` reads from top to bottom; everything it calls is one hop away."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from mtnlg_jax import command, compat
from mtnlg_jax.config import Config, to_json, validate, validate_batch
from mtnlg_jax.data.batches import SAMPLE_ORDER, Batches, HeldOut, heldout_count
from mtnlg_jax.data.store.sources import open_sources, spread
from mtnlg_jax.data.store.tokens import Tokens
from mtnlg_jax.data.tokenizer import Tokenizer
from mtnlg_jax.hardware import flops_per_token
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.train import changes, describe, init_from, lifetime, lora, processes
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.course import refuse_other_course, refuse_other_settings
from mtnlg_jax.train.metrics import MetricsLog, peak_flops
from mtnlg_jax.train.objectives import causal_batch, masked_batch
from mtnlg_jax.train.program import Program
from mtnlg_jax.train.saving import Saver
from mtnlg_jax.train.schedule import batch_size_at, is_masked, loss_name, samples_at_end, stage_at
from mtnlg_jax.train.step import abstract_state, init_state, make_eval, make_train_step, micro_batch_shape, put_batch
from mtnlg_jax.train.watchdog import Watchdog


class Preempted(Exception):
    """A signal came (`lifetime.signals`): the state was saved, the same command goes on from there."""

    exit_code = command.PREEMPTED


class Diverged(Exception):
    """Too many non-finite steps in a row."""

    exit_code = command.DIVERGED


FIGURES = ("causal_loss", "perplexity", "bits_per_byte", "masked_loss")  # of an evaluation


def _short(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended."""

    workdir: str
    steps: int
    parameters: int
    tokens: int
    seconds: float  # of this process, in the loop
    tokens_per_second: float
    mfu: float | None  # None where the peak of these devices is not known
    final: dict  # the last evaluation: step, causal_loss, perplexity, bits_per_byte, masked_loss
    best_step: int | None
    skipped: int

    @property
    def speed(self) -> str:
        """"1,234 tokens/s, MFU 41%", for a person."""
        mfu = "unknown (train.device_flops)" if self.mfu is None else f"{self.mfu:.0%}"
        return f"{self.tokens_per_second:,.0f} tokens/s, MFU {mfu}"

    @property
    def held_out(self) -> str:
        """The last evaluation, for a person."""
        losses = [f"{name.replace('_', ' ')} {_short(self.final[name])}" for name in FIGURES if name in self.final]
        if not losses:
            return "nothing is held out, so there is no held-out loss"
        return f"held out at step {self.final['step']}: {', '.join(losses)}"

    @property
    def kept(self) -> str:
        """The checkpoints that are left, for a person."""
        return "the last ones" + ("" if self.best_step is None else f" and the best (step {self.best_step})")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads: batches by stage, held-out text, and the tokenizer that they share."""

    tokenizer: Tokenizer
    stages: tuple[Batches, ...]
    held_out: tuple[tuple[Tokens, float], ...]  # of each source, with its share of the run's samples
    fingerprints: dict[str, str]
    training_tokens: int  # of all sources together


def train(config: Config, workdir: str, show_progress: bool = True,
          announce: Callable[[str], None] | None = None) -> Summary:
    """Trains ``config`` in ``workdir``, going on from the newest good checkpoint there. Of several processes each
    calls this; the first one writes, and calls ``announce`` with what the run is (`describe.at_start`).

    Raises ValueError on what does not fit, Preempted after a signal to any process (state saved), Diverged after
    train.max_bad_steps non-finite steps in a row, Disagreement. Ends the process on any other exception where there
    are several, and on a phase that takes too long (train.watchdog_seconds).
    """
    validate(config)
    refuse_other_settings(config, workdir)
    show_progress = show_progress and processes.is_first()
    with (lifetime.own(workdir), lifetime.signals() as stop, contextlib.ExitStack() as open_until_the_end,
          Watchdog(config.train.watchdog_seconds, config.train.phase_seconds, workdir) as watchdog,
          processes.leaving_at_once()):
        compat.serialize_cpu_collectives()
        data = load_data(config)
        config = resolve(config, data.tokenizer)
        mesh = make_mesh(config.mesh)
        validate_batch(config, mesh.shape["data"])
        checkpoints = Checkpoints(os.path.join(workdir, "checkpoints"), config.train.keep_last, config.train.keep_best)
        open_until_the_end.callback(checkpoints.close)
        init_from.refuse_other_runs(config, data.tokenizer, fresh=not checkpoints.steps())
        teachers = init_from.load_teachers(config, mesh)
        identity = _identity(config, data) | init_from.identity_of(config, teachers)
        # Precedence: 1. the newest good checkpoint of this folder; 2. the parameters of train.init; 3. fresh ones from
        # train.seed.
        restored = checkpoints.restore(abstract_state(config, mesh), identity,
                                       functools.partial(changes.refuse_changes, config=config))
        if restored:
            first, state, meta = restored
            config = changes.kept_init(meta, config)
            samples = int(state["samples"])  # 0: parameters alone, which no run has trained here yet
            reported = changes.report_changes(meta, first, samples, config) if samples else None
            if reported and processes.is_first():
                logging.warning("%s", reported)
        else:
            first, state = 0, init_state(config, mesh, init_from.load_start(config, mesh))
        # The one clock: what is read next, the ramp and the learning rate all follow the samples of the state.
        samples = int(state["samples"])
        total_samples = samples_at_end(config.train, min(first, config.train.steps), samples)
        if processes.is_first():
            describe.write(config, workdir, first)
            _keep_tokenizer(data.tokenizer, workdir)
            if announce:
                announce(describe.at_start(
                    config, mesh, workdir, first, samples, data.training_tokens, restored is not None))
        log = MetricsLog(workdir, first, writing=processes.is_first())
        open_until_the_end.callback(log.close)
        bar = open_until_the_end.enter_context(tqdm(
            total=config.train.steps, initial=first, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=None if show_progress else True))
        if first < config.train.steps:
            show(bar, ["compiling"])
        meter = _Meter(config)
        reporter = _Reporter(config, log, bar, meter, checkpoints)
        saver, save = Saver(checkpoints), None
        steps = {(number, masked): Program(make_train_step(config, mesh, causal=not masked, total_samples=total_samples,
                                                           **given), watchdog)
                 for number, given in init_from.kinds_of_steps(teachers) for masked in (False, True)}
        evaluate = Evaluator(config, mesh, data)
        asked, best = processes.Asked(), checkpoints.best_metric()
        for step in range(first, config.train.steps):
            masked = is_masked(config.train, step)
            batch, micro, sequences = batch_at(config, mesh, data, step, samples)
            samples += int(sequences)
            number, _, stage = stage_at(config.train, step)
            scale, (kind, teacher) = float(stage.learning_rate_scale), init_from.teacher_of(teachers, number)
            state, metrics = steps[kind, masked](state, batch, micro, sequences, scale, *teacher)
            # The previous step's numbers are fetched while this one runs.
            reporter.report()
            watchdog.enter("step")
            reporter.pending = (step, metrics, int(sequences))
            done, stopping = step + 1, asked(stop.is_set())
            if processes.several() and _due(config.train.compare_every, done, config):
                refuse_other_course(config, data.fingerprints, steps, state, done)
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
                save = functools.partial(_save, config, state, done, checkpoints, identity, result) if saving else None
                if saving:
                    best = min(best, metric) if saver.save(save) else best
                if not stopping and done < config.train.steps:
                    save = None  # it would hold this state beside the next one
                meter.restart()
            if stopping and done < config.train.steps:
                saver.finish(save)
                processes.meet("saved")
                if not saving:
                    raise Preempted(f"stopped by a signal after step {done}, whose state is not finite and not saved; "
                                    "the same command goes on from the last checkpoint")
                raise Preempted(f"stopped by a signal after step {done}; state saved in {workdir}; the same command "
                                "goes on from there")
        watchdog.enter("saving")
        saver.finish(save)
        processes.meet("saved")
        known = any(r["kind"] == "eval" and r["step"] == first for r in log.records)
        if first == config.train.steps and not processes.agree(lambda: known):
            # A finished run, started again, whose last evaluation was lost.
            _evaluate(evaluate, state, first, log, show_progress)
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
    shares: dict[str, float] = {}
    for stage, blend in zip(config.train.stages, blends, strict=True):
        for path, weight in blend:
            share = stage.fraction * weight / sum(weight for _, weight in blend)
            shares[path] = shares.get(path, 0.0) + share
    parts: dict[str, list] = {}  # sources of one output share their held-out part
    for path, tokens in held_out.items():
        if len(held_out) > 1 and not heldout_count(tokens, config.sequence_length):
            logging.warning("%s holds nothing out: the held-out loss says nothing about it", path)
        parts.setdefault(tokens.location, [tokens, 0.0])[1] += shares.get(path, 1.0)
    prints = {f"source {i}": tokens.meta["sha256"] for i, tokens in enumerate(opened.values())}
    return Data(tokenizer, batches, tuple(map(tuple, parts.values())), prints,
                sum(len(tokens) for tokens in opened.values()))


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


def batch_at(config: Config, mesh, data: Data, step: int, first: int):
    """(batch arrays (M, B, S), micro-batches in use, sequences) of ``step``, which ``first`` samples come before: pure
    in these and the seed, whatever the mesh. A step of the ramp that is smaller than the largest fills the rest with
    rows of weight 0."""
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
    return {"model": init_from.meaning(config.model), "tokenizer": {"sha256": data.tokenizer.fingerprint},
            "data": data.fingerprints}


EVALUATION_ROWS = 16  # held-out sequences in one of train.eval_batches


class Evaluator:
    """Held-out loss, perplexity and bits per byte, for the objectives that the run trains, always of the same rows
    (`HeldOut`). The loss of several sources is the mean of theirs, each by its share of the run's samples."""

    def __init__(self, config: Config, mesh, data: Data):
        self.config, self.mesh, self.data = config, mesh, data
        stages = config.train.stages
        self.objectives = [name for name, used in (("causal", any(s.masked < 1 for s in stages)),
                                                   ("masked", any(s.masked > 0 for s in stages))) if used]
        self.held_out = HeldOut(data.held_out, config.sequence_length, EVALUATION_ROWS * config.train.eval_batches)
        self._steps = {name: make_eval(config, mesh, causal=name == "causal") for name in self.objectives}

    def __call__(self, params) -> dict[str, float]:
        """causal_loss, perplexity, bits_per_byte, masked_loss, and of how many tokens and bytes the causal ones are;
        {} where nothing is held out."""
        result, params = {}, lora.merge(params, self.config)
        for name in self.objectives if len(self.held_out) else ():
            total, weight = np.float64(0), np.float64(0)
            for batch in self._batches(name):
                nats, tokens = self._steps[name](params, batch)
                total, weight = total + float(nats), weight + float(tokens)
            if not weight:
                continue
            result[f"{name}_loss"] = loss = float(total / weight)
            if name == "causal":
                result["perplexity"] = math.exp(min(loss, 700.0))
                if size := self._sizes["bytes"]:
                    result["bits_per_byte"] = loss / math.log(2) / size
                result |= {"scored_tokens": self._sizes["tokens"], "scored_bytes": self._sizes["all_bytes"]}
        return result

    def _rows(self, objective: str, numbers: np.ndarray) -> dict[str, np.ndarray]:
        raw = self.held_out.rows(numbers)
        if objective == "causal":
            return causal_batch(raw)
        return masked_batch(raw, self.held_out.window[numbers], 0, self.config.data.masking, self.data.tokenizer)

    @functools.cached_property
    def _scales(self) -> dict[str, np.ndarray]:
        """By objective: what a token of each source weighs [sources], so that the sources count by their shares."""
        scales = {}
        for name in self.objectives:
            tokens = np.zeros(len(self.held_out.sources))
            np.add.at(tokens, self.held_out.source, self._counts[name][0])
            shares = np.where(tokens > 0, self.held_out.shares, 0.0)
            scales[name] = shares / max(shares.sum(), 1e-300) * tokens.sum() / np.maximum(tokens, 1)
        return scales

    @functools.cached_property
    def _counts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By objective: tokens that each row predicts [rows], and the bytes of their text."""
        tokenizer, counts = self.data.tokenizer, {}
        sizes = np.array([len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size)])
        for name in self.objectives:
            parts = []
            for first in range(0, len(self.held_out), 64):
                rows = self._rows(name, np.arange(first, min(first + 64, len(self.held_out))))
                parts.append([(rows["weights"] > 0).sum(1), (sizes[rows["labels"]] * (rows["weights"] > 0)).sum(1)])
            counts[name] = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        return counts

    @functools.cached_property
    def _sizes(self) -> dict[str, float]:
        """Of causal rows: bytes of a token, sources by their shares; all tokens and bytes."""
        tokens, sizes = self._counts["causal"]
        scales = self._scales["causal"][self.held_out.source]
        return {"bytes": float((sizes * scales).sum() / max(tokens.sum(), 1)), "tokens": int(tokens.sum()),
                "all_bytes": int(sizes.sum())}

    def _batches(self, objective: str):
        pipe, (micro_batches, rows) = self.mesh.shape["pipe"], micro_batch_shape(self.config, self.mesh)
        # No more micro-batches than there are rows for, and as many as a pipeline is fed at a time.
        micro_batches = -(-min(micro_batches, -(-len(self.held_out) // rows)) // pipe) * pipe
        scales = self._scales[objective][self.held_out.source].astype(np.float32)
        for first in range(0, len(self.held_out), micro_batches * rows):
            def rows_of(numbers, first=first):
                used = first + numbers < len(self.held_out)
                chosen = np.where(used, first + numbers, 0)
                made = self._rows(objective, chosen)
                return made | {"weights": made["weights"] * (scales[chosen] * used)[:, None]}

            yield put_batch(rows_of, (micro_batches, rows, self.config.sequence_length), self.mesh)


# --- what happens around a step ---------------------------------------------------------------------------


def _due(every: int, done: int, config: Config) -> bool:
    return done == config.train.steps or (every > 0 and done % every == 0)


class _Reporter:
    """Fetches the numbers of the step that ``pending`` holds, a step late, and judges by them whether the state is fit
    to go on from."""

    def __init__(self, config: Config, log: MetricsLog, bar: tqdm, meter: "_Meter", checkpoints: Checkpoints):
        self.config, self.log, self.bar, self.meter, self.checkpoints = config, log, bar, meter, checkpoints
        self.pending = None  # (step, its metrics on the device, sequences)
        self.bad = 0  # non-finite steps in a row, up to the last one reported

    def report(self) -> None:
        """Writes and shows the pending step, if there is one. Raises Diverged after too many non-finite ones."""
        if self.pending is None:
            return
        (step, metrics, sequences), self.pending = self.pending, None
        train, meter = self.config.train, self.meter
        values = {key: value.item() for key, value in jax.device_get(metrics).items()}
        meter.add(sequences * self.config.sequence_length)
        _, _, stage = stage_at(train, step)
        self.bad, name = values["bad"], loss_name(train, stage)
        if (step + 1) % train.log_every == 0 or step + 1 == train.steps or self.bad:
            self.log.write({"kind": "train", "step": step + 1, name: values["loss"],
                            "grad_norm": values["grad_norm"], "learning_rate": values["learning_rate"],
                            "stage": stage.name, "objective": "masked" if is_masked(train, step) else "causal",
                            "sequences": sequences, "skipped": values["skipped"],
                            "tokens_per_second": round(meter.rate, 1), **meter.mfu_entry})
        self.bar.update()
        show(self.bar, [f"{name.replace('_', ' ')} {values['loss']:.3f}",
                        f"{meter.rate:,.0f} tokens/s" if meter.rate else "",
                        f"{values['skipped']} skipped" if values["skipped"] else "", f"stage {stage.name}",
                        "" if meter.mfu is None else f"MFU {meter.mfu:.0%}"])
        if not self.bad:
            self.checkpoints.prove()
        if self.bad >= train.max_bad_steps:
            self._diverge(f"loss or gradient was not finite for {self.bad} steps in a row, up to step {step + 1}")

    def is_healthy(self, done: int, result: dict, stopping: bool = False) -> bool:
        """Whether the state after step ``done``, with the evaluation ``result`` ({}: none), is to be saved: a loss of
        its parameters is finite, or they follow from a finite step. Where the run ends here (``stopping``, or its last
        step), a skipped step is no reason to lose what came before it: the state is saved and stays unproven. Raises
        Diverged where the last evaluation is not finite."""
        losses = [result[name] for name in ("causal_loss", "masked_loss") if name in result]
        ending = stopping or done == self.config.train.steps
        if all(map(math.isfinite, losses)) and (losses or not self.bad or ending):
            return True
        what = f"held-out loss {losses}" if losses else f"loss or gradient of the last {self.bad} steps"
        if done == self.config.train.steps:
            self._diverge(f"{what} was not finite at the last step, {done}")
        logging.warning("step %d is not saved: %s is not finite", done, what)
        return False

    def _diverge(self, what: str) -> None:
        good = self.checkpoints.give_up()
        last = "there is not a good checkpoint" if good is None else f"the last good checkpoint is of step {good}"
        raise Diverged(f"{what}; {last}. Lower optimizer.learning_rate or set optimizer.clip_grad_norm, then run again")


WIDE = 110  # columns of a terminal that has room for tqdm's own line


def show(bar: tqdm, parts: list[str]) -> None:
    """Puts ``parts`` behind the bar, as many of the first ones as the terminal has room for; a narrow one leaves out
    the elapsed time and steps/s, so that something of the bar is left."""
    width = bar.format_dict["ncols"] or WIDE
    bar.bar_format = None if width >= WIDE else "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
    room, shown = width - (54 if width >= WIDE else 24 + 2 * len(str(bar.total))), ""
    for part in filter(None, parts):
        if shown and len(shown) + 2 + len(part) > room:
            break
        shown += (", " if shown else "") + part
    bar.set_postfix_str(shown)


def _metric(result: dict) -> float:
    """What models are compared by, lower is better; infinite where nothing was evaluated, or nothing finite."""
    value = result.get("causal_loss", result.get("masked_loss", math.inf))
    return value if math.isfinite(value) else math.inf


def _evaluate(evaluate, state, done, log, show_progress) -> dict[str, float]:
    result = evaluate(state["params"])
    log.write({"kind": "eval", "step": done, **result})
    if show_progress and result:
        tqdm.write(f"step {done}: held out: " + ", ".join(
            f"{name} {_short(result[name])}" for name in FIGURES if name in result))
    log.plot()
    return result


def _save(config, state, done, checkpoints, identity, result) -> None:
    meta = {"config": json.loads(to_json(config)), "identity": identity, "samples": int(state["samples"]),
            "order_of_samples": SAMPLE_ORDER, "metrics": result}
    metric = _metric(result)
    checkpoints.save(done, state, meta, metric, proven=math.isfinite(metric))


class _Meter:
    """Tokens a second over the recent past, and model FLOP utilisation; pauses do not count."""

    def __init__(self, config: Config):
        self.flops = flops_per_token(config.model, config.sequence_length)
        self.peak = peak_flops(config.train.device_flops)
        self.rate, self.tokens, self.seconds = 0.0, 0, 0.0
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
    def mfu(self) -> float | None:
        return self.utilization(self.rate)

    @property
    def mfu_entry(self) -> dict[str, float]:
        """What metrics.jsonl says of it."""
        return {} if self.mfu is None else {"mfu": round(self.mfu, 4)}

    def utilization(self, rate: float) -> float | None:
        """MFU at ``rate`` tokens/s; None where the peak of these devices is not known."""
        return None if self.peak is None else rate * self.flops / self.peak


def _summary(config, workdir, records, meter, checkpoints, state) -> Summary:
    final = [r for r in records if r["kind"] == "eval"][-1]
    rate = meter.tokens / meter.seconds if meter.seconds else 0.0
    return Summary(workdir, config.train.steps, config.model.parameter_count(),
                   int(state["samples"]) * config.sequence_length, meter.seconds, rate,
                   meter.utilization(rate), final, checkpoints.best_step(), int(state["skipped"]))


def _keep_tokenizer(tokenizer: Tokenizer, workdir: str) -> None:
    """The tokenizer beside the checkpoints: with config.json a run folder needs nothing else to be used."""
    target = os.path.join(workdir, "tokenizer")
    if not os.path.exists(target):
        shutil.rmtree(target + ".partial", ignore_errors=True)
        tokenizer.save(target + ".partial")
        os.replace(target + ".partial", target)

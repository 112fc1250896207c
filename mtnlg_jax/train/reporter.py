"""Report the progress and speed of a run, judge whether its state is sound, and summarize it."""

import dataclasses
import math
import textwrap
import time

import jax
from absl import logging
from tqdm import tqdm

from mtnlg_jax.config import Config
from mtnlg_jax.errors import Diverged
from mtnlg_jax.hardware import flops_per_token
from mtnlg_jax.train import goodput, lora
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.metrics import MetricsLog, peak_flops
from mtnlg_jax.train.plots import OBJECTIVES, losses_of_sources, scores_of_tasks
from mtnlg_jax.train.privacy import Ledger
from mtnlg_jax.train.schedule import is_masked, loss_name, stage_at
from mtnlg_jax.train.statistics import Statistics

FIGURES = ("causal_loss", "perplexity", "bits_per_byte", "masked_loss")  # of an evaluation


def short(value: float | None) -> str:
    """Format a loss with three decimals."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"


def scores_text(record: dict) -> str:
    """Return the scores of a record of tasks as text, without their errors."""
    # The perplexity of a word is in the billions at first.
    scores = {
        name: f"{value:.3g}" if value >= 1000 else short(value)
        for name, value in scores_of_tasks(record).items()
    }
    return ", ".join(f"{name.replace('/', ' ')} {value}" for name, value in scores.items())


def wrapped(text: str) -> list[str]:
    """Return ``text`` in lines of a terminal; those after the first are indented."""
    # Names, which may be long or have hyphens, stay in one piece.
    return textwrap.wrap(
        text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a run."""

    workdir: str
    steps: int
    parameters: int
    tokens: int
    seconds: float  # of this process, in the loop
    tokens_per_second: float
    mfu: float | None  # None where the peak of these devices is not known
    final: dict  # the last evaluation: step, causal_loss, perplexity, bits_per_byte, masked_loss
    best_step: int | None
    skipped: int  # non-finite steps
    tasks: dict = dataclasses.field(default_factory=dict)  # the last record of train.eval_tasks
    # Seconds that this process scored tasks, and their share of its time.
    tasks_cost: tuple[float, float] = (0.0, 0.0)
    spikes: int = 0  # steps that were not applied, by train.spike_policy
    goodput: dict = dataclasses.field(default_factory=dict)  # the last record of its kind

    @property
    def speed(self) -> str:
        """Return text such as "1,234 tokens/s, MFU 41%"."""
        mfu = "unknown (train.device_flops)" if self.mfu is None else f"{self.mfu:.0%}"
        return f"{self.tokens_per_second:,.0f} tokens/s, MFU {mfu}"

    @property
    def held_out(self) -> str:
        """Return the last evaluation as text."""
        losses = [
            f"{name.replace('_', ' ')} {short(self.final[name])}"
            for name in FIGURES
            if name in self.final
        ]
        if not losses:
            return "nothing is held out, so there is no held-out loss"
        means = f"held out at step {self.final['step']}: {', '.join(losses)}"
        return "\n".join([means, *self._by_source()])

    def _by_source(self) -> list[str]:
        """Return lines with the held-out loss of each source, where there are several."""
        lines = []
        for objective in OBJECTIVES:
            found = losses_of_sources(self.final, objective)
            if found:
                text = ", ".join(f"{name} {short(loss)}" for name, loss in found.items())
                lines += wrapped(f"  {objective} loss by source: {text}")
        return lines

    @property
    def scored(self) -> str:
        """Return the last scores of tasks as text, and their cost; "" for a run without tasks."""
        if not self.tasks:
            return ""
        seconds, share = self.tasks_cost
        cost = (
            f"; scoring tasks took {seconds:,.1f} s, {share:.1%} of this start" if seconds else ""
        )
        return "\n".join(
            wrapped(f"tasks at step {self.tasks['step']}: {scores_text(self.tasks)}{cost}")
        )

    @property
    def time(self) -> str:
        """Return the shares of this start's time, and of the run's, as text."""
        lines = goodput.described(self.goodput).splitlines() if self.goodput else []
        return "\n".join(part for line in lines for part in wrapped(line))

    @property
    def kept(self) -> str:
        """Return as text which checkpoints are kept."""
        best = "" if self.best_step is None else f" and the best (step {self.best_step})"
        return "the last ones" + best


class Meter:
    """Recent tokens per second and model FLOP utilization; pauses do not count."""

    def __init__(self, config: Config, sparse: bool = False) -> None:
        # With a ``sparse`` loss few tokens reach the head, so it is left out.
        self.flops = flops_per_token(
            config.model, config.sequence_length, frozen=lora.used(config), head=not sparse
        )
        self.peak = peak_flops(config.train.device_flops)
        self.rate = 0.0
        self.tokens = 0
        self.seconds = 0.0
        self.restart()

    def restart(self) -> None:
        """Leave the time until the next step out."""
        self._last: float | None = None

    def add(self, tokens: int) -> None:
        """Count a step of ``tokens`` that has just ended."""
        now = time.perf_counter()
        # The first step after a pause has no start, so it is not measured.
        if self._last is not None:
            seconds = now - self._last
            self.tokens += tokens
            self.seconds += seconds
            if self.rate:
                # A moving average over about ten steps.
                self.rate += 0.1 * (tokens / seconds - self.rate)
            else:
                self.rate = tokens / seconds
        self._last = now

    @property
    def mfu(self) -> float | None:
        """Return the MFU at the recent rate."""
        return self.utilization(self.rate)

    @property
    def mfu_entry(self) -> dict[str, float]:
        """Return the entry of metrics.jsonl."""
        return {} if self.mfu is None else {"mfu": round(self.mfu, 4)}

    def utilization(self, rate: float) -> float | None:
        """Return the MFU at ``rate`` tokens/s; None where the peak of the devices is not known."""
        return None if self.peak is None else rate * self.flops / self.peak


_FURTHER = (
    "expert_",
    "nonprivate_",
    "spikes_",
    "deviation_",
)  # beginnings of the names of further metrics of a step


class Reporter:
    """Fetch the metrics of the pending step, one step late, and judge by them whether the state is
    good."""

    def __init__(
        self,
        config: Config,
        log: MetricsLog,
        bar: tqdm,
        meter: Meter,
        checkpoints: Checkpoints,
        ledger: Ledger | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.config = config
        self.log = log
        self.bar = bar
        self.meter = meter
        self.checkpoints = checkpoints
        self.ledger = ledger
        self.statistics = statistics
        # (step, its metrics on the device, sequences)
        self.pending: tuple[int, dict[str, jax.Array], int] | None = None
        self.nonfinite_streak = 0  # up to the last step reported

    def report(self) -> tuple[int, dict] | None:
        """Write and show the pending step, if there is one; return it and its figures.

        There are no figures where its batch was left out. Raise Diverged after too many non-finite
        steps in a row.
        """
        if self.pending is None:
            return None
        # Cleared first: a step must not be reported twice when the report raises.
        step, metrics, sequences = self.pending
        self.pending = None
        train = self.config.train
        meter = self.meter
        if not metrics:
            self.bar.update()
            meter.restart()
            return step, {}
        # This waits for the step. It is called after the next one was started, so the device stays
        # busy.
        values = {key: value.tolist() for key, value in jax.device_get(metrics).items()}
        # Sequences and not rows: the padding of a ramp is not speed.
        meter.add(sequences * self.config.sequence_length)
        _, _, stage = stage_at(train, step)
        self.nonfinite_streak = values["nonfinite_streak"]
        name = "nonprivate_loss" if self.ledger else loss_name(train, stage)
        spent = self.ledger.row(step + 1) if self.ledger else {}
        # What a reader looks for is always recorded.
        unusual = self.nonfinite_streak or values.get("is_spike")
        if (step + 1) % train.log_every == 0 or step + 1 == train.steps or unusual:
            self.log.write(
                {
                    "kind": "train",
                    "step": step + 1,
                    name: values["loss"],
                    "grad_norm": values["grad_norm"],
                    "learning_rate": values["learning_rate"],
                    "stage": stage.name,
                    "objective": "masked" if is_masked(train, step) else "causal",
                    "sequences": sequences,
                    "skipped": values["nonfinite_total"],
                    **{key: x for key, x in values.items() if key.startswith(_FURTHER)},
                    **spent,
                    "tokens_per_second": round(meter.rate, 1),
                    **meter.mfu_entry,
                }
            )
        if self.statistics is not None:
            self.statistics.report(step)
        self.bar.update()
        show(
            self.bar,
            [
                f"{name.replace('_', ' ')} {values['loss']:.3f}",
                f"epsilon {spent['epsilon']:.2f}" if spent else "",
                f"{meter.rate:,.0f} tokens/s" if meter.rate else "",
                f"{values['nonfinite_total']} skipped" if values["nonfinite_total"] else "",
                f"{values['spikes_total']} spikes" if values.get("spikes_total") else "",
                f"stage {stage.name}",
                "" if meter.mfu is None else f"MFU {meter.mfu:.0%}",
            ],
        )
        # This loss was computed with the parameters of the newest checkpoint or later ones, so they
        # are good.
        if not self.nonfinite_streak:
            self.checkpoints.prove()
        if self.nonfinite_streak >= train.max_bad_steps:
            self._diverge(
                f"loss or gradient was not finite for {self.nonfinite_streak} steps in a row, "
                f"up to step {step + 1}"
            )
        return step, values

    def restart(self, first: int) -> None:
        """Go on after step ``first``: what came after it is undone."""
        self.pending = None
        self.nonfinite_streak = 0
        if self.statistics is not None:
            self.statistics.restart()
        self.meter.restart()
        self.log.drop_after(first)
        self.bar.update(first - self.bar.n)

    def is_healthy(self, done: int, result: dict, stopping: bool = False) -> bool:
        """Return whether the state after step ``done`` should be saved.

        It should if a loss of its parameters is finite in the evaluation ``result`` ({}: none), or
        if its last step was. Where the run ends here (``stopping``, or the last step), the state is
        saved after a skipped step as well, so that earlier steps are not lost; it stays unproven.
        Raise Diverged where the last evaluation of the run is not finite.
        """
        losses = [result[name] for name in ("causal_loss", "masked_loss") if name in result]
        ending = stopping or done == self.config.train.steps
        # An evaluation proves these very parameters. The last step only proves those before its
        # update, which is why such a checkpoint stays unproven.
        if all(map(math.isfinite, losses)) and (losses or not self.nonfinite_streak or ending):
            return True
        what = (
            f"held-out loss {losses}"
            if losses
            else f"loss or gradient of the last {self.nonfinite_streak} steps"
        )
        # At the end there is no later step that could recover.
        if done == self.config.train.steps:
            self._diverge(f"{what} was not finite at the last step, {done}")
        logging.warning("step %d is not saved: %s is not finite", done, what)
        return False

    def _diverge(self, what: str) -> None:
        # Before the message, which names the checkpoint that is left.
        good = self.checkpoints.give_up()
        last = (
            "there is no good checkpoint"
            if good is None
            else f"the last good checkpoint is of step {good}"
        )
        raise Diverged(
            f"{what}; {last}. Lower optimizer.learning_rate or set optimizer.clip_grad_norm, then "
            "run again"
        )


WIDE = 110  # columns of a terminal with room for tqdm's default line


def show(bar: tqdm, parts: list[str]) -> None:
    """Show ``parts`` behind the bar, as many as fit, the first ones first.

    A narrow terminal leaves out the elapsed time and steps/s, so that part of the bar stays
    visible.
    """
    width = bar.format_dict["ncols"] or WIDE
    if width >= WIDE:
        bar.bar_format = None
        # 54 and 24: the columns of tqdm's own parts in the two formats.
        room = width - 54
    else:
        bar.bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
        room = width - 24 - 2 * len(str(bar.total))
    shown = ""
    for part in filter(None, parts):
        # The first part always shows, even if it is cut: it is the loss.
        if shown and len(shown) + 2 + len(part) > room:
            break
        shown += (", " if shown else "") + part
    bar.set_postfix_str(shown)

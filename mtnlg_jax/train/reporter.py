"""What a run says of itself: progress, speed, whether its state is sound, and how it ended."""

import dataclasses
import math
import time

import jax
from absl import logging
from tqdm import tqdm

from mtnlg_jax.config import Config
from mtnlg_jax.errors import Diverged
from mtnlg_jax.hardware import flops_per_token
from mtnlg_jax.train.checkpoint import Checkpoints
from mtnlg_jax.train.metrics import MetricsLog, peak_flops
from mtnlg_jax.train.schedule import is_masked, loss_name, stage_at

FIGURES = ("causal_loss", "perplexity", "bits_per_byte", "masked_loss")  # of an evaluation


def short(value: float | None) -> str:
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
        """ "1,234 tokens/s, MFU 41%", for a person."""
        mfu = "unknown (train.device_flops)" if self.mfu is None else f"{self.mfu:.0%}"
        return f"{self.tokens_per_second:,.0f} tokens/s, MFU {mfu}"

    @property
    def held_out(self) -> str:
        """The last evaluation, for a person."""
        losses = [
            f"{name.replace('_', ' ')} {short(self.final[name])}"
            for name in FIGURES
            if name in self.final
        ]
        if not losses:
            return "nothing is held out, so there is no held-out loss"
        return f"held out at step {self.final['step']}: {', '.join(losses)}"

    @property
    def kept(self) -> str:
        """The checkpoints that are left, for a person."""
        return "the last ones" + (
            "" if self.best_step is None else f" and the best (step {self.best_step})"
        )


class Meter:
    """Tokens a second over the recent past, and model FLOP utilisation; pauses do not count."""

    def __init__(self, config: Config):
        self.flops = flops_per_token(config.model, config.sequence_length)
        self.peak = peak_flops(config.train.device_flops)
        self.rate = 0.0
        self.tokens = 0
        self.seconds = 0.0
        self.restart()

    def restart(self) -> None:
        self._last = None

    def add(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._last is not None:
            seconds = now - self._last
            self.tokens = self.tokens + tokens
            self.seconds = self.seconds + seconds
            self.rate = (
                tokens / seconds
                if not self.rate
                else self.rate + 0.1 * (tokens / seconds - self.rate)
            )
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


class Reporter:
    """Fetches the numbers of the step that ``pending`` holds, a step late, and judges by them
    whether the state is fit to go on from."""

    def __init__(
        self, config: Config, log: MetricsLog, bar: tqdm, meter: Meter, checkpoints: Checkpoints
    ):
        self.config = config
        self.log = log
        self.bar = bar
        self.meter = meter
        self.checkpoints = checkpoints
        self.pending = None  # (step, its metrics on the device, sequences)
        self.bad = 0  # non-finite steps in a row, up to the last one reported

    def report(self) -> None:
        """Writes and shows the pending step, if there is one. Raises Diverged after too many
        non-finite ones."""
        if self.pending is None:
            return
        step, metrics, sequences = self.pending
        self.pending = None
        train = self.config.train
        meter = self.meter
        values = {key: value.item() for key, value in jax.device_get(metrics).items()}
        meter.add(sequences * self.config.sequence_length)
        _, _, stage = stage_at(train, step)
        self.bad = values["nonfinite_streak"]
        name = loss_name(train, stage)
        if (step + 1) % train.log_every == 0 or step + 1 == train.steps or self.bad:
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
                    "tokens_per_second": round(meter.rate, 1),
                    **meter.mfu_entry,
                }
            )
        self.bar.update()
        show(
            self.bar,
            [
                f"{name.replace('_', ' ')} {values['loss']:.3f}",
                f"{meter.rate:,.0f} tokens/s" if meter.rate else "",
                f"{values['nonfinite_total']} skipped" if values["nonfinite_total"] else "",
                f"stage {stage.name}",
                "" if meter.mfu is None else f"MFU {meter.mfu:.0%}",
            ],
        )
        if not self.bad:
            self.checkpoints.prove()
        if self.bad >= train.max_bad_steps:
            self._diverge(
                f"loss or gradient was not finite for {self.bad} steps in a row, up to step {step + 1}"
            )

    def is_healthy(self, done: int, result: dict, stopping: bool = False) -> bool:
        """Whether the state after step ``done``, with the evaluation ``result`` ({}: none), is to
        be saved: a loss of its parameters is finite, or they follow from a finite step. Where the
        run ends here (``stopping``, or its last step), a skipped step is no reason to lose what
        came before it: the state is saved and stays unproven. Raises Diverged where the last
            evaluation is not finite."""
        losses = [result[name] for name in ("causal_loss", "masked_loss") if name in result]
        ending = stopping or done == self.config.train.steps
        if all(map(math.isfinite, losses)) and (losses or not self.bad or ending):
            return True
        what = (
            f"held-out loss {losses}"
            if losses
            else f"loss or gradient of the last {self.bad} steps"
        )
        if done == self.config.train.steps:
            self._diverge(f"{what} was not finite at the last step, {done}")
        logging.warning("step %d is not saved: %s is not finite", done, what)
        return False

    def _diverge(self, what: str) -> None:
        good = self.checkpoints.give_up()
        last = (
            "there is not a good checkpoint"
            if good is None
            else f"the last good checkpoint is of step {good}"
        )
        raise Diverged(
            f"{what}; {last}. Lower optimizer.learning_rate or set optimizer.clip_grad_norm, then run again"
        )


WIDE = 110  # columns of a terminal that has room for tqdm's own line


def show(bar: tqdm, parts: list[str]) -> None:
    """Puts ``parts`` behind the bar, as many of the first ones as the terminal has room for; a
    narrow one leaves out the elapsed time and steps/s, so that something of the bar is left."""
    width = bar.format_dict["ncols"] or WIDE
    bar.bar_format = (
        None
        if width >= WIDE
        else "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
    )
    room = width - (54 if width >= WIDE else 24 + 2 * len(str(bar.total)))
    shown = ""
    for part in filter(None, parts):
        if shown and len(shown) + 2 + len(part) > room:
            break
        shown += (", " if shown else "") + part
    bar.set_postfix_str(shown)

"""What a run spends of its privacy: epsilon and delta, by Google's dp_accounting.

A step is the Gaussian mechanism on a Poisson sample of the units (Abadi 2016, section 3); steps are
composed. Two data sets are neighbors if one has a unit more. The guarantee is that of the released
parameters and of every checkpoint before; it does not cover the training loss, which metrics.jsonl
names nonprivate_loss.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from mtnlg_jax import storage
from mtnlg_jax.config import Config, override
from mtnlg_jax.data.poisson import OVERFLOW, PoissonSampler
from mtnlg_jax.train import changes, describe
from mtnlg_jax.train.schedule import batch_size_at, stage_at

FILE = "privacy.json"

# Above it, e^epsilon is beyond any use: a guarantee in name only.
LARGEST_EPSILON = 1000.0

# Steps of dp_accounting's grid of privacy losses: its default for what is reported, and a coarser
# one, whose epsilon is about 0.0001 larger, for what is computed often.
_FINE = 1e-4
_COARSE = 1e-3
_LITTLE_NOISE = 0.5
_LEAST_NOISE = 0.05


class Part(NamedTuple):
    """Steps in a row with the same sampling and noise."""

    steps: int
    probability: float  # with which a unit joins a step
    noise: float  # standard deviation of the noise / clip norm


def secret_of(config: Config, purpose: str) -> bytes:
    """Return the 32 bytes from which noise or samples are drawn, by ``purpose``.

    They are a hash of the file optimizer.dp_secret, or of train.seed without one. Raises ValueError
    if the file cannot be read or has fewer than 16 bytes.
    """
    path = config.optimizer.dp_secret
    secret = str(config.train.seed).encode()
    if path:
        try:
            secret = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(
                f"optimizer.dp_secret={path} cannot be read ({error.strerror}); make it with: "
                f"head -c 32 /dev/urandom > {path}"
            ) from None
        if len(secret) < 16:
            raise ValueError(
                f"optimizer.dp_secret={path} has {len(secret)} bytes, and fewer than 16 can be "
                f"guessed; make it with: head -c 32 /dev/urandom > {path}"
            )
    return hashlib.sha256(f"mtnlg_jax {purpose} ".encode() + secret).digest()


def noise_key(config: Config, fingerprints: dict[str, str]) -> np.ndarray:
    """Return the key of the noise, uint32 (2,), which is as much as JAX's generator takes.

    It follows the secret, the settings that decide the gradients, and the ``fingerprints`` of the
    data: if two runs had the same noise and other gradients, their difference would be without any.
    """
    run = json.dumps([changes.deciding(config), fingerprints], sort_keys=True)
    return np.frombuffer(secret_of(config, f"noise {run}")[:8], np.uint32)


# --- accounting


@functools.cache
def _library() -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp  # noqa: F401  # submodules, reached through the package
    except ImportError:
        raise ValueError(
            "differential privacy needs the package dp-accounting, which computes epsilon; run "
            "pip install 'mtnlg_jax[privacy]'"
        ) from None
    return dp_accounting


def event_of(parts: Iterable[Part]) -> Any:
    """Return ``parts`` as a DpEvent of dp_accounting."""
    library = _library()
    return library.ComposedDpEvent(
        [
            library.SelfComposedDpEvent(
                library.PoissonSampledDpEvent(
                    part.probability, library.GaussianDpEvent(part.noise)
                ),
                part.steps,
            )
            for part in parts
        ]
    )


def _accountant(kind: str, grid: float = _FINE) -> Any:
    library = _library()
    if kind == "rdp":
        return library.rdp.RdpAccountant()
    return library.pld.PLDAccountant(value_discretization_interval=grid)


def _grid(parts: Iterable[Part], grid: float) -> float:
    """Return the step of privacy losses: little noise makes them large, and a fine grid slow."""
    return grid * 10 if any(part.noise < _LITTLE_NOISE for part in parts) else grid


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the warnings about orders of Renyi divergences that the accountant skips."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def epsilon_of(
    parts: Sequence[Part], delta: float, accountant: str = "pld", grid: float = _FINE
) -> float:
    """Return epsilon after ``parts`` at ``delta``; inf where it is above LARGEST_EPSILON or cannot
    be computed.

    ``grid`` is the step of the privacy losses of "pld", ten times as large below a noise of 0.5.
    With a larger one epsilon is found faster and is never too low.
    """
    # The distribution of a huge loss would fill the memory. Its mean tells before, for a unit that
    # joins as often as it does in the mean, but once.
    mean = sum(
        max(1.0, part.steps * part.probability)
        * max(0.0, 0.5 / part.noise**2 + math.log(part.probability))
        for part in parts
    )
    if mean > 2 * LARGEST_EPSILON:
        return math.inf
    with _quiet():
        spent = _accountant(accountant, _grid(parts, grid))
        spent.compose(event_of(parts))
        found = float(spent.get_epsilon(delta))
    return found if found <= LARGEST_EPSILON else math.inf


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return ``parts`` with neighbors that are alike as one."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1][1:] == part[1:]:
            part = part._replace(steps=found.pop().steps + part.steps)
        if part.steps:
            found.append(part)
    return tuple(found)


class Ledger:
    """Epsilon and delta of a run after any of its steps; a pure function of the step."""

    def __init__(
        self, config: Config, parts: Sequence[Part], delta: float, units: int, begin: int = 0
    ):
        """``parts`` are those of all steps from ``begin`` on, of earlier starts as well. A run that
        starts with the parameters of a checkpoint begins at its step."""
        self.optimizer = config.optimizer
        self.parts = merged(parts)
        self.delta = delta
        self.units = units
        self.begin = begin
        self.steps = begin + sum(part.steps for part in self.parts)  # at the end
        self._live: dict[int, float] = {}
        self._exact: dict[int, float] = {}

    def until(self, done: int) -> tuple[Part, ...]:
        """Return the parts of the steps before ``done``."""
        found = []
        left = done - self.begin
        for part in self.parts:
            found.append(part._replace(steps=min(part.steps, left)))
            left -= found[-1].steps
        return merged(found)

    def epsilon(self, done: int) -> float:
        """Return epsilon after ``done`` steps at the delta of `total_delta`."""
        if done not in self._exact:
            kind = self.optimizer.dp_accountant
            self._exact[done] = epsilon_of(self.until(done), self.delta, kind)
        return self._exact[done]

    def total_delta(self, done: int, epsilon: float) -> float:
        """Return delta with the chance that a step had more units than its batch has room for.

        Left out, the rest would be another mechanism, at a distance of steps x OVERFLOW from this
        one on either of two neighbors.
        """
        return self.delta + (1 + math.exp(epsilon)) * (done - self.begin) * OVERFLOW

    def row(self, done: int) -> dict[str, float]:
        """Return the entries of metrics.jsonl after ``done`` steps: an upper bound, of up to 3 %
        more steps, so that few are computed."""
        wide = max(1, 2 ** (done.bit_length() - 1) // 32)
        ahead = min(-(-done // wide) * wide, self.steps)
        if ahead not in self._live:
            kind = self.optimizer.dp_accountant
            self._live[ahead] = epsilon_of(self.until(ahead), self.delta, kind, _COARSE)
        return {"epsilon": round(self._live[ahead], 4), "delta": self.delta}

    def meta(self, done: int) -> dict[str, Any]:
        """Return what the checkpoint of step ``done`` records, for `start`."""
        return {"parts": [list(part) for part in self.until(done)], "unit": self.optimizer.dp_unit}

    def report(self, done: int) -> dict[str, Any]:
        """Return the content of privacy.json after ``done`` steps."""
        epsilon = self.epsilon(done)
        parts = self.until(done)
        return describe.header("privacy", done, ("dp-accounting",)) | {
            "steps": done - self.begin,
            "epsilon": epsilon,
            "delta": self.total_delta(done, epsilon),
            "epsilon_at_end": self.epsilon(self.steps),
            "noise_multiplier": parts[-1].noise,
            "clip_norm": self.optimizer.dp_clip_norm,
            "sampling_probability": parts[-1].probability,
            "unit": self.optimizer.dp_unit,
            "units": self.units,
            "source_rows": self.optimizer.rows_of_unit,
            "accountant": self.optimizer.dp_accountant,
            "neighbors": "one unit more or less",
            "secret_noise": bool(self.optimizer.dp_secret),
            "parts": [part._asdict() for part in parts],
        }

    def write(self, workdir: str, done: int) -> None:
        """Write privacy.json into the run's folder, whole or not at all."""
        text = json.dumps(self.report(done), indent=1, sort_keys=True)
        storage.write_file(workdir, FILE, text.encode())

    def lines(self, done: int) -> list[str]:
        """Return the lines that are printed before the first step, of which ``done`` are done."""
        optimizer = self.optimizer
        begun = done > self.begin
        spent = f" ({self.epsilon(done):.2f} up to step {done:,})" if begun else ""
        end = self.parts[-1]
        lines = [
            f"  privacy epsilon {self.epsilon(self.steps):.3g} at delta {self.delta:.2g} after "
            f"{self.steps - self.begin:,} steps{spent}: noise {end.noise:.4g}, clip norm "
            f"{optimizer.dp_clip_norm:g}, each of {self.units:,} {optimizer.dp_unit}s joins a step "
            f"with probability {end.probability:.3g}"
        ]
        if not optimizer.dp_secret:
            lines.append(
                "          noise and samples follow from train.seed: before you release anything, "
                "give optimizer.dp_secret"
            )
        return lines


# --- at the start of a run


def refuse_known_data(config: Config, fingerprints: dict[str, str]) -> None:
    """Raise ValueError if the run of train.init has trained on data with these ``fingerprints``:
    what it saw of them would come without noise, or would not be counted."""
    init = config.train.init
    content = storage.read_file(init, "data.json") if init and config.optimizer.private else None
    # Models of other formats do not tell what they were trained on.
    known = [name for name, found in fingerprints.items() if found.encode() in (content or b"")]
    if known:
        raise ValueError(
            f"train.init={init} was trained on {', '.join(known)} of these data, so epsilon of "
            "this run alone would not hold for them; start from a model of other data"
        )


def start(
    config: Config, samplers: Sequence[PoissonSampler], meta: dict, first: int, samples: int
) -> tuple[Config, Ledger | None]:
    """Return ``config`` with its noise, and the ledger; None without differential privacy.

    ``samplers`` are those of the stages. The run goes on after ``first`` steps that read
    ``samples``, with the ``meta`` of their checkpoint.

    Raises ValueError if no finite epsilon can be computed, if the target is out of reach, or if a
    part of the run was or will be without differential privacy.
    """
    optimizer = config.optimizer
    history = _history(meta, optimizer, first if samples else 0)
    if not optimizer.private:
        return config, None
    if optimizer.dp_target_epsilon is not None and optimizer.dp_noise_multiplier:
        raise ValueError(
            f"optimizer.dp_noise_multiplier={optimizer.dp_noise_multiplier} and "
            f"optimizer.dp_target_epsilon={optimizer.dp_target_epsilon} are both set; keep one: "
            "the noise follows from the target"
        )
    units = max(sampler.units for sampler in samplers)
    delta = _delta(optimizer, units)
    planned = _planned(config, samplers, first, samples)
    noise = optimizer.dp_noise_multiplier
    if optimizer.dp_target_epsilon is not None:
        noise = _calibrated(optimizer, history, planned, delta)
        config = override(config, f"optimizer.dp_noise_multiplier={noise!r}")
    parts = [*history, *(part._replace(noise=noise) for part in planned)]
    begin = first - sum(part.steps for part in history)
    ledger = Ledger(config, parts, delta, units, begin)
    if not math.isfinite(ledger.epsilon(ledger.steps)):
        raise ValueError(
            f"no epsilon up to {LARGEST_EPSILON:g} can be computed for "
            f"optimizer.dp_noise_multiplier={noise:g}, {ledger.steps:,} steps and delta "
            f"{delta:.3g}; raise the noise (0.5 to 2 is usual) or optimizer.dp_delta, or lower "
            "train.steps or train.global_batch_size"
        )
    return config, ledger


def _history(meta: dict, optimizer: Any, first: int) -> tuple[Part, ...]:
    """Return the parts of the ``first`` steps, which the checkpoint records."""
    before = meta.get("privacy")
    if not first:
        return ()
    if optimizer.private and before is None:
        raise ValueError(
            f"the {first:,} steps of this run so far had no differential privacy, so no epsilon "
            "can be computed for it; give another --workdir"
        )
    if before is not None and not optimizer.private:
        raise ValueError(
            f"the {first:,} steps of this run so far had differential privacy, which any step "
            "without it would end; set optimizer.dp_noise_multiplier again, or give another "
            "--workdir with --init of this run"
        )
    if before is None:
        return ()
    if before["unit"] != optimizer.dp_unit:
        raise ValueError(
            f"optimizer.dp_unit was {before['unit']} up to step {first:,} and is "
            f"{optimizer.dp_unit}: guarantees of different units do not add up; give the same, or "
            "another --workdir"
        )
    return tuple(Part(*part) for part in before["parts"])


def _delta(optimizer: Any, units: int) -> float:
    if units < 2:
        raise ValueError(
            f"the data have {units} unit of privacy (optimizer.dp_unit={optimizer.dp_unit}), and "
            "one among others is to be protected; give more sources, or "
            "optimizer.dp_unit=example"
        )
    delta = units**-1.1 if optimizer.dp_delta is None else optimizer.dp_delta
    if delta >= 1 / units:
        raise ValueError(
            f"optimizer.dp_delta={delta} is 1 / {units:,} units or more, which allows a run to "
            f"publish one of them; set it below {1 / units:.2g}, or leave it out "
            f"({units**-1.1:.2g})"
        )
    return delta


def _planned(
    config: Config, samplers: Sequence[PoissonSampler], first: int, samples: int
) -> tuple[Part, ...]:
    """Return the parts of the steps to come, with noise 0: stages and a batch ramp change them."""
    train = config.train
    probability = functools.cache(
        lambda number, rows: samplers[number].probability(rows / config.optimizer.rows_of_unit)
    )
    parts = []
    for step in range(first, train.steps):
        rows = batch_size_at(train, samples)
        samples += rows
        parts.append(Part(1, probability(stage_at(train, step)[0], rows), 0.0))
    return merged(parts)


def _calibrated(
    optimizer: Any, history: Sequence[Part], planned: Sequence[Part], delta: float
) -> float:
    """Return the least noise with which the run ends at dp_target_epsilon or below."""
    library = _library()
    target = optimizer.dp_target_epsilon
    kind = optimizer.dp_accountant

    def parts(noise):
        return merged([*history, *(part._replace(noise=noise) for part in planned)])

    spent = epsilon_of(history, delta, kind, _COARSE) if history else 0.0
    if not planned:
        return history[-1].noise
    # A run that resumes as planned keeps its noise to the last bit.
    if history and epsilon_of(parts(history[-1].noise), delta, kind, _COARSE) <= target:
        return history[-1].noise
    if spent >= target:
        raise ValueError(
            f"optimizer.dp_target_epsilon={target} is spent: {spent:.4g} after "
            f"{sum(part.steps for part in history):,} steps; raise it, or stop here"
        )
    low = high = 1.0
    while epsilon_of(parts(high), delta, kind, _COARSE) > target:
        high *= 2
        if high > 1e6:
            raise ValueError(
                f"optimizer.dp_target_epsilon={target} at delta {delta:.3g} is out of reach with "
                "any noise; raise it or optimizer.dp_delta, or lower train.steps or "
                "train.global_batch_size"
            )
    while epsilon_of(parts(low), delta, kind, _COARSE) <= target:
        low /= 2
        if low < _LEAST_NOISE:
            return low  # so large a target asks for no more
    with _quiet():
        return float(
            library.calibrate_dp_mechanism(
                lambda: _accountant(kind, _grid(parts(low), _COARSE)),
                lambda noise: event_of(parts(noise)),
                target,
                delta,
                library.ExplicitBracketInterval(low, high),
                tol=1e-5,
            )
        )

"""The figures of a certificate: relative differences, each with its tolerance and the reason."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from mtnlg_jax.config import Config

# Share of the largest of all gradients below which a tensor is not measured by its own largest.
# The gradients of key biases, for example, are 0 but for rounding: the softmax takes them out. The
# terms that cancel there are rounded more coarsely in bfloat16.
_FLOOR = 0.01
_COARSE_FLOOR = 0.1
EXACT = 0.0
_FLOAT32 = 2e-6
_FLOAT32_LAYERS = 4  # up to which _FLOAT32 holds; rounding errors add up like a random walk
# Of Muon: the first coefficient of Newton-Schulz, once for each of five steps.
_NEWTON_SCHULZ = 3.4445**5 * 2.0**-24
# Of SOAP, whose bases have directions with small gradients.
_TURNED = 2.0**-24 / 1e-4
_NEXT_STEPS = 1e-5
# Of a rounding to bfloat16, relative: at most, and in the root mean square over all numbers.
_LARGEST_ROUNDING = 2.0**-8
_USUAL_ROUNDING = 2.0**-9
_MARGIN = 3
# Of experts in bfloat16: a few tokens of the hundreds of each expert visit another one; where an
# expert has few tokens, two of them.
_CHANGED_CHOICES = 0.05
_MOVED_TOKENS = 0.1
_MOVED_OF_EXPERT = 2
# Distance of neighbors, relative to the largest number of a tensor, in moments of each type. They
# are rounded at random: a difference in the last bit of a gradient may choose the other neighbor.
# int8: the highest decade of the dynamic map has 64 codes, and of second moments 128 for the roots.
_SPACING = {"float32": 0.0, "bfloat16": 2.0**-7, "int8": 0.9 / 64}
# Roundings of a layer on the way of a gradient: eight values forward and eight backward.
_ROUNDINGS = 16

LOSS = "loss"
GRADIENT = "gradient"
UPDATE = "update"
PARAMETERS = "parameters after"
AVERAGES = "averages after"
RESTORED = "restored"
NEXT = "next losses"
NORMS = "next gradient norms"
MOMENTS = "optimizer after them"
LOADS = "tokens of experts"
EXCHANGE = "Hugging Face and back"
PLAN = "plan"


Dtype = Literal["bfloat16", "float32"]


class Types(NamedTuple):
    """Types of one computation."""

    name: str
    compute: Dtype  # train.compute_dtype
    reduce: Dtype  # train.reduce_dtype


STRICT = Types("float32", "float32", "float32")


def types_of(config: Config) -> list[Types]:
    """Return float32, and the types of ``config`` where they are others."""
    train = config.train
    name: str = train.compute_dtype
    if train.reduce_dtype != "float32":
        name += f", sums {train.reduce_dtype}"
    own = Types(name, train.compute_dtype, train.reduce_dtype)
    return [STRICT] if own[1:] == STRICT[1:] else [STRICT, own]


@dataclass(frozen=True)
class Figure:
    """One line of a certificate."""

    check: str  # LOSS, GRADIENT and so on
    name: str  # the tensor, or what was compared
    mesh: str
    objective: str
    types: str
    difference: float | None  # relative; None where nothing was computed
    tolerance: float
    problem: str = ""  # why there is no difference, or what is wrong

    @property
    def within(self) -> bool:
        """Whether the difference is within the tolerance; a NaN is not."""
        return self.difference is not None and self.difference <= self.tolerance


@dataclass(frozen=True)
class Tolerance:
    """The limit of a kind of figure, and the reason for it."""

    value: float
    why: str


def tolerance_of(check: str, types: Types, config: Config, devices: int) -> Tolerance:
    """Return the tolerance of ``check`` in ``types`` for the small ``config``."""
    if check in (RESTORED, EXCHANGE, PLAN):
        return Tolerance(EXACT, "numbers are copied and not computed, so every bit is the same")
    spacing = _SPACING[config.optimizer.moments_dtype]
    if check == MOMENTS and spacing:
        # Two steps after the checkpoint, each at most one neighbor away.
        exact = dataclasses.replace(config.optimizer, moments_dtype="float32")
        rest = tolerance_of(check, types, dataclasses.replace(config, optimizer=exact), devices)
        return Tolerance(
            rest.value + 2 * spacing,
            f"{rest.why}; and two roundings of optimizer.moments_dtype="
            f"{config.optimizer.moments_dtype}, which may go to the other neighbor",
        )
    if check in (UPDATE, PARAMETERS, AVERAGES):
        return _of_update(config)
    layers = config.model.num_layers
    if check == LOADS and types.compute == "float32":
        return Tolerance(EXACT, "counts are whole numbers, and every token visits the same experts")
    if types == STRICT:
        if check in (NEXT, NORMS, MOMENTS):
            return Tolerance(
                _NEXT_STEPS,
                "updates divide by the root of the second moment, which amplifies the rounding of "
                "small gradients; the limit of tests/train/test_other_mesh.py",
            )
        depth = max(1.0, math.sqrt(layers / _FLOAT32_LAYERS))
        return Tolerance(
            _FLOAT32 * depth,
            "sums in another order round differently, by 2^-24 a number; 2e-6 is the limit of "
            f"tests/train/test_step.py, times sqrt(layers / {_FLOAT32_LAYERS}) in deeper models",
        )
    if check in (LOSS, NEXT):
        return Tolerance(
            _LARGEST_ROUNDING,
            "a mean over the tokens of a batch, whose roundings mostly cancel: one of 2^-8 is left",
        )
    moved = _MOVED_OF_EXPERT / _tokens_of_expert(config)
    if check == LOADS:
        return Tolerance(
            max(_CHANGED_CHOICES, moved),
            "tokens whose experts have equal scores within a rounding may visit others: 5 % of the "
            f"largest load, or {_MOVED_OF_EXPERT} of the {_tokens_of_expert(config):g} of an "
            "expert where that is more",
        )
    roundings = _ROUNDINGS * layers if types.compute == "bfloat16" else 0
    if types.reduce == "bfloat16":
        roundings += 1 + math.ceil(math.log2(devices))
    more = ""
    value = _MARGIN * _USUAL_ROUNDING * math.sqrt(roundings)
    # Sums in bfloat16 alone move no token before they have changed the parameters.
    if config.model.moe.num_moe_experts and (types.compute == "bfloat16" or check != GRADIENT):
        moved = max(_MOVED_TOKENS, moved)
        value += moved
        more = (
            f"; and {moved:.2g}, as a token that visits another expert moves its gradient: "
            f"{_MOVED_OF_EXPERT} of the {_tokens_of_expert(config):g} of an expert, and at least "
            f"{_MOVED_TOKENS}"
        )
    if check == MOMENTS:
        value *= 2
        more += "; twice, as second moments are squares"
    return Tolerance(
        value,
        f"{roundings} roundings to bfloat16 on the way of a gradient ({_ROUNDINGS} a layer where "
        "products are bfloat16; one for each doubling of the devices where sums are), 2^-9 each in "
        "the root mean square, add up to 2^-9 times their root; three times that, for the largest "
        f"of many numbers{more}",
    )


def _tokens_of_expert(config: Config) -> float:
    """Return the tokens that visit an expert in the mean, of the smallest batch."""
    ramp = config.train.rampup_batch_size
    rows = ramp[0] if ramp else config.train.global_batch_size
    moe = config.model.moe
    visits = rows * config.sequence_length * moe.moe_router_topk
    return visits / max(moe.num_moe_experts, 1)


def _of_update(config: Config) -> Tolerance:
    """Return the tolerance of what a step does with the same gradients and the same state."""
    why = (
        "of the same gradients and state the norms of the clips alone are sums in another order; "
        "2e-6 is 32 roundings of 2^-24"
    )
    name = config.optimizer.name
    if name == "muon":
        return Tolerance(
            _FLOAT32 + _NEWTON_SCHULZ,
            f"{why}; and 3.4445^5 of them, the factor of small singular values in the five steps "
            "of Newton-Schulz",
        )
    if name == "soap":
        return Tolerance(
            _FLOAT32 + _TURNED,
            f"{why}; and 2^-24 / 1e-4, as a turned gradient is rounded by 2^-24 of its largest "
            "number, and divided by the roots of its squares, of which those below 1e-4 of the "
            "largest hardly occur",
        )
    return Tolerance(_FLOAT32, why)


def loss_difference(got: float, wanted: float) -> float:
    """Return the relative difference of two numbers."""
    return abs(got - wanted) / max(abs(wanted), 1e-30)


def tensor_differences(
    got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], types: Types
) -> dict[str, float]:
    """Return the largest difference of each tensor, relative to the largest number of that tensor,
    or to a share of the largest of all where that is more: 1 % in float32, else 10 %."""
    floor = _FLOOR if types == STRICT else _COARSE_FLOOR
    largest = max((_largest(each) for each in wanted.values()), default=0.0)
    least = floor * largest
    return {name: largest_relative(got[name], array, least) for name, array in wanted.items()}


def largest_relative(got: np.ndarray, wanted: np.ndarray, least: float = 0.0) -> float:
    """Return the largest difference, relative to the largest number of ``wanted`` or to ``least``,
    whichever is more."""
    error = np.asarray(got, np.float64) - np.asarray(wanted, np.float64)
    return _largest(error) / max(_largest(wanted), least, 1e-30)


def _largest(array: np.ndarray) -> float:
    # A NaN stays one: it is within no tolerance.
    return float(np.max(np.abs(array), initial=0.0))


def differing_bits(got: np.ndarray, wanted: np.ndarray) -> float:
    """Return 0 where two arrays are the same bit for bit, else their largest relative difference,
    at least the smallest number above 0."""
    got = np.asarray(got)
    wanted = np.asarray(wanted)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return math.inf
    if got.tobytes() == wanted.tobytes():
        return 0.0
    return max(largest_relative(got, wanted), float(np.nextafter(0, 1)))

"""Predict the seconds of a compiled train step, its MFU, and what it waits for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mtnlg_jax.config import Config
from mtnlg_jax.hardware import CHIPS, Chip, flops_per_token
from mtnlg_jax.planning.cycles import is_estimated
from mtnlg_jax.planning.gpu_costs import GpuCosts
from mtnlg_jax.planning.hlo import Program
from mtnlg_jax.planning.kernel_cycles import profile
from mtnlg_jax.planning.source_lines import SourceLines
from mtnlg_jax.planning.span import largest_first
from mtnlg_jax.planning.timeline import Timeline
from mtnlg_jax.planning.topology import Topology, check_slice, wrapped
from mtnlg_jax.planning.torus import Torus
from mtnlg_jax.planning.tpu_costs import RULES, TpuCosts
from mtnlg_jax.train import lora

WORST = 5  # waits that a prediction keeps
# The best MFU that benchmarks/calibration.py holds predictions against, by kind of chip. Above it
# nothing is known of the error.
BEST_PUBLISHED = {"v5p": 0.7147, "v5e": 0.6686, "v6e": 0.5033}

Costs = TpuCosts | GpuCosts


@dataclasses.dataclass
class Prediction:
    """Seconds and FLOPs are those of one step on one device."""

    rules: int  # version of the rules of simulation (tpu_costs.RULES)
    seconds: float
    tokens_per_second: float  # of all devices
    mfu: float  # model FLOPs (PaLM's count) over the peak
    hfu: float  # FLOPs that are computed over the peak
    classes: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, longest first
    flops: dict[str, float] = dataclasses.field(default_factory=dict)  # of products, by class
    # [label, source, seconds, runs, bytes of the operands in one run], longest first
    waits: list = dataclasses.field(default_factory=list)
    assumed_kernels: list = dataclasses.field(default_factory=list)  # kernels without an estimate
    unknown: list = dataclasses.field(default_factory=list)  # instructions counted as no time


def is_beyond(kind: str, mfu: float) -> bool:
    """Return whether no published step of chips of this kind reaches ``mfu``."""
    return mfu > BEST_PUBLISHED.get(kind, 1.0)


def check(topology: Topology, step: str, flag: str = "--time") -> None:
    """Raise ValueError if ``step`` on ``topology`` cannot be predicted; ``flag`` asks for it."""
    if step != "train":
        raise ValueError(
            f"--time predicts train steps, not --step={step}; leave --time or --step out"
        )
    chip_of(topology, flag)
    check_slice(topology)


def chip_of(topology: Topology, flag: str = "--time") -> Chip:
    """Return the figures of a topology's chips. Raises ValueError if a TPU lacks clock or links, or
    if there are none."""
    known = {
        ("A100" if name == "A100-80" else name): chip
        for name, chip in CHIPS.items()
        if not chip.tpu or (chip.clock and chip.link)
    }
    if topology.kind not in known:
        raise ValueError(
            f"{flag}: there are no figures of the clock and the links of {topology.kind}; "
            f"leave {flag} out, or choose one of {', '.join(known)}"
        )
    return known[topology.kind]


def torus_between(topology: Topology, places: Sequence[Sequence[int]], chip: Chip) -> Torus:
    """Describe the links between devices at ``places`` of the slice, in the order of the mesh."""
    dims = len(topology.dims)
    return Torus(
        tuple(tuple(place[:dims]) for place in places),
        topology.dims,
        wrapped(topology)[:dims],
        chip.link,
        chip.slow,
    )


def simulate(
    text: str,
    topology: Topology,
    places: Sequence[Sequence[int]],
    mesh: Mapping[str, int],
    dynamic_trips: Callable[[int], float],
    causal: bool = True,
    profiled: bool = True,
) -> tuple[Timeline, Costs]:
    """Simulate the compiled program ``text``.

    Args:
      places: those of the devices in a TPU slice, in the order of the mesh.
      causal: whether attention is.
      profiled: whether attention kernels may be compiled alone: their mask is known then.

    Raises ValueError if the TPU compiler wrote no estimates."""
    chip = chip_of(topology)
    if chip.tpu and not is_estimated(text):
        raise ValueError(
            f"--time: the compiler for {topology.kind} wrote no estimates of cycles into the "
            "program; leave --time out"
        )
    program = Program(text)
    costs: Costs
    if chip.tpu:
        links = torus_between(topology, places, chip)
        kernels = profile(program, topology, causal) if profiled else {}
        costs = TpuCosts(chip, links, kernels)
    else:
        costs = GpuCosts(chip, topology.dims[-1])
    return Timeline(program, mesh, costs, dynamic_trips, SourceLines(text)), costs


def predict(config: Config, timeline: Timeline, costs: Costs, devices: int) -> Prediction:
    """Sum up a simulated train step of the whole batch."""
    step = timeline.step
    peak = costs.chip.flops * step.seconds
    tokens = config.train.global_batch_size * config.sequence_length
    each = flops_per_token(config.model, config.sequence_length, frozen=lora.used(config))
    model_flops = tokens * each / devices
    real = [wait for wait in step.waits.values() if wait.seconds > 0]
    waits = sorted(real, key=lambda wait: -wait.seconds)[:WORST]
    return Prediction(
        rules=RULES,
        seconds=step.seconds,
        tokens_per_second=tokens / step.seconds,
        mfu=model_flops / peak,
        hfu=sum(step.flops.values()) / peak,
        classes=largest_first(step.classes),
        flops={label: flops for label, flops in largest_first(step.flops).items() if flops},
        waits=[
            [wait.label, wait.source, wait.seconds, wait.count, wait.bytes / wait.count]
            for wait in waits
        ],
        assumed_kernels=sorted(costs.assumed),
        unknown=sorted(costs.unknown),
    )

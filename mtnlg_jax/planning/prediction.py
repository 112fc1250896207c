"""Predict the seconds of a compiled train step, its MFU, and what it waits for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mtnlg_jax.config import Config
from mtnlg_jax.hardware import CHIPS, Chip, flops_per_token
from mtnlg_jax.planning import tpu_costs
from mtnlg_jax.planning.hlo import Program
from mtnlg_jax.planning.kernel_cycles import profile
from mtnlg_jax.planning.source_lines import SourceLines
from mtnlg_jax.planning.timeline import Timeline
from mtnlg_jax.planning.topology import Topology, wrapped
from mtnlg_jax.planning.torus import Torus

WORST = 5  # waits that a prediction keeps


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


def check(topology: Topology, step: str) -> None:
    """Raise ValueError if ``step`` on ``topology`` cannot be predicted."""
    if step != "train":
        raise ValueError(
            f"--time predicts train steps, not --step={step}; leave --time or --step out"
        )
    chip_of(topology)


def chip_of(topology: Topology) -> Chip:
    """Return the figures of a topology's chips. Raises ValueError if they lack clock or links."""
    chip = CHIPS.get(topology.kind)
    if chip is None or not chip.clock or not chip.link:
        known = ", ".join(name for name, each in CHIPS.items() if each.clock and each.link)
        raise ValueError(
            f"--time: there are no figures of the clock and the links of {topology.kind}; "
            f"leave --time out, or choose one of {known}"
        )
    return chip


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
) -> tuple[Timeline, tpu_costs.TpuCosts]:
    """Simulate the compiled program ``text``; ``places`` are those of the devices in the slice, in
    the order of the mesh. Raises ValueError if the compiler wrote no estimates."""
    if '"estimated_cycles"' not in text:
        raise ValueError(
            f"--time: the compiler for {topology.kind} wrote no estimates of cycles into the "
            "program; leave --time out"
        )
    chip = chip_of(topology)
    program = Program(text)
    kernels = profile(program, topology, causal)
    costs = tpu_costs.TpuCosts(chip, torus_between(topology, places, chip), kernels)
    timeline = Timeline(program, mesh, costs, dynamic_trips, SourceLines(text))
    return timeline, costs


def predict(
    config: Config, timeline: Timeline, costs: tpu_costs.TpuCosts, devices: int
) -> Prediction:
    """Sum up a simulated train step of the whole batch."""
    step = timeline.step
    peak = costs.chip.flops * step.seconds
    tokens = config.train.global_batch_size * config.sequence_length
    model_flops = tokens * flops_per_token(config.model, config.sequence_length) / devices
    waits = sorted(step.waits.values(), key=lambda wait: -wait.seconds)[:WORST]
    return Prediction(
        rules=tpu_costs.RULES,
        seconds=step.seconds,
        tokens_per_second=tokens / step.seconds,
        mfu=model_flops / peak,
        hfu=sum(step.flops.values()) / peak,
        classes=dict(step.classes.most_common()),
        flops={label: flops for label, flops in step.flops.most_common() if flops},
        waits=[
            [wait.label, wait.source, wait.seconds, wait.count, wait.bytes / wait.count]
            for wait in waits
        ],
        assumed_kernels=sorted(costs.assumed),
        unknown=sorted(costs.unknown),
    )

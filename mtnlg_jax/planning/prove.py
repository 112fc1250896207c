"""Compile the fastest layouts of the planner, and rank them by their predicted seconds."""

from collections.abc import Iterator

from mtnlg_jax.hardware import size_of
from mtnlg_jax.planning import prediction
from mtnlg_jax.planning.aot import Measurement, measure
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.estimate import Estimate
from mtnlg_jax.planning.search import flags_of, with_layout
from mtnlg_jax.planning.text import columns, duration
from mtnlg_jax.planning.topology import Topology, parse, slice_of

CARDS = 8  # GPUs of a node
_HEADER = ("", "by sums", "predicted", "MFU", "HFU", "peak", "longest wait")


def topology_of(name: str, number: int) -> Topology:
    """Return the slice of ``number`` chips ``name`` (a key of hardware.CHIPS), or nodes of 8 GPUs.

    Raises ValueError if no slice has as many chips, or nothing can be predicted for them.
    """
    kind = name.removesuffix("-80")
    if name.startswith(("A", "H", "B")):
        if number > CARDS and number % CARDS:
            raise ValueError(
                f"--prove: {number} {name} are no whole nodes of {CARDS}; choose a multiple of it"
            )
        cards = min(number, CARDS)
        found = Topology(kind, (number // cards, cards))
    else:
        found = slice_of({"TPU7x": "tpu7x"}.get(name, name), number)
    prediction.check(found, "train", "--prove")
    return found


def proofs(job: Job, topology: Topology, found: list[Estimate], count: int) -> Iterator[str]:
    """Compile the ``count`` fastest layouts of ``job`` that leave no device idle; ``found``: by
    `search`. Yield a line for each, then the table, fastest first, and the flags of the first."""
    devices = topology.chips
    on_all = [each for each in found if each.layout.devices == devices]
    if not on_all:
        yield f"no layout uses all of {devices:,} devices, so none is compiled"
        return
    proven = []
    for rank, estimate in enumerate(on_all[:count], 1):
        config = with_layout(job.config, estimate.layout)
        measurement = measure(config, topology, predict=True)
        predicted = measurement.predicted
        if predicted is None:
            yield f"layout {rank}: {(measurement.failure or measurement.not_predicted)[:200]}"
            continue
        proven.append((rank, estimate, measurement, predicted))
        by_sums = duration(estimate.step_seconds)
        yield f"layout {rank}: {by_sums} a step by sums, {duration(predicted.seconds)} predicted"
    if not proven:
        yield "no layout on all devices compiled; --prove=N with a larger N tries more"
        return
    proven.sort(key=lambda each: each[3].seconds)
    yield ""
    yield columns([_HEADER, *(_cells(*each) for each in proven)], left=0)
    rank, estimate, *_ = proven[0]
    yield f"\nfastest by prediction: {rank}: {' '.join(flags_of(job.config, estimate.layout))}"
    yield "a difference within the error of the predictions (docs/predicted_step.md) is a tie"


def _cells(
    rank: int,
    estimate: Estimate,
    measurement: Measurement,
    predicted: prediction.Prediction,
) -> tuple[str, ...]:
    beyond = prediction.is_beyond(parse(measurement.topology).kind, predicted.mfu)
    label, source, seconds, *_ = predicted.waits[0] if predicted.waits else ("none", "", 0.0)
    return (
        str(rank),
        duration(estimate.step_seconds),
        duration(predicted.seconds),
        f"({predicted.mfu:.1%})" if beyond else f"{predicted.mfu:.1%}",
        f"{predicted.hfu:.1%}",
        size_of(measurement.peak),
        f"{duration(seconds)} {label} {source}".rstrip(),
    )

"""Suggest changes if a step does not fit: ranked by arithmetic, verified by compiling."""

import dataclasses
import math
from collections.abc import Iterator

from mtnlg_jax.config import Config, override, validate, validate_batch
from mtnlg_jax.hardware import size_of
from mtnlg_jax.parallel.mesh import mesh_shape, row_shards
from mtnlg_jax.planning.aot import Measurement, measure
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import layout_of
from mtnlg_jax.planning.report import largest_tensors
from mtnlg_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Change:
    flags: tuple[str, ...]  # to add to the command line; one change of layout may need two
    config: Config
    topology: Topology
    predicted: int  # bytes a device


# A change is worth compiling if it is predicted to need up to this share of the memory.
MARGIN = 1.1


def estimate(config: Config, devices: int, step: str) -> dict[str, float]:
    """Return the bytes of a step on a device by content; for a train step as the planner counts
    them."""
    if step == "train":
        return Job(config, None).memory(layout_of(config, devices))
    model = config.model
    train = config.train
    sizes = mesh_shape(config.mesh, devices)
    size = 2 if train.compute_dtype == "bfloat16" else 4
    rows = train.micro_batch_size or 1
    cache = 2 * model.num_layers * rows * config.sequence_length * model.kv_heads * model.head_width
    return {
        "weights": size * model.parameter_count() / sizes["tensor"],
        "cache": size * cache / sizes["tensor"],
    }


def suggest(
    config: Config, topology: Topology, devices: int, needed: int, limit: int, step: str
) -> list[Change]:
    """Return changes that are predicted to fit, the least intrusive first. The prediction scales
    the measured need by the ratio of the estimates."""
    base = sum(estimate(config, devices, step).values())
    found = []
    for flags, larger in _candidates(config, topology, devices, step):
        grown = larger or topology
        try:
            changed = override(
                config,
                *(flag.removeprefix("--set=") for flag in flags if flag.startswith("--set=")),
            )
            model = changed.model.padded(changed.mesh.tensor)
            changed = dataclasses.replace(changed, model=model)
            validate(changed)
            count = devices * grown.chips // topology.chips
            rows = row_shards(mesh_shape(changed.mesh, count))
            validate_batch(changed, rows)
            if changed.mesh.zero and changed.model.hidden_size % rows:
                continue
            predicted = int(needed * sum(estimate(changed, count, step).values()) / base)
        except ValueError:  # not a valid config
            continue
        if predicted <= MARGIN * limit:
            found.append(Change(flags, changed, grown, predicted))
    return found


def _candidates(config: Config, topology: Topology, devices: int, step: str):
    """Yield (flags, larger topology or None)."""
    mesh = config.mesh
    train = config.train

    def of(*values):
        return tuple(f"--set={value}" for value in values), None

    if step == "train":
        shards = row_shards(mesh_shape(mesh, devices))
        rows = train.micro_batch_size or train.global_batch_size // shards
        smaller = [rows // 2**n for n in range(1, rows.bit_length()) if rows % 2**n == 0]
        yield from (of(f"train.micro_batch_size={size}") for size in smaller)
        if train.recompute != "full":
            yield of("train.recompute=full")
        if mesh.pipe > 1 and mesh.schedule != "1f1b":
            yield of(
                "mesh.schedule=1f1b", *(["mesh.virtual_pipe=1"] if mesh.virtual_pipe > 1 else [])
            )
        # In a pipeline ZeRO-3 would gather a stage's weights for every micro-batch.
        yield from (
            of(f"mesh.zero={zero}")
            for zero in ((1, 3) if mesh.pipe == 1 else (1,))
            if mesh.zero < zero
        )
        if train.offload != "both":
            parts = ("moments", "both") if train.offload == "none" else ("both",)
            yield from (of(f"train.offload={part}") for part in parts)
        if config.optimizer.moments_dtype == "float32":
            yield of("optimizer.moments_dtype=bfloat16")
    if step == "train" and config.model.moe.num_moe_experts:
        yield from (of(f"mesh.expert={mesh.expert * n}", "mesh.data=-1") for n in (2, 4, 8))
    for factor in (2, 4, 8):
        yield of(f"mesh.tensor={mesh.tensor * factor}", "mesh.data=-1")
    if step == "train":
        for pipe in range(2, config.model.num_layers + 1):
            if mesh.pipe == 1 and config.model.num_layers % pipe == 0 and not devices % pipe:
                yield of(
                    f"mesh.pipe={pipe}",
                    "mesh.data=-1",
                    f"train.micro_batch_size={train.micro_batch_size or 1}",
                )
    for factor in (2, 4, 8, 16):
        larger = _grown(topology, factor)
        yield (f"--topology={larger}", "--set=mesh.data=-1"), larger


def _grown(topology: Topology, factor: int) -> Topology:
    """Multiply the chips by ``factor``, a power of two: a torus grows along its shortest sides, v5e
    and v6e beyond 16x16 in slices, GPUs in hosts."""
    dims = list(topology.dims)
    slices = topology.slices
    for _ in range(int(math.log2(factor))):
        shortest = dims.index(min(dims)) if topology.platform == "tpu" else 0
        if len(dims) == 2 and topology.platform == "tpu" and dims[shortest] >= 16:
            slices *= 2
        else:
            dims[shortest] *= 2
    return dataclasses.replace(topology, dims=tuple(dims), slices=slices)


def way_out(
    config: Config,
    topology: Topology,
    found: Measurement,
    target_config: str | None,
    memory: int | None,
    prove: int,
    flags: bool = True,
) -> Iterator[str]:
    """Yield lines on what fills the memory and which single change makes room. At most ``prove``
    changes are compiled, until one fits. ``flags`` as in ``measure``."""
    needed = found.most
    if found.failure and topology.platform == "tpu":
        # The compiler gave up before it placed any tensor. The same step for the same number of
        # devices with more memory differs in its kernels and little else.
        roomy = _roomy(found.devices)
        stand_in = None
        if roomy and topology.kind != roomy.kind:
            stand_in = measure(config, roomy, found.step, flags=flags)
        if stand_in and not stand_in.failure:
            needed = stand_in.peak
            peak = size_of(needed)
            yield f"to blame     on {roomy}, where it compiles, the step's peak is {peak} a device"
            yield from largest_tensors(stand_in)
    limit = found.limit
    if not limit or not needed:
        yield "way out      none is known: the compiler reported neither need nor limit"
        return
    parts = sorted(estimate(config, found.devices, found.step).items(), key=lambda part: -part[1])
    yield (
        "by sums      " + ", ".join(f"{name} {size_of(size)}" for name, size in parts) + " a device"
    )
    changes = suggest(config, topology, found.devices, needed, limit, found.step)
    for change in changes[:prove]:
        proof = measure(
            change.config, change.topology, found.step, target_config, memory, flags=flags
        )
        said = " ".join(change.flags)
        if proof.fits:
            yield (
                f"way out      {said}: compiled, FITS with a peak of {size_of(proof.peak)} of "
                f"{size_of(proof.limit or 0)} a device"
            )
            return
        result = f"{size_of(proof.most)} a device, still too much"
        if proof.failure and not proof.needed:
            result = proof.failure[:120]
        yield f"tried        {said}: {result} ({size_of(change.predicted)} expected)"
    for change in changes[prove : prove + 1]:
        expected = f"{size_of(change.predicted)} a device expected, not compiled"
        yield f"perhaps      {' '.join(change.flags)}: {expected}"
    if len(changes) <= prove:
        yield (
            "way out      no single change is known to fit; take more devices and change the "
            "layout as well"
        )


def _roomy(devices: int) -> Topology | None:
    """Return a v5p topology of ``devices`` chips in an existing shape: the first two sizes even."""
    if devices % 4:
        return None
    left = devices // 4
    first = max((n for n in range(1, left + 1) if left % n == 0 and n**3 <= left), default=1)
    left //= first
    second = max(n for n in range(1, left + 1) if left % n == 0 and n * n <= 2 * left)
    return Topology("v5p", (2 * first, 2 * second, left // second))

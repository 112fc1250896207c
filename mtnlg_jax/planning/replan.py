"""Choose the mesh of a run whose machines have become fewer: the fastest by the planner's estimate
that takes the same batch, on whole nodes."""

import dataclasses
import json
import math

from mtnlg_jax import storage
from mtnlg_jax.config import Config, validate_batch
from mtnlg_jax.hardware import CHIPS, Chip, size_of
from mtnlg_jax.parallel.mesh import AXES, described
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import Layout, layout_of
from mtnlg_jax.planning.search import flags_of, lean_layouts, search, smallest_devices

# Ranks meshes of devices whose kind is not known, such as those of a CPU; of their memory is known
# that the mesh of the config fits.
NOMINAL = "H100"
# Of a run that has not begun, as launch/plan.py takes: GPT-2's, padded for any mesh.tensor.
VOCABULARY = 51200
TRIES = 16  # numbers of devices that are searched for one that would do
SHOWN = 4  # of those that would do


def vocabulary_of(workdir: str | None) -> int | None:
    """Return the size of the vocabulary that the run in ``workdir`` has recorded, if any."""
    text = storage.read_file(workdir, "config.json") if workdir else None
    return json.loads(text)["model"]["vocab_size"] if text else None


def replan(
    config: Config, devices: int, node: int, kind: str | None, whole: int | None = None
) -> tuple[int, Layout, str]:
    """Return (nodes, layout, a note on its memory or ""): the most nodes of ``node`` devices each,
    of ``devices`` in all, that a mesh can fill, and the fastest one on them.

    ``kind`` is one of `hardware.CHIPS`, whose memory the run must fit. Without it, a mesh may take
    what that of the config takes on a device where the run has all of its devices, ``whole``
    (default: ``devices``); where none does, it is the leanest mesh. Raise ValueError where no
    number of nodes has a mesh, with the numbers of devices that would do.
    """
    job = Job(config, chip_of(kind))
    own = None
    if kind is None:
        own = _own_bytes(job, whole or devices)
        job.room = own or 0
    for nodes in range(devices // node, 0, -1):
        if layout := _best(job, nodes * node):
            return nodes, layout, ""
    if kind is None:
        job.room = math.inf
        for nodes in range(devices // node, 0, -1):
            if layout := _leanest(job, nodes * node):
                return nodes, layout, _note(job, layout, own)
    what = f"{kind} chips" if kind else "devices"
    enough = _that_would_do(job, devices, node)
    where = (
        f"in nodes of {node:,}" if any(each % node == 0 for each in enough) else "in other nodes"
    )
    numbers = ", ".join(f"{each:,}" for each in enough)
    every = config.train.verify_every
    compared = f" and the replicas of train.verify_every={every:,}" if every else ""
    raise ValueError(
        f"no mesh of {devices:,} {what} in nodes of {node:,} takes train.global_batch_size="
        f"{config.train.global_batch_size:,}{compared} of {config.name}; "
        + (f"{numbers} of them would do, {where}" if enough else "more of them would not do either")
    )


def chip_of(kind: str | None) -> Chip:
    """Return the chip ``kind``, or one without a limit of memory."""
    if kind is None:
        return dataclasses.replace(CHIPS[NOMINAL], memory=math.inf)
    if kind not in CHIPS:
        raise ValueError(f"unknown kind of chip {kind!r}; choose one of {', '.join(CHIPS)}")
    return CHIPS[kind]


def _own_bytes(job: Job, devices: int) -> float | None:
    """Return the bytes of a device on the mesh of the config; None where it has none of
    ``devices``, which is known where it does not say mesh.data."""
    try:
        layout = layout_of(job.config, devices if job.config.mesh.data < 0 else None)
        validate_batch(job.config, layout.rows)
        return job.bytes(layout)
    except ValueError:
        return None


def _note(job: Job, layout: Layout, own: float | None) -> str:
    """Return why it is ``layout``, the leanest, and that it may not fit."""
    why = (
        f"no mesh takes as little memory as the config's own, {size_of(own)} a device"
        if own
        else "the memory is not known, since the config's own mesh does not fit these devices"
    )
    return (
        f"; {why}, so this is the leanest, {size_of(job.bytes(layout))} a device; --kind=CHIP "
        "gives the limit"
    )


def _can_fill(job: Job, devices: int) -> bool:
    model = job.config.model
    # Sizes of axes divide these, so the number of devices divides their product.
    parts = model.num_layers * model.num_attention_heads * job.sequence * job.batch
    return parts * max(1, model.moe.num_moe_experts or 1) % devices == 0


def _is_allowed(job: Job, layout: Layout, devices: int) -> bool:
    # A run takes all devices of its processes, so a mesh that leaves some idle is none.
    # train.verify_every compares replicas along data; a run without them is refused.
    least = 2 if job.config.train.verify_every else 1
    return layout.devices == devices and layout.data >= least


def _best(job: Job, devices: int) -> Layout | None:
    if not _can_fill(job, devices):
        return None
    found = (each.layout for each in search(job, devices))
    return next((each for each in found if _is_allowed(job, each, devices)), None)


def _leanest(job: Job, devices: int) -> Layout | None:
    if not _can_fill(job, devices):
        return None
    found = (each for each in lean_layouts(job, devices) if _is_allowed(job, each, devices))
    return min(found, key=job.bytes, default=None)


def _that_would_do(job: Job, devices: int, node: int) -> list[int]:
    """Return some numbers of devices for which there is a mesh: of more nodes; where those would
    not do, of fewer devices in nodes of another size."""
    least = devices + 1
    if math.isfinite(job.room):
        # Memory decides: the first number that has enough of it may be far away.
        least = smallest_devices(job) or 0
        if not least:
            return []
    first = -(-max(least, devices + 1) // node)
    more = (number * node for number in range(first, first + TRIES))
    found = [number for number in more if _best(job, number)]
    fewer = range(devices - 1, max(0, devices - 1 - TRIES), -1)
    return found[:SHOWN] or [number for number in fewer if _best(job, number)][:SHOWN]


def line_of(config: Config, nodes: int, layout: Layout, note: str = "") -> tuple[str, str]:
    """Return ("NODES --set=...", what to tell a person) of the result of `replan`."""
    mesh = described(dict(zip(AXES, layout.sizes, strict=True)))
    told = (
        f"{nodes} nodes, {layout.devices:,} devices: {mesh}, zero {layout.zero}, micro-batches of "
        f"{layout.micro_batch_size}{note}"
    )
    return " ".join([str(nodes), *flags_of(config, layout)]), told

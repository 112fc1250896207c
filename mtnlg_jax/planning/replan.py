"""Choose the mesh of a run whose machines have become fewer: the fastest by the planner's estimate
that takes the same batch, on whole nodes."""

import dataclasses
import json
import math
from collections.abc import Iterable

from mtnlg_jax import storage
from mtnlg_jax.config import Config
from mtnlg_jax.hardware import CHIPS, Chip
from mtnlg_jax.parallel.mesh import AXES, described
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.layout import Layout
from mtnlg_jax.planning.search import flags_of, search

# Ranks meshes of devices whose kind is not known, such as those of a CPU; their memory is then not
# a limit, since what they had was enough.
NOMINAL = "H100"
# Of a run that has not begun, as launch/plan.py takes: GPT-2's, padded for any mesh.tensor.
VOCABULARY = 51200
FURTHER = 4  # times the devices that are there, up to which numbers that would do are looked for


def vocabulary_of(workdir: str | None) -> int | None:
    """Return the size of the vocabulary that the run in ``workdir`` has recorded, if any."""
    text = storage.read_file(workdir, "config.json") if workdir else None
    return json.loads(text)["model"]["vocab_size"] if text else None


def replan(config: Config, devices: int, node: int, kind: str | None) -> tuple[int, Layout]:
    """Return (nodes, layout): the most nodes of ``node`` devices each, of ``devices`` in all, that
    a mesh can fill, and the fastest one on them.

    ``kind`` is one of `hardware.CHIPS`, whose memory the run must fit; None: not known. Raise
    ValueError where no number of nodes has a mesh, with the numbers of devices that would do.
    """
    job = Job(config, chip_of(kind))
    for nodes in range(devices // node, 0, -1):
        if layout := _best(job, nodes * node):
            return nodes, layout
    numbers = ", ".join(f"{each:,}" for each in _that_would_do(job, devices, node))
    what = f"{kind} chips" if kind else "devices"
    raise ValueError(
        f"no mesh of {devices:,} {what} in nodes of {node:,} takes train.global_batch_size="
        f"{config.train.global_batch_size:,} of {config.name}: "
        + (
            f"{numbers} of them would do"
            if numbers
            else f"neither would up to {FURTHER * devices:,}; nodes of another size may"
        )
    )


def chip_of(kind: str | None) -> Chip:
    """Return the chip ``kind``, or one without a limit of memory."""
    if kind is None:
        return dataclasses.replace(CHIPS[NOMINAL], memory=math.inf)
    if kind not in CHIPS:
        raise ValueError(f"unknown kind of chip {kind!r}; choose one of {', '.join(CHIPS)}")
    return CHIPS[kind]


def _best(job: Job, devices: int) -> Layout | None:
    # A run takes all devices of its processes, so a mesh that leaves some idle is none.
    found = (each.layout for each in search(job, devices))
    return next((layout for layout in found if layout.devices == devices), None)


def _that_would_do(job: Job, devices: int, node: int) -> Iterable[int]:
    """Return some numbers of devices, in whole nodes, for which there is a mesh."""
    more = range(devices // node + 1, FURTHER * max(1, devices // node) + 1)
    found = [nodes * node for nodes in more if _best(job, nodes * node)]
    return found[:4]


def line_of(config: Config, nodes: int, layout: Layout) -> tuple[str, str]:
    """Return ("NODES --set=...", what to tell a person) of the result of `replan`."""
    mesh = described(dict(zip(AXES, layout.sizes, strict=True)))
    told = (
        f"{nodes} nodes, {layout.devices:,} devices: {mesh}, zero {layout.zero}, micro-batches of "
        f"{layout.micro_batch_size}"
    )
    return " ".join([str(nodes), *flags_of(config, layout)]), told

"""A layout: the settings of a config that the planner chooses."""

import math
from typing import NamedTuple

from mtnlg_jax.config import Config
from mtnlg_jax.parallel.mesh import mesh_shape, row_shards


class Policy(NamedTuple):
    """Cost of a value of train.recompute."""

    kept: float  # bytes in units of s b h that a layer keeps in bf16 for the backward pass
    again: tuple[str, ...]  # products computed a second time
    # Collectives over tensor in a layer and micro-batch, forward and backward. Each moves s b h
    # once; the gathers before products are always repeated.
    collectives: int


# For each of model.transformer.RECOMPUTE, most memory first. The backward pass needs no second fc2.
POLICIES = {
    "none": Policy(32, (), 10),
    "elementwise": Policy(20, (), 10),
    "mlp": Policy(12, ("fc1",), 10),
    "projections": Policy(6, ("qkv", "fc1"), 10),
    "full": Policy(2, ("qkv", "scores", "out", "fc1"), 11),
}


class Layout(NamedTuple):
    pipe: int
    data: int
    context: int
    tensor: int
    zero: int
    schedule: str
    virtual_pipe: int
    flush: int | None
    micro_batch_size: int
    recompute: str
    expert: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def mesh(self) -> tuple[int, int, int, int]:
        return self[:4]

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes of parallel.mesh.AXES."""
        return self.pipe, self.data, self.expert, self.context, self.tensor

    @property
    def rows(self) -> int:
        """Parts into which rows are split."""
        return self.data * self.expert


def layout_of(config: Config, devices: int | None = None) -> Layout:
    """Return the layout that ``config`` sets. Without ``devices`` its mesh.data must be known.
    Raises ValueError if the mesh does not multiply to ``devices``."""
    mesh = config.mesh
    train = config.train
    data = mesh.data if devices is None else mesh_shape(mesh, devices)["data"]
    rows = row_shards({"data": data, "expert": mesh.expert})
    micro = train.micro_batch_size or train.global_batch_size // rows
    return Layout(
        mesh.pipe,
        data,
        mesh.context,
        mesh.tensor,
        mesh.zero,
        mesh.schedule,
        mesh.virtual_pipe,
        mesh.flush,
        micro,
        train.recompute,
        mesh.expert,
    )

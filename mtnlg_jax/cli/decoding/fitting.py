"""--memory: tell that a model does not fit before it is loaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from mtnlg_jax import command

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mtnlg_jax.decode.memory import Choices, Plan

with command.flag_group("Memory"):
    MEMORY = flags.DEFINE_float(
        "memory",
        None,
        "GiB that weights and cache may take of each device; a model that needs more is refused "
        "before it is loaded; default: what is free; 0: load it all the same",
        lower_bound=0,
    )


def check(
    name: str, plans: "Sequence[Plan]", choices: "Choices", mesh: "Mesh | None" = None
) -> None:
    """Raise ValueError if the models ``plans`` do not fit the devices of ``mesh`` together.

    All processes of a mesh must call this together.
    """
    from mtnlg_jax.decode.memory import check_fits
    from mtnlg_jax.hardware import GIB
    from mtnlg_jax.parallel.memory import room

    if MEMORY.value == 0:
        return
    free = room(mesh)
    if free is not None and MEMORY.value is not None:
        free = free._replace(bytes=int(MEMORY.value * GIB))
    if free is not None:
        check_fits(name, plans, free, choices, "or load it all the same with --memory=0")

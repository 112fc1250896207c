"""Optional parts of the training state, which a config has or has not.

A checkpoint may lack a part that the config wants, and have one that it does not want: a resume can
turn each on and off.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from flax import nnx

from mtnlg_jax.config import Config
from mtnlg_jax.train import averages, spike_rule


class Part(NamedTuple):
    """How a part of `state.TrainState.extras` is made."""

    wanted: Callable[[Config], bool]
    # From the config and the trained parameters, which may be traced. Its arrays are named with
    # their dims, as parameters are.
    new: Callable[[Config, nnx.State], Any]


PARTS: dict[str, Part] = {
    averages.KEY: Part(averages.wanted, averages.new),
    spike_rule.KEY: Part(spike_rule.wanted, spike_rule.new),
}


def new(config: Config, trained: nnx.State) -> dict[str, Any]:
    """Return the parts that ``config`` wants, by name, as before the first step."""
    return {name: part.new(config, trained) for name, part in PARTS.items() if part.wanted(config)}


def part_of(name: str) -> str | None:
    """Return the part to which the array ``name`` of a checkpoint belongs; None for all others."""
    section, _, rest = name.partition(".")
    return rest.partition(".")[0] if section == "extras" else None


def lacking(wanted: Collection[str], saved: Collection[str]) -> set[str]:
    """Return the parts of the arrays ``wanted`` that are not whole among those ``saved``."""
    return {part for name in wanted if name not in saved and (part := part_of(name)) is not None}
